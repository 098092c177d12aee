"""However a run ends: its threads end, its files are closed, its lock is given back."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

from store.reader import State, open_run

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
