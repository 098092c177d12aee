"""What a key is worth once it was taken out of the key set, and while that cannot be read."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import zmq

from acquire import link
from acquire.door import Rights
from engine.package import Package
from refocus import keys, wire
from refocus.frame import RefocusOutcome
from refocus.keys import WorkerKey
from tests.branch import Branch, hello_of
from tests.other_host import far_settings, free_port, remotes

pytestmark = pytest.mark.skipif(os.name != "posix", reason="links and pipes of POSIX")


class Lab:
    """A recorder with a key set, and a guest on another host that the test plays."""

    def __init__(self, folder: Path, package: Package, devices: tuple[int, ...]) -> None:
        self.keys = folder / "keys"
        keys.new(self.keys)
        self.key = keys.read_worker(keys.add(self.keys, "gpu"))
        port = free_port()
        chosen = far_settings(package, self.keys, port=port, devices=devices)
        self.branch = Branch(chosen, folder / "run")
        self.notes: list[str] = []
        self.branch.intake.note = lambda note: note(self)  # type: ignore[method-assign,arg-type]
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.guest = self._context.socket(zmq.DEALER)
        self.guest.linger = 0
        keys.show(self.guest, self.key)
        self.guest.connect(f"tcp://127.0.0.1:{port}")

    def note_event(self, kind: str, **fields: object) -> None:
        """As the run on disk would."""
        if kind in ("worker_ready", "worker_gone"):
            self.notes.append(kind)

    def note_scaling(self, *scaling: object) -> None:
        """As the run on disk would."""

    def say_hello(self, epoch: str) -> None:
        hello = hello_of(self.branch, epoch)
        self.guest.send_multipart(wire.encode(msgspec.structs.replace(hello, secret="")))

    def beat(self, epoch: str) -> None:
        self.guest.send_multipart(wire.encode(wire.Beat(epoch=epoch)))

    def enter(self) -> None:
        self.say_hello("guest")
        self.branch.drain(lambda: remotes(self.branch) == ["gpu"])

    def until_refused(self, epoch: str = "guest") -> wire.Bye:
        """Lets the guest's heart beat until the recorder says BYE."""
        heard: list[wire.Message] = []

        def refused() -> bool:
            self.beat(epoch)
            while self.guest.poll(0):
                heard.append(wire.decode(self.guest.recv_multipart())[0])
            return any(isinstance(message, wire.Bye) for message in heard)

        self.branch.drain(refused)
        assert not any(isinstance(message, wire.Job) for message in heard)
        return next(message for message in heard if isinstance(message, wire.Bye))

    def close(self) -> None:
        self.guest.close()
        self._context.term()
        self.branch.close()


@pytest.fixture
def open_lab(tmp_path: Path, negated: Package) -> Iterator[Callable[..., Lab]]:
    with contextlib.ExitStack() as stack:

        def open_one(devices: tuple[int, ...] = ()) -> Lab:
            return stack.enter_context(contextlib.closing(Lab(tmp_path, negated, devices)))

        yield open_one


def test_a_name_given_to_a_new_key_is_no_right_of_the_old_one(open_lab: Callable[..., Lab]) -> None:
    lab = open_lab()
    lab.enter()
    keys.remove(lab.keys, "gpu")
    keys.add(lab.keys, "gpu")
    assert lab.until_refused().refused == link.NO_RIGHT
    assert remotes(lab.branch) == []
    lab.say_hello("again")  # over the connection that was opened with a right
    assert lab.until_refused("again").refused == link.NO_RIGHT
    assert remotes(lab.branch) == []


def test_who_has_no_right_any_more_writes_nothing_into_the_run(
    open_lab: Callable[..., Lab], caplog: pytest.LogCaptureFixture
) -> None:
    lab = open_lab()
    lab.enter()
    keys.remove(lab.keys, "gpu")
    lab.until_refused()
    before = list(lab.notes)
    caplog.clear()
    for number in range(100):
        lab.say_hello(f"flood {number}")
        if number % 20 == 19:
            lab.until_refused()
    assert lab.notes == before
    assert len(caplog.records) == 1, "refused once in words"


def test_a_worker_that_introduces_itself_again_and_again_is_one_worker(
    open_lab: Callable[..., Lab],
) -> None:
    lab = open_lab()
    lab.enter()
    seq = lab.branch.send()
    assert lab.guest.poll(5000)
    for number in range(50):
        lab.say_hello(f"flood {number}")
    lab.branch.drain(lambda: "flood 49" in lab.branch.engine.link._roster.peers)
    assert remotes(lab.branch) == ["gpu"]
    assert lab.notes == ["worker_ready"]
    lab.branch.drain(lab.branch.answered(seq))
    assert lab.branch.answers[seq][0].outcome is RefocusOutcome.LOST
    assert "introduced itself again" in lab.branch.answers[seq][0].reason


def test_comings_and_goings_do_not_fill_the_journal(
    open_lab: Callable[..., Lab], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "MOST_NOTES", 5)
    lab = open_lab()
    for number in range(6):
        lab.say_hello(f"visit {number}")
        lab.branch.drain(lambda: remotes(lab.branch) == ["gpu"])
        lab.guest.send_multipart([b"FRAME", b"rubbish"])
        lab.branch.drain(lambda: remotes(lab.branch) == [])
    assert len(lab.notes) == 5


def test_a_key_set_that_cannot_be_read_changes_nothing_and_is_said_once(
    open_lab: Callable[..., Lab], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("acquire.door.LOOK_AGAIN_S", 0.02)
    lab = open_lab(devices=(0,))
    lab.branch.ready()
    workers = lab.keys / "workers"
    workers.rename(lab.keys / "moved")
    workers.symlink_to(workers)  # a loop: to read it is an error of the system
    lab.branch.drain(lambda: bool(lab.branch.trouble))
    seq = lab.branch.send()
    lab.branch.drain(lab.branch.answered(seq))
    assert lab.branch.answers[seq][0].outcome is RefocusOutcome.REFOCUSED
    lab.enter()
    workers.unlink()
    (lab.keys / "moved").rename(workers)
    late = keys.read_worker(keys.add(lab.keys, "late"))
    rights = lab.branch.engine.link._router._door._rights  # type: ignore[union-attr]
    lab.branch.drain(lambda: rights.name(late.public) == "late")
    (line,) = lab.branch.trouble
    assert "keep the rights that they had" in line


def test_a_key_set_that_hangs_keeps_no_worker_and_no_end_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("acquire.door.LOOK_AGAIN_S", 0.02)
    keys.new(tmp_path / "keys")
    key: WorkerKey = keys.read_worker(keys.add(tmp_path / "keys", "gpu"))
    told: list[str] = []
    rights = Rights(tmp_path / "keys", told.append)
    hanging = tmp_path / "keys" / "workers" / "hanging.pub"
    os.mkfifo(hanging)  # whoever opens it to read waits for one who writes
    writer = None
    try:
        while writer is None:
            with contextlib.suppress(OSError):  # nobody waits there yet
                writer = os.open(hanging, os.O_WRONLY | os.O_NONBLOCK)
        assert rights.name(key.public) == "gpu"
        monkeypatch.setattr("acquire.door.CLOSE_S", 0.05)
        rights.close()
        assert rights._thread.is_alive()
    finally:
        if writer is not None:
            os.close(writer)  # the end of the file: it hangs no more
        rights._thread.join()
    assert told == []
