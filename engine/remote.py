"""Keeps one worker at the service of a recorder on another host: what `refocus worker` runs.

Recorders come and go, one a run; this stays. It knocks first, with the worker's key alone: only
where a recorder opens is the worker's process started, which loads the generator and the GPU. When
that leaves, because the run has ended or the recorder is gone, it knocks again.

Why a recorder does not open is said once, until it changes. Nothing here gives up on a recorder:
one that refuses today (another generator, a right taken away) may not tomorrow. What none can
mend ends it: a runtime that cannot be had, a model package that is damaged.

A recorder on another host cannot kill a worker that hangs: it has to end itself, also where it
hangs while it compiles (warmup_timeout_ms).
"""

import contextlib
import re
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import zmq
from zmq.utils.monitor import parse_monitor_message

from engine import launch, model_store
from engine.launch import FIRST_PAUSE_S, Order, Pauses
from refocus import keys
from refocus.errors import RefusedError, SettingsError
from refocus.settings import Settings

KNOCK_S = 3.0
"""A recorder that is there opens within milliseconds."""
KNOCK_AGAIN_S = 2.0
REFUSED_PAUSE_S = 30.0
POLL_S = 0.05
POLL_MS = 50
STOP_S = 3.0
"""How long a worker that was asked to stop may take before it is killed."""

_ADDRESS = re.compile(r"tcp://[0-9A-Za-z_.-]+:([0-9]{1,5})")
_EVENTS = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)


@dataclass(frozen=True, slots=True)
class Service:
    """Which recorder is served, and with what."""

    address: str
    """tcp://HOST:PORT"""
    key_file: Path
    settings: Settings
    device: int
    shape: tuple[int, int] | None
    """Of frames (y, x) to get ready for before the first one."""


def check(service: Service) -> None:
    """Raises SettingsError, PackageError for what no recorder can mend."""
    found = _ADDRESS.fullmatch(service.address)
    if not found or not 0 < int(found[1]) < 2**16:
        raise SettingsError(
            f"--connect wants tcp://HOST:PORT, the recorder's computer and the port of its [link] "
            f"address, got {service.address!r}"
        )
    if service.settings.engine.runtime == "none":
        raise SettingsError("a worker with engine none has nothing to do; choose another engine")
    keys.read_worker(service.key_file)
    model_store.find(service.settings.engine.generator)


def serve(service: Service, stop: threading.Event, say: Callable[[str], None]) -> None:
    """Serves until *stop* is set; *say* is told in plain lines what happens.

    Raises SettingsError, PackageError for what no recorder can mend.
    """
    check(service)
    pauses = Pauses()
    told = ""
    while not stop.is_set():
        refusal = knock(service.address, keys.read_worker(service.key_file), stop)
        if refusal:
            if refusal != told and not stop.is_set():
                say(f"{refusal}; trying on")
            told = refusal
            stop.wait(KNOCK_AGAIN_S)
            continue
        told = ""
        say(f"serving the recorder at {service.address}")
        started = time.monotonic()
        code = _one_life(service, stop)
        if stop.is_set():
            return
        if code == SettingsError.exit_code:
            raise SettingsError("the worker cannot run here, for the reason above")
        if code == RefusedError.exit_code:  # which it has said itself
            stop.wait(REFUSED_PAUSE_S)
        elif code == 0:
            say("the recorder has no more frames, or is gone; waiting for the next one")
            stop.wait(FIRST_PAUSE_S)
        else:
            pause_s = pauses.after(time.monotonic() - started)
            say(f"the worker died (exit code {code}); it is started again in {pause_s:g} s")
            stop.wait(pause_s)


def knock(address: str, key: keys.WorkerKey, stop: threading.Event) -> str:
    """Why the recorder at *address* does not open to *key*, or nothing: it does."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.linger = 0
    keys.show(socket, key)
    monitor = socket.get_monitor_socket(_EVENTS)
    try:
        socket.connect(address)
        return _opened(address, key, monitor, stop)
    finally:
        socket.disable_monitor()
        monitor.close(0)
        socket.close(0)
        context.term()


def _opened(
    address: str, key: keys.WorkerKey, monitor: "zmq.Socket[bytes]", stop: threading.Event
) -> str:
    refusal = (
        f"nobody answers at {address}: no recorder with keys runs there, or a firewall is shut"
    )
    deadline = time.monotonic() + KNOCK_S
    while time.monotonic() < deadline and not stop.is_set():
        if not monitor.poll(POLL_MS):
            continue
        event = parse_monitor_message(monitor.recv_multipart())["event"]
        match event:
            case zmq.EVENT_HANDSHAKE_SUCCEEDED:
                return ""
            case zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                return (
                    f"the recorder at {address} does not let worker {key.name} in: its key is "
                    "not, or no longer, in the recorder's key set (refocus keys list, there)"
                )
            case zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
                return f"what listens at {address} uses no keys: it is no recorder for other hosts"
            case _:  # it hung up, which may also mean that it is just leaving: look on
                refusal = (
                    f"what listens at {address} hung up: it is not the recorder that the key of "
                    f"worker {key.name} was made for (or that has made new keys since)"
                )
    return refusal


def _one_life(service: Service, stop: threading.Event) -> int:
    """Runs one worker to its end; returns its exit code (negative: the signal)."""
    process = launch.start(_order(service))
    assert process.stdin is not None
    try:
        while process.poll() is None and not stop.wait(POLL_S):
            pass
        with contextlib.suppress(OSError):
            process.stdin.close()
        return process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        return 1
    finally:
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # deep in a driver: left to the system
            process.wait(STOP_S)


def _order(service: Service) -> Order:
    settings = service.settings
    return Order(
        address=service.address,
        # Looked up for every life: another generator may have been put to use meanwhile.
        model=model_store.find(settings.engine.generator),
        runtime=settings.engine.runtime,
        device=service.device,
        threads=settings.engine.threads,
        beat_ms=settings.link.beat_ms,
        warm=service.shape,
        key_file=service.key_file,
        ready_ms=settings.engine.warmup_timeout_ms,
    )
