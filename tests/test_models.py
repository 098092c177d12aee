"""Which generators are on this computer, and which is the current one."""

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from acquire.fill import fill
from engine import install, model_store, package
from engine.package import Package
from refocus.cli.main import main
from refocus.errors import PackageError
from store.reader import open_run
from tests import identity_package
from tests.damaged_store import flip_a_bit, go_away
from tests.recording import plane, recorder, shoot
from tests.recording import settings as recording_settings
from tests.unfilled import make_run, outcomes, settings, skipped, times


@pytest.fixture(autouse=True)
def own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has a computer on which nothing was chosen yet."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return model_store.store_folder()


def current() -> str:
    return package.load(model_store.find("current")).manifest.name


def test_where_none_was_chosen_the_current_one_ships(own_store: Path) -> None:
    assert model_store.find("current") == package.SHIPPED / "fluorescence"
    assert current() == "fluorescence"
    assert not own_store.exists(), "looking changes nothing"


def test_a_generator_is_found_by_its_name_or_its_folder(
    negated: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(package, "SHIPPED", negated.folder.parent)
    assert model_store.find("negated") == model_store.find(negated.folder) == negated.folder
    with pytest.raises(PackageError, match=r"'negatted'.*one of negated"):
        model_store.find("negatted")


def test_a_folder_is_installed_and_what_happens_to_it_later_harms_nobody(
    negated: Package, own_store: Path
) -> None:
    used = model_store.use(negated.folder)
    shutil.rmtree(negated.folder)
    found = package.load(model_store.find("current"))
    assert found.hash == used.hash == negated.hash
    assert found.folder == own_store / f"negated-0-{negated.hash[:12]}"
    assert model_store.find("negated") == model_store.find(found.folder.name) == found.folder
    assert model_store.find_by_hash(negated.hash) == [found.folder]
    left = {path.name for path in own_store.iterdir()}
    assert left == {"current.json", "current.lock", found.folder.name}


def test_rollback_goes_back_step_by_step(negated: Package, tmp_path: Path) -> None:
    identity = identity_package.make(tmp_path / "identity")
    for one in (negated.folder, identity.folder, identity.folder, "fluorescence", "negated"):
        model_store.use(one)
    seen = [current()]
    for _ in range(4):
        model_store.rollback()
        seen.append(current())
    assert seen == ["negated", "fluorescence", "identity", "negated", "fluorescence"]
    with pytest.raises(PackageError, match="nothing to go back to"):
        model_store.rollback()


def test_every_change_can_be_seen_without_reading(negated: Package) -> None:
    stamps = [model_store.stamp()]
    changes: list[Callable[[], Package]] = [
        lambda: model_store.use(negated.folder),
        lambda: model_store.use("fluorescence"),
        model_store.rollback,
        lambda: model_store.use("negated"),  # it is the current one already
    ]
    for change in changes:
        change()
        stamps.append(model_store.stamp())
    assert len(set(stamps)) == 5
    model_store.rollback()
    assert current() == "fluorescence", "it was chosen once"


def test_a_package_that_is_not_sound_is_not_chosen(negated: Package, own_store: Path) -> None:
    with (negated.folder / "generator.onnx").open("ab") as file:
        file.write(b"!")
    with pytest.raises(PackageError, match="altered"):
        model_store.use(negated.folder)
    with pytest.raises(PackageError, match="fluorescence"):
        model_store.use("no such")
    assert not own_store.exists()


def test_a_damaged_copy_is_made_again(negated: Package) -> None:
    installed = model_store.use(negated.folder).folder
    (installed / "weights.safetensors").write_bytes(b"damaged")
    with pytest.raises(PackageError, match="altered"):
        model_store.use("negated")
    assert model_store.use(negated.folder).folder == installed
    assert package.load(installed).hash == negated.hash


def test_a_store_that_cannot_be_written_is_a_plain_error(
    negated: Package, own_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own_store.parent.mkdir(parents=True)
    own_store.write_text("a file where a folder must be")
    assert main(["models", "use", str(negated.folder)]) == 2
    assert str(own_store) in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"[]", b'{"format": 2}', b'{"chosen": ["gone-0-123"]}', b'{"x": 1}'),
        b'{"chosen": ["fluor\xf3scence"]}',
        b'{"chosen": ' + b"[" * 100_000,
    ],
    ids=lambda content: content[:24].decode("latin1"),
)
def test_a_damaged_pointer_is_a_plain_error_and_can_be_set_again(
    negated: Package, own_store: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    model_store.use(negated.folder)
    (own_store / "current.json").write_bytes(content)
    with pytest.raises(PackageError, match="refocus models use"):
        model_store.find("current")
    assert main(["models", "list"]) == 1
    assert "refocus models use" in capsys.readouterr().out
    assert main(["models", "use", "negated"]) == 0
    assert current() == "negated"


@pytest.mark.parametrize("nested", [False, True])
def test_a_damaged_manifest_is_a_plain_error_and_the_copy_can_be_made_again(
    negated: Package, capsys: pytest.CaptureFixture[str], nested: bool
) -> None:
    manifest = model_store.use(negated.folder).folder / package.MANIFEST
    flip_a_bit(manifest, b"negated")
    if nested:
        manifest.write_bytes(b'{"format": 1, "training": {"notes": ' + b"[" * 100_000)
    with pytest.raises(PackageError, match="damaged"):
        package.load(model_store.find("current"))
    assert main(["models", "list"]) == 1
    (marked,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("*"))
    assert "negated" in marked
    assert "is damaged" in marked
    assert main(["models", "use", str(negated.folder)]) == 0
    assert package.load(model_store.find("current")).hash == negated.hash


def test_a_store_that_cannot_be_listed_is_a_plain_error(
    negated: Package, own_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_store.use(negated.folder)
    go_away(monkeypatch, own_store)
    with pytest.raises(PackageError, match=f"cannot be listed.*{os.strerror(errno.ESTALE)}"):
        model_store.find("negated")
    assert main(["models", "list"]) == 2


def test_two_installed_ones_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    narrow = identity_package.make(tmp_path / "a", name="mine", pixel_um=(0.1, 0.2))
    wide = identity_package.make(tmp_path / "b", name="mine")
    installed = [model_store.use(one.folder) for one in (narrow, wide)]
    with pytest.raises(PackageError, match=installed[0].folder.name):
        model_store.find("mine")
    assert package.load(model_store.find(installed[0].folder.name)).hash == narrow.hash


def test_several_choose_at_once(
    tmp_path: Path, own_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = model_store._write_pointer

    def slowly(chosen: tuple[str, ...]) -> None:  # each has read before the next one has written
        time.sleep(0.02)
        write(chosen)

    monkeypatch.setattr(model_store, "_write_pointer", slowly)
    made = [identity_package.make(tmp_path / f"{k}", name=f"own-{k}") for k in range(4)]
    with ThreadPoolExecutor(8) as threads:
        used = list(threads.map(model_store.use, [one.folder for one in [*made, *made]]))
    folders = {found.folder for found in used}
    assert {package.load(folder).hash for folder in folders} == {one.hash for one in made}
    chosen = json.loads((own_store / "current.json").read_bytes())["chosen"]
    assert set(chosen) == {folder.name for folder in folders}, "no choice was lost"
    assert not [path for path in own_store.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("before", ["absent", "damaged"])
def test_who_installs_at_the_same_time_finds_the_copy_of_the_first(
    negated: Package, monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    if before == "damaged":
        (model_store.use(negated.folder).folder / "weights.safetensors").write_bytes(b"damaged")
    copy, others = install._copy_durably, []

    def meanwhile(source: Path, target: Path) -> None:
        copy(source, target)
        if not others:
            others.append(None)
            others.append((model_store.use(negated.folder).folder / "generator.onnx").stat())

    monkeypatch.setattr(install, "_copy_durably", meanwhile)
    found = model_store.use(negated.folder)
    assert package.load(model_store.find("current")).folder == found.folder
    assert (found.folder / "generator.onnx").stat().st_ino == others[1].st_ino


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_a_use_that_is_killed_leaves_the_one_before(
    negated: Package, tmp_path: Path, own_store: Path
) -> None:
    """Killed before every step that changes something, one after the other."""
    model_store.use(negated.folder)
    other = identity_package.make(tmp_path / "identity")
    script = (
        "import os, signal, sys\n"
        "left = int(sys.argv[2])\n"
        "def count(event, args):\n"
        "    global left\n"
        "    writes = event == 'open' and isinstance(args[2], int) and args[2] & os.O_CREAT\n"
        "    if writes or event in ('os.rename', 'os.mkdir', 'os.chmod'):\n"
        "        left -= 1\n"
        "        if left < 0:\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "from engine import model_store\n"
        "sys.addaudithook(count)\n"
        "model_store.use(sys.argv[1])\n"
    )
    codes = []
    for step in range(100):
        command = [sys.executable, "-c", script, str(other.folder), str(step)]
        codes.append(subprocess.run(command, check=False).returncode)
        if codes[-1] == 0:
            break
        assert codes[-1] == -9
        assert current() == "negated"
    assert len(codes) > 6, "it was killed at every file, and where it was moved"
    assert current() == "identity"
    left = [path for path in own_store.iterdir() if path.name.startswith(".")]
    assert left
    for path in left[1:]:
        os.utime(path, (0, time.time() - install.UNFINISHED_S - 1))
    third = identity_package.make(tmp_path / "third", name="third")
    model_store.use(third.folder)
    swept = [path for path in own_store.iterdir() if path.name.startswith(".")]
    assert swept == left[:1], "of another process that copies now, for all we know"
    model_store.rollback()
    shutil.rmtree(own_store / f"third-0-{third.hash[:12]}")
    assert {one.name.split("-")[0] for one in model_store.listed()[0]} == {
        "fluorescence",
        "negated",
        "identity",
    }


def test_the_command_lists_uses_and_goes_back(
    negated: Package, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["models", "use", str(negated.folder)]) == 0
    assert f"current: negated 0 ({negated.hash[:12]})" in capsys.readouterr().out
    assert main(["models", "list"]) == 0
    starred = [line for line in capsys.readouterr().out.splitlines() if line.startswith("*")]
    assert len(starred) == 1
    assert "negated" in starred[0]
    assert main(["models", "list", "--json"]) == 0
    told = {one["name"]: one for one in json.loads(capsys.readouterr().out)}
    mine = told[f"negated-0-{negated.hash[:12]}"]
    assert (mine["current"], mine["shipped"], mine["hash"]) == (True, False, negated.hash)
    assert (mine["modality"], mine["pixel_um"]) == ("fluorescence", [0.05, 2.0])
    shipped = told["fluorescence"]
    assert (shipped["current"], shipped["shipped"], shipped["problem"]) == (False, True, "")
    measured = package.load(package.SHIPPED / "fluorescence").manifest.metrics["through-focus"]
    assert shipped["gain_db"] == {"through-focus": measured["all"]["gain_db"]}
    assert main(["models", "rollback"]) == 0
    assert "current: fluorescence" in capsys.readouterr().out
    assert main(["models", "rollback"]) == 2
    assert main(["models", "use", "no such"]) == 2


def test_a_run_records_with_the_current_one_by_default(negated: Package, tmp_path: Path) -> None:
    model_store.use(negated.folder)
    with recorder(tmp_path / "run", recording_settings("current")) as r:
        assert r.wait_for_engine(30)
        shoot(r, plane())
    run = open_run(tmp_path / "run")
    (line,) = run.notes.generators.values()
    assert (line.name, line.package_hash) == ("negated", negated.hash)


def test_fill_finds_a_runs_own_generator_among_the_installed(
    negated: Package, tmp_path: Path
) -> None:
    make_run(tmp_path / "run", negated, times(3), outcome=lambda seq: skipped(seq) if seq else None)
    model_store.use(negated.folder)
    model_store.use("fluorescence")
    shutil.rmtree(negated.folder)
    assert fill(tmp_path / "run", settings()).filled > 0
    run = open_run(tmp_path / "run")
    assert outcomes(run) == {"REFOCUSED": 3}
    assert {line.package_hash for line in run.notes.generators.values()} == {negated.hash}
