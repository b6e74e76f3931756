"""Where the files of a cache live: a folder in which a file appears whole or not at all, and never
changes.

A new file is written under a temporary name, locked while its writer lives, synced, and linked to
its final name, which fails if the name is taken. Nothing is ever overwritten; what is wrong is
moved to `quarantine/`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import secrets
import stat
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

from kdcache.errors import CacheCorrupt, KDCacheError
from kdcache.user.paths import local_path

TEMPORARY = ".tmp-"
QUARANTINE = "quarantine"
MAX_JSON = 2**26  # header and commit records
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.EMLINK)
NO_FILE = (errno.ENOENT, errno.ELOOP, errno.ENXIO, errno.ENODEV, errno.ENOTDIR, errno.EISDIR)
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.EBADF)
# of a folder: CIFS, some FUSE
NO_SYNC = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS)


class Temporary:
    """A new file without its final name. Written front to back, by us or through a library that
    wants a file.
    """

    closed = False  # pyarrow asks

    def __init__(self, fd: int, path: str, step: Callable[[str], None]) -> None:
        self.fd, self.path, self._step, self._at = fd, path, step, 0

    def write(self, data: bytes | memoryview) -> int:
        view = memoryview(data).cast("B")
        self._step("write")
        done = 0
        while done < len(view):
            done += os.write(self.fd, view[done:])
        self._at += done
        return done

    def tell(self) -> int:
        return self._at

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        """The folder closes it, after the link."""

    def sync(self) -> None:
        self._step("sync")
        os.fsync(self.fd)


class Directory:
    """The folder of a cache. Names are relative, with `/`. OSError from the system passes through;
    see `as_cache_errors`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = local_path(path, "path")

    @staticmethod
    def step(name: str) -> None:
        """Called before each file operation that changes something: where fault injection may stop
        a writer.
        """

    def full(self, name: str) -> str:
        return str(self.path / name) if name else str(self.path)

    # ---- reading
    # ----------------------------------------------------------------------------------------------

    def names(self, folder: str = "") -> list[str]:
        """Sorted names in a folder, [] if there is none; CacheCorrupt if something else has its
        name.
        """
        path = self.full(folder)
        try:
            return sorted(os.listdir(path))
        except OSError as e:
            if e.errno == errno.ENOENT and not os.path.lexists(path):
                return []
            if e.errno in NO_FILE:
                raise CacheCorrupt(
                    f"{path}: not a folder, or a link that leads to none ({e.strerror}); put the "
                    "folder back, or mount the disk that it is on"
                ) from e
            raise

    def size(self, name: str) -> int | None:
        """Bytes of a plain file, None if there is none, whatever else has its name."""
        try:
            found = os.stat(self.full(name))
        except OSError as e:
            if e.errno not in NO_FILE:
                raise
            return None
        return found.st_size if stat.S_ISREG(found.st_mode) else None

    def read(self, name: str, limit: int = MAX_JSON) -> bytes | None:
        """All bytes of a plain file, None if there is none; CacheCorrupt above `limit` bytes,
        before reading them.
        """
        return read_plain(self.full(name), limit)

    # ---- writing
    # ----------------------------------------------------------------------------------------------

    def make(self, folder: str = "") -> None:
        """Create a folder and what is above it, if absent."""
        path = Path(self.full(folder))
        if not path.is_dir():
            self.step("mkdir")
            path.mkdir(parents=True, exist_ok=True)
            self._sync_folder(path.parent)

    @contextlib.contextmanager
    def temporary(self, folder: str) -> Iterator[Temporary]:
        """A new locked file in `folder`; its temporary name is gone afterwards, whatever happened."""
        fd, path = self._new(folder)
        try:
            yield Temporary(fd, path, self.step)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(path)
            os.close(fd)

    def publish(self, temporary: Temporary, name: str) -> bool:
        """Give a synced temporary its final name; False if the name is taken."""
        final = self.full(name)
        self.step("link")
        try:
            os.link(temporary.path, final)
        except OSError as e:
            # A lost answer of a network file system: the link was made all the same.
            if os.fstat(temporary.fd).st_nlink != 2:
                if e.errno == errno.EEXIST:
                    return False
                if e.errno not in NO_LINKS:
                    raise
                if not _publish_without_links(temporary, final):
                    return False
        self.step("unlink")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary.path)
        self._sync_folder(Path(final).parent)
        return True

    def put(self, name: str, data: bytes) -> bool:
        """Create a file with these bytes whole; False if the name is taken."""
        with self.temporary(os.path.dirname(name)) as temporary:
            temporary.write(data)
            temporary.sync()
            return self.publish(temporary, name)

    def replace(self, name: str, data: bytes) -> None:
        """Put a file with these bytes whole in place of the one there; a link there is replaced,
        never followed.
        """
        with self.temporary(os.path.dirname(name)) as temporary:
            temporary.write(data)
            temporary.sync()
            self.put_over(temporary, name)

    def put_over(self, temporary: Temporary, name: str) -> None:
        """Give a synced temporary its final name, in place of what has it."""
        self.step("rename")
        os.replace(temporary.path, self.full(name))
        self._sync_folder(Path(self.full(name)).parent)

    def remove(self, name: str) -> None:
        """Unlink a file of our own making; nothing if it is gone."""
        self.step("remove")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.full(name))

    def hold(self, name: str) -> Hold | None:
        """Hold a file under a shared lock for as long as the answer lives; None if the name is no
        longer its own.
        """
        path = self.full(name)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            return None
        # without locks nobody may replace it either: see `unheld`
        _lock(fd, fcntl.LOCK_SH)
        if _same(fd, path):
            return Hold(fd)
        os.close(fd)
        return None

    @contextlib.contextmanager
    def unheld(self, name: str) -> Iterator[bool]:
        """Whether nobody holds the file `name`, as far as can be known; nobody can, within this
        block.
        """
        path = self.full(name)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            yield False
            return
        try:
            yield _lock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB) and _same(fd, path)
        finally:
            os.close(fd)

    def quarantine(self, name: str, bad: Callable[[], bool]) -> bool:
        """Move a file to `quarantine/` if it is still `bad`; False if it was not.

        Two who find the same bad file must not move the good one that the first of them put in its
        place: the judgement is repeated under a lock on the very file that is moved.
        """
        path = self.full(name)
        with _judging(path) as there:
            if not there or not bad():
                return False
            self.make(QUARANTINE)
            flat, copy = name.replace("/", "-"), 0
            while os.path.lexists(
                target := self.full(f"{QUARANTINE}/{flat}" + (f".{copy}" if copy else ""))
            ):
                copy += 1
            self.step("rename")
            try:
                os.rename(path, target)
            except FileNotFoundError:
                if os.path.lexists(path):
                    raise
                # its owner, who lost a race for the shard, removed it meanwhile
                return False
            self._sync_folder(Path(path).parent)
            return True

    def drop_dead_temporaries(self, folder: str) -> None:
        """Delete the temporaries whose writers are gone: a live writer holds a lock on its own.
        What no writer makes, a folder or link of such a name, goes to quarantine."""
        for name in self.names(folder):
            if not name.startswith(TEMPORARY):
                continue
            name = f"{folder}/{name}" if folder else name
            path = self.full(name)
            with contextlib.suppress(FileNotFoundError):
                if not is_plain(path):
                    self.quarantine(name, lambda: True)
                    continue
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
                try:
                    if _lock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB) and _same(fd, path):
                        self.step("unlink")
                        os.unlink(path)
                finally:
                    os.close(fd)

    def _new(self, folder: str) -> tuple[int, str]:
        while True:
            path = self.full(
                f"{folder}/{TEMPORARY}{secrets.token_hex(8)}"
                if folder
                else f"{TEMPORARY}{secrets.token_hex(8)}"
            )
            self.step("create")
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            # Whoever sweeps dead temporaries may lock it between these two lines: wait, and if it
            # is gone take another.
            _lock(fd, fcntl.LOCK_EX)
            if _same(fd, path):
                return fd, path
            os.close(fd)

    def _sync_folder(self, path: Path) -> None:
        self.step("sync_folder")
        sync_folder(path)


def read_plain(path: str, limit: int, *, dir_fd: int | None = None) -> bytes | None:
    """All bytes of a plain file (`path` below the open folder `dir_fd`, if given), None if there is
    none; CacheCorrupt for other kinds of files, of which some would wait for ever, and above
    `limit` bytes, before reading them."""
    try:
        fd = open_plain(path, dir_fd=dir_fd)
    except FileNotFoundError:
        return None
    try:
        size = os.fstat(fd).st_size
        if size > limit:
            raise CacheCorrupt(f"{path}: file has {size} bytes, the most allowed is {limit}")
        with open(fd, "rb", closefd=False) as file:
            return file.read(limit + 1)
    finally:
        os.close(fd)


def open_plain(path: str, *, dir_fd: int | None = None) -> int:
    """A descriptor to read a plain file by. FileNotFoundError only where nothing has its name;
    CacheCorrupt for a link that leads nowhere or in a circle, a folder, socket, pipe or device.
    Other OSErrors, such as EACCES, pass."""
    try:
        # a pipe must not block
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=dir_fd)
    except OSError as e:
        if e.errno == errno.ENOENT:
            os.lstat(path, dir_fd=dir_fd)  # of nothing: FileNotFoundError again
            raise CacheCorrupt(f"{path}: a link that leads nowhere") from e
        if e.errno in NO_FILE and e.errno != errno.ENOTDIR:
            raise CacheCorrupt(f"{path}: not a plain file ({e.strerror})") from e
        raise
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return fd
    os.close(fd)
    raise CacheCorrupt(f"{path}: not a plain file")


def is_plain(path: str) -> bool:
    """Whether a plain file, and no link to one, has this name. FileNotFoundError if nothing has."""
    return stat.S_ISREG(os.lstat(path).st_mode)


@contextlib.contextmanager
def _judging(path: str) -> Iterator[bool]:
    """Whether something stands at `path`, which nobody else moves within this block. A plain file
    is locked itself; of what cannot be opened, or leads elsewhere, the folder is."""
    fd = None
    try:
        with contextlib.suppress(FileNotFoundError):
            plain = is_plain(path)
            fd = os.open(
                path if plain else os.path.dirname(path), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
            )
        if fd is None:
            yield False
            return
        _lock(fd, fcntl.LOCK_EX)
        try:
            there = _same(fd, path) if plain else not is_plain(path)
        except FileNotFoundError:
            there = False
        yield there
    finally:
        if fd is not None:
            os.close(fd)


def sync_folder(path: str | os.PathLike[str]) -> None:
    """Flush the entries of a folder to disk, where its file system can do that."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as e:
        if e.errno not in NO_SYNC:
            raise
    finally:
        os.close(fd)


@contextlib.contextmanager
def as_cache_errors(
    path: str | os.PathLike[str], doing: str, what_is_saved: Callable[[], str] = str
) -> Iterator[None]:
    """Turn an OSError into one line that says what to do; `what_is_saved` adds how far the cache is."""
    try:
        yield
    except OSError as e:
        why = e.strerror or str(e)
        if e.errno in FULL:
            raise KDCacheError(
                f"{path}: disk full while {doing} ({why}); free space and run the same command "
                f"again{what_is_saved()}"
            ) from e
        if e.errno in DENIED:
            raise KDCacheError(
                f"{e.filename or path}: not allowed while {doing} ({why}); check the permissions "
                f"of the folder and its files{what_is_saved()}"
            ) from e
        raise KDCacheError(f"{e.filename or path}: {why} while {doing}{what_is_saved()}") from e


class Hold:
    """A shared lock on a file, which says that its user is alive. Worker processes forked meanwhile
    do not keep it.
    """

    def __init__(self, fd: int) -> None:
        self._fd: int | None = fd
        _holds.add(self)

    def release(self) -> None:
        """Let go; nothing if that was done."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    __del__ = release


_holds: weakref.WeakSet[Hold] = weakref.WeakSet()
# A fork shares the lock: it would stand as long as the child does, after its parent was killed too.
os.register_at_fork(after_in_child=lambda: _release(list(_holds)))


def _release(holds: list[Hold]) -> None:
    for hold in holds:
        hold.release()


def _lock(fd: int, how: int) -> bool:
    """False if another holds it, or if the file system has no locks."""
    try:
        fcntl.flock(fd, how)
    except OSError as e:
        if e.errno in (errno.EWOULDBLOCK, errno.EACCES, *NO_LOCKS):
            return False
        raise
    return True


def _same(fd: int, path: str) -> bool:
    """Whether `path` still names the open file."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _publish_without_links(temporary: Temporary, final: str) -> bool:
    """For file systems without hard links: a rename that does not replace, else a copy to a name
    that must be new.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2"):
        at_fdcwd, no_replace = -100, 1
        if (
            libc.renameat2(
                at_fdcwd, os.fsencode(temporary.path), at_fdcwd, os.fsencode(final), no_replace
            )
            == 0
        ):
            return True
        if ctypes.get_errno() == errno.EEXIST:
            return False
    try:
        fd = os.open(final, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except FileExistsError:
        return False
    # a crash in here leaves a torn file under a final name: resume quarantines it
    try:
        os.lseek(temporary.fd, 0, os.SEEK_SET)
        while part := os.read(temporary.fd, 2**20):
            view = memoryview(part)
            while view:
                view = view[os.write(fd, view) :]
        os.fsync(fd)
    except OSError:
        os.unlink(final)
        raise
    finally:
        os.close(fd)
    return True
