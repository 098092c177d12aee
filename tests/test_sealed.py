"""Sealed files: nothing that was not written here, under this name, by this user, comes back."""

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine import sealed
from engine.files import PARTIAL
from engine.sealed import read_sealed, write_sealed
from refocus.errors import SettingsError

CONTENT = b'{"label": 1}\n' + bytes(range(64))

posix = pytest.mark.skipif(sys.platform == "win32", reason="a mode means nothing on Windows")


@pytest.fixture(autouse=True)
def own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user without a key; returns where it will lie."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return tmp_path / "data/refocus/plan.key"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "plans/one.plan"
    write_sealed(path, CONTENT)
    return path


def test_what_was_written_comes_back(file: Path) -> None:
    assert read_sealed(file) == CONTENT
    write_sealed(file, b"")
    assert read_sealed(file) == b""
    assert read_sealed(file.with_name("another.plan")) is None
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_no_bit_may_differ(file: Path) -> None:
    whole = file.read_bytes()
    for k in range(len(whole)):
        for bit in (0, 7):
            damaged = bytearray(whole)
            damaged[k] ^= 1 << bit
            file.write_bytes(damaged)
            assert read_sealed(file) is None
    file.write_bytes(whole)
    assert read_sealed(file) == CONTENT


def test_no_byte_may_lack_or_be_added(file: Path) -> None:
    whole = file.read_bytes()
    for k in range(len(whole)):
        file.write_bytes(whole[:k])
        assert read_sealed(file) is None
    for more in (whole + b"\0", b"\0" + whole, whole + whole, CONTENT):
        file.write_bytes(more)
        assert read_sealed(file) is None


def test_a_renamed_file_is_not_that_file(file: Path) -> None:
    assert read_sealed(file.rename(file.with_name("two.plan"))) is None


def test_a_file_of_another_key_is_foreign(file: Path, own_data: Path) -> None:
    own_data.unlink()
    assert read_sealed(file) is None
    write_sealed(file, CONTENT)
    assert read_sealed(file) == CONTENT


def test_the_key_is_ours_alone_and_stays(file: Path, own_data: Path) -> None:
    key = own_data.read_bytes()
    assert len(key) == 32
    assert key not in file.read_bytes()
    write_sealed(file, b"more")
    assert own_data.read_bytes() == key
    if sys.platform != "win32":
        assert stat.S_IMODE(own_data.stat().st_mode) == 0o600
        assert stat.S_IMODE(own_data.parent.stat().st_mode) == 0o700
        assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert [path.name for path in own_data.parent.iterdir()] == [own_data.name]


@posix
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o610, 0o620, 0o666])
def test_a_key_that_others_may_touch_is_refused(file: Path, own_data: Path, mode: int) -> None:
    own_data.chmod(mode)
    for act in (lambda: read_sealed(file), lambda: write_sealed(file, CONTENT)):
        with pytest.raises(SettingsError, match=f"mode {mode:04o}: others may .* remove it"):
            act()


@posix
def test_a_key_of_another_user_is_refused(
    file: Path, monkeypatch: pytest.MonkeyPatch, own_data: Path
) -> None:
    if os.geteuid() == 0:
        os.chown(own_data, 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(SettingsError, match="it is of user "):
        read_sealed(file)


@posix
def test_a_key_that_is_a_link_is_refused(file: Path, own_data: Path) -> None:
    own_data.rename(own_data.with_name("elsewhere"))
    own_data.symlink_to("elsewhere")
    with pytest.raises(SettingsError, match="cannot be made or read"):
        read_sealed(file)


@pytest.mark.parametrize("nbytes", [0, 31, 33])
def test_a_key_of_another_length_is_refused(file: Path, own_data: Path, nbytes: int) -> None:
    own_data.write_bytes(b"k" * nbytes)
    with pytest.raises(SettingsError, match=f"has {nbytes} bytes, wanted 32; remove it"):
        read_sealed(file)


def test_no_place_for_a_key_is_said(file: Path, own_data: Path) -> None:
    own_data.unlink()
    own_data.parent.rmdir()
    own_data.parent.write_bytes(b"a file where a folder is wanted")
    with pytest.raises(SettingsError, match="cannot be made or read"):
        read_sealed(file)


def test_the_slower_of_two_takes_the_key_of_the_faster(
    tmp_path: Path, own_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process makes the key while ours is written, before it is put in place."""
    write, other = sealed.write_partial, b"o" * 32

    def meanwhile(path: Path, content: bytes) -> Path:
        partial = write(path, content)
        if path == own_data:
            own_data.write_bytes(other)
            own_data.chmod(0o600)
        return partial

    monkeypatch.setattr(sealed, "write_partial", meanwhile)
    write_sealed(tmp_path / "one.plan", CONTENT)
    assert own_data.read_bytes() == other
    assert read_sealed(tmp_path / "one.plan") == CONTENT
    assert [path.name for path in own_data.parent.iterdir()] == [own_data.name]


WRITER = """
import sys
from pathlib import Path
from engine.sealed import write_sealed
sys.stdout.write("ready")
sys.stdout.flush()
sys.stdin.read()
for path in sys.argv[1:]:
    write_sealed(Path(path), b"content of " + path.encode())
"""


def start(*arguments: str, script: str = WRITER) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[1],
    )


@pytest.fixture
def writers(tmp_path: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes that are about to write the same file and one of their own, without a key yet."""
    shared = str(tmp_path / "shared.plan")
    started = [start(shared, str(tmp_path / f"{k}.plan")) for k in range(6)]
    yield started
    for process in started:
        with process:
            process.kill()


def test_processes_that_start_at_once_have_one_key(
    tmp_path: Path, writers: list[subprocess.Popen[bytes]]
) -> None:
    for process in writers:
        assert process.stdout is not None
        assert process.stdout.read(5) == b"ready"
    for process in writers:
        assert process.stdin is not None
        process.stdin.close()
    assert [process.wait() for process in writers] == [0] * len(writers)
    for path in tmp_path.glob("*.plan"):
        assert read_sealed(path) == b"content of " + str(path).encode()
    assert len(list(tmp_path.glob("*.plan"))) == len(writers) + 1
    assert not list(tmp_path.rglob(f"*{PARTIAL}"))


KILLED = """
import os, signal, sys, tempfile
from pathlib import Path
from engine import sealed
calls, last = 0, int(sys.argv[2])
def kill_at_last(function):
    def counted(*arguments, **how):
        global calls
        calls += 1
        if calls == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **how)
    return counted
for name in ("replace", "unlink", "hardlink_to"):
    setattr(Path, name, kill_at_last(getattr(Path, name)))
os.fsync = kill_at_last(os.fsync)
tempfile.mkstemp = kill_at_last(tempfile.mkstemp)
sealed.write_sealed(Path(sys.argv[1]), b"new")
print("whole")
"""


@posix
def test_killed_at_any_step_leaves_the_old_or_the_new(file: Path, own_data: Path) -> None:
    """Also while the key is made: it is whole or not there."""
    seen = []
    for last in range(1, 20):
        write_sealed(file, b"old")
        own_data.unlink()
        process = start(str(file), str(last), script=KILLED)
        said, _ = process.communicate()
        if said:
            assert process.returncode == 0
            break
        assert process.returncode == -signal.SIGKILL
        assert not own_data.exists() or len(own_data.read_bytes()) == 32
        seen.append(read_sealed(file))  # the old one is of a key that is gone
        write_sealed(file, CONTENT)
        assert read_sealed(file) == CONTENT
    assert len(seen) == 9
    assert set(seen) == {None, b"new"}


def test_a_write_that_fails_leaves_nothing(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_sealed(file, b"new")
    monkeypatch.undo()
    assert [path.name for path in file.parent.iterdir()] == [file.name]
