"""How well predictions agree with the truth: metrics with intervals over patients, tables, pictures, one report.

Predictions come from a trained head on features or images, or from a table of any program. Everything is computed
before the first file is written, and images go through the cache: what was interrupted is run again and gives the same
files.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from medssl_cli.core.errors import DataError
from medssl_cli.core.result import Result
from medssl_cli.core.run import (
    RESEARCH_NOTE,
    check_out_folder,
    claim_out_folder,
    locked,
    plain,
    provenance,
    result_header,
    temporary_folder,
)
from medssl_cli.core.wording import counted
from medssl_cli.data.manifest import say_some
from medssl_cli.report.eval_page import group_unit
from medssl_cli.services import evaluate_groups, evaluate_missing
from medssl_cli.services.evaluate_comparison import comparison_facts, read_evaluation
from medssl_cli.services.evaluate_files import score_files
from medssl_cli.services.evaluate_lines import partly_evaluated, said_interval, said_test, short_number
from medssl_cli.services.evaluate_masks_request import is_masks
from medssl_cli.services.evaluate_measures import DELONG_DEFINITION, case_losses, delong_facts, measure, measured_facts
from medssl_cli.services.evaluate_request import (
    COMMAND,
    EvaluateRequest,
    Progress,
    Scored,
    check_request,
    config_facts,
    few_groups_note,
)
from medssl_cli.services.evaluate_results import publish, write_results

log = logging.getLogger(__name__)

__all__ = ["EvaluateRequest", "evaluate"]

_WORST = 10
_UNCALIBRATED = "probabilities were not fitted to validation data; see ece and the calibration picture"


def evaluate(request: EvaluateRequest, *, progress: Progress | None = None) -> Result:
    """Evaluate and write the folder of results; ``progress`` is told cases done and in all.

    Raises:
        ConfigError: Options that contradict each other, no head, or nothing that can be evaluated.
        DataError: Cases that the head has seen, missing predictions or labels, ids that stand there twice.
        CheckpointError: The head or its backbone cannot be loaded.
        ResourceError: No such device, or not enough memory or disk.
    """
    if is_masks(request):
        from medssl_cli.services.evaluate_masks import evaluate_masks  # SciPy's trees and graphs: not for a table

        return evaluate_masks(request, progress=progress)
    started = time.time()
    check_request(request)
    inputs = request.inputs()
    check_out_folder(request.out, COMMAND, overwrite=request.overwrite, inputs=inputs)
    claim = partial(claim_out_folder, request.out, COMMAND, overwrite=request.overwrite, inputs=inputs)
    scored, found = measured(request, progress=progress)
    facts = plain({**result_header(COMMAND, started), **found, "provenance": provenance()})
    with locked(request.out, "output folder"):
        _write(request.out, scored, facts, claim)
    return Result(_lines(facts, request.out), facts, partly_evaluated(scored.failures, request.out))


def measured(request: EvaluateRequest, *, progress: Progress | None = None) -> tuple[Scored, dict[str, Any]]:
    """What is evaluated, and ``metrics.json`` of it without header and provenance; nothing is written.

    Raises:
        ConfigError, DataError, CheckpointError, ResourceError: As ``evaluate``.
    """
    check_request(request)
    if request.compare is not None:
        read_evaluation(request.compare)  # a wrong folder is told before anything is computed
    scored = _grouped(_score(request, progress), request)
    return scored, _facts(request, scored)


def _score(request: EvaluateRequest, progress: Progress | None) -> Scored:
    if request.of_files:
        return score_files(request)
    from medssl_cli.services.evaluate_model import score_model  # torch: a table is evaluated without it

    if request.data is None:
        raise ValueError("a model without data")
    return score_model(request, request.data, progress)


def _grouped(scored: Scored, request: EvaluateRequest) -> Scored:
    """The cases grouped by the column asked for, where the table of labels has not done so already."""
    if request.group_by is None or request.of_files:
        return scored
    groups = evaluate_groups.case_column(scored, request.group_by, request.subgroups)
    unknown = [case_id for case_id, group in zip(scored.table.case_ids, groups, strict=True) if not group]
    if unknown:
        raise DataError(
            f"{counted(len(unknown), 'case')} without a group.",
            where=f"--group-by {request.group_by}: {say_some(unknown)}",
            fix="fill the column for every case",
            code="group_unknown",
        )
    slices = scored.slices
    if slices is not None:
        of_case = dict(zip(scored.table.case_ids, groups, strict=True))
        names = tuple(of_case.get(name.rpartition(":")[0], name) for name in slices.case_ids)
        slices = replace(slices, patient_ids=names)
    table = replace(scored.table, patient_ids=tuple(groups))
    return replace(scored, table=table, group_by=request.group_by, slices=slices)


def _facts(request: EvaluateRequest, scored: Scored) -> dict[str, Any]:
    """``metrics.json`` without header and provenance."""
    table, draws, seed = scored.table, request.draws, request.seed
    evaluation = measure(table, scored.thresholds, draws=draws, seed=seed)
    found = measured_facts(table, evaluation)
    found["bootstrap"]["unit"] = scored.group_by
    return {
        "task": table.task,
        "classes": list(table.classes),
        "n_unlabelled": scored.unlabelled,
        "n_failed": len(scored.failures),
        "group_by": scored.group_by,
        **found,
        **_threshold_facts(scored),
        "calibrated": scored.calibrated,
        "delong": delong_facts(table),
        "delong_definition": None if table.task == "regression" else DELONG_DEFINITION,
        **_subgroups(request, scored),
        "comparison": None if request.compare is None else comparison_facts(scored, request.compare, draws, seed),
        **_missing_sequences(request, scored),
        "slice_level": _slice_level(scored, draws, seed),
        "worst_cases": worst_cases(scored),
        "model": scored.model,
        "data": scored.data,
        "config": config_facts(request),
        "device": scored.device,
        "notes": [*scored.notes, *few_groups_note(evaluation.n_groups, scored.group_by)],
        "null_reasons": _null_reasons(request, scored),
        "note": RESEARCH_NOTE,
    }


def _threshold_facts(scored: Scored) -> dict[str, Any]:
    values = None if scored.thresholds is None else [float(value) for value in scored.thresholds]
    single = values[0] if values is not None and len(set(values)) == 1 else None
    return {"threshold": single, "thresholds": values, "threshold_source": scored.threshold_source}


def _subgroups(request: EvaluateRequest, scored: Scored) -> dict[str, Any]:
    if not request.subgroup:
        return {"subgroups": None, "subgroups_note": None}
    draws, seed = request.draws, request.seed
    found = evaluate_groups.subgroup_facts(scored, request.subgroup, request.subgroups, draws, seed)
    return {"subgroups": found, "subgroups_note": evaluate_groups.NOTE}


def _missing_sequences(request: EvaluateRequest, scored: Scored) -> dict[str, Any]:
    if not request.missing_sequences or scored.with_sequences is None:
        return {"missing_sequences": None, "missing_sequences_definition": None}
    table = evaluate_missing.missing_facts(scored, scored.with_sequences, request.draws, request.seed)
    return {"missing_sequences": table, "missing_sequences_definition": evaluate_missing.DEFINITION}


def _slice_level(scored: Scored, draws: int, seed: int) -> dict[str, Any] | None:
    """The metrics of single slices, where they have labels of their own."""
    if scored.slices is None:
        return None
    found = measure(scored.slices, scored.thresholds, draws=draws, seed=seed).to_json()
    return {"definition": "each slice with a label of its own; intervals over patients", **found}


def worst_cases(scored: Scored) -> list[dict[str, Any]]:
    """The cases whose predictions are farthest off."""
    table, losses = scored.table, case_losses(scored.table)
    order = np.argsort(-losses, kind="stable")[:_WORST]
    return [
        {"case_id": table.case_ids[n], "patient_id": table.patient_ids[n], "loss": float(losses[n]), **_row(table, n)}
        for n in order
    ]


def _row(table: Any, n: int) -> dict[str, Any]:
    values = dict(zip(table.classes, map(float, table.values_NC[n]), strict=True))
    labels = table.labels_NC[n]
    if table.task == "multiclass":
        return {"label": table.classes[int(labels[0])], "predicted": values}
    return {"label": dict(zip(table.classes, map(float, labels), strict=True)), "predicted": values}


def _null_reasons(request: EvaluateRequest, scored: Scored) -> dict[str, str]:
    task = scored.table.task
    reasons = {
        "subgroups": "" if request.subgroup else "--subgroup was not given",
        "comparison": "" if request.compare else "--compare was not given",
        "missing_sequences": "" if request.missing_sequences else "--missing-sequences was not given",
        "slice_level": "" if scored.slices else "no slice head on slices with labels of their own",
        "model": "" if scored.model else "predictions from a file",
        "device": "" if scored.device else "predictions from a file",
        "calibrated": ""
        if scored.calibrated is not None
        else "not known of predictions from a file"
        if scored.model is None
        else "numbers are predicted, no probabilities",
        "threshold": ""
        if _threshold_facts(scored)["threshold"] is not None
        else scored.threshold_source
        if scored.thresholds is None
        else "each class has its own, see thresholds",
        "thresholds": "" if scored.thresholds is not None else scored.threshold_source,
        "delong": "numbers are predicted" if task == "regression" else "",
    }
    reasons["delong_definition"] = reasons["delong"]
    reasons["subgroups_note"] = reasons["subgroups"]
    reasons["missing_sequences_definition"] = reasons["missing_sequences"]
    if task not in ("multilabel", "regression"):
        reasons["any_class_metrics"] = "only for several labels a case"
    if scored.calibrated is False:
        log.info("Not calibrated: %s", _UNCALIBRATED)
    return {name: reason for name, reason in reasons.items() if reason}


# --- files and lines -------------------------------------------------------------------------------------------------


def _write(out: Path, scored: Scored, facts: Mapping[str, Any], claim: Callable[..., None]) -> None:
    temporary = temporary_folder(out, COMMAND)
    try:
        write_results(temporary, scored, facts)
        claim(keep=(temporary,))
        publish(temporary, out)
        for leftover in out.glob(".tmp-*"):  # of a run that was killed
            shutil.rmtree(leftover, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _lines(facts: Mapping[str, Any], out: Path) -> list[str]:
    """A table for people: each metric with its interval, and where the report is."""
    what = f"{facts['task']} ({', '.join(facts['classes'])})"
    cases, groups = facts["n"], facts["n_groups"]
    unit = group_unit(facts["group_by"], groups)
    of = "" if facts["group_by"] == "case_id" else f", {groups} {unit}"
    lines = [f"{what}: {counted(cases, 'case')}{of}; {_said_thresholds(facts)}"]
    lines += [f"  note: {note}" for note in facts["notes"]]
    width = max(len(name) for name in facts["metrics"])
    for name, metric in facts["metrics"].items():
        lines.append(f"  {name:<{width}}  {_said_metric(name, metric, unit)}")
    lines += _said_classes(facts, unit)
    if facts["comparison"] is not None:
        lines += [said_test(name, test) for name, test in facts["comparison"]["tests"].items()]
    return [*lines, f"report: {out / 'report.html'}"]


def _said_classes(facts: Mapping[str, Any], unit: str) -> list[str]:
    """The leading metric of each class or target, where there are several; the report holds all of them."""
    name = "r2" if facts["task"] == "regression" else "auroc"
    told = {kind: metrics[name] for kind, metrics in facts["per_class"].items() if name in metrics}
    if len(told) < 2:
        return []
    width = max(map(len, told))
    return [f"  {name} of {kind:<{width}}  {_said_metric(name, metric, unit)}" for kind, metric in told.items()]


def _said_metric(name: str, metric: Mapping[str, Any], unit: str) -> str:
    """``0.912  (0.851 to 0.962)  38 patients`` of one metric."""
    if metric["value"] is None:
        return f"-      {metric.get('reason', '')}"
    value = f"{metric['value']:.0f}" if name == "n_positives" else short_number(metric["value"])
    reason = f"  {metric['reason']}" if metric.get("reason") else ""
    return f"{value}{said_interval(metric)}  {metric['n_groups']} {unit}{reason}"


def _said_thresholds(facts: Mapping[str, Any]) -> str:
    values = facts["thresholds"]
    if values is None:
        return str(facts["threshold_source"])
    shown = [f"{value:.3g}" for value in dict.fromkeys(values)]
    return f"threshold {', '.join(shown[:6])}{' ...' if len(shown) > 6 else ''} ({facts['threshold_source']})"
