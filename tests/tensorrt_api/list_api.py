"""What the Python bindings of a TensorRT offer, as JSON, without a GPU and without TensorRT.

    python list_api.py 10.13.3.9 10.16.1.11 11.4.0.106

writes tensorrt-VERSION.json beside this file, which tests/test_tensorrt_api.py holds our calls
against. The bindings alone are a small wheel; the libraries they link to are gigabytes. They are
imported all the same, in a process of their own, against empty libraries that define the nine
functions they ask for (a C compiler is needed; only x86-64 Linux).

A method is listed as its overloads: names of its arguments without self, with a ? where there is a
default, and last what it returns, as its docstring says. Anything else is listed as null.
"""

import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

CLASSES = frozenset(
    """Builder IBuilderConfig ICudaEngine IExecutionContext IHostMemory ILogger INetworkDefinition
    IOptimizationProfile IRuntimeCache IRuntimeConfig ITensor Logger OnnxParser ParserError
    Runtime""".split()  # noqa: SIM905
)
"""Beside these, every enumeration is listed."""
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
FUNCTIONS = frozenset(
    """createInferBuilder_INTERNAL createInferRefitter_INTERNAL createInferRuntime_INTERNAL
    createNvOnnxParserRefitter_INTERNAL createNvOnnxParser_INTERNAL getBuilderPluginRegistry
    getNvOnnxParserVersion getPluginRegistry initLibNvInferPlugins""".split()  # noqa: SIM905
)
"""What the bindings look up in them."""

Overloads = list[list[str]]
Listing = dict[str, dict[str, Overloads | None]]
"""Class or enumeration, member, overloads."""


def describe(module: Any) -> Listing:
    """Listing of an imported module of bindings; what it offers itself stands under "module"."""
    listing: Listing = {"module": {name: None for name in dir(module) if name[:2] != "__"}}
    for name in dir(module):
        value = getattr(module, name)
        if name in CLASSES or hasattr(value, "__members__"):
            listing[name] = _members(value)
        if name in CLASSES:
            inner = {f"{name}.{key}": getattr(value, key) for key in dir(value)}
            listing |= {
                key: _members(kind) for key, kind in inner.items() if hasattr(kind, "__members__")
            }
    return listing


def _members(kind: Any) -> dict[str, Overloads | None]:
    members = {}
    for name in dir(kind):
        if name[0] != "_" or name == "__init__":
            value = getattr(kind, name)
            members[name] = _overloads(name, value.__doc__ or "") if callable(value) else None
    return members


def _overloads(name: str, doc: str) -> Overloads | None:
    lines = re.findall(rf"^\s*(?:\d+\. )?{name}\((.*)\) -> (.*)$", doc, re.MULTILINE)
    return [[*_arguments(inside), _class(returned)] for inside, returned in lines] or None


def _class(returned: str) -> str:
    """Name of a class without where it lives, as the bindings call it, not as C++ does."""
    name = re.split(r"[.:]", returned)[-1].strip("[]")
    return "ParserError" if name == "IParserError" else name


def _arguments(inside: str) -> list[str]:
    """Names of the arguments in a signature: what stands before a colon outside of brackets."""
    while (flat := re.sub(r"[\[(<{][^\[\](){}<>]*[\])}>]", "", inside)) != inside:
        inside = flat
    return [
        part.split(":")[0] + ("?" if "=" in part else "")
        for part in map(str.strip, inside.split(","))
        if part not in ("", "*", "/") and not part.startswith("self")
    ]


def main(versions: list[str]) -> None:
    for version in versions:
        with tempfile.TemporaryDirectory() as folder:
            listing = _list_version(version, Path(folder))
        lines = [f" {json.dumps(key)}: {json.dumps(listing[key])}" for key in sorted(listing)]
        target = Path(__file__).with_name(f"tensorrt-{version}.json")
        target.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        print(target.name, f"{len(listing)} classes and enumerations")


def _list_version(version: str, folder: Path) -> Listing:
    wheel = f"tensorrt_cu13_bindings=={version}"
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), wheel]
    subprocess.run(pip, check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        archive.extractall(folder)
    source = folder / "empty.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in FUNCTIONS))
    for library in LIBRARIES:
        name = f"lib{library}.so.{version.split('.')[0]}"
        build = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(folder / name)]
        subprocess.run([*build, str(source)], check=True)
    look = "import json, list_api, tensorrt_bindings as t; print(json.dumps(list_api.describe(t)))"
    done = subprocess.run(
        [sys.executable, "-c", look],
        env={"LD_LIBRARY_PATH": str(folder), "PYTHONPATH": f"{folder}:{Path(__file__).parent}"},
        check=True,
        stdout=subprocess.PIPE,
    )
    listing: Listing = json.loads(done.stdout)
    return listing


if __name__ == "__main__":
    main(sys.argv[1:])
