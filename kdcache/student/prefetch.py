"""Work a few items ahead in a background thread."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")
POLL_SECONDS = 0.5  # how soon a signal is noticed while an item is waited for


class Prefetch(Generic[T]):
    """An iterator over `source` that a thread keeps up to `depth` items ahead.

    What the source raises is raised here, after the items before it. `check` is called while an
    item is waited for; what it raises ends the wait. `close()` stops the thread and waits for it;
    it is also called at the end, at an error, and by leaving the `with` block.
    """

    def __init__(
        self, source: Iterator[T], depth: int = 2, check: Callable[[], object] | None = None
    ) -> None:
        self._source, self._depth, self._check = source, depth, check
        self._items: deque[T] = deque()
        self._changed = threading.Condition()
        self._ended = self._stopped = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="kdcache-prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Prefetch[T]:
        return self

    def __next__(self) -> T:
        with self._changed:
            while not self._changed.wait_for(lambda: self._items or self._ended, POLL_SECONDS):
                if self._check is not None:
                    self._check()
            if self._items:
                item = self._items.popleft()
                self._changed.notify_all()
                return item
        self.close()
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        raise StopIteration

    def __enter__(self) -> Prefetch[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        with self._changed:
            self._stopped = True
            self._items.clear()
            self._changed.notify_all()
        self._thread.join()

    def _work(self) -> None:
        try:
            for item in self._source:
                with self._changed:
                    self._changed.wait_for(lambda: len(self._items) < self._depth or self._stopped)
                    if self._stopped:
                        return
                    self._items.append(item)
                    self._changed.notify_all()
        except BaseException as e:  # the thread's owner raises it, whatever it is
            self._error = e
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()
