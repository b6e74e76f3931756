"""Files mapped into memory: how many there may be, what tells that one changed, and zeros in place
of a bus error.

A mapped file that is cut loses its pages, and whoever touches one gets SIGBUS, which ends a process
without a word. So where such a page belongs to one of our maps, a page of zeros takes its place,
and the map is marked as lost: the reader that copied zeros asks, and says what happened. Linux
alone; elsewhere the signal stays what it is.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import weakref

import numpy as np

from kdcache.cache.columns import Array
from kdcache.cache.store import open_plain
from kdcache.errors import CacheCorrupt

# size and the two times of a file that a change of its bytes moves
Signature = tuple[int, int, int]
PAGE = os.sysconf("SC_PAGE_SIZE")
_PROT_READ, _MAP_SHARED = 1, 1  # the same on Linux and macOS
_MAP_PRIVATE, _MAP_FIXED, _MAP_ANONYMOUS = 0x02, 0x10, 0x20  # of Linux
_SA_SIGINFO, _SI_ADDR = 4, 16  # of Linux, with pointers of 64 bits
_MAP_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

_maps: dict[int, int] = {}  # address -> bytes
_lost: set[int] = set()  # addresses
_installing, _installed = threading.Lock(), threading.Event()


class _SigAction(ctypes.Structure):
    _fields_ = [
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ulong * 16),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    ]


_before = _SigAction()


def most_maps() -> int:
    """How many files may be mapped at once: half of what the kernel lets a process map, which has
    other maps too.
    """
    try:
        with open("/proc/sys/vm/max_map_count", encoding="ascii") as file:
            return max(1, int(file.read()) // 2)
    except (OSError, ValueError):
        return 2**15


MOST = most_maps()


def count() -> int:
    """Files of all caches that are mapped now."""
    return len(_maps)


def map_file(path: str, size: int | None = None) -> Array:
    """The bytes of a file, as `map_signed`."""
    return map_signed(path, size)[0]


def map_signed(path: str, size: int | None = None) -> tuple[Array, Signature]:
    """The bytes of a file as a read-only uint8 array, and its signature; CacheCorrupt unless it is
    a plain file of
    `size` bytes.

    The file descriptor is closed again: Python's own `mmap` keeps one open for every map (before
    3.13), and a cache may have 20,000 shards. The map goes when the last array over it goes.
    OSError if the file cannot be opened or mapped.
    """
    fd = open_plain(path)
    try:
        found = os.fstat(fd)
        if size is not None and found.st_size != size:
            raise CacheCorrupt(
                f"{path}: file has {found.st_size} bytes, expected {size}; it was cut or "
                "overwritten"
            )
        if found.st_size == 0:
            return np.zeros(0, np.uint8), _of(found)
        _install()
        address = _libc.mmap(None, found.st_size, _PROT_READ, _MAP_SHARED, fd, 0)
        if address in (None, _MAP_FAILED):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), path)
        _maps[address] = found.st_size
        memory = (ctypes.c_ubyte * found.st_size).from_address(address)
        # No unmapping at exit of the interpreter: threads may still read.
        weakref.finalize(memory, _unmap, address, found.st_size).atexit = False
        out: Array = np.frombuffer(memoryview(memory), np.uint8)
        out.flags.writeable = False
        return out, _of(found)
    finally:
        os.close(fd)


def signature(path: str) -> Signature | None:
    """Of the file that has this name now; None if none has, or it cannot be asked."""
    try:
        return _of(os.stat(path))
    except OSError:
        return None


def lost(data: Array) -> bool:
    """Whether a page of the map that `data` is was found gone, so that zeros were read in its
    place.
    """
    return bool(_lost) and data.ctypes.data in _lost


def _of(found: os.stat_result) -> Signature:
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _unmap(address: int, size: int) -> None:
    _maps.pop(address, None)
    _lost.discard(address)
    _libc.munmap(address, size)


def _install() -> None:
    """Take SIGBUS, once in the life of a process. What is not ours goes to whoever had it before."""
    if sys.platform != "linux" or sys.maxsize < 2**32:
        return
    if not _installed.is_set():
        with _installing:
            if not _installed.is_set():
                action = _SigAction(
                    handler=ctypes.cast(_handler, ctypes.c_void_p).value, flags=_SA_SIGINFO
                )
                _libc.sigaction(signal.SIGBUS, ctypes.byref(action), ctypes.byref(_before))
                _installed.set()


def _on_bus_error(number: int, info: int, context: int) -> None:
    """Runs at the instruction that touched the page, which is tried again afterwards. That is a
    copy or a digest, of numpy's or xxhash's: no allocator or lock is in the middle of anything."""
    at = ctypes.c_size_t.from_address(info + _SI_ADDR).value
    for address, size in list(_maps.items()):
        if address <= at < address + size:
            page = at - at % PAGE
            how = _MAP_PRIVATE | _MAP_FIXED | _MAP_ANONYMOUS
            if _libc.mmap(page, address + size - page, _PROT_READ, how, -1, 0) == page:
                _lost.add(address)
                return
    _libc.sigaction(number, ctypes.byref(_before), None)


_handler = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(_on_bus_error)
