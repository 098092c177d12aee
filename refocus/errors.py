"""Everything that Refocus raises on purpose, in one tree.

RefocusError
├── SettingsError      a setting or argument is wrong               (exit 2)
├── RunError           a run on disk cannot be made, opened or read (exit 1)
│   ├── StuckError     a thread of Micro-Manager's never ends: leave by os._exit
│   ├── DiskError      the disk is, or would be, too full for the run (exit 3)
│   └── LockedError    the run has another writer                    (exit 4)
├── PackageError       a model package is missing, altered or unfit (exit 2)
├── WireError          a message between link and worker is malformed
├── RefusedError       a recorder will not have this worker now     (exit 5, of a worker only)
├── RejectedError      this plane is not ours to refocus: the reason is its text
└── EngineError        the runtime failed on a plane, or answered rubbish

A message says what was got, what was wanted, and what to do. None of these ever passes
through a Micro-Manager hook: there an exception would abort the user's experiment.
"""


class RefocusError(Exception):
    """Root of all errors that Refocus raises on purpose."""

    exit_code = 1


class SettingsError(RefocusError):
    """A setting or a command-line argument cannot be used."""

    exit_code = 2


class RunError(RefocusError):
    """A run on disk cannot be made, opened or read."""


class StuckError(RunError):
    """A thread of Micro-Manager's hangs. Python waits for it for ever: leave with os._exit."""


class DiskError(RunError):
    """The disk has no room for the run, or came down to the reserve while it was written."""

    exit_code = 3


class LockedError(RunError):
    """Another process writes this run."""

    exit_code = 4


class PackageError(RefocusError):
    """A model package is missing, altered, too new or unfit."""

    exit_code = 2


class WireError(RefocusError):
    """A message between link and worker is malformed. The peer is dropped, nothing else."""


class RefusedError(RefocusError):
    """The recorder will not have this worker, or is not there: later it may be otherwise."""

    exit_code = 5


class RejectedError(RefocusError):
    """This plane must not be refocused; the text is the reason that the journal keeps."""


class EngineError(RefocusError):
    """The runtime failed on a plane, or its answer did not pass the checks."""
