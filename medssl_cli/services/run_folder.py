"""The folder of a training run, held by one process, with its log and a ``run.json`` that always tells how it stands.

Nothing that an earlier run left is touched before ``begin``, which comes when everything is read and built: bad input
never costs good output.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from logging.handlers import MemoryHandler
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from medssl_cli.core.errors import Interrupted, MedsslError, ResourceError
from medssl_cli.core.run import check_out_folder, claim_out_folder, hide_home, locked, write_json

log = logging.getLogger(__name__)


class HeldLog:
    """Log lines of a run, kept in memory until their file may be written."""

    def __init__(self) -> None:
        # no level is so high, and no number of lines so large, that it would flush by itself
        self._early = MemoryHandler(1 << 30, flushLevel=1 << 30, flushOnClose=False)
        self._file: logging.FileHandler | None = None

    def __enter__(self) -> HeldLog:
        logging.getLogger().addHandler(self._early)
        return self

    def __exit__(self, *_: object) -> None:
        root = logging.getLogger()
        for handler in (self._early, self._file):
            if handler is not None:
                root.removeHandler(handler)
                handler.close()

    def write_to(self, path: Path) -> None:
        """Append the lines so far, and from now on each as it comes."""
        self._file = logging.FileHandler(path, encoding="utf-8")
        self._file.setFormatter(_Homeless("%(asctime)s %(levelname)s %(message)s"))
        root = logging.getLogger()
        root.removeHandler(self._early)
        self._early.setTarget(self._file)
        self._early.flush()
        root.addHandler(self._file)

    def note(self, text: str) -> None:
        """A line for the file alone."""
        if self._file is not None:
            self._file.handle(logging.LogRecord(__name__, logging.ERROR, __file__, 0, text, None, None))


class RunFolder:
    """A run folder in the hands of this process, used as a context.

    Args:
        path: As given to ``--out``.
        command: Its owner, e.g. ``pretrain``.
        lines: Log of this call so far, which flows into ``log.txt`` once the run begins.
        overwrite: Replace a folder that holds something else, once the run begins.
        inputs: What the run reads, which is never replaced.

    Raises:
        ConfigError: The folder holds something else or an input, or another process works on it.
    """

    def __init__(
        self, path: Path, command: str, lines: HeldLog, *, overwrite: bool = False, inputs: Sequence[Path] = ()
    ) -> None:
        self.path, self.command, self.overwrite, self.inputs = path, command, overwrite, tuple(inputs)
        self.facts: dict[str, Any] = {}
        self._lock = contextlib.ExitStack()
        self._log = lines

    def __enter__(self) -> RunFolder:
        check_out_folder(self.path, self.command, overwrite=self.overwrite, inputs=self.inputs)
        with contextlib.ExitStack() as lock:
            lock.enter_context(locked(self.path, "run folder"))
            if not self.overwrite:
                claim_out_folder(self.path, self.command)
            self._lock = lock.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, (MedsslError, KeyboardInterrupt)):
            self._log.note(str(error) or type(error).__name__)
        self._lock.close()

    def begin(self, *, clear: Sequence[str] = ()) -> None:
        """Take the folder over: remove what it may replace and ``clear``, and let the log flow into ``log.txt``."""
        if self.overwrite:
            claim_out_folder(self.path, self.command, overwrite=True, inputs=self.inputs)
        for name in clear:
            place = self.path / name
            shutil.rmtree(place) if place.is_dir() and not place.is_symlink() else place.unlink(missing_ok=True)
        self._log.write_to(self.path / "log.txt")

    def say(self, status: str, **facts: Any) -> None:
        """Write ``run.json``: the facts of the run, its status and what else is given."""
        write_json(self.path / "run.json", without_home({**self.facts, "status": status, **facts}))

    @contextlib.contextmanager
    def telling_the_end(self, state: Callable[[], dict[str, Any]]) -> Iterator[None]:
        """``run.json`` says ``interrupted`` or ``failed``, with the reason, if the block does not end well.

        Args:
            state: Asked at that moment, e.g. for the step.
        """
        try:
            yield
        except BaseException as error:
            status = "interrupted" if isinstance(error, (Interrupted, KeyboardInterrupt)) else "failed"
            reason = error.what if isinstance(error, MedsslError) else type(error).__name__
            if isinstance(error, KeyboardInterrupt) and str(error):  # of ``stoppable``, which tells of the signal
                reason = str(error)
            try:
                self.say(status, reason=reason, **state())
            except ResourceError as second:  # the disk is full: the first error says so with the bytes it needs
                log.warning("%s %s", second.what, second.where)
            raise


class _Homeless(logging.Formatter):
    """Lines in which the user's home folder is written as ``~``."""

    def format(self, record: logging.LogRecord) -> str:
        return hide_home(super().format(record))


def without_home(data: Any) -> Any:
    """The same plain data with the user's home folder written as ``~`` in every text."""
    if isinstance(data, Mapping):
        return {key: without_home(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [without_home(value) for value in data]
    return hide_home(str(data)) if isinstance(data, (str, Path)) else data


@contextlib.contextmanager
def stoppable(what: str) -> Iterator[None]:
    """SIGTERM and SIGUSR1 end the block as ``Interrupted``; what is finished stays, nothing else has to be saved.

    The signal is raised as KeyboardInterrupt and becomes an Interrupted at the edge of the block: readers that take
    every ``Exception`` for a damaged file must not take the signal for one. The training loop has its own handlers,
    which save first. Outside the main thread this does nothing.

    Args:
        what: What the block is at, for the message: "SIGTERM came while preparing".

    Raises:
        Interrupted: A signal came.
    """
    before: dict[int, Any] = {}
    told: list[str] = []

    def stop(number: int, frame: FrameType | None) -> None:
        told.append(f"{signal.Signals(number).name} came while {what}; finished parts are whole.")
        raise KeyboardInterrupt(told[0])

    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    except KeyboardInterrupt as error:
        if not told:  # Ctrl-C
            raise
        raise Interrupted(told[0], fix="run the same command again", code="interrupted") from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
