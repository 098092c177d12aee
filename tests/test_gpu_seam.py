"""The seam to the GPU over both bindings: on the fake driver, and with `-m gpu` the same on a GPU.

What only a driver that can be made to fail shows is in test_gpu_faults.py.
"""

import threading
from collections.abc import Iterator

import numpy as np
import pytest

from engine.gpu import Gpu, GpuError, GpuMemoryError, NoGpuError, open_gpu
from engine.gpu.convert import STATS, Converter, level, params
from engine.scaling import Scaling, to_counts, to_network
from tests import fake_driver

SEAMS = ("pycuda", "cuda-bindings")
RNG = np.random.default_rng(0)


@pytest.fixture(params=["fake", pytest.param("real", marks=pytest.mark.gpu)])
def machine(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "real":
        yield "real"
        return
    with fake_driver.plugged_in():
        yield "fake"
        assert fake_driver.alive() == {}


@pytest.fixture(params=SEAMS)
def gpu(machine: str, request: pytest.FixtureRequest) -> Iterator[Gpu]:
    pytest.importorskip("pycuda" if request.param == "pycuda" else "cuda.bindings")
    try:
        opened = open_gpu(seam=request.param)
    except NoGpuError as error:
        pytest.skip(str(error))
    with opened:
        yield opened
    assert opened.leaks() == {}


class Bench:
    """A plane's way over the GPU and back, in one stream."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.stream = gpu.stream()

    def up(self, array: np.ndarray) -> int:
        """The array's copy on the GPU."""
        address = self.gpu.alloc(array.nbytes)
        self.gpu.copy_in(address, self.pinned(array), self.stream)
        return address

    def pinned(self, array: np.ndarray) -> np.ndarray:
        host = self.gpu.pinned(array.nbytes).view(array.dtype).reshape(array.shape)
        host[...] = array
        return host

    def down(self, address: int, shape: tuple[int, ...], dtype: np.typing.DTypeLike) -> np.ndarray:
        host = self.pinned(np.zeros(shape, dtype))
        self.gpu.copy_out(host, address, self.stream)
        self.gpu.synchronize(self.stream)
        return host.copy()


def plane(shape: tuple[int, int], dtype: np.typing.DTypeLike) -> np.ndarray:
    return RNG.integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def test_says_what_it_is(gpu: Gpu) -> None:
    assert gpu.seam.split()[0] in SEAMS
    assert gpu.device.name
    assert gpu.device.capability >= (7, 5)
    assert gpu.device.uuid.startswith("GPU-")
    assert gpu.device.driver.startswith("CUDA ")
    assert 0 < gpu.memory().free_bytes <= gpu.memory().total_bytes
    assert gpu.memory().total_bytes <= gpu.device.memory_bytes


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize(
    ("shape", "padded"),
    [
        ((8, 8), (8, 8)),
        ((5, 7), (8, 8)),
        ((1, 1), (4, 4)),
        ((1, 9), (4, 12)),
        ((3, 2), (16, 16)),  # wider than the plane: reflected again and again
        ((301, 517), (304, 520)),  # more than one block, more rows than blocks
    ],
)
def test_counts_become_the_networks_range_as_numpy_does_it(
    gpu: Gpu, shape: tuple[int, int], padded: tuple[int, int], dtype: np.typing.DTypeLike
) -> None:
    raw, scaling, bench = plane(shape, dtype), Scaling(101.37, 7.3), Bench(gpu)
    network = gpu.alloc(4 * padded[0] * padded[1])
    converter = Converter(gpu, dtype)
    converter.to_network(
        bench.up(raw), network, shape, padded, bench.up(params(scaling)), bench.stream
    )
    after = [(0, wide - side) for wide, side in zip(padded, shape, strict=True)]
    wanted = to_network(np.pad(raw, after, mode="reflect"), scaling)
    got = bench.down(network, padded, np.float32)
    assert got.tobytes() == wanted.tobytes()


def back(
    gpu: Gpu, values: np.ndarray, shape: tuple[int, int], dtype: np.typing.DTypeLike, with_: Scaling
) -> tuple[np.ndarray, np.void]:
    """The GPU's counts of a padded answer, and its statistics."""
    bench, converter = Bench(gpu), Converter(gpu, dtype)
    counts = gpu.alloc(shape[0] * shape[1] * np.dtype(dtype).itemsize)
    stats = gpu.alloc(STATS.itemsize)
    converter.reset_stats(stats, bench.stream)
    converter.to_counts(
        bench.up(values), counts, shape, values.shape, bench.up(params(with_)), stats, bench.stream
    )
    return bench.down(counts, shape, dtype), bench.down(stats, (1,), STATS)[0]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("shape", [(8, 8), (5, 7), (1, 1), (301, 517)])
def test_the_answer_becomes_counts_as_numpy_does_it(
    gpu: Gpu, shape: tuple[int, int], dtype: np.typing.DTypeLike
) -> None:
    padded = (-(-shape[0] // 8) * 8, -(-shape[1] // 8) * 8)
    values = RNG.normal(0.5, 1.0, padded).astype(np.float32)
    values[shape[0] :], values[:, shape[1] :] = np.nan, 1e9  # what is cut off counts for nothing
    inside = values[: shape[0], : shape[1]]
    top = np.iinfo(dtype).max
    scaling = Scaling(top / 3.1, top / 2.3)  # about a fifth is clipped on either side
    wanted, clipped = to_counts(inside, scaling, dtype)
    got, stats = back(gpu, values, shape, dtype, scaling)
    assert got.tobytes() == wanted.tobytes()
    assert stats["clipped"] == clipped
    assert stats["nonfinite"] == 0
    assert level(stats["lowest"]) == inside.min()
    assert level(stats["highest"]) == inside.max()


def test_halves_are_rounded_to_even_and_limits_are_no_clipping(gpu: Gpu) -> None:
    values = np.array([[-0.5, 0.5, 1.5, 2.5, 254.5, 255.0, 255.5, -0.50001]], np.float32)
    got, stats = back(gpu, values, (1, 8), np.uint8, Scaling(0.0, 1.0))
    assert got.tolist() == [[0, 0, 2, 2, 254, 255, 255, 0]]
    assert stats["clipped"] == 2


def test_values_that_are_no_numbers_are_counted(gpu: Gpu) -> None:
    values = np.array([[np.nan, np.inf, -np.inf, -2.0, -0.0, 3.0]], np.float32)
    got, stats = back(gpu, values, (1, 6), np.uint16, Scaling(10.0, 2.0))
    assert got.tolist() == [[0, 65535, 0, 6, 10, 16]]
    assert (stats["nonfinite"], stats["clipped"]) == (3, 2)
    assert (level(stats["lowest"]), level(stats["highest"])) == (-2.0, 3.0)
    nothing = back(gpu, np.full((1, 3), np.nan, np.float32), (1, 3), np.uint8, Scaling(0.0, 1.0))[1]
    assert np.isnan(level(nothing["lowest"]))
    assert np.isnan(level(nothing["highest"]))


def test_work_is_done_once_it_was_waited_for(gpu: Gpu, machine: str) -> None:
    bench = Bench(gpu)
    first, last = gpu.event(), gpu.event()
    assert gpu.is_done(first)  # never recorded
    sent = plane((64, 64), np.uint16)
    gpu.record(first, bench.stream)
    address = bench.up(sent)
    got = bench.pinned(np.zeros_like(sent))
    gpu.copy_out(got, address, bench.stream)
    gpu.record(last, bench.stream)
    if machine == "fake":
        assert not got.any()
        assert not gpu.is_done(last)
    gpu.wait(last)
    assert gpu.is_done(last)
    assert np.array_equal(got, sent)
    assert gpu.elapsed_ms(first, last) >= 0.0
    gpu.drop_event(first)
    gpu.drop_event(last)
    gpu.drop_stream(bench.stream)
    assert set(gpu.leaks()) == {"device memory", "pinned memory"}


def test_a_graph_repeats_its_work_on_what_lies_there_by_then(gpu: Gpu) -> None:
    shape, bench = (24, 40), Bench(gpu)
    raw, counts = bench.pinned(plane(shape, np.uint16)), bench.pinned(np.zeros(shape, np.uint16))
    scale, stats = bench.pinned(params(Scaling(0.0, 1.0))), bench.pinned(np.zeros(1, STATS))
    on_gpu = [gpu.alloc(size) for size in (raw.nbytes, 4 * raw.size, scale.nbytes, stats.nbytes)]
    raw_at, network_at, params_at, stats_at = on_gpu
    converter = Converter(gpu, np.uint16)

    def whole_way() -> None:
        gpu.copy_in(raw_at, raw, bench.stream)
        gpu.copy_in(params_at, scale, bench.stream)
        converter.to_network(raw_at, network_at, shape, shape, params_at, bench.stream)
        converter.reset_stats(stats_at, bench.stream)
        converter.to_counts(network_at, raw_at, shape, shape, params_at, stats_at, bench.stream)
        gpu.copy_out(counts, raw_at, bench.stream)
        gpu.copy_out(stats, stats_at, bench.stream)

    graph = gpu.capture(bench.stream, whole_way)
    gpu.synchronize(bench.stream)
    assert not counts.any()  # captured, not done
    for scaling in (Scaling(100.0, 50.0), Scaling(3000.25, 1234.5)):
        raw[...] = plane(shape, np.uint16)
        scale[...] = params(scaling)
        gpu.replay(graph, bench.stream)
        gpu.synchronize(bench.stream)
        assert np.array_equal(counts, raw)
        values = to_network(raw, scaling)
        assert stats[0]["clipped"] == stats[0]["nonfinite"] == 0
        assert level(stats[0]["lowest"]) == values.min()
        assert level(stats[0]["highest"]) == values.max()
    gpu.drop_graph(graph)
    assert "graphs" not in gpu.leaks()


def test_a_capture_that_fails_leaves_the_stream_usable(gpu: Gpu) -> None:
    bench, sent = Bench(gpu), plane((4, 4), np.uint8)
    address, host = gpu.alloc(sent.nbytes), bench.pinned(sent)

    def interrupted() -> None:
        gpu.copy_in(address, host, bench.stream)
        raise KeyError("the caller's own trouble")

    def forbidden() -> None:
        gpu.alloc(8)

    with pytest.raises(KeyError):
        gpu.capture(bench.stream, interrupted)
    with pytest.raises(GpuError):
        gpu.capture(bench.stream, forbidden)
    assert "graphs" not in gpu.leaks()
    assert np.array_equal(bench.down(bench.up(sent), (4, 4), np.uint8), sent)


def test_what_does_not_fit_is_refused_and_the_rest_goes_on(gpu: Gpu) -> None:
    too_much = 16 * gpu.memory().total_bytes  # Windows lends the GPU some of the host's
    with pytest.raises(GpuMemoryError, match=rf"{too_much >> 20} MiB were asked of .*MiB free"):
        gpu.alloc(too_much)
    bench, sent = Bench(gpu), plane((4, 4), np.uint8)
    assert np.array_equal(bench.down(bench.up(sent), (4, 4), np.uint8), sent)


def test_copies_stay_inside_what_was_given_out(gpu: Gpu) -> None:
    stream, address, host = gpu.stream(), gpu.alloc(100), gpu.pinned(100, write_combined=True)
    gpu.copy_in(address + 50, host[:50], stream)
    with pytest.raises(GpuError, match="not C-contiguous"):
        gpu.copy_in(address, host[::2], stream)
    with pytest.raises(GpuError, match="outside the pinned memory"):
        gpu.copy_in(address, np.zeros(100, np.uint8), stream)
    with pytest.raises(GpuError, match="outside the device memory"):
        gpu.copy_out(host, address + 1, stream)
    gpu.synchronize(stream)
    gpu.unpin(host)
    with pytest.raises(GpuError, match="not among the pinned memory"):
        gpu.unpin(host)
    gpu.free(address)
    with pytest.raises(GpuError, match="not among the device memory"):
        gpu.free(address)


def test_another_thread_is_refused(gpu: Gpu) -> None:
    refused: list[str] = []

    def stranger() -> None:
        for call in (gpu.memory, gpu.stream, gpu.close):
            with pytest.raises(GpuError) as caught:
                call()
            refused.append(str(caught.value))

    thread = threading.Thread(target=stranger, name="stranger")
    thread.start()
    thread.join()
    assert len(refused) == 3
    assert all("'stranger' calls; open, use and close it in one thread" in one for one in refused)
    assert gpu.memory().free_bytes > 0


def test_a_closed_gpu_says_so(gpu: Gpu) -> None:
    gpu.alloc(100)
    gpu.capture(gpu.stream(), lambda: None)
    gpu.close()
    assert gpu.leaks() == {}
    gpu.close()
    with pytest.raises(GpuError, match="is closed; open it again"):
        gpu.memory()


def test_two_gpus_of_one_thread_share_the_context(gpu: Gpu) -> None:
    with open_gpu() as second:
        address = second.alloc(100)
        second.free(address)
    assert gpu.memory().free_bytes > 0
