"""The worker's side of the wire: what is in work at once, in which order answers come, what a
failing GPU costs, and where pixels lie."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import zmq

from acquire.supervisor import CANNOT_START
from engine.gpu import GpuError, GpuMemoryError
from engine.package import Package
from refocus import wire
from refocus.arena import Arena
from refocus.errors import EngineError, PackageError, RejectedError
from refocus.frame import FrameHeader
from tests import identity_package
from tests.played_link import LARGER, SHAPE, WAIT_MS, Played, Told, offer


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Package:
    return identity_package.make(tmp_path_factory.mktemp("package") / "identity")


@pytest.fixture
def play(package: Package) -> Iterator[Callable[[Told], Played]]:
    opened: list[Played] = []

    def play(runtime: Told) -> Played:
        opened.append(Played(package, runtime))
        return opened[-1]

    yield play
    for one in opened:
        one.close()


def test_as_many_planes_are_in_work_as_there_are_slots(play: Callable[[Told], Played]) -> None:
    runtime = Told(slots=2)
    link = play(runtime)
    assert link.hello.credit == 3
    for seq in range(4):
        link.frame(seq)
    link.load()
    for seq in range(4):
        link.result(seq)
    assert runtime.log == [
        *("load 16", "start 0", "start 1", "answer 0", "start 2", "answer 1"),
        *("start 3", "answer 2", "answer 3"),
    ]


def test_a_plane_alone_is_answered_at_once(play: Callable[[Told], Played]) -> None:
    link = play(Told(slots=8))
    link.frame(0)
    link.load()
    link.result(0)
    link.frame(1)
    link.result(1)
    assert link.runtime.log == ["load 16", "start 0", "answer 0", "start 1", "answer 1"]


def test_another_shape_waits_for_what_is_in_work(play: Callable[[Told], Played]) -> None:
    link = play(Told(slots=4))
    for seq, shape in enumerate((SHAPE, SHAPE, LARGER)):
        link.frame(seq, shape)
    link.load()
    link.result(0)
    link.result(1)
    link.load()
    link.result(2)
    assert link.runtime.log == [
        *("load 16", "start 0", "start 1", "answer 0", "answer 1", "load 32", "start 2"),
        "answer 2",
    ]


def test_a_heartbeat_names_the_oldest_in_work(play: Callable[[Told], Played]) -> None:
    link = play(Told(slots=2))
    link.runtime.may_answer.clear()
    link.frame(7)
    link.frame(8)
    link.receive(wire.Busy)
    link.beats.clear()
    link.runtime.may_load.set()
    link.receive(wire.Busy)
    while 7 not in link.beats:
        assert link._router.poll(WAIT_MS)
        link.beats.append(wire.decode(link._router.recv_multipart()[1:])[0].seq)
    assert 8 not in link.beats
    link.runtime.may_answer.set()
    link.result(7)
    link.result(8)


@pytest.mark.parametrize("where", ["start", "answer"])
@pytest.mark.parametrize(
    ("trouble", "rejected"),
    [
        (EngineError("rubbish"), False),
        (GpuMemoryError("out of memory"), False),
        (RejectedError("not this one"), True),
        (ZeroDivisionError("a bug"), False),
        (EngineError("a log\n" * 10_000), False),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_what_fails_on_one_plane_costs_that_plane_alone(
    play: Callable[[Told], Played], where: str, trouble: Exception, rejected: bool
) -> None:
    link = play(Told(slots=2))
    link.runtime.trouble[where, 1] = trouble
    for seq in range(3):
        link.frame(seq)
    link.load()
    seen = {}
    for _ in range(3):
        message, _ = link.receive(wire.Result | wire.Fault)
        seen[message.seq] = message
    assert isinstance(seen[1], wire.Fault)
    assert (seen[1].reason, seen[1].rejected) == (str(trouble)[:2000], rejected)
    assert isinstance(seen[0], wire.Result)
    assert isinstance(seen[2], wire.Result)


def test_a_shape_that_cannot_be_loaded_does_not_end_the_one_before(
    play: Callable[[Told], Played],
) -> None:
    link = play(Told())
    link.frame(0)
    link.load()
    link.result(0)
    link.runtime.load = _reject  # type: ignore[method-assign]
    link.frame(1, LARGER)
    link.receive(wire.Busy)
    link.receive(wire.Busy)
    assert link.fault(1).rejected
    del link.runtime.load
    link.frame(2)
    link.load()  # whatever the runtime had is not taken for granted
    link.result(2)


def test_after_a_failure_of_the_gpu_everything_in_work_is_answered_for(
    play: Callable[[Told], Played],
) -> None:
    link = play(Told(slots=3))
    link.runtime.trouble["answer", 1] = GpuError("an illegal address was accessed")
    for seq in range(4):
        link.frame(seq)
    link.load()
    link.result(0)
    for seq in (1, 2, 3):
        assert "illegal address" in link.fault(seq).reason
    link.receive(wire.Bye)
    assert isinstance(link.ended.get(timeout=WAIT_MS / 1000), GpuError)
    assert "answer 2" not in link.runtime.log, "nothing is asked of a broken GPU"
    link.ended.put(None)


def test_a_generator_that_cannot_run_here_ends_the_worker(play: Callable[[Told], Played]) -> None:
    """No plane would fare better, and a start that fails in the same way is not worth one."""
    link = play(Told())
    link.runtime.load = _refuse  # type: ignore[method-assign]
    link.frame(0)
    link.receive(wire.Busy)
    link.receive(wire.Busy)
    assert "accuracy gate" in link.fault(0).reason
    link.receive(wire.Bye)
    ended = link.ended.get(timeout=WAIT_MS / 1000)
    assert isinstance(ended, PackageError)
    assert ended.exit_code == CANNOT_START
    link.ended.put(None)


def test_pixels_lie_in_the_memory_that_the_link_offers(play: Callable[[Told], Played]) -> None:
    link = play(Told(slots=2))
    first, second = Arena.make(3, 1000), Arena.make(3, 2000)
    try:
        for arena, shape in ((first, SHAPE), (second, LARGER)):
            link.send(offer(link, arena))
            taken, _ = link.receive(wire.Taken)
            assert taken == wire.Taken(epoch=link.hello.epoch, name=arena.name)
            for slot in (2, 0):
                arena.plane(slot, shape, "uint16")[:] = slot
                link.frame(slot, shape, place=slot)
            link.load()
            for slot in (2, 0):
                assert link.result(slot).place == slot
                assert (arena.plane(slot, shape, "uint16") == slot + 1).all()
        link.frame(5)
        link.load()
        assert link.result(5).place is None, "by message as it came by message"
    finally:
        first.remove()
        second.remove()


def test_memory_changes_only_when_nothing_is_in_work(play: Callable[[Told], Played]) -> None:
    link = play(Told(slots=2))
    first, second = Arena.make(2, 1000), Arena.make(2, 1000)
    try:
        link.send(offer(link, first))
        first.plane(1, SHAPE, "uint16")[:] = 3
        link.frame(3, place=1)
        link.send(offer(link, second))
        link.receive(wire.Taken)
        link.load()
        link.result(3)
        assert (first.plane(1, SHAPE, "uint16") == 4).all()
        assert link.receive(wire.Taken)[0].name == second.name
    finally:
        first.remove()
        second.remove()


@pytest.mark.parametrize("place", [-1, 2, 2**60])
def test_a_place_that_there_is_not_is_a_fault(play: Callable[[Told], Played], place: int) -> None:
    link = play(Told())
    link.frame(0, place=place)
    assert "no memory is shared" in link.fault(0).reason
    arena = Arena.make(2, 1000)
    try:
        link.send(offer(link, arena))
        link.receive(wire.Taken)
        link.frame(1, place=place)
        assert "does not fit" in link.fault(1).reason
        link.frame(2, (100, 100), place=0)
        assert "does not fit" in link.fault(2).reason
    finally:
        arena.remove()
    link.frame(3)
    link.load()
    link.result(3)


def test_memory_that_cannot_be_opened_is_said(play: Callable[[Told], Played]) -> None:
    link = play(Told())
    arena = Arena.make(2, 1000)
    arena.remove()
    link.send(offer(link, arena))
    taken, _ = link.receive(wire.Taken)
    assert taken.trouble
    assert taken.name == arena.name
    link.frame(0)
    link.load()
    link.result(0)


def test_a_worker_whose_gpu_fails_leaves_with_code_1(package: Package, tmp_path: Path) -> None:
    code = (
        "import sys; from engine import worker; from engine.gpu import GpuError; "
        "from tests.played_link import Told; told = Told(); told.may_load.set(); "
        "told.trouble['start', 3] = GpuError('fell off the bus'); "
        "told.close = lambda: print('closed'); "
        "sys.exit(worker.main(sys.argv[1:], lambda given: told))"
    )
    address = f"ipc://{tmp_path / 'link'}"
    given = ["--address", address, "--model", str(package.folder)]
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.linger = 0
        router.bind(address)
        process = subprocess.Popen(
            [sys.executable, "-c", code, *given],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        heard: list[wire.Message] = []
        while not heard or not isinstance(heard[-1], wire.Bye):
            assert router.poll(60_000)
            identity, *parts = router.recv_multipart()
            heard.append(wire.decode(parts)[0])
            if isinstance(heard[-1], wire.Hello):
                header = FrameHeader(run="r", seq=3, axes={}, shape=SHAPE, dtype="uint16")
                job = wire.Job(epoch=heard[-1].epoch, frame=header, offset=0, scale=1)
                pixels = np.full(SHAPE, 3, np.uint16)
                router.send_multipart([identity, *wire.encode(job, pixels)])
        out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert any(isinstance(m, wire.Fault) and "bus" in m.reason for m in heard)
    assert "fell off the bus" in err
    assert "closed" not in out, "releasing what a broken context holds may hang"


def _reject(package: Package, shape: tuple[int, int]) -> None:
    raise RejectedError(f"{shape} does not fit on this GPU")


def _refuse(package: Package, shape: tuple[int, int]) -> None:
    raise PackageError("accuracy gate: 31.0 dB")
