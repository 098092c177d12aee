"""A plan in TensorRT's hands: deserialised once, one execution context a slot.

The code is the same for TensorRT 10.13 and later, 11 and TensorRT for RTX; what differs is said
where it does. Activations lie in memory that we allocate (USER_MANAGED), because then their size is
known for the very shape before anything is taken, and because a context sized for the profile's
largest shape would take it all.

A plan is executable code. Whoever comes here with one has had its seal checked (engine/sealed.py).
"""

from pathlib import Path
from typing import Any

from engine.gpu import GpuMemoryError
from engine.plan import Toolkit
from engine.sealed import read_sealed, write_sealed
from refocus.errors import EngineError


class Executable:
    """A deserialised plan. Made, used and closed by the thread that owns the GPU."""

    def __init__(self, toolkit: Toolkit, plan: bytes, jit_cache: Path) -> None:
        """*jit_cache*: where TensorRT for RTX keeps what it compiled for this GPU.

        Raises EngineError where TensorRT does not take the plan.
        """
        self._toolkit = toolkit
        self._jit_path = jit_cache
        self._runtime = toolkit.module.Runtime(toolkit.logger)
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise _failure(toolkit, f"{toolkit.name} does not take its own plan")
        self._config: Any = None
        self._jit: Any = None
        self._jit_saved = 0
        if toolkit.is_rtx:
            self._configure_rtx()

    def _configure_rtx(self) -> None:
        """RTX compiles kernels when a context is made: for the real shape, and kept on disk."""
        trt = self._toolkit.module
        self._config = self._engine.create_runtime_config()
        # Eager: no stand-in kernels first, so a graph may be captured after one plain run.
        self._config.dynamic_shapes_kernel_specialization_strategy = (
            trt.DynamicShapesKernelSpecializationStrategy.EAGER
        )
        self._config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED  # we capture copies, too
        self._config.set_execution_context_allocation_strategy(
            trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        self._jit = self._config.create_runtime_cache()
        if known := read_sealed(self._jit_path):
            self._jit.deserialize(known)
            self._jit_saved = len(known)
        self._config.set_runtime_cache(self._jit)

    def context(self, padded: tuple[int, int], stream: int) -> "Context":
        """A context for planes of *padded* (y, x) px, a shape of the plan's profile."""
        trt = self._toolkit.module
        context = self._engine.create_execution_context(
            self._config
            if self._config is not None
            else trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        if context is None:
            raise _failure(self._toolkit, "TensorRT makes no context")
        return Context(self._engine, context, self._toolkit, padded, stream)

    def save_jit(self) -> None:
        """Keeps what was compiled since the last time; the next start need not. Raises OSError."""
        if self._jit is None:
            return
        compiled = bytes(memoryview(self._jit.serialize()))
        if len(compiled) != self._jit_saved:
            write_sealed(self._jit_path, compiled)
            self._jit_saved = len(compiled)

    def close(self) -> None:
        """After every context is closed."""
        self._config = self._jit = None
        self._engine = None
        self._runtime = None


class Context:
    """One plane at a time of one shape. Enqueues work; never waits for it."""

    def __init__(
        self,
        engine: Any,
        context: Any,
        toolkit: Toolkit,
        padded: tuple[int, int],
        stream: int,
    ) -> None:
        self._context = context
        self._toolkit = toolkit
        trt = toolkit.module
        names = [engine.get_tensor_name(k) for k in range(engine.num_io_tensors)]
        modes = {engine.get_tensor_mode(name): name for name in names}
        self._input = modes[trt.TensorIOMode.INPUT]
        self._output = modes[trt.TensorIOMode.OUTPUT]
        self._require(context.set_optimization_profile_async(0, stream), "takes no profile")
        shape = (1, 1, *padded)
        self._require(context.set_input_shape(self._input, shape), f"does not take {shape}")
        try:
            unresolved = context.infer_shapes()
        except RuntimeError as error:
            raise EngineError(f"TensorRT cannot tell the shapes: {error}") from error
        self._require(not unresolved, f"cannot tell the shape of {unresolved}")
        answer = tuple(context.get_tensor_shape(self._output))
        self._require(answer == shape, f"answers {answer} to {shape}")
        self.memory_bytes = int(context.update_device_memory_size_for_shapes())
        """Activations of this shape, to be handed to `bind`."""

    def bind(self, network: int, answer: int, memory: int) -> None:
        """Addresses on the GPU: input and output, float32, and *memory_bytes* of activations."""
        self._require(self._context.set_tensor_address(self._input, network), "takes no input")
        self._require(self._context.set_tensor_address(self._output, answer), "takes no output")
        self._context.set_device_memory(memory, self.memory_bytes)

    def enqueue(self, stream: int) -> None:
        """Runs the network once, in *stream*."""
        self._require(self._context.execute_async_v3(stream), "cannot run")

    def is_capturable(self, stream: int) -> bool:
        """Whether a graph may be captured; RTX refuses while kernels are still being compiled."""
        if self._toolkit.is_rtx:
            return bool(self._context.is_stream_capturable(stream))
        return True

    def close(self) -> None:
        self._context = None

    def _require(self, went_well: object, what: str) -> None:
        if not went_well:
            raise _failure(self._toolkit, f"TensorRT {what}")


def _failure(toolkit: Toolkit, what: str) -> EngineError:
    """*what*, with what TensorRT said; a kind of its own where it wanted more memory."""
    said = "; ".join(toolkit.messages()) or "no reason given"
    is_memory = "outofmemory" in said.lower().replace(" ", "")
    return (GpuMemoryError if is_memory else EngineError)(f"{what}: {said}")
