"""A thread that does one thing after the other, for whoever hands them to it.

It does not outlive the program, and it does not end with the main thread either: other threads may
still record then, which an executor of the standard library would refuse them.
"""

import errno
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial


class Lane:
    """Does what `submit` hands it, in this order. Ended by `close`."""

    def __init__(self, name: str) -> None:
        """*name* of the thread, which starts at once."""
        self._todo: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def submit(self, work: Callable[..., None], *args: object) -> "Future[None]":
        """Do *work*, after all else; the result raises what it raises. OSError after `close`."""
        if self._closed:
            raise OSError(errno.EBADF, "the run is closed")
        done: Future[None] = Future()
        self._todo.put(partial(_do, done, work, args))
        return done

    def close(self) -> None:
        """Return when all is done, and end the thread. May be repeated."""
        self._closed = True
        self._todo.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (todo := self._todo.get()) is not None:
            todo()
            del todo  # while it waits, a plane must not stay in memory


def _do(done: "Future[None]", work: Callable[..., None], args: tuple[object, ...]) -> None:
    try:
        work(*args)
    except BaseException as error:  # noqa: BLE001  # told to whoever asks for the result
        done.set_exception(error)
        del done  # the error knows this frame: a circle that would keep the plane
    else:
        done.set_result(None)
