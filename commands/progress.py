"""A progress bar where people look, plain lines where logs are kept."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """A callback ``(done, total)`` for services: a bar on a terminal, else a line at every tenth of the work."""
    if sys.stderr.isatty() and "SLURM_JOB_ID" not in os.environ:
        from tqdm import tqdm

        with tqdm(desc=label, leave=False, file=sys.stderr) as bar:

            def move(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            yield move
        return
    last = -1

    def say(done: int, total: int) -> None:
        nonlocal last
        tenth = 10 * done // max(total, 1)
        if tenth != last:
            last = tenth
            print(f"{label} {done}/{total}", file=sys.stderr, flush=True)

    yield say
