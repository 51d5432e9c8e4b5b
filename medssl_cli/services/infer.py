"""Look at cases through a backbone: slice embeddings, a heat map on the input's grid, and a report of each."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from medssl_cli.core.config import load_config
from medssl_cli.core.errors import ConfigError, DataError, PartialFailure
from medssl_cli.core.result import Result
from medssl_cli.core.run import (
    check_out_folder,
    claim_out_folder,
    hide_home,
    locked,
    plain,
    result_header,
    temporary_folder,
    write_failures,
    write_json,
)
from medssl_cli.models.vit import VisionTransformer
from medssl_cli.services.backbone import Backbone, open_backbone, read_planes, saying_memory
from medssl_cli.services.case_input import Named, Wanted, found_case, named_cases
from medssl_cli.services.case_results import CaseResults, publish, remove_results, shown
from medssl_cli.services.devices import resolve_device
from medssl_cli.services.heatmaps import InferConfig, look
from medssl_cli.services.lookup import find_model

log = logging.getLogger(__name__)

COMMAND = "infer"
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class InferRequest:
    """What the user typed. Names as the options of ``medssl infer``."""

    cases: tuple[str, ...]
    overrides: tuple[str, ...] = ()
    model: Path | None = None
    heatmap: bool = False
    out: Path = Path("out")
    top_k: int = 5
    sequence: str | None = None
    device: str = "auto"
    on_error: Literal["stop", "skip"] = "stop"
    overwrite: bool = False


def default_out(words: tuple[str, ...]) -> Path:
    """``out/<case>`` for one case, so that the next one does not replace it, and ``out`` for several."""
    cases = named_cases(words)
    return Path("out") / cases[0].name if len(cases) == 1 else Path("out")


def infer(request: InferRequest, *, progress: Progress | None = None) -> Result:
    """Look at one case or several with one model; ``progress`` is told cases done, or slices of the only case.

    Raises:
        ConfigError: No case, or no model to be found.
        DataError: A case cannot be read (with ``on_error: stop``); cases before it are complete.
        CheckpointError: The model cannot be loaded.
        ResourceError: No such device, or not enough memory or disk.
    """
    started = time.time()
    config = _config(request)
    cases = named_cases(request.cases)
    backbone = open_backbone(find_model(request.model), resolve_device(request.device))
    config = _fitting(config, backbone)
    inputs = _inputs(request, cases, backbone)
    would_go = check_out_folder(request.out, COMMAND, overwrite=request.overwrite, inputs=inputs)
    claim = partial(claim_out_folder, request.out, COMMAND, overwrite=request.overwrite, inputs=inputs)
    summaries: list[dict[str, Any]] = []
    failures: list[tuple[str, str, str, str]] = []
    with locked(request.out, "output folder"):
        if not would_go:
            claim()
            for leftover in request.out.glob(".tmp-*"):
                shutil.rmtree(leftover)
        for done, named in enumerate(cases, start=1):
            out = request.out if len(cases) == 1 else request.out / named.name
            slices = progress if len(cases) == 1 else None
            try:
                with saying_memory(backbone):
                    summaries.append(_infer_case(named, backbone, request, config, out, slices, claim))
            except DataError as error:
                if request.on_error == "stop":
                    raise
                log.warning("%s: %s", named.name, error.what)
                failures.append((named.name, hide_home(str(named.path)), _reason(error), error.fix))
            if progress is not None and len(cases) > 1:
                progress(done, len(cases))
        if would_go and not summaries:
            raise _nothing_to_replace_it(failures)
        write_failures(request.out / "failures.csv", failures)
        facts = plain({**result_header(COMMAND, started), "cases": summaries, "failures": _failure_facts(failures)})
        if len(cases) > 1:
            remove_results(request.out)
            write_json(request.out / "summary.json", facts)
    lines = [line for summary in summaries for line in _lines(summary, request, len(cases))]
    return Result(lines, facts, _partial(failures, len(cases), request.out))


def _config(request: InferRequest) -> InferConfig:
    config = load_config(InferConfig, None, recipes=COMMAND, overrides=request.overrides)
    if not request.heatmap and "heatmap_method" in config.model_fields_set:
        raise ConfigError(
            "heatmap_method has no effect without a heat map.",
            where=f"heatmap_method={config.heatmap_method}",
            fix="add --heatmap, or leave the key out",
            code="config_invalid",
        )
    return config


def _fitting(config: InferConfig, backbone: Backbone) -> InferConfig:
    """A network without attention has nothing to roll out: similarity stands in where no method was asked for."""
    if isinstance(backbone.model, VisionTransformer) or "heatmap_method" in config.model_fields_set:
        return config
    return config.model_copy(update={"heatmap_method": "similarity"})


def _inputs(request: InferRequest, cases: list[Named], backbone: Backbone) -> list[Path]:
    """What is read: cases, the tables that name them, and the model."""
    model = backbone.found.run or backbone.found.weights
    return [*(Path(word) for word in request.cases), *(named.path for named in cases), model]


def _nothing_to_replace_it(failures: list[tuple[str, str, str, str]]) -> DataError:
    return DataError(
        f"None of {len(failures)} cases could be looked at; the output folder keeps what it holds.",
        where="\n".join(f"{path}: {reason}" for _, path, reason, _ in failures[:5]),
        fix=failures[0][3],
        code="cases_failed",
    )


def _reason(error: DataError) -> str:
    return f"{error.what} {error.where}".strip()


def _failure_facts(failures: list[tuple[str, str, str, str]]) -> list[dict[str, str]]:
    return [dict(zip(("case_id", "path", "reason", "fix"), failure, strict=True)) for failure in failures]


def _partial(failures: list[tuple[str, str, str, str]], count: int, out: Path) -> PartialFailure | None:
    if not failures:
        return None
    return PartialFailure(
        f"{len(failures)} of {count} cases failed.",
        where=hide_home(str(out / "failures.csv")),
        fix="see the reasons there; the other cases are complete",
        code="cases_failed",
    )


# --- one case --------------------------------------------------------------------------------------------------------


def _infer_case(
    named: Named,
    backbone: Backbone,
    request: InferRequest,
    config: InferConfig,
    out: Path,
    progress: Progress | None,
    claim: Callable[..., None],
) -> dict[str, Any]:
    """Look at one case; its folder gets all results, or keeps what it had.

    ``claim`` makes the output folder ours, which may delete what lay there: not before there are results.
    """
    started = time.time()
    wanted = Wanted(backbone.sequences, backbone.reference, volumes=backbone.model.sequences is not None)
    temporary = temporary_folder(request.out, "case")
    try:
        with found_case(named, wanted, request.sequence, temporary) as case:
            planes = read_planes(case, backbone)
            seen = look(planes, backbone, config, heatmap=request.heatmap, progress=progress)
            results = CaseResults(named.path, case, planes, seen, backbone, config, temporary / "results")
            results.write_arrays()
            if request.heatmap:
                results.write_heat(request.top_k)
            summary = {
                **result_header(COMMAND, started),
                "input": shown(named.path),
                "output_dir": shown(out),
                **results.facts(),
            }
            results.write_report(summary)
            write_json(results.folder / "summary.json", summary)
            claim(keep=(temporary,))
            publish(results.folder, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return summary


def _lines(summary: dict[str, Any], request: InferRequest, count: int) -> list[str]:
    out = request.out if count == 1 else request.out / summary["case_id"]
    lines = [f"{summary['case_id']}: {summary['num_slices']} slices, {summary['embedding_dim']} numbers each"]
    if summary["heatmap"]:
        lines.append(f"heat map: {out / summary['heatmap']} ({summary['heatmap_method']})")
    return [*lines, f"report:   {out / 'report.html'}"]
