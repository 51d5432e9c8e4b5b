"""Several cases through one model, one after the other: results of each whole or not at all, and a list of failures."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from medssl_cli.core.errors import ConfigError, DataError, PartialFailure
from medssl_cli.core.result import Result
from medssl_cli.core.run import (
    check_out_folder,
    claim_out_folder,
    hide_home,
    locked,
    plain,
    result_header,
    write_failures,
    write_json,
)
from medssl_cli.services.case_input import Named
from medssl_cli.services.case_results import remove_results

log = logging.getLogger(__name__)

COMMAND = "infer"
DEFAULT_TOP_K = 5
Progress = Callable[[int, int], None]
Failure = tuple[str, str, str, str]
"""(case_id, path, reason, fix)."""
InferCase = Callable[[Named, Path, Progress | None, Callable[..., None]], dict[str, Any]]
"""(case, its folder, progress over slices, claim) -> its ``summary.json``. ``claim`` makes the output folder ours,
which may delete what lay there: not before there are results."""


@dataclass(frozen=True)
class InferRequest:
    """What the user typed. Names as the options of ``medssl infer``."""

    cases: tuple[str, ...]
    overrides: tuple[str, ...] = ()
    model: Path | None = None
    heatmap: bool = False
    out: Path = Path("out")
    top_k: int | None = None
    sequence: str | None = None
    device: str = "auto"
    on_error: Literal["stop", "skip"] = "stop"
    overwrite: bool = False
    threshold: float | None = None
    backbone: Path | None = None
    dicom: str | None = None
    tta: bool = False
    save_probabilities: bool = False
    ct: Path | None = None
    pet: Path | None = None

    @property
    def slices_listed(self) -> int:
        """Slices with the highest score that are listed and shown, at most."""
        return DEFAULT_TOP_K if self.top_k is None else self.top_k


def infer_cohort(
    request: InferRequest,
    cases: Sequence[Named],
    inputs: Sequence[Path],
    infer_case: InferCase,
    *,
    started: float,
    lines: Callable[[dict[str, Any]], list[str]],
    saying_memory: Callable[[], AbstractContextManager[None]],
    finish: Callable[[list[dict[str, Any]]], None],
    progress: Progress | None = None,
) -> Result:
    """Look at every case.

    Args:
        request: What the user typed.
        cases: One or several.
        inputs: What is read, and so must not be deleted.
        infer_case: Looks at one case and writes its folder.
        started: ``time.time()`` at the start.
        lines: What is said of a case, from its summary.
        saying_memory: Turns a lack of memory into an error that tells what to do.
        finish: Writes what belongs to several cases together, from their summaries.
        progress: Told cases done, or slices of the only case.

    Raises:
        DataError: A case cannot be read (with ``on_error: stop``); cases before it are complete.
    """
    would_go = check_out_folder(request.out, COMMAND, overwrite=request.overwrite, inputs=inputs)
    claim = partial(claim_out_folder, request.out, COMMAND, overwrite=request.overwrite, inputs=inputs)
    summaries: list[dict[str, Any]] = []
    failures: list[Failure] = []
    with locked(request.out, "output folder"):
        if not would_go:
            claim()
            for leftover in request.out.glob(".tmp-*"):
                shutil.rmtree(leftover)
        for done, named in enumerate(cases, start=1):
            out = request.out if len(cases) == 1 else request.out / named.name
            slices = progress if len(cases) == 1 else None
            try:
                with saying_memory():
                    summaries.append(infer_case(named, out, slices, claim))
            except DataError as error:
                if request.on_error == "stop":
                    raise
                log.warning("%s: %s", named.name, error.what)
                failures.append(failure_of(named.name, named.path, error))
            if progress is not None and len(cases) > 1:
                progress(done, len(cases))
        if would_go and not summaries:
            raise nothing_to_replace_it(failures)
        write_failures(request.out / "failures.csv", failures)
        facts = plain({**result_header(COMMAND, started), "cases": summaries, "failures": failure_facts(failures)})
        if len(cases) > 1:
            remove_results(request.out)
            finish(summaries)
            write_json(request.out / "summary.json", facts)
    told = [line for summary in summaries for line in lines(summary)]
    return Result(told, facts, partial_failure(failures, len(cases), request.out))


def nothing_to_replace_it(failures: Sequence[Failure]) -> DataError:
    """Every case failed, and a folder would have to be emptied for nothing."""
    return DataError(
        f"None of {len(failures)} cases could be looked at; the output folder keeps what it holds.",
        where="\n".join(f"{path}: {reason}" for _, path, reason, _ in failures[:5]),
        fix=failures[0][3],
        code="cases_failed",
    )


def failure_of(name: str, path: Path, error: DataError) -> Failure:
    """A row of ``failures.csv``."""
    return name, hide_home(str(path)), f"{error.what} {error.where}".strip(), error.fix


def failure_facts(failures: Sequence[Failure]) -> list[dict[str, str]]:
    """The rows as JSON has them."""
    return [dict(zip(("case_id", "path", "reason", "fix"), failure, strict=True)) for failure in failures]


def partial_failure(failures: Sequence[Failure], count: int, out: Path) -> PartialFailure | None:
    """Exit code 4 where some of ``count`` cases failed."""
    if not failures:
        return None
    return PartialFailure(
        f"{len(failures)} of {count} cases failed.",
        where=hide_home(str(out / "failures.csv")),
        fix="see the reasons there; the other cases are complete",
        code="cases_failed",
    )


def needless(what: str, where: str, fix: str) -> ConfigError:
    """An option or a key that would have no effect."""
    return ConfigError(what, where=where, fix=fix, code="config_invalid")


def check_threshold(request: InferRequest) -> None:
    """Refuse a threshold that decides nothing.

    Raises:
        ConfigError: Not above 0 and below 1.
    """
    if request.threshold is not None and not 0 < request.threshold < 1:
        raise ConfigError(
            "A threshold lies between 0 and 1.",
            where=f"--threshold {request.threshold}",
            fix="give a number above 0 and below 1",
            code="threshold_range",
        )
