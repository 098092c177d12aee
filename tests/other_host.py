"""Another host, played on loopback: its worker is a real process, its cable can be pulled."""

import contextlib
import select
import socket
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import psutil

from engine.package import Package
from refocus import keys
from refocus.settings import Settings
from tests.branch import Branch, settings

BEAT_MS = 200


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def far_settings(
    package: Package, folder: Path, *, port: int, devices: tuple[int, ...], **engine: int
) -> Settings:
    """Settings of a recorder that lets workers in whose keys are in *folder*."""
    chosen = settings(package, **engine)
    link = msgspec.structs.replace(
        chosen.link, address=f"tcp://127.0.0.1:{port}", keys=str(folder), beat_ms=BEAT_MS
    )
    where = msgspec.structs.replace(chosen.engine, devices=devices)
    return msgspec.structs.replace(chosen, link=link, engine=where)


def remotes(b: Branch) -> list[str]:
    """Names of the workers on other hosts that the link has now."""
    peers = list(b.engine.link._roster.peers.values())
    return sorted(peer.remote.name for peer in peers if peer.remote)


class OtherHost:
    """`refocus worker` with the key file *key*, for the recorder at *port*."""

    def __init__(self, key: Path, port: int, package: Package, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.toml").write_text(f"[link]\nbeat_ms = {BEAT_MS}\n[engine]\nthreads = 1\n")
        self.name = keys.read_worker(key).name
        self._log = folder / "said"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "refocus.cli.main", "worker"),
                    *("--connect", f"tcp://127.0.0.1:{port}", "--keys", str(key)),
                    *("--generator", str(package.folder), "--engine", "openvino"),
                    *("--config", str(folder / "config.toml")),
                ],
                stdin=subprocess.DEVNULL,
                stderr=log,
            )

    @property
    def said(self) -> str:
        return self._log.read_text()

    @property
    def workers(self) -> list[psutil.Process]:
        """The process that computes, as long as there is one."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self.process.pid).children()
        return []

    def close(self) -> None:
        """However the test has left it: nothing of it stays."""
        children = self.workers
        self.process.kill()
        self.process.wait()
        for child in children:  # stopped ones, too
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()


class Cable:
    """From `port` to *far*: it can be pulled, and it can hang, which neither end is told."""

    def __init__(self, far: int) -> None:
        self._far = far
        self.port = free_port()
        self._server: socket.socket | None = None
        self._ends: dict[socket.socket, socket.socket] = {}
        self._hangs = threading.Event()
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self.plug()
        self._thread = threading.Thread(target=self._carry, name="cable")
        self._thread.start()

    def plug(self) -> None:
        self._server = socket.create_server(("127.0.0.1", self.port))
        self._server.setblocking(False)

    def pull(self) -> None:
        with self._lock:
            assert self._server is not None
            self._server.close()
            for end in self._ends:
                end.close()
            self._ends.clear()

    def hang(self) -> None:
        self._hangs.set()

    def go_on(self) -> None:
        self._hangs.clear()

    def close(self) -> None:
        self._closing.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            self.pull()

    def _carry(self) -> None:
        while not self._closing.wait(0.002):
            if self._hangs.is_set():
                continue
            with self._lock, contextlib.suppress(OSError):
                self._connect()
                self._forward()

    def _connect(self) -> None:
        assert self._server is not None
        with contextlib.suppress(BlockingIOError):
            near, _ = self._server.accept()
            far = socket.create_connection(("127.0.0.1", self._far))
            self._ends |= {near: far, far: near}

    def _forward(self) -> None:
        ready, _, _ = select.select(list(self._ends), [], [], 0)
        for end in ready:
            other = self._ends.get(end)
            data = b""
            with contextlib.suppress(OSError):  # closed, perhaps with the end before it
                data = end.recv(65536)
                if other is not None:
                    other.sendall(data)
            if not data and other is not None:
                for one in (end, other):
                    self._ends.pop(one, None)
                    one.close()
