"""Who gets past the link's door for other hosts: only whoever shows a key that it lets in."""

import contextlib
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import psutil
import pytest
import zmq
from zmq.utils.monitor import parse_monitor_message

from acquire import door
from acquire.engine_side import check_address
from engine import remote
from engine.package import Package
from refocus import keys, wire
from refocus.errors import SettingsError
from refocus.frame import RefocusOutcome
from refocus.keys import WorkerKey
from refocus.settings import LinkSettings, Settings
from tests.branch import Branch, hello_of
from tests.other_host import OtherHost, far_settings, free_port, remotes

FAILED = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)


class House:
    """A recorder that lets worker "good" in, with no worker of its own."""

    def __init__(self, folder: Path, package: Package, devices: tuple[int, ...]) -> None:
        self.keys = folder / "keys"
        keys.new(self.keys)
        self.good = keys.read_worker(keys.add(self.keys, "good"))
        self.port = free_port()
        self.address = f"tcp://127.0.0.1:{self.port}"
        chosen = far_settings(package, self.keys, port=self.port, devices=devices)
        self.branch = Branch(chosen, folder / "run")


@pytest.fixture
def house(tmp_path: Path, negated: Package) -> Iterator[Callable[..., House]]:
    opened: list[House] = []

    def open_house(devices: tuple[int, ...] = ()) -> House:
        opened.append(House(tmp_path, negated, devices))
        return opened[-1]

    yield open_house
    for one in opened:
        one.branch.close()


@pytest.fixture
def context() -> Iterator["zmq.Context[zmq.Socket[bytes]]"]:
    made: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield made
    made.term()


def caller(context: "zmq.Context[zmq.Socket[bytes]]", key: WorkerKey | None) -> "zmq.Socket[bytes]":
    made = context.socket(zmq.DEALER)
    made.linger = 0
    if key is not None:
        keys.show(made, key)
    return made


def is_kept_out(house: House, guest: "zmq.Socket[bytes]", hello: wire.Hello) -> None:
    monitor = guest.get_monitor_socket(FAILED | zmq.EVENT_HANDSHAKE_SUCCEEDED)
    guest.connect(house.address)
    guest.send_multipart(wire.encode(hello))
    assert monitor.poll(10_000)
    event = parse_monitor_message(monitor.recv_multipart())["event"]
    guest.disable_monitor()
    monitor.close(0)
    assert event & FAILED
    house.branch.send()
    house.branch.drain(lambda: not house.branch.intake._queue.qsize())
    assert not guest.poll(50)
    assert remotes(house.branch) == []


def hear(connection: socket.socket, words: bytes) -> None:
    heard = b""
    while words not in heard:
        more = connection.recv(4096)
        assert more, f"hung up after {heard!r}"
        heard += more


def test_a_key_that_is_let_in_is_all_the_proof_it_takes(
    house: Callable[..., House], context: "zmq.Context[zmq.Socket[bytes]]"
) -> None:
    h = house()
    hello = msgspec.structs.replace(hello_of(h.branch, "g"), secret="")
    with caller(context, h.good) as guest:
        guest.connect(h.address)
        guest.send_multipart(wire.encode(hello))
        h.branch.drain(lambda: remotes(h.branch) == ["good"])
        seq = h.branch.send()
        assert guest.poll(5000)
        job, pixels = wire.decode(guest.recv_multipart())
    assert isinstance(job, wire.Job)
    assert job.frame.seq == seq
    assert pixels is not None, "never through shared memory"


@pytest.mark.parametrize("wrong", ["no key", "unknown key", "another recorder's key"])
def test_nobody_else_gets_past_the_handshake(
    house: Callable[..., House],
    context: "zmq.Context[zmq.Socket[bytes]]",
    tmp_path: Path,
    wrong: str,
) -> None:
    h = house()
    keys.new(tmp_path / "other")
    stranger = keys.read_worker(keys.add(tmp_path / "other", "good"))
    key = {
        "no key": None,
        "unknown key": WorkerKey("good", stranger.public, stranger.secret, h.good.recorder),
        "another recorder's key": WorkerKey(
            "good", h.good.public, h.good.secret, stranger.recorder
        ),
    }[wrong]
    with caller(context, key) as guest:
        is_kept_out(h, guest, hello_of(h.branch, "guest"))


def test_knocking_says_why_nobody_opens(house: Callable[..., House], tmp_path: Path) -> None:
    h = house()
    keys.new(tmp_path / "other")
    stranger = keys.read_worker(keys.add(tmp_path / "other", "far"))
    never = threading.Event()
    assert remote.knock(h.address, h.good, never) == ""
    assert "hung up" in remote.knock(h.address, stranger, never)
    unknown = WorkerKey("far", stranger.public, stranger.secret, h.good.recorder)
    assert "does not let worker far in" in remote.knock(h.address, unknown, never)
    assert "nobody answers" in remote.knock(f"tcp://127.0.0.1:{free_port()}", h.good, never)
    assert "uses no keys" in remote.knock(h.branch.engine.link.address, h.good, never)


def test_a_key_is_let_in_as_soon_as_it_is_added(house: Callable[..., House]) -> None:
    h = house()
    late = keys.read_worker(keys.add(h.keys, "late"))
    never = threading.Event()
    h.branch.drain(lambda: not remote.knock(h.address, late, never))
    keys.remove(h.keys, "late")
    h.branch.drain(lambda: "does not let" in remote.knock(h.address, late, never))
    assert remote.knock(h.address, h.good, never) == ""


def test_a_key_for_other_hosts_is_no_secret_of_this_one(house: Callable[..., House]) -> None:
    """A local peer may claim any User-Id in its greeting: nobody is asked about that."""
    h = house()
    hello = msgspec.structs.replace(hello_of(h.branch, "liar"), secret="guessed")
    with socket.socket(socket.AF_UNIX) as liar:
        liar.settimeout(10)
        liar.connect(h.branch.engine.link.address.removeprefix("ipc://"))
        liar.sendall(b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32))
        hear(liar, b"NULL")
        properties = {b"Socket-Type": b"DEALER", b"User-Id": b"guessed good"}
        ready = b"\x05READY" + b"".join(
            bytes([len(name)]) + name + struct.pack(">I", len(value)) + value
            for name, value in properties.items()
        )
        liar.sendall(b"\x04" + bytes([len(ready)]) + ready)
        kind, header = wire.encode(hello)
        liar.sendall(b"\x01" + bytes([len(kind)]) + kind)
        liar.sendall(b"\x02" + struct.pack(">Q", len(header)) + header)
        hear(liar, b"does not know the secret")
    assert h.branch.engine.link.workers == 0


def test_another_protocol_is_refused_in_words(
    house: Callable[..., House], context: "zmq.Context[zmq.Socket[bytes]]"
) -> None:
    h = house()
    hello = msgspec.structs.replace(hello_of(h.branch, "guest"), protocol=wire.PROTOCOL + 1)
    with caller(context, h.good) as guest:
        guest.connect(h.address)
        guest.send_multipart(wire.encode(hello))
        assert guest.poll(5000)
        answer, _ = wire.decode(guest.recv_multipart())
    assert isinstance(answer, wire.Bye)
    assert f"protocol {wire.PROTOCOL + 1}" in answer.refused


def test_a_flood_of_strangers_stops_no_worker_and_takes_no_file_from_the_writer(
    house: Callable[..., House], tmp_path: Path, negated: Package
) -> None:
    h = house()
    key = h.keys / "worker-good.key"
    with contextlib.closing(OtherHost(key, h.port, negated, tmp_path / "host")):
        h.branch.drain(lambda: remotes(h.branch) == ["good"])
        process = psutil.Process()
        before = process.num_fds()
        ours = most = 0
        with contextlib.ExitStack() as strangers:
            for number in range(600):
                stranger = strangers.enter_context(socket.create_connection(("127.0.0.1", h.port)))
                ours += 1
                with contextlib.suppress(OSError):  # cut off already
                    stranger.send(b"GET / HTTP/1.1\r\n\r\n" if number % 3 == 0 else b"\xff")
                if number % 60 == 0:
                    seq = h.branch.send()
                    h.branch.drain(h.branch.answered(seq))
                    assert h.branch.answers[seq][0].outcome is RefocusOutcome.REFOCUSED
                    most = max(most, process.num_fds() - ours)
        assert most - before <= 2 * door.MOST_CONNECTIONS
        assert remotes(h.branch) == ["good"]


def test_silent_strangers_are_cut_off(house: Callable[..., House]) -> None:
    h = house()
    with contextlib.ExitStack() as stack:
        strangers = [
            stack.enter_context(socket.create_connection(("127.0.0.1", h.port), timeout=10))
            for _ in range(2 * door.MOST_CONNECTIONS)
        ]
        for stranger in strangers:
            while stranger.recv(4096):  # our greeting, then the end
                pass
    assert not remote.knock(h.address, h.good, threading.Event())


@pytest.mark.skipif(os.name != "posix", reason="descriptors of POSIX")
def test_a_file_that_has_got_a_connection_s_number_stays_as_it_is(
    house: Callable[..., House], tmp_path: Path
) -> None:
    door = house().branch.engine.link._router._door
    assert door is not None
    with (tmp_path / "plane").open("wb") as file:
        door._cut_off(file.fileno())
        before = psutil.Process().num_fds()
        for _ in range(20):
            door._cut_off(file.fileno())
        assert psutil.Process().num_fds() < before + 20, "no duplicate stays"
        file.write(b"raw")
    assert (tmp_path / "plane").read_bytes() == b"raw"


def test_a_port_that_is_taken_costs_the_others_only(tmp_path: Path, negated: Package) -> None:
    keys.new(tmp_path / "keys")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        chosen = far_settings(negated, tmp_path / "keys", port=port, devices=(0,))
        with contextlib.closing(Branch(chosen, tmp_path / "run")) as b:
            assert "another recorder, or refocus fill" in b.trouble[0]
            b.ready()
            seq = b.send()
            b.drain(b.answered(seq))
            assert b.answers[seq][0].outcome is RefocusOutcome.REFOCUSED


def test_what_may_be_opened_is_checked_before_a_run(tmp_path: Path) -> None:
    def check(address: str, folder: str) -> None:
        check_address(Settings(link=LinkSettings(address=address, keys=folder)))

    with pytest.raises(SettingsError, match="refocus keys --help"):
        check("tcp://0.0.0.0:5577", "")
    with pytest.raises(SettingsError, match="refocus keys new"):
        check("tcp://0.0.0.0:5577", str(tmp_path))
    keys.new(tmp_path)
    check("tcp://0.0.0.0:5577", str(tmp_path))
    for wrong in ("auto", "tcp://0.0.0.0", "tcp://microscope:5577", "0.0.0.0:5577"):
        with pytest.raises(SettingsError, match="wanted tcp://IPv4:PORT"):
            check(wrong, str(tmp_path))
    (tmp_path / "recorder.key").chmod(0o644)
    with pytest.raises(SettingsError, match="chmod 600"):
        check("tcp://0.0.0.0:5577", str(tmp_path))
