"""The next items of an iterator, made in a thread while the present one is worked on."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class _End:
    """The last thing in the queue; ``error`` is what ended the iterator early."""

    error: BaseException | None


def read_ahead(items: Iterator[T], count: int) -> Generator[T, None, None]:
    """The items in their order; at most ``count`` are ready at a time, and one more is being made.

    Whatever the iterator raises is raised here, at its place. When this generator is closed the thread ends after the
    item that it is making.

    Args:
        items: Used by the thread alone.
        count: At least 1; bounds the memory.
    """
    ready: queue.Queue[Any] = queue.Queue(max(1, count))
    is_closed = threading.Event()
    thread = threading.Thread(target=_fill, args=(items, ready, is_closed), name="read-ahead", daemon=True)
    thread.start()
    try:
        while not isinstance(item := ready.get(), _End):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        is_closed.set()
        while thread.is_alive():
            _make_room(ready)  # a thread that waits for room looks at the flag next
            thread.join(0.01)


def _fill(items: Iterator[T], ready: queue.Queue[Any], is_closed: threading.Event) -> None:
    try:
        for item in items:
            if is_closed.is_set():
                return
            ready.put(item)
    except BaseException as error:  # raised again by the reader: nothing may end in a thread unseen
        ready.put(_End(error))
    else:
        ready.put(_End(None))


def _make_room(ready: queue.Queue[Any]) -> None:
    while True:
        try:
            ready.get_nowait()
        except queue.Empty:
            return
