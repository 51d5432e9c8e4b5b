"""How well label maps agree with the truth: overlap, distances, lesions; with intervals over patients and a report.

Label maps come from any program as files, or from a segmentation network of this one. Cases stream: one is in memory at
a time, and everything is computed before the first file is written.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from medssl_cli.core.config import load_config
from medssl_cli.core.errors import ConfigError, DataError
from medssl_cli.core.result import Result
from medssl_cli.core.run import (
    RESEARCH_NOTE,
    check_out_folder,
    claim_out_folder,
    hide_home,
    locked,
    plain,
    provenance,
    result_header,
    temporary_folder,
)
from medssl_cli.core.wording import counted
from medssl_cli.data.label_maps import LabelSpec
from medssl_cli.data.manifest import say_some, split_digest
from medssl_cli.report.eval_page import group_unit, metric_name
from medssl_cli.services.evaluate_lines import partly_evaluated, said_interval, said_test, short_number
from medssl_cli.services.evaluate_masks_cases import (
    GRID_FIX,
    CaseScores,
    FoundValues,
    Grid,
    ScoreOptions,
    compare_grids,
    failure,
    is_probability,
    nothing_left,
    read_classes,
    read_grid,
    read_prediction,
    read_probabilities,
    read_values,
    score_case,
    score_options,
)
from medssl_cli.services.evaluate_masks_facts import (
    SUBGROUP_NOTE,
    UNITS,
    ScoredMasks,
    comparison_facts,
    masks_facts,
    read_other,
    subgroup_facts,
)
from medssl_cli.services.evaluate_masks_files import (
    MaskPair,
    Pairs,
    find_pairs,
    image_beside,
    say_missing,
    spec_beside,
)
from medssl_cli.services.evaluate_masks_groups import CaseTables, case_rows, patients_of, tables_at, with_patients
from medssl_cli.services.evaluate_masks_request import (
    MasksConfig,
    check_masks_request,
    refuse_idle_lesion_keys,
    segment_run,
)
from medssl_cli.services.evaluate_masks_results import PREDICTIONS, publish_masks, write_masks
from medssl_cli.services.evaluate_masks_worst import WorstCases
from medssl_cli.services.evaluate_request import (
    COMMAND,
    EvaluateRequest,
    Failure,
    Progress,
    config_facts,
    few_groups_note,
)

log = logging.getLogger(__name__)

_LINES = ("dice", "dice_non_empty", "iou", "nsd", "hd95", "assd", "precision", "recall", "volume_error_ml")


def evaluate_masks(request: EvaluateRequest, *, progress: Progress | None = None) -> Result:
    """Evaluate and write the folder of results; ``progress`` is told cases done and in all.

    Raises:
        ConfigError: Options that contradict each other or have no effect.
        DataError: Missing predictions, grids that differ, files that cannot be read, cases that the model has seen.
        CheckpointError: The model cannot be loaded.
        ResourceError: No such device, or not enough memory or disk.
    """
    started = time.time()
    check_masks_request(request)
    inputs = [*request.inputs()]
    check_out_folder(request.out, COMMAND, overwrite=request.overwrite, inputs=inputs)
    claim = partial(claim_out_folder, request.out, COMMAND, overwrite=request.overwrite, inputs=inputs)
    if request.compare is not None:
        read_other(request.compare)  # a wrong folder is told before anything is computed
    with ExitStack() as stack:
        saved = _scratch(stack, request) if request.save_predictions else None
        scored, worst = _score(request, progress, saved)
        facts = plain({**result_header(COMMAND, started), **_facts(request, scored, worst), "provenance": provenance()})
        with locked(request.out, "output folder"):
            _write(request.out, scored, facts, worst, claim, saved)
    return Result(_lines(facts, request.out), facts, partly_evaluated(scored.failures, request.out, "read or compared"))


def _scratch(stack: ExitStack, request: EvaluateRequest) -> Path:
    """A folder on the disk of the results, for label maps until the rest is there."""
    request.out.parent.mkdir(parents=True, exist_ok=True)
    name = stack.enter_context(tempfile.TemporaryDirectory(prefix=".medssl-eval-", dir=request.out.parent))
    return Path(name)


def _score(request: EvaluateRequest, progress: Progress | None, saved: Path | None) -> tuple[ScoredMasks, WorstCases]:
    run = segment_run(request)
    if run is None:
        return score_files(request, progress)
    from medssl_cli.services.evaluate_masks_model import score_segmenter  # torch: files are evaluated without it

    return score_segmenter(request, run, progress, saved)


# --- label maps from files -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """What is going to be measured.

    Args:
        pairs: Cases that can be.
        spec: Classes.
        options: How.
        threshold: Of probabilities; None where there are none.
        threshold_source: In words.
        lesion_source: In words; None without lesions.
        unit: Of distances.
        failures: Cases left out so far.
    """

    pairs: tuple[MaskPair, ...]
    spec: LabelSpec
    options: ScoreOptions
    threshold: float | None
    threshold_source: str
    lesion_source: str | None
    unit: str
    failures: tuple[Failure, ...]


def score_files(request: EvaluateRequest, progress: Progress | None = None) -> tuple[ScoredMasks, WorstCases]:
    """Measure label maps of two folders.

    Raises:
        ConfigError: Options without effect, a pattern or classes that cannot be read.
        DataError: Missing predictions, grids that differ, files that cannot be read.
    """
    if request.predictions is None or request.reference is None:
        raise ValueError("files without predictions or reference")
    config = load_config(MasksConfig, None, recipes=COMMAND, overrides=request.overrides)
    found = find_pairs(request.predictions, request.reference, request.probabilities, request.label, request.split_csv)
    plan = _planned(request, config, found)
    tables = CaseTables(
        case_rows([pair.case_id for pair in plan.pairs], [pair.name for pair in plan.pairs]),
        request.reference,
        tables_at(request.reference, request.subgroups),
        of_images=plan.unit == "px",
    )
    patients, group_by, notes = patients_of(request, tables)
    tables = with_patients(tables, patients, request.subgroup)
    cases, failures, worst = [], list(plan.failures), WorstCases(config.worst_cases)
    for number, pair in enumerate(plan.pairs):
        try:
            cases.append(_measured(pair, patients[pair.case_id], plan, worst))
        except DataError as error:
            _stop_or_list(request, failures, pair, error)
        if progress is not None:
            progress(number + 1, len(plan.pairs))
    scored = ScoredMasks(
        cases=tuple(_some(cases, failures)),
        classes=plan.spec.classes,
        options=plan.options,
        unit=plan.unit,
        group_by=group_by,
        tables=tables.kept([case.case_id for case in cases]),
        threshold=plan.threshold,
        threshold_source=plan.threshold_source,
        data=_data_facts(request, cases),
        lesion_source=plan.lesion_source,
        failures=tuple(failures),
        extra=found.extra,
        notes=(*notes, *_unit_note(plan.unit), *_extra_note(found.extra)),
    )
    return scored, worst


def _measured(pair: MaskPair, patient_id: str, plan: _Plan, worst: WorstCases) -> CaseScores:
    grid = read_grid(pair.reference)
    prediction, probability = read_prediction(pair, plan.spec, plan.options.threshold)
    if plan.options.lesions and pair.probability is not None:
        probability = read_probabilities(pair.probability, plan.spec)
    reference = read_classes(pair.reference, plan.spec)
    names = (pair.case_id, pair.name, patient_id)
    scores = score_case(names, prediction, reference, grid, plan.spec.classes, plan.options, probability)
    worst.add(scores, prediction, reference, grid, image_beside(pair))
    return scores


def _planned(request: EvaluateRequest, config: MasksConfig, found: Pairs) -> _Plan:
    """Compare grids and find out the classes before anything is measured."""
    failures = [(case, hide_home(str(path)), why, "predict this case as well") for case, path, why in found.missing]
    if found.missing and request.on_error == "stop":
        raise say_missing(found.missing)
    wrong = compare_grids(found.pairs)
    if wrong and request.on_error == "stop":
        raise _said_failures(wrong)
    lost = {case for case, *_ in wrong}
    failures += wrong
    pairs = [pair for pair in found.pairs if pair.case_id not in lost]
    spec, of_probabilities, pairs = _classes(request, pairs, failures)
    threshold, source = _threshold(request, of_probabilities)
    lesions = request.lesions or request.probabilities is not None or of_probabilities
    refuse_idle_lesion_keys(request, lesions=lesions)
    return _Plan(
        tuple(pairs),
        spec,
        score_options(request, config, threshold, lesions=lesions),
        threshold,
        source,
        _lesion_source(request, config, of_probabilities) if lesions else None,
        _unit(pairs),
        tuple(failures),
    )


def _classes(
    request: EvaluateRequest, pairs: Sequence[MaskPair], failures: list[Failure]
) -> tuple[LabelSpec, bool, list[MaskPair]]:
    """(classes, whether predictions are probabilities, cases that can be read)."""
    if not pairs:
        raise nothing_left(failures)
    beside = (
        None if request.classes else spec_beside(pairs[0].reference if request.reference is None else request.reference)
    )
    if beside is not None:
        log.info("Classes: %s (%s)", beside[0].describe(), hide_home(str(beside[1])))
        return beside[0], is_probability(read_values(pairs[0].prediction)), list(pairs)
    found, kept = FoundValues(), []
    for pair in pairs:
        try:
            found.add(pair)
            kept.append(pair)
        except DataError as error:
            _stop_or_list(request, failures, pair, error)
    if not kept:
        raise nothing_left(failures)
    spec = found.spec(request.classes, hide_home(str(request.reference)), request.label or "")
    log.info("Classes: %s (values of the files)", spec.describe())
    return spec, bool(found.probability_channels), kept


def _threshold(request: EvaluateRequest, of_probabilities: bool) -> tuple[float | None, str]:
    if of_probabilities:
        if request.threshold is not None:
            return request.threshold, "--threshold"
        return 0.5, "0.5, as none was chosen"
    if request.threshold is not None:
        raise ConfigError(
            "--threshold has no effect on label maps.",
            where=f"--threshold {request.threshold:g}: every voxel of the predictions has its class already",
            fix="leave it out, or name probability maps with --predictions",
            code="threshold_needless",
        )
    return None, "no threshold: label maps"


def _lesion_source(request: EvaluateRequest, config: MasksConfig, of_probabilities: bool) -> str:
    if request.probabilities is None and not of_probabilities:
        return "connected regions of the predicted label maps, each with confidence 1"
    return config.candidates("probability maps")


def _unit(pairs: Sequence[MaskPair]) -> str:
    """Unit of distances: that of the first case; others have to be alike.

    Raises:
        DataError: Cases of several kinds.
    """
    kinds: dict[str, str] = {}
    for pair in pairs:
        grid = read_grid(pair.reference)
        kinds.setdefault(unit_of(grid), pair.case_id)
    if len(kinds) > 1:
        raise DataError(
            "References are of several kinds.",
            where=", ".join(f"{case}: distances in {UNITS[unit]}" for unit, case in kinds.items()),
            fix="evaluate volumes, pictures and arrays without geometry apart",
            code="kinds_mixed",
        )
    return next(iter(kinds))


def unit_of(grid: Grid) -> str:
    """``mm``, ``px`` of a picture, or ``voxels`` where a file tells no geometry."""
    if len(grid.shape) == 2:
        return "px"
    return "voxels" if grid.affine is None else "mm"


def _unit_note(unit: str) -> tuple[str, ...]:
    if unit == "mm":
        return ()
    return (f"The files tell no geometry: distances and the tolerance are in {UNITS[unit]}, volumes are not known.",)


def _extra_note(extra: Sequence[str]) -> tuple[str, ...]:
    if not extra:
        return ()
    log.warning("%s without a reference: %s", counted(len(extra), "prediction"), say_some(extra))
    return (f"{counted(len(extra), 'prediction')} without a reference: {say_some(extra)}.",)


def _stop_or_list(request: EvaluateRequest, failures: list[Failure], pair: MaskPair, error: DataError) -> None:
    if request.on_error == "stop":
        raise error
    failures.append(failure(pair, pair.prediction, error))


def _said_failures(failures: Sequence[Failure]) -> DataError:
    lines = [f"{case}: {reason} ({path})" for case, path, reason, _ in failures]
    more = f"\nand {len(lines) - 8} more" if len(lines) > 8 else ""
    return DataError(
        f"{counted(len(failures), 'case')} cannot be compared.",
        where="\n".join(lines[:8]) + more,
        fix=f"{failures[0][3] or GRID_FIX}; --on-error skip lists such cases and evaluates the others",
        code="grid_mismatch",
    )


def _some(cases: Sequence[CaseScores], failures: Sequence[Failure]) -> Sequence[CaseScores]:
    if not cases:
        raise nothing_left(failures)
    return cases


def _data_facts(request: EvaluateRequest, cases: Sequence[CaseScores]) -> dict[str, Any]:
    return {
        "predictions": hide_home(str(request.predictions)),
        "reference": hide_home(str(request.reference)),
        "probabilities": None if request.probabilities is None else hide_home(str(request.probabilities)),
        "split": None,
        "split_digest": split_digest([case.case_id for case in cases]),
    }


# --- facts, files, lines ---------------------------------------------------------------------------------------------


def _facts(request: EvaluateRequest, scored: ScoredMasks, worst: WorstCases) -> dict[str, Any]:
    """``metrics.json`` without header and provenance."""
    draws, seed = request.draws, request.seed
    found = masks_facts(scored, draws, seed)
    subgroups = subgroup_facts(scored, request.subgroup, draws, seed) if request.subgroup else None
    return {
        **found,
        "subgroups": subgroups,
        "subgroups_note": SUBGROUP_NOTE if subgroups else None,
        "comparison": None if request.compare is None else comparison_facts(scored, request.compare, draws, seed),
        "worst_cases": [case.facts for case in worst.cases],
        "model": scored.model,
        "data": scored.data,
        "config": config_facts(request),
        "device": scored.device,
        "notes": [*scored.notes, *few_groups_note(found["n_groups"], scored.group_by)],
        "null_reasons": _null_reasons(request, scored),
        "note": RESEARCH_NOTE,
    }


def _null_reasons(request: EvaluateRequest, scored: ScoredMasks) -> dict[str, str]:
    reasons = {
        "std": "one case or patient alone has no standard deviation",
        "hd95": "not defined where a mask is empty" if scored.options.hd_empty == "nan" else "",
        "volume_error_ml": "" if scored.unit == "mm" else "the files tell no geometry",
        "threshold": "" if scored.threshold is not None else scored.threshold_source,
        "lesions": "" if scored.lesion_source else "--lesions was not given, and there are no probability maps",
        "subgroups": "" if request.subgroup else "--subgroup was not given",
        "subgroups_note": "" if request.subgroup else "--subgroup was not given",
        "comparison": "" if request.compare else "--compare was not given",
        "model": "" if scored.model else "predictions from files",
        "device": "" if scored.device else "predictions from files",
    }
    return {name: reason for name, reason in reasons.items() if reason}


def _write(
    out: Path,
    scored: ScoredMasks,
    facts: Mapping[str, Any],
    worst: WorstCases,
    claim: Callable[..., None],
    saved: Path | None,
) -> None:
    temporary = temporary_folder(out, COMMAND)
    try:
        write_masks(temporary, scored, facts, worst)
        if saved is not None:
            shutil.move(saved, temporary / PREDICTIONS)
            saved.mkdir()  # which its owner removes
        claim(keep=(temporary,))
        publish_masks(temporary, out)
        for leftover in out.glob(".tmp-*"):  # of a run that was killed
            shutil.rmtree(leftover, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _lines(facts: Mapping[str, Any], out: Path) -> list[str]:
    """A table for people: each metric with its spread and interval, and where the report is."""
    unit = group_unit(facts["group_by"], facts["n_groups"])
    of = "" if facts["group_by"] == "case_id" else f", {facts['n_groups']} {unit}"
    lines = [
        f"segmentation ({', '.join(facts['classes'][1:])}): {counted(facts['n'], 'case')}{of}; {_said_threshold(facts)}"
    ]
    lines += [f"  note: {note}" for note in facts["notes"]]
    lines += [f"  {counted(facts['n_empty_truth'], 'case')} with an empty reference"] if facts["n_empty_truth"] else []
    told = {name: facts["metrics"][name] for name in _LINES if facts["metrics"][name]["value"] is not None}
    labels = {name: _label(name, facts) for name in told}
    width = max(map(len, labels.values()), default=0)
    lines += [f"  {labels[name]:<{width}}  {_said(metric)}" for name, metric in told.items()]
    if len(facts["per_class"]) > 1:
        lines += [f"  Dice of {name}: {_said(metrics['dice'])}" for name, metrics in facts["per_class"].items()]
    for name, found in ((facts["lesions"] or {}).get("per_class") or {}).items():
        lines.append(
            f"  lesions, {name}: {found['n_found']} of {found['n_lesions']} found, {found['n_false_positives']} false"
        )
        lines += [
            f"    {metric_name(metric)}  {_said(found['metrics'][metric])}"
            for metric in ("average_precision", "auroc", "ranking_score")
            if found["metrics"][metric]["value"] is not None
        ]
    if facts["comparison"] is not None:
        lines += [said_test(metric_name(name), test) for name, test in facts["comparison"]["tests"].items()]
    return [*lines, f"report: {out / 'report.html'}"]


def _label(name: str, facts: Mapping[str, Any]) -> str:
    unit = facts["distance_unit"]
    suffix = f", {unit}" if name in ("hd95", "assd") else f" at {facts['tolerance']:g} {unit}" if name == "nsd" else ""
    return f"{metric_name(name)}{suffix}"


def _said_threshold(facts: Mapping[str, Any]) -> str:
    if facts["threshold"] is None:
        return str(facts["threshold_source"])
    return f"threshold {facts['threshold']:.3g} ({facts['threshold_source']})"


def _said(metric: Mapping[str, Any]) -> str:
    """``0.781 ± 0.040  (0.765 to 0.796)  16 cases``."""
    if metric["value"] is None:
        return f"-      {metric.get('reason', '')}"
    std = "" if metric.get("std") is None else f" ± {short_number(metric['std'])}"
    reason = f"  {metric['reason']}" if metric.get("reason") else ""
    return f"{short_number(metric['value'])}{std}{said_interval(metric)}  {counted(metric['n'], 'case')}{reason}"
