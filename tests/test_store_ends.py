"""However a run ends: its threads end, its files are closed, its lock is given back."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
from faulty_os import Child, Say, needs_fork
from store_runs import frame, pixels, start

from refocus.errors import RunError
from refocus.frame import RefocusOutcome
from store import disk, durable, shards
from store.reader import State, open_run
from store.records import Kind
from store.recover import recover
from store.writer import Provenance, RunWriter

REPOSITORY = Path(__file__).parents[1]


def run_script(script: str, *args: object) -> None:
    """Do *script* in a process of its own; it can import what a test can."""
    paths = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, args)],
        env=os.environ | {"PYTHONPATH": paths},
        check=True,
        timeout=60,
    )


def test_a_run_goes_on_when_the_main_thread_has_ended(tmp_path: Path) -> None:
    run_script(
        """
        import sys, threading
        from pathlib import Path
        from store_runs import frame, start

        def record():
            run = start(Path(sys.argv[1]))
            run.write_raw(frame(0, {"time": 0}), {})
            threading.main_thread().join()
            run.write_raw(frame(1, {"time": 1}), {})
            run.close(complete=True, expected_frames=2)

        threading.Thread(target=record).start()
        """,
        tmp_path / "run",
    )
    found = open_run(tmp_path / "run")
    assert found.state == State.COMPLETE
    assert found.counts.saved == 2


def test_a_run_that_nobody_closes_keeps_no_program_from_ending(tmp_path: Path) -> None:
    run_script(
        """
        import sys
        from pathlib import Path
        from store_runs import frame, start
        run = start(Path(sys.argv[1]))
        run.write_raw(frame(0, {"time": 0}), {})
        """,
        tmp_path / "run",
    )
    found = open_run(tmp_path / "run")
    assert found.state == State.INCOMPLETE
    assert found.counts.saved == 1


def test_errors_of_closing_files_leave_no_thread_and_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network share over its quota says so when a file is closed."""
    path = tmp_path / "run"
    run = start(path)
    for seq in range(3):
        run.write_raw(frame(seq, {"position": seq}), {})
    with monkeypatch.context() as full:
        full.setattr(disk, "close", close_and_complain)
        with pytest.raises(RunError, match=r"not sealed .*quota"):
            run.close(complete=True, expected_frames=3)
    assert not [t for t in threading.enumerate() if t.name.startswith("refocus")]
    assert open_run(path).notes.seal is None
    recover(path)
    assert open_run(path).counts.saved == 3


def test_a_file_that_cannot_be_closed_costs_no_plane_but_nothing_is_durable_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "MAX_OPEN", 2)
    run = start(tmp_path / "run")
    with monkeypatch.context() as full:
        full.setattr(disk, "close", close_and_complain)
        for seq in range(4):
            run.write_raw(frame(seq, {"position": seq}), {})
    assert "quota" in run.sync_trouble
    with pytest.raises(RunError, match=r"not sealed .*may not be on the disk: .*quota"):
        run.close(complete=True, expected_frames=4)
    assert open_run(tmp_path / "run").counts.saved == 4


def close_and_complain(descriptor: int) -> None:
    os.close(descriptor)
    raise OSError(errno.EDQUOT, "quota exceeded")


def test_ctrl_c_while_a_plane_is_waited_for_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(tmp_path / "run")
    pending = run.put_raw(frame(0, {"time": 0}), {})
    with monkeypatch.context() as waiting:
        waiting.setattr(pending.put.done, "result", press_ctrl_c)
        with pytest.raises(KeyboardInterrupt):
            run.settle()
    counts = run.close(complete=True, expected_frames=1)
    assert (counts.saved, counts.failed) == (1, 0)
    assert open_run(tmp_path / "run").state == State.COMPLETE


def test_ctrl_c_while_a_run_is_closed_leaves_no_thread_and_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(tmp_path / "run")
    run.write_raw(frame(0, {"time": 0}), {})
    pending = run.put_raw(frame(1, {"time": 1}), {})
    monkeypatch.setattr(pending.put.done, "result", press_ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        run.close(complete=True, expected_frames=2)
    assert not [t for t in threading.enumerate() if t.name.startswith("refocus")]
    assert open_run(tmp_path / "run").state == State.INCOMPLETE
    recover(tmp_path / "run")


def press_ctrl_c() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("fails", [False, True], ids=["sealed", "not sealed"])
def test_a_run_is_closed_once_and_takes_nothing_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    run = start(tmp_path / "run")
    run.write_raw(frame(0, {"time": 0}), {})
    with contextlib.ExitStack() as failing:
        if fails:
            disk_full = failing.enter_context(monkeypatch.context())
            disk_full.setattr(disk, "replace_file", refuse)
            failing.enter_context(pytest.raises(RunError, match="not sealed"))
        run.close(complete=True, expected_frames=1)
    for again in (
        lambda: run.close(complete=True, expected_frames=1),
        lambda: run.reseal(),
        lambda: run.write_raw(frame(1, {"time": 1}), {}),
        lambda: run.write_refocused(0, pixels(0), Provenance(generator=0, latency_ns=1)),
        lambda: run.book_raw_failed(1, "no pixels"),
        lambda: run.book_refocus(0, RefocusOutcome.SKIPPED, "no engine"),
    ):
        with pytest.raises(RunError, match="was closed already"):
            again()
    assert open_run(tmp_path / "run").counts.saved == 1


def refuse(path: Path, content: bytes) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def test_a_run_that_was_moved_while_it_is_written_is_not_called_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durable, "PAUSE_S", 3600)
    run = start(tmp_path / "run")
    run.write_raw(frame(0, {"time": 0}), {})
    (tmp_path / "run").rename(tmp_path / "moved")
    with pytest.raises(OSError, match="may not be on the disk"):
        run._durability.sync()
    assert "frames.jsonl" in run.sync_trouble
    with pytest.raises(RunError, match="not sealed"):
        run.close(complete=True, expected_frames=1)
    found = open_run(tmp_path / "moved")
    assert found.counts.saved == 1
    assert not any(found.is_durable(record) for record in found.records(Kind.RAW))


@needs_fork
def test_a_forked_child_that_lives_on_keeps_no_lock(tmp_path: Path) -> None:
    """As multiprocessing forks one beside a run, on Linux."""

    def live_on(say: Say) -> None:
        say("forked")
        signal.pause()

    run = start(tmp_path / "run")
    run.write_raw(frame(0, {"time": 0}), {})
    child = Child(live_on)
    try:
        assert next(child.lines) == "forked"
        assert open_run(tmp_path / "run").state == State.LIVE
        run.close(complete=True, expected_frames=1)
        assert open_run(tmp_path / "run").state == State.COMPLETE
        RunWriter.reopen(tmp_path / "run").reseal()
    finally:
        child.kill()
        child.end()


def test_the_folders_made_for_a_run_are_durable_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(disk, "sync", synced.append)
    run = start(tmp_path / "2026" / "11-20" / "run")
    run.close(complete=True, expected_frames=0)
    made_in = {tmp_path, tmp_path / "2026", tmp_path / "2026" / "11-20"}
    assert made_in <= set(synced)
