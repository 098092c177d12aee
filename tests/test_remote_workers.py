"""Workers on other hosts: frames are shared, and whatever happens to one costs only its frames.

Every worker is a real process that comes in over tcp with its key; loopback stands in for the wire.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import acquire.fill
from acquire.fill import fill
from acquire.peers import Peer
from engine.package import Package
from refocus import keys
from refocus.frame import RefocusOutcome
from store.reader import open_run
from tests import hanging_package, identity_package
from tests.branch import Branch
from tests.other_host import Cable, OtherHost, far_settings, free_port, remotes
from tests.recording import assert_raw, plane, recorder, shoot
from tests.unfilled import make_run, times

START_S = 40.0
"""Three Python processes start on two cores."""


class Lab:
    """A recorder's key set and port, and the other hosts."""

    def __init__(self, folder: Path, package: Package) -> None:
        self.folder = folder
        self.package = package
        self.keys = folder / "keys"
        self.port = free_port()
        keys.new(self.keys)
        self.open: list[Branch | OtherHost | Cable] = []
        self.runs = 0

    def host(self, name: str, *, port: int = 0, package: Package | None = None) -> OtherHost:
        """A new host with its own key."""
        key = keys.add(self.keys, name)
        folder = self.folder / f"host-{name}"
        host = OtherHost(key, port or self.port, package or self.package, folder)
        self.open.append(host)
        return host

    def cable(self) -> Cable:
        cable = Cable(self.port)
        self.open.append(cable)
        return cable

    def branch(self, devices: tuple[int, ...] = (), **engine: int) -> Branch:
        chosen = far_settings(self.package, self.keys, port=self.port, devices=devices, **engine)
        self.runs += 1
        b = Branch(chosen, self.folder / f"run{self.runs}")
        self.open.append(b)
        return b

    def close(self, one: Branch | OtherHost | Cable) -> None:
        self.open.remove(one)
        one.close()


@pytest.fixture
def open_lab(tmp_path: Path) -> Iterator[Callable[[Package], Lab]]:
    made: list[Lab] = []

    def open_one(package: Package) -> Lab:
        made.append(Lab(tmp_path, package))
        return made[-1]

    yield open_one
    for lab in made:
        for one in list(reversed(lab.open)):
            lab.close(one)


@pytest.fixture
def lab(open_lab: Callable[[Package], Lab], negated: Package) -> Lab:
    return open_lab(negated)


def wait_until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + START_S
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def refocuses(b: Branch, count: int = 1) -> None:
    for _ in range(count):
        seq = b.send()
        b.drain(b.answered(seq))
        assert b.answers[seq][-1].outcome is RefocusOutcome.REFOCUSED


def test_local_and_remote_workers_share_the_frames(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = [lab.host("one"), lab.host("two")]
    b = lab.branch(devices=(0,))
    b.drain(lambda: remotes(b) == ["one", "two"] and b.engine.link.workers == 3, START_S)
    made_by = set()
    exchange = b.engine.link._exchange
    result = exchange.result

    def noted(peer: Peer, *rest: Any) -> None:
        made_by.add(peer.remote.name if peer.remote else "")
        result(peer, *rest)

    monkeypatch.setattr(exchange, "result", noted)
    while made_by != {"", "one", "two"}:
        sent = [b.send() for _ in range(4)]
        b.drain(b.answered(*sent))
    assert set(b.outcomes()) <= {"REFOCUSED", "SKIPPED"}
    assert all(len(given) == 1 for given in b.answers.values())
    assert all(host.process.poll() is None for host in hosts)


def test_a_run_stays_in_order_while_a_remote_worker_is_killed(lab: Lab) -> None:
    host = lab.host("one")
    chosen = far_settings(lab.package, lab.keys, port=lab.port, devices=(0,))
    taken = [plane() for _ in range(24)]
    with recorder(lab.folder / "run", chosen, expected_shape=(32, 48)) as r:
        assert r.wait_for_engine(START_S)
        engine = r._engine
        assert engine is not None
        wait_until(lambda: engine.link.workers == 2)
        for number, pixels in enumerate(taken):
            shoot(r, pixels)
            if number == 12:
                os.kill(host.process.pid, signal.SIGKILL)
    fill(lab.folder / "run", chosen)
    run = open_run(lab.folder / "run")
    assert_raw(run, taken)
    (scaling,) = run.notes.scalings.values()
    for entry in run.frames():
        assert entry.refocus is not None
        assert entry.refocus.outcome == RefocusOutcome.REFOCUSED
        mirrored = np.clip(2 * scaling.offset - taken[entry.seq].astype(float), 0, None)
        refocused = run.refocused(entry.seq)
        assert refocused is not None
        assert np.abs(refocused - mirrored).max() <= 2, "each twin beside its own raw plane"


def stopped(host: OtherHost, cable: Cable) -> None:
    (worker,) = host.workers
    worker.suspend()


def killed(host: OtherHost, cable: Cable) -> None:
    cable.hang()  # so that it dies with the frames that it has been sent
    (worker,) = host.workers
    worker.kill()


def pulled(host: OtherHost, cable: Cable) -> None:
    cable.pull()


def hung(host: OtherHost, cable: Cable) -> None:
    cable.hang()


def mended(host: OtherHost, cable: Cable, how: Callable[[OtherHost, Cable], None]) -> None:
    if how is pulled:
        cable.plug()
    elif how is stopped:
        (worker,) = host.workers
        worker.resume()
    else:
        cable.go_on()


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("how", [stopped, killed, pulled, hung], ids=lambda how: how.__name__)
def test_what_happens_to_a_remote_worker_costs_only_its_frames(
    lab: Lab, how: Callable[[OtherHost, Cable], None]
) -> None:
    cable = lab.cable()
    host = lab.host("far", port=cable.port)
    b = lab.branch()
    b.drain(lambda: remotes(b) == ["far"], START_S)
    refocuses(b, 3)
    how(host, cable)
    sent = [b.send() for _ in range(3)]
    b.drain(lambda: remotes(b) == [])
    mended(host, cable, how)
    b.drain(lambda: remotes(b) == ["far"], START_S)
    b.drain(b.answered(*sent))
    refocuses(b, 3)
    assert set(b.outcomes()) <= {"REFOCUSED", "SKIPPED", "LOST", "LATE"}
    firsts = {b.answers[seq][0].outcome.name for seq in sent}
    if how in (stopped, hung):
        assert "LOST" in firsts
        assert any("silent" in given[0].reason for given in b.answers.values())


def test_a_remote_worker_that_hangs_ends_itself_and_is_replaced(
    open_lab: Callable[[Package], Lab], tmp_path: Path
) -> None:
    lab = open_lab(hanging_package.make(tmp_path / "hanging"))
    host = lab.host("far")
    b = lab.branch(frame_timeout_ms=500)
    b.drain(lambda: remotes(b) == ["far"], START_S)
    (hung_one,) = host.workers
    seq = b.send()
    b.drain(b.answered(seq))
    assert b.answers[seq][0].outcome is RefocusOutcome.LOST
    assert "hung" in b.answers[seq][0].reason
    b.drain(lambda: not hung_one.is_running(), START_S)
    b.drain(lambda: remotes(b) == ["far"], START_S)


def test_the_next_recorder_is_served_without_a_word(lab: Lab) -> None:
    lab.host("far")
    for _ in range(2):
        b = lab.branch()
        b.drain(lambda: remotes(b) == ["far"], START_S)  # noqa: B023 - drained before the next
        refocuses(b)
        lab.close(b)


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_ctrl_c_ends_a_worker_that_works_and_one_that_waits(lab: Lab) -> None:
    working, waiting = lab.host("working"), lab.host("waiting", port=free_port())
    b = lab.branch()
    b.drain(lambda: remotes(b) == ["working"], START_S)
    b.drain(lambda: "nobody answers" in waiting.said, START_S)
    (child,) = working.workers
    for host in (working, waiting):
        host.process.send_signal(signal.SIGINT)
        assert host.process.wait(10) == 130
    assert not child.is_running()
    b.drain(lambda: remotes(b) == [])


def test_a_worker_with_another_generator_is_told_both_and_waits(lab: Lab, tmp_path: Path) -> None:
    other = identity_package.make(tmp_path / "other", name="other")
    host = lab.host("far", package=other)
    b = lab.branch()
    b.drain(lambda: "refused this worker" in host.said, START_S)
    b.drain(lambda: host.workers == [])
    assert "(other 0)" in host.said
    assert f"wanted negated 0 ({lab.package.hash[:12]})" in host.said
    refused = [line for line in host.said.splitlines() if "refused" in line]
    assert len(refused) == 1
    assert host.process.poll() is None
    assert remotes(b) == []


def test_a_right_that_is_taken_away_ends_at_once_and_can_be_given_back(lab: Lab) -> None:
    host = lab.host("far")
    b = lab.branch()
    b.drain(lambda: remotes(b) == ["far"], START_S)
    public = lab.keys / "workers" / "far.pub"
    right = public.read_bytes()
    public.unlink()  # as refocus keys remove does, which takes the secret too
    b.drain(lambda: remotes(b) == [])
    b.drain(lambda: "taken out of the recorder's key set" in host.said)
    seq = b.send()
    assert b.engine.link.workers == 0
    lab.close(host)
    public.write_bytes(right)
    again = OtherHost(lab.keys / "worker-far.key", lab.port, lab.package, lab.folder / "again")
    lab.open.append(again)
    b.drain(lambda: remotes(b) == ["far"], START_S)
    b.drain(b.answered(seq))


def test_a_worker_that_can_never_run_says_so_and_ends(lab: Lab, tmp_path: Path) -> None:
    damaged = identity_package.make(tmp_path / "damaged")
    (damaged.folder / "generator.onnx").write_bytes(b"damaged")
    host = lab.host("far", package=damaged)
    b = lab.branch()
    b.drain(lambda: host.process.poll() is not None, START_S)
    assert host.process.returncode == 2
    assert "altered" in host.said
    assert remotes(b) == []


def test_filling_does_not_wait_for_ever_for_a_worker_from_elsewhere(
    negated: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path / "run", negated, times(3))
    keys.new(tmp_path / "keys")
    chosen = far_settings(negated, tmp_path / "keys", port=free_port(), devices=())
    monkeypatch.setattr(acquire.fill, "GUEST_S", 0.5)
    filled = fill(tmp_path / "run", chosen)
    assert (filled.filled, filled.left) == (0, 3)
    assert any("no worker came to tcp://127.0.0.1:" in line for line in filled.trouble)
