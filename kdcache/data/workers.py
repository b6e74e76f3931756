"""Batches made by worker processes, for both stages: in order, and with an end to every wait.

torch's DataLoader starts the workers and keeps the order. What it leaves open is closed here: a
worker that is gone, a batch that cannot be handed over (a small /dev/shm), a signal while a batch
is waited for. Workers ignore SIGINT and SIGTERM, which a terminal, `timeout` or a batch system
sends to all processes of a group: the process that started them decides when the work ends. They
end with it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import pickle
import signal
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from kdcache.data.collate import Collated
from kdcache.errors import KDCacheError
from kdcache.process.signals import CAUGHT
from kdcache.user.code_errors import describe, message, reraise_interrupt, translated, users_code

POLL_SECONDS = 0.5  # how soon a signal or a dead worker is noticed
# that a process whose socket is closed already may still seem to live
DEATH_SECONDS = 1.0
TIMED_OUT = "DataLoader timed out"
NO_ROOM = (
    "a worker process cannot hand over its batch ({error}): there is too little shared memory in "
    "/dev/shm; take fewer --workers or a smaller batch, or give it more (docker: --shm-size)"
)
Make = Callable[[Any], Collated]


class WorkerDied(KDCacheError):
    """A process that builds batches has ended by itself or was killed."""


class _Packed:
    """A batch as bytes, its tensors in shared memory: packed by the worker, where what cannot be is
    noticed.

    torch packs in a thread, which prints a traceback and drops the batch, and whoever waits for it
    waits for ever.
    """

    def __init__(self, batch: Any) -> None:
        try:
            self.data = bytes(ForkingPickler.dumps(batch))
        except Exception as e:
            said = message(e)
            raise KDCacheError(
                NO_ROOM.format(error=said)
                if "shared memory" in said
                else f"a worker process cannot hand over its batch: {describe(e)}"
            ) from e


class _Batches(Dataset[Any]):
    """What a worker process does: an item is one packed batch, or the error that came of it."""

    def __init__(self, make: Make) -> None:
        self.make = make

    def __getitem__(self, wanted: Any) -> _Packed | KDCacheError:
        try:
            batch = self.make(wanted)
            return _Packed(batch)
        except KDCacheError as e:
            return e
        except BaseException as e:
            found = translated(e)
            if found is None:
                raise
            return found


class _Plan(Sampler[Any]):
    """What is wanted of each batch, as a DataLoader takes it."""

    def __init__(self, wanted: Callable[[], Iterable[Any]]) -> None:
        self.wanted = wanted

    def __iter__(self) -> Iterator[Any]:
        return iter(self.wanted())


def by_workers(
    make: Make,
    wanted: Callable[[], Iterable[Any]],
    workers: int,
    check: Callable[[], object] | None = None,
) -> Generator[Collated, None, None]:
    """`make(w)` for each w of `wanted()`, in order, by that many processes, which start with the
    first `next()`.

    check: called while a batch is waited for; what it raises ends the wait. KDCacheErrors of `make`
    are raised here. WorkerDied names the process that is gone and its signal. Closing the generator
    ends the processes.
    """
    # A generator of its own: without one, DataLoader draws its base seed from the generator that
    # dropout uses.
    loader: DataLoader[Any] = DataLoader(
        _Batches(make),
        batch_size=None,
        sampler=_Plan(wanted),
        num_workers=workers,
        timeout=POLL_SECONDS,
        worker_init_fn=_begin,
        generator=torch.Generator(),
    )
    before, ended = set(multiprocessing.active_children()), False
    with _signals_held(), users_code("the dataset cannot be sent to worker processes (--workers)"):
        batches: Any = iter(loader)
    processes = [child for child in multiprocessing.active_children() if child not in before]
    handler = _without_torchs_handler()
    try:
        while True:
            try:
                found = _unpacked(_next(batches, processes, check), processes, check)
            except StopIteration:
                ended = True
                return
            yield found
    finally:
        if not ended:
            # they ignore SIGTERM, and may be in the midst of a long item
            for process in processes:
                process.kill()
        # Here and now: tracebacks keep the iterator, and when the garbage collector finds it, its
        # queues are lost: then torch waits 5 seconds for each worker, and its handler sees the
        # children die.
        batches._shutdown_workers()
        del batches
        if handler is not None:
            # in another thread, where this generator was forgotten
            with contextlib.suppress(ValueError):
                signal.signal(signal.SIGCHLD, handler)


def _next(
    batches: Iterator[Any], processes: list[BaseProcess], check: Callable[[], object] | None
) -> Any:
    while True:
        try:
            return next(batches)
        # of torch, and of a pipe whose other end is gone
        except (RuntimeError, EOFError, OSError) as e:
            reraise_interrupt(e)
            gone = _gone(processes)
            if not gone and not str(e).startswith(TIMED_OUT):
                raise
        if check is not None:
            # a signal that they did not survive is said as a signal
            check()
        if gone:
            raise WorkerDied(_obituary(gone[0]))


def _obituary(process: BaseProcess) -> str:
    code = process.exitcode or 0
    if code >= 0:
        return (
            f"worker process {process.pid}, which builds batches, has ended by itself, with exit "
            f"code {code}; does the dataset, or a library that it uses, end the process?"
        )
    name = signal.Signals(-code).name if -code in set(signal.Signals) else str(-code)
    why = {
        int(signal.SIGKILL): ": out of memory? Take fewer --workers or a smaller batch",
        int(
            signal.SIGBUS
        ): ": too little shared memory in /dev/shm? Take fewer --workers or a smaller batch, or "
        "give it more (docker: --shm-size)",
        int(signal.SIGSEGV): ": a fault in a library that the dataset uses?",
    }
    return (
        f"worker process {process.pid}, which builds batches, was killed by "
        f"{name}{why.get(-code, '')}"
    )


def _unpacked(found: Any, processes: list[BaseProcess], check: Callable[[], object] | None) -> Any:
    if isinstance(found, KDCacheError):
        raise found
    try:
        return pickle.loads(found.data)
    # the process that holds its shared memory gives it no more
    except (RuntimeError, OSError, EOFError) as e:
        reraise_interrupt(e)
        said = describe(e)
    deadline = time.monotonic() + DEATH_SECONDS
    while not (gone := _gone(processes)) and time.monotonic() < deadline:
        time.sleep(DEATH_SECONDS / 100)
    if check is not None:
        check()
    raise WorkerDied(
        _obituary(gone[0])
        if gone
        else f"a batch of a worker process cannot be taken over ({said}); too "
        "many open files (ulimit -n)?"
    )


def _gone(processes: list[BaseProcess]) -> list[BaseProcess]:
    return [process for process in processes if process.exitcode is not None]


def _begin(worker: int) -> None:
    """In a worker process, before its first batch."""
    for signum in CAUGHT:
        signal.signal(signum, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, CAUGHT)


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Processes that are started inside are born with SIGINT and SIGTERM blocked: between their
    birth and `_begin` a signal would end them with a traceback. Here such a signal comes when the
    block is left."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, CAUGHT)
    try:
        with warnings.catch_warnings():
            # Python 3.12 and later: forking a process that has threads; torch's own threads are
            # idle here.
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _without_torchs_handler() -> Any:
    """Put torch's handler of SIGCHLD away, and return it: it raises a RuntimeError wherever the
    main thread is when a worker has died, in the midst of a checkpoint or of the user's model.
    Whoever waits for a batch notices it too."""
    if threading.current_thread() is not threading.main_thread():
        return None
    return signal.signal(signal.SIGCHLD, signal.SIG_DFL)
