"""An ordered map over worker processes that holds few results at a time and ends cleanly on Ctrl-C."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

from medssl_cli.core.errors import Interrupted, ResourceError
from medssl_cli.core.run import hide_home

Task = TypeVar("Task")
Result = TypeVar("Result")
OrderedMap = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]


@contextlib.contextmanager
def ordered_map(workers: int) -> Iterator[OrderedMap]:
    """A ``map`` for picklable functions: results in the order of the tasks, whatever the number of workers.

    With fewer than two workers everything runs in this process. Processes are spawned, not forked, so that nothing of
    the parent's threads and locks comes along; at most two tasks a worker are under way, so memory stays bounded.

    Raises:
        ResourceError: A worker died, most often for want of memory.
    """
    if workers < 2:
        yield map
        return
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=_ignore_interrupts)
    try:
        yield lambda function, tasks: _windowed(pool, function, tasks, 2 * workers)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)  # tasks under way end whole


@contextlib.contextmanager
def told_interrupts(out: Path) -> Iterator[None]:
    """SIGTERM as Ctrl-C, so that a job that the scheduler ends cleans up and tells how to go on.

    Args:
        out: The folder whose finished parts the message names.

    Raises:
        Interrupted: Either of them came.
    """

    def stop(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not in the main thread: the program that runs us keeps its own handling
        yield
        return
    try:
        yield
    except KeyboardInterrupt as error:
        raise Interrupted(
            "Interrupted; finished parts are whole.",
            where=f"output folder {hide_home(str(out))}",
            fix="run the same command again to go on",
            code="interrupted",
        ) from error
    finally:
        signal.signal(signal.SIGTERM, before)


def _windowed(
    pool: ProcessPoolExecutor, function: Callable[[Task], Result], tasks: Iterable[Task], window: int
) -> Iterator[Result]:
    waiting: deque[Future[Result]] = deque()
    source = iter(tasks)
    try:
        for task in source:
            waiting.append(pool.submit(function, task))
            if len(waiting) >= window:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise ResourceError(
            "A worker process died.",
            where="most often the system ended it for want of memory",
            fix="run the same command again with fewer --workers; finished cases are kept",
            code="worker_died",
        ) from error
    finally:
        for future in waiting:
            future.cancel()


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it and lets the tasks under way end
