"""Key sets: what goes where, who may read it, and that nothing is ever written over."""

import os
import stat
from pathlib import Path

import pytest

from refocus import keys
from refocus.cli.main import main
from refocus.errors import SettingsError

POSIX = pytest.mark.skipif(os.name != "posix", reason="modes of POSIX")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    keys.new(tmp_path / "keys")
    return tmp_path / "keys"


def test_a_worker_and_its_recorder_get_keys_that_fit(folder: Path) -> None:
    worker = keys.read_worker(keys.add(folder, "gpu-pc"))
    assert worker.name == "gpu-pc"
    assert worker.recorder == keys.read_recorder(folder).public
    assert keys.allowed(folder) == {worker.public: "gpu-pc"}


@POSIX
def test_secrets_are_their_owner_s_alone_from_the_first_moment(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        keys.new(tmp_path / "keys")
        keys.add(tmp_path / "keys", "gpu-pc")
    finally:
        os.umask(before)
    found = [path for path in (tmp_path / "keys").rglob("*") if path.is_file()]
    assert len(found) == 3
    assert {stat.S_IMODE(path.stat().st_mode) for path in found} == {0o600}
    assert stat.S_IMODE((tmp_path / "keys").stat().st_mode) == 0o700


def test_a_worker_s_file_holds_no_secret_but_its_own(folder: Path) -> None:
    mine, other = keys.add(folder, "mine"), keys.add(folder, "other")
    secrets = keys.read_recorder(folder).secret, keys.read_worker(other).secret
    assert not any(secret in mine.read_text() for secret in secrets)
    public = "".join(path.read_text() for path in (folder / "workers").iterdir())
    assert keys.read_worker(mine).secret not in public


def test_secrets_do_not_show_when_a_key_is_printed(folder: Path) -> None:
    recorder = keys.read_recorder(folder)
    worker = keys.read_worker(keys.add(folder, "gpu-pc"))
    assert recorder.secret not in repr(recorder)
    assert worker.secret not in repr(worker)


def test_nothing_is_written_over(folder: Path) -> None:
    handed_over = keys.add(folder, "gpu-pc")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(SettingsError, match="never written over"):
        keys.new(folder)
    with pytest.raises(SettingsError, match="refocus keys remove"):
        keys.add(folder, "gpu-pc")
    handed_over.unlink()  # moved to its host
    with pytest.raises(SettingsError, match="refocus keys remove"):
        keys.add(folder, "gpu-pc")
    assert keys.read_recorder(folder)
    assert all(path.read_bytes() == before[path] for path in before if path.exists())


def test_a_right_that_was_taken_away_can_be_given_anew(folder: Path) -> None:
    old = keys.read_worker(keys.add(folder, "gpu-pc"))
    keys.add(folder, "other")
    keys.remove(folder, "gpu-pc")
    assert set(keys.allowed(folder).values()) == {"other"}
    new = keys.read_worker(keys.add(folder, "gpu-pc"))
    assert new.public != old.public
    assert old.public not in keys.allowed(folder)


@pytest.mark.parametrize("name", ["", "../recorder", "a b", "-x", "a" * 65])
def test_a_name_cannot_leave_the_folder(folder: Path, name: str) -> None:
    with pytest.raises(SettingsError, match="must match"):
        keys.add(folder, name)
    with pytest.raises(SettingsError, match="knows no worker"):
        keys.remove(folder, name)


@POSIX
def test_a_wrong_name_among_several_makes_nothing(tmp_path: Path) -> None:
    assert main(["keys", "new", str(tmp_path / "set"), "gpu-pc", "two words"]) == 2
    assert not (tmp_path / "set").exists()


def test_a_secret_that_others_can_read_is_refused(folder: Path) -> None:
    handed_over = keys.add(folder, "gpu-pc")
    handed_over.chmod(0o640)
    (folder / "recorder.key").chmod(0o604)
    with pytest.raises(SettingsError, match=r"mode 0640.*chmod 600"):
        keys.read_worker(handed_over)
    with pytest.raises(SettingsError, match="mode 0604"):
        keys.read_recorder(folder)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("secret = '", "secret = 'x", "damaged"),
        ("public", "pubic", "it should say"),
        ("'", "", "damaged"),
        ("name", "\xff", "damaged"),
    ],
)
def test_a_damaged_key_is_refused(folder: Path, old: str, new: str, words: str) -> None:
    path = keys.add(folder, "gpu-pc")
    path.write_bytes(path.read_text().replace(old, new).encode("latin-1"))
    with pytest.raises(SettingsError, match=words):
        keys.read_worker(path)


def test_halves_that_do_not_belong_together_are_refused(folder: Path) -> None:
    path, other = keys.add(folder, "gpu-pc"), keys.read_worker(keys.add(folder, "other"))
    key = keys.read_worker(path)
    for wrong in (other.public, "~" * 40):
        text = path.read_text().replace(key.secret, wrong)
        path.write_text(text)
        with pytest.raises(SettingsError, match="do not belong together"):
            keys.read_worker(path)
        path.write_text(text.replace(wrong, key.secret))
    assert keys.read_worker(path) == key


def test_a_damaged_public_key_lets_nobody_in(folder: Path) -> None:
    good = keys.read_worker(keys.add(folder, "good"))
    keys.add(folder, "bad")
    (folder / "workers" / "bad.pub").write_text("public = 'short'")
    (folder / "workers" / "empty.pub").touch()
    assert keys.allowed(folder) == {good.public: "good"}


def test_what_is_missing_is_said_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="refocus keys new"):
        keys.read_recorder(tmp_path)
    with pytest.raises(SettingsError, match="refocus keys new"):
        keys.add(tmp_path, "gpu-pc")
    with pytest.raises(SettingsError, match="refocus keys add"):
        keys.read_worker(tmp_path / "worker.key")
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match="no key set can be made"):
        keys.new(tmp_path / "file" / "keys")


def test_what_the_system_does_not_let_us_read_is_said(folder: Path) -> None:
    too_long = folder / ("a" * 300)  # the system refuses even to look
    for read in (keys.read_recorder, keys.read_worker):
        with pytest.raises(SettingsError, match="cannot be read"):
            read(too_long)
    keys.add(folder, "gpu-pc")
    workers = folder / "workers"
    workers.rename(folder / "moved")
    assert keys.allowed(folder) == {}
    workers.touch()
    with pytest.raises(NotADirectoryError):
        keys.allowed(folder)
    assert main(["keys", "list", str(folder)]) == 2


def test_the_commands_from_the_first_key_to_the_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(tmp_path / "keys")

    def said(*words: str, code: int = 0) -> str:
        assert main(["keys", *words]) == code
        out, err = capsys.readouterr()
        return out + err

    assert "worker-gpu-pc.key to its computer" in said("new", folder, "gpu-pc")
    assert "may connect now" in said("add", folder, "second")
    assert "never written over" in said("new", folder, code=2)
    (tmp_path / "keys" / "worker-second.key").unlink()
    listed = said("list", folder).splitlines()
    assert listed[0].startswith("gpu-pc  (its secret is still here")
    assert listed[1] == "second"
    assert "may not connect" in said("remove", folder, "second")
    assert "it lets in gpu-pc" in said("remove", folder, "second", code=2)
    said("remove", folder, "gpu-pc")
    assert "nobody is let in" in said("list", folder)
