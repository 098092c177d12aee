"""A model package is what its manifest says, or it is refused before anything else reads it."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

from engine import package
from engine.package import FILES, MANIFEST, ONNX, Package
from refocus.errors import PackageError
from refocus.frame import FrameHeader
from tests import identity_package


@pytest.fixture
def shipped(tmp_path: Path) -> Package:
    return identity_package.make(tmp_path / "identity")


def edit(folder: Path, **changes: object) -> None:
    path = folder / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_what_is_written_is_what_is_loaded(shipped: Package) -> None:
    assert package.load(shipped.folder) == shipped
    assert sorted(path.name for path in shipped.folder.iterdir()) == sorted((*FILES, MANIFEST))
    (golden,) = package.read_golden(shipped)
    assert golden.scaling.scale == 1000.0
    np.testing.assert_array_equal(golden.pixels, golden.answer)


@pytest.mark.parametrize("name", FILES)
def test_an_altered_or_missing_file_is_refused(shipped: Package, name: str) -> None:
    path = shipped.folder / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(PackageError, match=f"{name} was altered"):
        package.load(shipped.folder)
    path.unlink()
    with pytest.raises(PackageError, match=f"{name} cannot be read"):
        package.load(shipped.folder)


def test_weights_in_another_file_are_refused(shipped: Package, tmp_path: Path) -> None:
    files = {name: (shipped.folder / name).read_bytes() for name in FILES}
    outside = {**files, ONNX: identity_package.with_external_data(files[ONNX], tmp_path / "apart")}
    with pytest.raises(PackageError, match="keeps weights in another file"):
        package.write(tmp_path / "new", shipped.manifest, outside)
    assert not (tmp_path / "new").exists()
    (shipped.folder / ONNX).write_bytes(outside[ONNX])
    hashes = {**shipped.manifest.files, ONNX: hashlib.sha256(outside[ONNX]).hexdigest()}
    edit(shipped.folder, files=hashes)
    with pytest.raises(PackageError, match="keeps weights in another file"):
        package.load(shipped.folder)


def test_a_generator_may_look_at_the_whole_plane(tmp_path: Path) -> None:
    whole = identity_package.make(tmp_path / "whole", halo_px=None)
    assert package.load(whole.folder).manifest.halo_px is None


def test_the_hash_names_every_byte(shipped: Package) -> None:
    edit(shipped.folder, version="1")
    assert package.load(shipped.folder).hash != shipped.hash


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"format": package.FORMAT + 1, "news": 1}, "has format 2, this Refocus reads up to 1"),
        ({"stirde": 16}, "stirde"),
        ({"stride": 0}, "stride must be at least 1"),
        ({"halo_px": 24}, "multiple of the stride 16, got 24"),
        ({"pixel_um": [2.0, 0.1]}, "pixel_um must be"),
        ({"name": "../escape"}, "name must match"),
        ({"version": "1.0-β"}, "version must match"),
        ({"version": ""}, "version must match"),
        ({"scale": 2}, "scale"),
        ({"scaling": "minmax"}, "wants scaling 'minmax'"),
        ({"files": {}}, "it hashes nothing"),
        ({"files": {"../../secret": "0"}}, "it hashes ../../secret"),
    ],
)
def test_a_wrong_manifest_is_refused(
    shipped: Package, changes: dict[str, object], complaint: str
) -> None:
    edit(shipped.folder, **changes)
    with pytest.raises(PackageError, match=complaint):
        package.load(shipped.folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"format": "new"}'])
def test_a_damaged_manifest_is_refused(shipped: Package, content: bytes) -> None:
    (shipped.folder / MANIFEST).write_bytes(content)
    with pytest.raises(PackageError, match="damaged"):
        package.load(shipped.folder)


def test_a_folder_without_a_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match=r"no model package: wanted a readable manifest\.json"):
        package.load(tmp_path)


def test_writing_leaves_all_or_nothing(shipped: Package, tmp_path: Path) -> None:
    files = {name: (shipped.folder / name).read_bytes() for name in FILES}
    with pytest.raises(PackageError, match="exists"):
        package.write(shipped.folder, shipped.manifest, files)
    with pytest.raises(PackageError, match="needs"):
        package.write(tmp_path / "new", shipped.manifest, {"generator.onnx": b""})
    broken = {**files, FILES[-1]: memoryview(b"")[::-1].tolist()}  # not bytes: fails half-way
    with pytest.raises(TypeError):
        package.write(tmp_path / "new", shipped.manifest, broken)  # type: ignore[arg-type]
    assert package.load(shipped.folder) == shipped
    assert [path.name for path in tmp_path.iterdir()] == ["identity"]


def test_who_must_not_be_refocused(shipped: Package) -> None:
    header = FrameHeader(run="r", seq=0, axes={}, shape=(4, 5), dtype="uint16", pixel_um=0.1)
    unfit = package.unfit
    assert unfit(shipped.manifest, header) is None
    assert unfit(shipped.manifest, msgspec.structs.replace(header, pixel_um=None)) is None
    reason = unfit(shipped.manifest, msgspec.structs.replace(header, pixel_um=6.5))
    assert reason == "pixel size 6.5 um is outside 0.05 to 2 um, the range of generator 'identity'"
    reason = unfit(shipped.manifest, msgspec.structs.replace(header, dtype="float32"))
    assert reason == "pixels are float32; only uint8 and uint16 are refocused"


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys, engine.package; "
        "print({'torch', 'onnx', 'openvino', 'zarr', 'safetensors'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
