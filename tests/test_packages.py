"""The packages that an installed Refocus imports are ours."""

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
ROOMS = ("refocus", "acquire", "store", "engine", "calibration")


@pytest.mark.parametrize("room", ROOMS)
def test_no_other_installed_package_shadows_ours(room: str, tmp_path: Path) -> None:
    """The wheel acquire-imaging, for one, brings a package `acquire` of its own."""
    command = [sys.executable, "-P", "-c", f"import {room}; print({room}.__file__)"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    found = done.stdout.strip()
    if not found.startswith(str(REPOSITORY)):
        pytest.fail(
            f"package {room!r} comes from {found or done.stderr.strip()[-200:]}, wanted "
            f"{REPOSITORY / room}: uninstall the other package, or install Refocus "
            "(pip install -e .) into an environment of its own",
            pytrace=False,
        )


def test_the_wheel_holds_the_rooms_and_nothing_else() -> None:
    """Every room on disk is packed; tests, docs and benchmarks are not."""
    import tomllib

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    packed = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert sorted(packed) == sorted(ROOMS)
    for room in ROOMS:
        assert (REPOSITORY / room / "py.typed").exists()
        assert (REPOSITORY / room / "__init__.py").exists()
