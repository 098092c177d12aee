"""Every call that changes a file of a run, or makes it durable, goes through here.

So the promises of the store can be tested at this one seam: a test puts a stand-in for `os` into
this module, which counts, breaks, cuts short, kills at, or replays the calls.

What differs between systems is decided here too: positioned writes (Windows has none: seek and
write, from one thread), sparse files, writes that pass by the page cache, syncing.
"""

import contextlib
import errno
import mmap
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

PAGE = 4096
"""What memory, offset and length of a write that passes by the page cache must be multiples of."""
_BINARY = getattr(os, "O_BINARY", 0)  # Windows
_PROBE_BYTES = 16 << 20

Data = bytes | memoryview


def open_new(path: Path) -> int:
    """Descriptor of a new file, to read and write. Raises FileExistsError where there is one."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _BINARY, 0o666)


def open_existing(path: Path, *, direct: bool = False) -> int:
    """Descriptor of a file, to read and write; *direct*: writes pass by the page cache."""
    return os.open(path, os.O_RDWR | _BINARY | (os.O_DIRECT if direct else 0))


def close(descriptor: int) -> None:
    """Close a descriptor."""
    os.close(descriptor)


def write_at(descriptor: int, data: Data, offset: int) -> None:
    """Write all of *data* at *offset*. Raises OSError where it does not go in whole."""
    written = _write_some(descriptor, data, offset)
    while written < len(data):  # a full disk takes what fits, and says so when asked for more
        more = _write_some(descriptor, memoryview(data)[written:], offset + written)
        if not more:
            raise OSError(errno.ENOSPC, f"wrote {written} of {len(data)} bytes")
        written += more


def _write_some(descriptor: int, data: Data, offset: int) -> int:
    if hasattr(os, "pwrite"):
        return os.pwrite(descriptor, data, offset)
    os.lseek(descriptor, offset, os.SEEK_SET)
    return os.write(descriptor, data)


def read_at(descriptor: int, nbytes: int, offset: int) -> bytes:
    """Up to *nbytes* from *offset*, fewer at the end of the file."""
    if hasattr(os, "pread"):
        return os.pread(descriptor, nbytes, offset)
    os.lseek(descriptor, offset, os.SEEK_SET)
    return os.read(descriptor, nbytes)


def cut(descriptor: int, nbytes: int) -> None:
    """Let the file end after *nbytes*."""
    os.ftruncate(descriptor, nbytes)


def make_folders(path: Path) -> list[Path]:
    """Make *path* and its parents where they are missing; returns the folders that changed."""
    if path.is_dir():
        return []
    changed = make_folders(path.parent)
    with contextlib.suppress(FileExistsError):
        os.mkdir(path)
    return [*changed, path.parent]


def remove(path: Path) -> None:
    """Remove a file."""
    os.unlink(path)


def replace_file(path: Path, content: bytes, *, offset: int = 0) -> None:
    """Put *content* at *path*: a reader, or a kill at any moment, finds the old or the new.

    Before *offset* the file is a hole. Where that fails nothing of it stays. Raises OSError.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | _BINARY, 0o666)
        try:
            if offset:
                make_sparse(descriptor)
            write_at(descriptor, content, offset)
        finally:
            os.close(descriptor)
        _rename_over(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):  # on Windows perhaps still open elsewhere
            os.unlink(temporary)
        raise


def _rename_over(temporary: Path, path: Path) -> None:
    """Rename; Windows refuses while another program (a virus scanner) has either file open: 1 s."""
    for _ in range(100 if sys.platform == "win32" else 0):
        with contextlib.suppress(PermissionError):
            os.replace(temporary, path)
            return
        time.sleep(0.01)
    os.replace(temporary, path)


def sync(path: Path) -> None:
    """Make a file's content, or a folder's list of files, survive a power cut. Raises OSError."""
    folder = path.is_dir()
    if folder and sys.platform == "win32":  # NTFS journals its folders by itself
        return
    descriptor = os.open(path, (os.O_RDONLY if folder else os.O_RDWR) | _BINARY)
    try:
        # A folder's names are not data to every file system: fdatasync might leave them out.
        (os.fsync if folder else getattr(os, "fdatasync", os.fsync))(descriptor)
    finally:
        os.close(descriptor)


def make_sparse(descriptor: int) -> None:
    """Let a new file have holes that take no room. Everywhere but on Windows it has them anyway.

    NTFS would fill everything before the first write with zeros otherwise: half a gigabyte for a
    plane. Raises OSError where the file system has no sparse files.
    """
    if sys.platform == "win32":
        import ctypes
        import msvcrt

        set_sparse = 0x900C4  # FSCTL_SET_SPARSE
        handle = msvcrt.get_osfhandle(descriptor)
        length = ctypes.c_ulong()
        if not ctypes.windll.kernel32.DeviceIoControl(
            ctypes.c_void_p(handle), set_sparse, None, 0, None, 0, ctypes.byref(length), None
        ):
            raise OSError(errno.EOPNOTSUPP, "this file system has no sparse files")


def has_sparse_files(folder: Path) -> bool:
    """Whether a hole in a file takes no room in this folder (exFAT and FAT fill it). OSError."""
    with _probe_file(folder) as (descriptor, _):
        try:
            make_sparse(descriptor)
        except OSError:
            return False
        write_at(descriptor, b"end", _PROBE_BYTES)
        blocks = getattr(os.fstat(descriptor), "st_blocks", 0)  # of 512 bytes; Windows: unknown
        return bool(blocks * 512 < _PROBE_BYTES // 2)


def takes_direct_writes(folder: Path) -> bool:
    """Whether writes can really pass by the page cache in this folder.

    A file system that also takes a write from any address only pretends (tmpfs), and costs a copy
    for nothing.
    """
    if not hasattr(os, "O_DIRECT"):
        return False
    with _probe_file(folder) as (_, path):
        memory = aligned_memory(2 * PAGE).data
        try:
            descriptor = open_existing(path, direct=True)
        except OSError:
            return False
        try:
            write_at(descriptor, memory[:PAGE], 0)
            write_at(descriptor, memory[1 : PAGE + 1], 0)
        except OSError as error:
            return error.errno == errno.EINVAL and os.fstat(descriptor).st_size == PAGE
        finally:
            os.close(descriptor)
    return False


@contextlib.contextmanager
def _probe_file(folder: Path) -> Iterator[tuple[int, Path]]:
    path = folder / ".probe.partial"  # a kill may have left one
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | _BINARY, 0o666)
    try:
        yield descriptor, path
    finally:
        os.close(descriptor)
        os.unlink(path)


def aligned_memory(nbytes: int) -> npt.NDArray[np.uint8]:
    """Zeros at the start of a page of memory; of a large page, where the system has them.

    A disk that reads from large pages gets fewer and longer pieces: up to twice the rate.
    """
    if sys.platform == "win32":
        return np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel built without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)


def is_aligned(data: npt.NDArray[np.uint8]) -> bool:
    """Whether a write of *data* can pass by the page cache as it is."""
    return data.ctypes.data % PAGE == 0 and data.nbytes % PAGE == 0


def rename(path: Path, to: Path) -> None:
    """Give a file or folder a name that is free."""
    os.rename(path, to)


def remove_tree(path: Path) -> None:
    """Remove a folder with all that is in it; nothing where there is none."""
    if not path.is_dir():
        return
    for child in list(path.iterdir()):
        if child.is_dir():
            remove_tree(child)
        else:
            os.unlink(child)
    os.rmdir(path)


def sync_tree(path: Path) -> None:
    """Make a folder with all that is in it survive a power cut. Raises OSError."""
    for child in list(path.iterdir()):
        if child.is_dir():
            sync_tree(child)
        else:
            sync(child)
    sync(path)
