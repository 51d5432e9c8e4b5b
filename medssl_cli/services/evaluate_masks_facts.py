"""The numbers of an evaluation of masks: means over cases and over patients, intervals, groups, another run.

Every metric is computed for each case and structure first; a mean is a mean of cases, never of pooled voxels.
Letters: N cases, S structures, K columns, B draws of a block.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from medssl_cli.core.errors import DataError
from medssl_cli.core.run import hide_home
from medssl_cli.core.wording import counted
from medssl_cli.data.images import is_image
from medssl_cli.data.manifest import say_some
from medssl_cli.metrics import lesions, segmentation, surface
from medssl_cli.metrics.comparison import PERMUTATION_DEFINITION, paired_permutation
from medssl_cli.metrics.evaluation import Metric
from medssl_cli.metrics.intervals import DEFINITION as INTERVAL
from medssl_cli.metrics.intervals import bootstrap, number_groups, percentile_interval
from medssl_cli.metrics.lesions import LesionScores
from medssl_cli.services.evaluate_groups import LEAST_CASES, NOTE, named_groups
from medssl_cli.services.evaluate_masks_cases import METRICS, CaseScores, ScoreOptions
from medssl_cli.services.evaluate_masks_groups import CaseTables
from medssl_cli.services.evaluate_request import Failure

TASK = "segmentation"
NON_EMPTY = "_non_empty"
_NON_EMPTY_OF = ("dice", "iou")
"""Metrics with a mean over the cases whose reference is not empty; distances are defined for no others."""
_ROW = ("dice", "iou", "accuracy", "f1", "hd95", "precision", "recall", "assd", "nsd")
_COMPARED = ("dice", "iou", "nsd", "hd95")
UNITS = {"mm": "mm", "px": "pixels", "voxels": "voxels"}
DEFINITIONS = {**segmentation.DEFINITIONS, **surface.DEFINITIONS}


@dataclass(frozen=True)
class ScoredMasks:
    """Measured cases, and all that their evaluation needs besides.

    Args:
        cases: In order of their ids.
        classes: L names, the background first.
        options: How they were measured.
        unit: Of distances: ``mm``, ``px`` of pictures, ``voxels`` where files tell no geometry.
        group_by: What ``patient_id`` of the cases holds.
        tables: For subgroups.
        threshold: Of the probability; None where nothing was decided by one.
        threshold_source: Where it comes from, in words.
        data: What was evaluated, for ``metrics.json``.
        lesion_source: What the candidates are regions of; None without lesions.
        failures: Cases left out because they could not be read or compared.
        extra: Predictions without a reference.
        model: What predicted, for ``metrics.json``; None for files.
        device: What it was computed on.
        notes: What the reader of the numbers has to know.
    """

    cases: tuple[CaseScores, ...]
    classes: tuple[str, ...]
    options: ScoreOptions
    unit: str
    group_by: str
    tables: CaseTables
    threshold: float | None
    threshold_source: str
    data: dict[str, Any]
    lesion_source: str | None = None
    failures: tuple[Failure, ...] = ()
    extra: tuple[str, ...] = ()
    model: dict[str, Any] | None = None
    device: str | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def structures(self) -> tuple[str, ...]:
        """Classes without the background."""
        return self.classes[1:]

    @property
    def groups(self) -> list[str]:
        """Patient of each case."""
        return [case.patient_id for case in self.cases]

    def array(self, name: str) -> np.ndarray:
        """A metric or count of every case and structure, (N, S)."""
        return np.stack([case.values[name] for case in self.cases])

    def of_cases(self, name: str) -> np.ndarray:
        """A metric of every case, (N,): the mean over its structures for which it is defined."""
        return mean_defined(self.array(name))

    def taken(self, places: Sequence[int]) -> list[CaseScores]:
        """Some of the cases."""
        return [self.cases[place] for place in places]


def mean_defined(values_NS: np.ndarray) -> np.ndarray:
    """Mean along the last axis over what is not NaN; NaN where nothing is."""
    known = ~np.isnan(values_NS)
    total, count = np.where(known, values_NS, 0.0).sum(-1), known.sum(-1)
    return np.asarray(np.divide(total, count, out=np.full(count.shape, math.nan), where=count > 0))


# --- metrics with intervals ------------------------------------------------------------------------------------------


def masks_facts(scored: ScoredMasks, draws: int, seed: int) -> dict[str, Any]:
    """The part of ``metrics.json`` that the measured cases alone decide."""
    n_groups = number_groups(scored.groups)[1]
    columns = metric_columns(scored.cases)
    told = _told(columns, scored, draws, seed)
    every = {
        f"{s}/{name}": column
        for s in range(len(scored.structures))
        for name, column in metric_columns(scored.cases, s).items()
    }
    of_each = told if len(scored.structures) == 1 else _told(every, scored, draws, seed)
    per_class = {
        structure: {name: of_each[name if len(scored.structures) == 1 else f"{s}/{name}"] for name in columns}
        for s, structure in enumerate(scored.structures)
    }
    return {
        "task": TASK,
        "classes": list(scored.classes),
        "n": len(scored.cases),
        "n_groups": n_groups,
        "n_failed": len(scored.failures),
        "group_by": scored.group_by,
        "metrics": told,
        "per_class": per_class,
        "overall": overall(scored),
        "per_image": image_rows(scored),
        "per_patient": patient_rows(scored),
        "threshold": scored.threshold,
        "threshold_source": scored.threshold_source,
        **empty_counts(scored.cases),
        "empty_by_class": {name: empty_counts(scored.cases, s) for s, name in enumerate(scored.structures)},
        "empty_rules": _empty_rules(scored.options),
        "tolerance": scored.options.tolerance,
        "distance_unit": scored.unit,
        "hd_empty": scored.options.hd_empty,
        "boundary_definition": surface.BOUNDARY,
        "bootstrap": {"draws": draws, "seed": seed, "unit": _unit(scored.group_by), "interval": INTERVAL},
        "lesions": lesion_facts(scored, draws, seed),
        "extra_predictions": list(scored.extra),
    }


def _unit(group_by: str) -> str:
    return "case" if group_by == "case_id" else f"patient (column patient_id of per_case.csv, {group_by})"


def _empty_rules(options: ScoreOptions) -> str:
    return f"{segmentation.EMPTY_RULE} {surface.EMPTY_RULES[options.hd_empty]}."


def metric_columns(cases: Sequence[CaseScores], structure: int | None = None) -> dict[str, np.ndarray]:
    """Every metric of every case, each (N,): of one structure, or the mean over structures.

    Names ending in ``_non_empty`` leave out what is empty in the reference.
    """
    columns = {}
    chosen = slice(None) if structure is None else slice(structure, structure + 1)
    present = np.stack([case.values["tp"] + case.values["fn"] > 0 for case in cases])[:, chosen]
    for name in METRICS:
        values = np.stack([case.values[name] for case in cases])[:, chosen]
        columns[name] = mean_defined(values)
        if name in _NON_EMPTY_OF:
            columns[f"{name}{NON_EMPTY}"] = mean_defined(np.where(present, values, math.nan))
    return columns


def _told(columns: Mapping[str, np.ndarray], scored: ScoredMasks, draws: int, seed: int) -> dict[str, dict[str, Any]]:
    metrics = mean_metrics(columns, scored.groups, draws, seed)
    found = {}
    for key, metric in metrics.items():
        name = key.rpartition("/")[2]
        definition = definition_of(name, scored)
        several = "/" not in key and len(scored.structures) > 1
        mean = "mean over cases of the mean over structures" if several else "mean over cases"
        facts = replace(metric, definition=f"{definition}; {mean}").to_json()
        spread = spread_of(columns[key])
        found[key] = {**facts, "std": spread["std"]}
    return found


def definition_of(name: str, scored: ScoredMasks) -> str:
    """What a metric of one case is, with its unit and the rules in force."""
    base = name.removesuffix(NON_EMPTY)
    text = DEFINITIONS[base]
    if base in ("hd95", "assd"):
        text += f"; in {UNITS[scored.unit]}"
    if base == "nsd":
        text += f"; tolerance {scored.options.tolerance:g} {UNITS[scored.unit]}"
    return f"{text}; only where the reference is not empty" if name.endswith(NON_EMPTY) else text


def mean_metrics(columns: Mapping[str, np.ndarray], groups: Sequence[str], draws: int, seed: int) -> dict[str, Metric]:
    """Mean of each column over the cases for which it is defined, with its interval over groups."""
    names = list(columns)
    stacked_NK = np.stack([columns[name] for name in names], axis=1)
    known_NK = ~np.isnan(stacked_NK)
    filled_NK = np.where(known_NK, stacked_NK, 0.0)

    def weighted(weights_BN: np.ndarray) -> dict[str, np.ndarray]:
        count_BK = weights_BN @ known_NK
        means_BK = np.divide(
            weights_BN @ filled_NK, count_BK, out=np.full(count_BK.shape, math.nan), where=count_BK > 0
        )
        return dict(zip(names, means_BK.T, strict=True))

    drawn = bootstrap(weighted, groups, draws, seed) if draws else {}
    point = weighted(np.ones((1, len(groups))))
    found = {}
    for k, name in enumerate(names):
        n, n_groups = (
            int(known_NK[:, k].sum()),
            len({g for g, known in zip(groups, known_NK[:, k], strict=True) if known}),
        )
        value = float(point[name][0])
        if math.isnan(value):
            found[name] = Metric(math.nan, math.nan, math.nan, "", n, n_groups, "it is defined for no case")
            continue
        interval = percentile_interval(drawn.get(name, np.empty(0)), n_groups)
        found[name] = Metric(value, interval.low, interval.high, "", n, n_groups, interval.reason)
    return found


# --- means and spreads -----------------------------------------------------------------------------------------------


def spread_of(values_N: np.ndarray) -> dict[str, Any]:
    """Mean, sample standard deviation (n - 1) and number of what is defined."""
    known = values_N[~np.isnan(values_N)]
    return {
        "mean": float(known.mean()) if len(known) else math.nan,
        "std": float(known.std(ddof=1)) if len(known) > 1 else math.nan,
        "n": len(known),
    }


def patient_means(values_N: np.ndarray, groups: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """(patients in order, mean of each patient's cases for which the value is defined)."""
    numbers, n = number_groups(groups)
    known = ~np.isnan(values_N)
    total = np.bincount(numbers, np.where(known, values_N, 0.0), n)
    count = np.bincount(numbers, known, n)
    names = sorted({str(group) for group in groups})
    return names, np.divide(total, count, out=np.full(n, math.nan), where=count > 0)


def overall(scored: ScoredMasks) -> dict[str, Any]:
    """Each metric as mean and sample standard deviation over cases and over patients, also of non-empty references."""
    found = {}
    columns = metric_columns(scored.cases)
    for name in METRICS:
        facts: dict[str, Any] = {"definition": definition_of(name, scored), **_both(columns[name], scored.groups)}
        if f"{name}{NON_EMPTY}" in columns:
            facts["non_empty_truth"] = _both(columns[f"{name}{NON_EMPTY}"], scored.groups)
        found[name] = facts
    return found


def _both(values_N: np.ndarray, groups: Sequence[str]) -> dict[str, Any]:
    return {"cases": spread_of(values_N), "patients": spread_of(patient_means(values_N, groups)[1])}


def image_rows(scored: ScoredMasks) -> list[dict[str, Any]]:
    """One entry a case: its values as means over structures, its counts as sums."""
    columns = {name: scored.of_cases(name) for name in _ROW}
    counts = {name: scored.array(name).sum(1) for name in ("tp", "fp", "fn")}
    return [
        {
            "name": case.name,
            "case_id": case.case_id,
            "patient": case.patient_id,
            **{name: float(column[n]) for name, column in columns.items()},
            **{name: int(column[n]) for name, column in counts.items()},
        }
        for n, case in enumerate(scored.cases)
    ]


def patient_rows(scored: ScoredMasks) -> list[dict[str, Any]]:
    """One entry a patient: the mean of the values of its cases."""
    columns = {name: patient_means(scored.of_cases(name), scored.groups) for name in _ROW}
    counts = {group: scored.groups.count(group) for group in set(scored.groups)}
    names = next(iter(columns.values()))[0]
    return [
        {"patient": name, "n": counts[name], **{metric: float(means[i]) for metric, (_, means) in columns.items()}}
        for i, name in enumerate(names)
    ]


def empty_counts(cases: Sequence[CaseScores], structure: int | None = None) -> dict[str, int]:
    """Cases whose reference or prediction is empty, of one structure or of all together."""
    chosen = slice(None) if structure is None else slice(structure, structure + 1)
    truth = np.array([(case.values["tp"] + case.values["fn"])[chosen].sum() > 0 for case in cases])
    found = np.array([(case.values["tp"] + case.values["fp"])[chosen].sum() > 0 for case in cases])
    return {
        "n_empty_truth": int((~truth).sum()),
        "n_both_empty": int((~truth & ~found).sum()),
        "n_missed": int((truth & ~found).sum()),
        "n_false_alarm": int((~truth & found).sum()),
    }


# --- lesions ---------------------------------------------------------------------------------------------------------


def lesion_facts(scored: ScoredMasks, draws: int, seed: int) -> dict[str, Any] | None:
    """Lesion-level metrics of each structure; None where lesions were not asked for."""
    if scored.lesion_source is None:
        return None
    found = {name: _lesions_of(scored, s, draws, seed) for s, name in enumerate(scored.structures)}
    return {
        "definition": lesions.match_definition(scored.options.min_iou),
        "candidates": scored.lesion_source,
        "per_class": found,
    }


def _lesions_of(scored: ScoredMasks, structure: int, draws: int, seed: int) -> dict[str, Any]:
    judged = [case.lesions[structure] for case in scored.cases]
    scores = LesionScores(judged)
    point = scores.values(np.ones((1, len(judged))))
    drawn = bootstrap(scores.values, scored.groups, draws, seed)
    n_groups = number_groups(scored.groups)[1]
    metrics = {}
    for name, definition in lesions.DEFINITIONS.items():
        value, interval = float(point[name][0]), percentile_interval(drawn[name], n_groups)
        reason = _undefined_lesions(name, judged) if math.isnan(value) else interval.reason
        ends = (math.nan, math.nan) if math.isnan(value) else (interval.low, interval.high)
        metrics[name] = Metric(value, *ends, definition, len(judged), n_groups, reason).to_json()
    return {
        "metrics": metrics,
        "n_lesions": sum(case.n_lesions for case in judged),
        "n_found": sum(case.n_found for case in judged),
        "n_false_positives": sum(case.n_false for case in judged),
        "n_unjudged": sum(case.n_unjudged for case in judged),
        "n_cases_with_lesion": sum(case.n_lesions > 0 for case in judged),
        "froc": [{"threshold": t, "fp_per_case": fp, "sensitivity": tp} for t, fp, tp in scores.froc()],
    }


def _undefined_lesions(name: str, judged: Sequence[lesions.CaseLesions]) -> str:
    if name == "precision":
        return "there is no candidate"
    with_lesion = sum(case.n_lesions > 0 for case in judged)
    if not with_lesion:
        return "no case has a lesion"
    return "all cases have a lesion"


# --- groups of cases and another run ---------------------------------------------------------------------------------


def subgroup_facts(scored: ScoredMasks, columns: Sequence[str], draws: int, seed: int) -> dict[str, Any]:
    """Metrics of each group of each column: {column: list of {value, n, n_groups, metrics}}.

    Raises:
        DataError: A column is nowhere to be found.
    """
    return {column: _groups(scored, scored.tables.column(column), draws, seed) for column in columns}


SUBGROUP_NOTE = NOTE


def _groups(scored: ScoredMasks, cells: Sequence[str], draws: int, seed: int) -> list[dict[str, Any]]:
    names, values = named_groups(cells)
    found = []
    for value in values:
        cases = scored.taken([i for i, name in enumerate(names) if name == value])
        groups = [case.patient_id for case in cases]
        facts = {"value": value, "n": len(cases), "n_groups": len(set(groups))}
        few = len(cases) < LEAST_CASES
        metrics = mean_metrics(metric_columns(cases), groups, 0 if few else draws, seed)
        told = {name: replace(m, definition=definition_of(name, scored)).to_json() for name, m in metrics.items()}
        if few:
            reason = f"fewer than {LEAST_CASES} cases"
            facts["reason"] = reason
            none = {"value": None, "ci_low": None, "ci_high": None, "reason": reason}
            told = {name: {**metric, **none} for name, metric in told.items()}
        found.append({**facts, "metrics": told})
    return found


def read_other(folder: Path) -> dict[str, Any]:
    """``metrics.json`` of another evaluation of masks.

    Raises:
        DataError: It is none.
    """
    path = folder / "metrics.json"
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if facts["task"] != TASK:
            raise ValueError(f"an evaluation of the task {facts['task']}")
        wanted = {"case_id", "tp", "fn", *_COMPARED}
        if not all(wanted <= set(row) for row in facts["per_image"]):
            raise ValueError("its per_image does not tell of single cases")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            "The evaluation to compare with cannot be read.",
            where=f"{hide_home(str(path))}: {type(error).__name__} {error}",
            fix="name the --out folder of another `medssl eval` of masks",
            code="evaluation_missing",
        ) from error
    return dict(facts)


def comparison_facts(scored: ScoredMasks, folder: Path, draws: int, seed: int) -> dict[str, Any]:
    """This evaluation minus another one of the same cases.

    Raises:
        DataError: No evaluation of masks there, or of other cases, structures or references.
    """
    other = read_other(folder)
    rows = _aligned(scored, other, folder)
    tests = {}
    for name in _COMPARED:
        own = scored.of_cases(name)
        theirs = np.array([math.nan if row[name] is None else row[name] for row in rows], dtype=np.float64)
        tests[name] = _test(own, theirs, scored.groups, draws, seed)
        if name == "dice":  # an empty pair counts 1 and any voxel in it 0, which may outweigh all the rest
            present_N = np.array([row["tp"] + row["fn"] > 0 for row in rows])
            own, theirs = (np.where(present_N, values_N, math.nan) for values_N in (own, theirs))
            tests["dice_non_empty"] = _test(own, theirs, scored.groups, draws, seed)
    first = next(iter(tests))
    return {
        "other": hide_home(str(folder)),
        "n": len(rows),
        "n_groups": len(set(scored.groups)),
        "draws": draws,
        "seed": seed,
        "metric": first,
        **tests[first],
        "tests": tests,
        "definition": "difference of the means over cases: this evaluation minus the other one, over the cases for "
        "which the metric is defined in both; its interval is that of the bootstrap over patients",
        "methods": {"paired permutation": PERMUTATION_DEFINITION},
        "note": "Several metrics are tested on the same cases; p-values are not corrected for that.",
    }


def _test(own_N: np.ndarray, theirs_N: np.ndarray, groups: Sequence[str], draws: int, seed: int) -> dict[str, Any]:
    both = ~np.isnan(own_N) & ~np.isnan(theirs_N)
    facts: dict[str, Any] = {"method": "paired permutation", "n": int(both.sum())}
    if not both.any():
        none = {"difference": None, "ci_low": None, "ci_high": None, "p": None}
        return {**none, **facts, "reason": "it is defined for no case in both"}
    kept = [group for group, known in zip(groups, both, strict=True) if known]
    a, b = own_N[both], theirs_N[both]
    test = paired_permutation(a, b, np.zeros(len(a)), kept, _mean, draws, seed)
    difference = mean_metrics({"difference": a - b}, kept, draws, seed)["difference"]
    return {
        "difference": test.difference,
        "ci_low": difference.ci_low,
        "ci_high": difference.ci_high,
        "p": test.p,
        **facts,
    }


def _mean(values_NC: np.ndarray, _labels: np.ndarray) -> float:
    return float(values_NC.mean())


def _plain_id(case_id: str) -> str:
    """The id of a picture without its suffix: a data set names its files, a folder of predictions their stems."""
    return Path(case_id).stem if is_image(Path(case_id)) else case_id


def _aligned(scored: ScoredMasks, other: Mapping[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Rows of the other evaluation in the order of these cases.

    Raises:
        DataError: They are of other cases, structures or references.
    """
    rows = {_plain_id(row["case_id"]): row for row in other["per_image"]}
    own = {_plain_id(case.case_id): case for case in scored.cases}
    faults = []
    theirs = list(other.get("classes") or ())
    one_each = len(theirs) == len(scored.classes) == 2  # files tell no name of their one structure
    if theirs != list(scored.classes) and not one_each:
        faults.append(f"structures {', '.join((other.get('classes') or ())[1:])}; here {', '.join(scored.structures)}")
    if (other.get("tolerance"), other.get("hd_empty")) != (scored.options.tolerance, scored.options.hd_empty):
        faults.append(
            f"tolerance {other.get('tolerance')}, hd_empty {other.get('hd_empty')}; "
            f"here {scored.options.tolerance:g}, {scored.options.hd_empty}"
        )
    for where, names in (("there", set(rows) - set(own)), ("here", set(own) - set(rows))):
        if names:
            faults.append(f"{counted(len(names), 'case')} only {where}: {say_some(sorted(names), 5)}")
    changed = [
        name
        for name, case in own.items()
        if name in rows and int((case.values["tp"] + case.values["fn"]).sum()) != rows[name]["tp"] + rows[name]["fn"]
    ]
    if changed:
        faults.append(f"{counted(len(changed), 'case')} with another reference: {say_some(sorted(changed), 5)}")
    if faults:
        raise DataError(
            "The two evaluations are not of the same cases.",
            where=f"{hide_home(str(folder))}\n" + "\n".join(faults),
            fix="evaluate both with the same references and options",
            code="comparison_differs",
        )
    return [rows[_plain_id(case.case_id)] for case in scored.cases]
