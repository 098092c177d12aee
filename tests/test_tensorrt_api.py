"""Every name of TensorRT that we use exists in every TensorRT that we say we run with.

TensorRT's classes are native and untyped, so neither mypy nor a machine without a GPU finds a call
that some version does not have. This reads our sources: it follows which of TensorRT's classes each
variable holds (from constructors, and from what a method returns by its signature in the bindings),
and holds every member, the number and the names of arguments against the bindings of 10.13, 10.16
and 11.4, as recorded by tests/tensorrt_api/list_api.py, and against TensorRT for RTX as it is
installed. What stands in a function or branch for RTX alone is held against RTX alone.
"""

import ast
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import tensorrt_rtx

from tests.tensorrt_api.list_api import Listing, describe

ENGINE = Path(__file__).parents[1] / "engine"
RECORDED = sorted((Path(__file__).parent / "tensorrt_api").glob("tensorrt-*.json"))
MODULE = "module"
CLASS = "class "
PARAMETERS = {
    "trt": MODULE,
    "module": MODULE,
    "network": "INetworkDefinition",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
    "tensor": "ITensor",
}
"""What a variable holds that comes from outside of its function. The others are followed."""


@dataclass(frozen=True)
class Use:
    """A member of TensorRT's that a source uses."""

    where: str
    owner: str
    member: str
    arguments: tuple[str, ...] | None
    """Of a call: "" for each by position, names of the others; None where it is no plain call."""
    rtx_only: bool


class Reader(ast.NodeVisitor):
    """Collects the uses in one source."""

    def __init__(self, source: str, name: str, known: Listing) -> None:
        self.name, self.known = name, known
        self.functions: tuple[str, ...] = ()
        """Those around what is read now."""
        self.variables: dict[tuple[tuple[str, ...], str], str] = {}
        """By the functions around them; attributes of self by none. A list is as what is in it."""
        self.uses: set[Use] = set()
        self.rtx_only = False
        tree = ast.parse(source)
        for _ in range(4):  # a variable may be followed only when another one is known
            self.uses.clear()
            self.visit(tree)

    def kind(self, node: ast.AST | None) -> str | None:
        """Class of the instance that *node* is, or CLASS and a class, or MODULE."""
        match node:
            case ast.Name(id=name):
                around = [self.functions[:k] for k in range(len(self.functions) + 1)]
                kinds = [self.variables.get((functions, name)) for functions in around]
                return next(filter(None, reversed(kinds)), PARAMETERS.get(name))
            case ast.Attribute(value=value, attr=name):
                owner = self.kind(value)
                if owner is None:
                    return MODULE if name == "module" else self.variables.get(((), f".{name}"))
                inner = name if owner == MODULE else f"{owner.removeprefix(CLASS)}.{name}"
                return CLASS + inner if inner in self.known else None
            case ast.Call(func=function):
                called = self.kind(function)
                if called is not None and called.startswith(CLASS):
                    return called.removeprefix(CLASS)
                if isinstance(function, ast.Attribute):
                    overloads = self.known.get(self.kind(function.value) or "?", {})
                    returned = (overloads.get(function.attr) or [["?"]])[0][-1]
                    return returned if returned in self.known else None
            case ast.ListComp(elt=element):
                return self.kind(element)
            case ast.Subscript(value=value):
                return self.kind(value)
        return None

    def assign(self, target: ast.AST, value: ast.AST | None) -> None:
        if (kind := self.kind(value)) is None:
            return
        match target:
            case ast.Name(id=name):
                self.variables[self.functions, name] = kind
            case ast.Attribute(attr=name):
                self.variables[(), f".{name}"] = kind

    def visit_Assign(self, node: ast.Assign) -> None:
        self.assign(node.targets[0], node.value)
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        self.assign(node.target, node.iter)
        self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.functions += (node.name,)
        before, self.rtx_only = self.rtx_only, "rtx" in node.name or "jit" in node.name
        self.generic_visit(node)
        self.rtx_only = before
        self.functions = self.functions[:-1]

    def visit_If(self, node: ast.If) -> None:
        self.visit(node.test)
        before, self.rtx_only = self.rtx_only, self.rtx_only or "is_rtx" in ast.unparse(node.test)
        for one in node.body:
            self.visit(one)
        self.rtx_only = before
        for one in node.orelse:
            self.visit(one)

    def visit_Call(self, node: ast.Call) -> None:
        called, arguments = self.kind(node.func), [""] * len(node.args)
        names = [keyword.arg for keyword in node.keywords]
        plain = not any(isinstance(one, ast.Starred) for one in node.args) and None not in names
        given = (*arguments, *(name or "" for name in names)) if plain else None
        if called is not None and called.startswith(CLASS):
            self.add(node, called.removeprefix(CLASS), "__init__", given)
        elif isinstance(node.func, ast.Attribute):
            owner = self.kind(node.func.value)
            if owner is not None and not owner.startswith(CLASS):
                self.add(node, owner, node.func.attr, given)
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        owner = self.kind(node.value)
        if owner is not None and node.attr not in ("__members__", "__version__"):
            self.add(node, owner.removeprefix(CLASS), node.attr, None)
        self.generic_visit(node)

    def add(
        self, node: ast.expr, owner: str, member: str, arguments: tuple[str, ...] | None
    ) -> None:
        where = f"{self.name}:{node.lineno}"
        self.uses.add(Use(where, owner, member, arguments, self.rtx_only))


def missing(uses: set[Use], listing: Listing) -> list[str]:
    """What *uses* want and *listing* does not have."""
    found = []
    for use in sorted(uses, key=lambda use: (use.where, use.member)):
        name = f"{use.where}: {use.owner}.{use.member}"
        if use.member not in listing.get(use.owner, {}):
            found.append(f"{name} does not exist")
            continue
        overloads = listing[use.owner][use.member]
        if use.arguments is None or overloads is None:
            continue
        if not any(_takes(overload[:-1], use.arguments) for overload in overloads):
            found.append(f"{name} takes {overloads}, not {use.arguments}")
    return found


def _takes(parameters: list[str], arguments: tuple[str, ...]) -> bool:
    by_position = arguments.count("")
    rest = {name.rstrip("?"): name.endswith("?") for name in parameters[by_position:]}
    names = {name for name in arguments if name}
    wanted = {name for name, optional in rest.items() if not optional}
    return by_position <= len(parameters) and wanted <= names <= set(rest)


@pytest.fixture(scope="module")
def listings() -> dict[str, Listing]:
    recorded = {path.stem: json.loads(path.read_text()) for path in RECORDED}
    return {**recorded, "tensorrt_rtx": describe(tensorrt_rtx)}


@pytest.fixture(scope="module")
def known(listings: dict[str, Listing]) -> Listing:
    """Everything that any version has."""
    merged: Listing = {}
    for listing in listings.values():
        for owner, members in listing.items():
            merged[owner] = merged.get(owner, {}) | members
    return merged


@pytest.fixture(scope="module")
def uses(known: Listing) -> set[Use]:
    found: set[Use] = set()
    for path in sorted(ENGINE.rglob("*.py")):
        if "oolkit.module" in (source := path.read_text()):
            found |= Reader(source, path.relative_to(ENGINE.parent).as_posix(), known).uses
    return found


def test_every_version_has_what_we_use(uses: set[Use], listings: dict[str, Listing]) -> None:
    assert len(listings) == 4
    for name, listing in listings.items():
        theirs = uses if name == "tensorrt_rtx" else {use for use in uses if not use.rtx_only}
        assert missing(theirs, listing) == [], name


def test_our_calls_are_found(uses: set[Use]) -> None:
    """A variable that is no longer followed would take its calls out of the test above."""
    calls = {(use.owner, use.member) for use in uses if use.arguments is not None}
    assert calls >= {
        ("Builder", "__init__"),
        ("Builder", "create_network"),
        ("Builder", "build_serialized_network"),
        ("OnnxParser", "parse"),
        ("ParserError", "desc"),
        ("IBuilderConfig", "clear_flag"),
        ("IBuilderConfig", "set_memory_pool_limit"),
        ("IBuilderConfig", "set_compute_capability"),
        ("INetworkDefinition", "get_input"),
        ("IOptimizationProfile", "set_shape"),
        ("Runtime", "deserialize_cuda_engine"),
        ("ICudaEngine", "create_execution_context"),
        ("ICudaEngine", "get_tensor_mode"),
        ("IExecutionContext", "execute_async_v3"),
        ("IExecutionContext", "set_tensor_address"),
        ("IExecutionContext", "set_input_shape"),
        ("IRuntimeConfig", "create_runtime_cache"),
        ("IRuntimeCache", "deserialize"),
    }
    members = {(use.owner, use.member) for use in uses}
    assert members >= {
        (MODULE, "ComputeCapability"),
        ("BuilderFlag", "TF32"),
        ("IBuilderConfig", "max_aux_streams"),
        ("ILogger.Severity", "ERROR"),
        ("ITensor", "name"),
        ("ICudaEngine", "num_io_tensors"),
        ("TensorIOMode", "OUTPUT"),
        ("CudaGraphStrategy", "DISABLED"),
    }
    assert {use.owner for use in uses if use.rtx_only} >= {"IRuntimeCache", "CudaGraphStrategy"}


OLD = """
builder = trt.Builder(logger)
network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH))
self.config = builder.create_builder_config()
self.config.set_flag(trt.BuilderFlag.FP16)
runtime = trt.Runtime(logger)
size = runtime.deserialize_cuda_engine(plan).device_memory_size
"""
WRONG = """
config = trt.Builder(logger).create_builder_config()
config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE)
config.clear_flag(falg=1)
config.no_such_thing = 3
if toolkit.is_rtx:
    config.num_compute_capabilities = 1
"""


def test_what_version_11_dropped_is_found(listings: dict[str, Listing], known: Listing) -> None:
    uses = Reader(OLD, "old", known).uses
    assert missing(uses, listings["tensorrt-10.13.3.9"]) == []
    assert missing(uses, listings["tensorrt-11.4.0.106"]) == [
        "old:3: NetworkDefinitionCreationFlag.EXPLICIT_BATCH does not exist",
        "old:5: BuilderFlag.FP16 does not exist",
        "old:7: ICudaEngine.device_memory_size does not exist",
    ]


def test_wrong_calls_are_found(listings: dict[str, Listing], known: Listing) -> None:
    everywhere = [
        "wrong:3: IBuilderConfig.set_memory_pool_limit takes [['pool', 'pool_size', 'None']], "
        "not ('',)",
        "wrong:4: IBuilderConfig.clear_flag takes [['flag', 'None']], not ('falg',)",
        "wrong:5: IBuilderConfig.no_such_thing does not exist",
    ]
    uses = Reader(WRONG, "wrong", known).uses
    assert missing(uses, listings["tensorrt_rtx"]) == everywhere
    assert missing(uses, listings["tensorrt-10.16.1.11"]) == [
        *everywhere,
        "wrong:7: IBuilderConfig.num_compute_capabilities does not exist",
    ]
    assert [use.member for use in uses if use.rtx_only] == ["num_compute_capabilities"]
