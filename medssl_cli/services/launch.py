"""Several processes on this machine, started by PyTorch's elastic launcher, that end as one.

The first process's value is the value of all; the error of the one that failed first is raised here, so that a user
reads three lines once, whatever the number of processes. Signals to this process reach the others, which save and
leave by themselves.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import secrets
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

from medssl_cli.core.errors import Interrupted, MedsslError, ResourceError
from medssl_cli.core.run import to_json

log = logging.getLogger(__name__)
T = TypeVar("T")

_LAUNCHER_LOGS = ("torch.distributed.elastic", "torch.distributed.launcher", "torchelastic-events-null")
_QUIET = {"TORCH_CPP_LOG_LEVEL": "ERROR"}
"""For the processes: PyTorch's warnings from C++, such as that no parameter was left out of a batch this time."""


def launch(work: Callable[..., T], *arguments: Any, processes: int) -> T:
    """Run ``work`` in several new processes that find each other through torchrun's environment variables.

    Args:
        work: A function at the top of a module; its value must be picklable.
        arguments: For it, picklable.
        processes: How many.

    Returns:
        The value of the first process.

    Raises:
        MedsslError: As one of the processes raised it.
        Interrupted: A signal came to this process.
        RuntimeError: A bug in one of the processes; its traceback is the text.
    """
    with tempfile.TemporaryDirectory(prefix="medssl-launch-") as place:
        told: list[str] = []
        outcome = _run_elastic(Path(place), told, work, arguments, processes)
        if isinstance(outcome, BaseException):
            raise _first_error(Path(place), told, outcome) from outcome
        return cast(T, outcome[0])


def _run_elastic(place: Path, told: list[str], work: Callable[..., Any], arguments: tuple[Any, ...], count: int) -> Any:
    """Value of each rank, or the exception of the launcher; it runs in a thread, so that signals are ours."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=secrets.token_hex(4),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
        start_method="spawn",
        local_addr="127.0.0.1",
    )
    outcome: list[Any] = []

    def start() -> None:
        try:
            root = logging.getLogger()
            words = (str(place), root.level, work, arguments)
            outcome.append(elastic_launch(config, _work)(*words))
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=start, name="launcher")
    with _quiet_launcher(), _passing_signals(told) as pass_on:
        thread.start()
        while thread.is_alive():
            thread.join(0.2)
            pass_on()
    return outcome[0]


@contextmanager
def _quiet_launcher() -> Iterator[None]:
    """The launcher's own log lines say again, at length, what our errors say."""
    before = {name: logging.getLogger(name).level for name in _LAUNCHER_LOGS}
    for name in before:
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    added = {name: value for name, value in _QUIET.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


@contextmanager
def _passing_signals(told: list[str]) -> Iterator[Callable[[], None]]:
    """Hand SIGTERM, SIGUSR1 and SIGINT on to the processes; a terminal sends SIGINT to them by itself.

    A second SIGINT to a training process would end it at once, so it is passed on as SIGTERM.
    """
    waiting: list[int] = []
    reached: set[tuple[int, int]] = set()

    def receive(number: int, frame: object) -> None:
        told.append(signal.Signals(number).name)
        waiting.append(signal.SIGTERM if number == signal.SIGINT else number)

    def pass_on() -> None:
        for child in multiprocessing.active_children() if waiting else ():
            for number in waiting:
                if child.pid is not None and (child.pid, number) not in reached:
                    reached.add((child.pid, number))
                    os.kill(child.pid, number)

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
        before = {number: signal.signal(number, receive) for number in numbers}
    try:
        yield pass_on
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- in a process ----------------------------------------------------------------------------------------------------


def _work(place: str, level: int, work: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """One process: only the first one logs; an error goes into a file, and its exit code out."""
    rank = int(os.environ["RANK"])
    logging.basicConfig(
        level=level if rank == 0 else logging.ERROR, format="%(message)s", stream=sys.stderr, force=True
    )
    try:
        value = work(*arguments)
    except MedsslError as error:
        words = {name: getattr(error, name) for name in ("what", "where", "fix", "code")}
        _write(place, rank, {"kind": type(error).__name__, "exit_code": error.exit_code, **words})
        if level <= logging.DEBUG:
            traceback.print_exc()
        sys.exit(error.exit_code)
    except Exception:
        _write(place, rank, {"kind": "", "traceback": traceback.format_exc()})
        sys.exit(1)
    return value if rank == 0 else None


def _write(place: str, rank: int, words: dict[str, Any]) -> None:
    path = Path(place, f"{rank}.json")
    temporary = path.with_suffix(".tmp")
    temporary.write_text(to_json({**words, "rank": rank, "time": time.time()}), encoding="utf-8")
    temporary.replace(path)


# --- what went wrong -------------------------------------------------------------------------------------------------


def _first_error(place: Path, told: list[str], outcome: BaseException) -> BaseException:
    """The error that explains the others: an own one, then a bug, then an interruption that nobody asked for."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(place.glob("*.json"))]
    own = [words for words in found if words["kind"]]
    asked = [words for words in own if words["kind"] == Interrupted.__name__]
    others = [words for words in own if words["kind"] != Interrupted.__name__]
    bugs = [words for words in found if not words["kind"]]
    ranked = [asked, others, bugs] if told else [others, bugs, asked]
    for group in ranked:
        if group:
            return _revive(min(group, key=lambda words: (bool(words["kind"]) and words["rank"], words["time"])))
    if told:
        return Interrupted(
            f"{told[0]} came while the processes were starting; nothing was changed.",
            fix="run the same command again",
            code="interrupted",
        )
    return _killed(outcome)


def _revive(words: dict[str, Any]) -> BaseException:
    if not words["kind"]:
        return RuntimeError(f"process {words['rank']} failed:\n{words['traceback']}")
    kinds = {kind.__name__: kind for kind in MedsslError.__subclasses__()}
    kind = kinds.get(words["kind"], MedsslError)
    return kind(words["what"], where=words["where"], fix=words["fix"], code=words["code"])


def _killed(outcome: BaseException) -> BaseException:
    """A process that left no word: killed from outside, or by the kernel for its memory."""
    failures = getattr(outcome, "failures", None)
    if not failures:
        return outcome
    rank, failure = min(failures.items(), key=lambda item: item[1].timestamp)
    if failure.exitcode >= 0:
        return RuntimeError(f"process {rank} ended with exit status {failure.exitcode} and left no word")
    name = signal.Signals(-failure.exitcode).name
    return ResourceError(
        f"A training process was killed by {name}.",
        where=f"process {rank} (pid {failure.pid})",
        fix="if nobody sent it, the machine was short of memory: take fewer --workers or a smaller batch; "
        "then run the same command again",
        code="process_killed",
    )
