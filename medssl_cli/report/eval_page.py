"""The page of an evaluation: each figure with its interval and its definition, the curves, the groups of cases.

It is made of ``metrics.json`` and of pictures by name; what a run did not ask for leaves its section out, and a number
that is not defined stands as a dash with the reason.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from medssl_cli.core.run import RESEARCH_NOTE
from medssl_cli.core.wording import counted
from medssl_cli.report.page import Content, Html, Page, escaped, image, joined, path_text

EvalPictures: TypeAlias = Mapping[str, bytes]
"""PNG bytes by name: ``roc``, ``pr``, ``calibration``, ``histogram``, ``confusion``; ``scatter``, ``bland_altman``."""

_NAMES = {
    "auroc": "AUROC",
    "average_precision": "average precision",
    "balanced_accuracy": "balanced accuracy",
    "f1": "F1",
    "mcc": "MCC",
    "ppv": "PPV",
    "npv": "NPV",
    "brier": "Brier score",
    "log_loss": "log loss",
    "ece": "ECE",
    "n_positives": "positives",
    "quadratic_kappa": "quadratic kappa",
    "mae": "MAE",
    "rmse": "RMSE",
    "r2": "R²",
    "pearson": "Pearson r",
    "relative_error": "relative error",
    "limit_low": "lower limit of agreement",
    "limit_high": "upper limit of agreement",
    "dice": "Dice",
    "iou": "IoU",
    "dice_non_empty": "Dice, non-empty references",
    "iou_non_empty": "IoU, non-empty references",
    "hd95": "HD95",
    "assd": "ASSD",
    "nsd": "surface Dice",
    "volume_error_ml": "volume error, ml",
    "ranking_score": "ranking score",
    "false_positives_per_case": "false positives a case",
}
_MAIN = (
    ("macro_auroc", "auroc", "macro_r2", "r2", "dice"),
    ("macro_average_precision", "average_precision", "macro_pearson", "mae", "iou"),
    ("macro_sensitivity", "sensitivity", "balanced_accuracy", "macro_relative_error", "pearson", "nsd"),
    ("macro_specificity", "specificity", "bias", "hd95"),
)
"""What stands at the top: of each line the first that there is; the very first also compares groups."""
_PER_CLASS = ("n_positives", "auroc", "average_precision", "sensitivity", "specificity", "ppv", "f1")
_PER_STRUCTURE = ("dice", "dice_non_empty", "iou", "nsd", "hd95", "precision", "recall")
_PER_TARGET = ("mae", "rmse", "bias", "r2", "pearson")
_UNIT = {"auroc", "average_precision", "accuracy", "balanced_accuracy", "f1", "sensitivity", "specificity", "ppv",
         "npv", "brier", "ece", "prevalence", "r2", "pearson", "dice", "iou", "dice_non_empty", "iou_non_empty", "nsd",
         "precision", "recall", "ranking_score"}  # fmt: skip
"""Metrics that are drawn between 0 and 1."""
_COUNTS = ("n_positives",)
_CHECKED = 8
"""Classes whose AUROC stands there with DeLong's interval too."""
_PLOTS = {
    "roc": (
        "ROC curves",
        "Sensitivity against false positives over all thresholds. The nearer to the upper left corner the better; the "
        "dashed diagonal is chance.",
    ),
    "pr": (
        "Precision and recall",
        "How many of the cases called positive are positive, against how many of the positive ones are found. Dashed: "
        "chance, the share of positives. With rare findings this tells more than the ROC curve.",
    ),
    "calibration": (
        "Calibration",
        "Of the cases with about this probability, how many were positive (95 % Wilson interval). On the diagonal the "
        "numbers can be read as probabilities; below it they are too high. Grey: how many cases.",
    ),
    "histogram": (
        "Scores",
        "Probabilities of negative and of positive cases, each as shares of its own. The less the two overlap, the "
        "better; where they do, the threshold trades misses for false alarms.",
    ),
    "confusion": ("Confusion matrix", "Rows are the reference, columns the decision; the diagonal is right."),
    "scatter": ("Predicted against reference", "Each dot is a case; on the dashed line they agree."),
    "bland_altman": (
        "Agreement",
        "Difference against mean of the two (Bland and Altman 1986). The line off zero is the bias; 95 % of the "
        "differences are expected between the dashed lines, if they are normally distributed.",
    ),
}


@dataclass(frozen=True)
class _Scale:
    """Ends of the little bars, and where a mark stands."""

    low: float
    high: float
    mark: float | None = None


_ONE = _Scale(0.0, 1.0)


@dataclass(frozen=True)
class _Each:
    """What the table of single classes tells: its noun, the metrics, the one of the bars and where chance lies."""

    noun: str
    metrics: tuple[str, ...]
    lead: str
    chance: float | None = None


_EACH_CLASS = _Each("class", _PER_CLASS, "auroc", 0.5)
_OF_EACH = {
    "regression": _Each("target", _PER_TARGET, "r2"),
    "segmentation": _Each("structure", _PER_STRUCTURE, "dice"),
}


def eval_page(facts: Mapping[str, Any], pictures: EvalPictures) -> Page:
    """The report of an evaluation.

    Args:
        facts: ``metrics.json``; an absent key leaves its section out.
        pictures: Made by ``eval_plots``.
    """
    page = Page("Evaluation", _lead(facts))
    page.style(STYLE)
    page.note(RESEARCH_NOTE, "warning")
    for note in facts.get("notes") or ():
        page.note(str(note), "info")
    add_headline(page, facts)
    add_classes(page, facts)
    _add_plots(page, pictures)
    add_subgroups(page, facts)
    add_comparison(page, facts.get("comparison"))
    _add_missing(page, facts)
    _add_slices(page, facts)
    _add_worst(page, facts)
    add_provenance(page, facts)
    return page


def _lead(facts: Mapping[str, Any]) -> str:
    n, groups = facts.get("n"), facts.get("n_groups")
    parts = [str(facts.get("task", "")).capitalize()]
    if n is not None:
        level = str(facts.get("group_by", "patient_id"))
        of = "" if groups is None or level == "case_id" else f" of {groups} {group_unit(level, groups)}"
        parts.append(f"{counted(n, 'case')}{of}")
    split = (facts.get("data") or {}).get("split")
    return ", ".join(part for part in (*parts, f"part {split}" if split else "") if part) + "."


def group_unit(level: str, count: int) -> str:
    """What the bootstrap draws, by the column that it goes by."""
    if level == "case_id":
        return "case" if count == 1 else "cases"
    if level.lower().replace("_", "") in ("patientid", "patient", "subjectid", "subject", "personid"):
        return "patient" if count == 1 else "patients"
    return f"{'group' if count == 1 else 'groups'} of {level}"


# --- the figures -----------------------------------------------------------------------------------------------------


def add_headline(page: Page, facts: Mapping[str, Any], heading: str = "Result") -> None:
    """Tiles and the table of all metrics; without a heading where ``heading`` is empty."""
    metrics = facts.get("metrics") or {}
    if not metrics:
        return
    if heading:
        page.heading(heading)
    page.add(_tiles(metrics))
    undefined = facts.get("undefined_classes") or ()
    if undefined:
        page.note(
            f"Not defined for {', '.join(map(str, undefined))}: without a positive or a negative case there is nothing "
            "to tell apart. Means over classes leave them out.",
            "warning",
        )
    rows = [_metric_row(name, metric) for name, metric in metrics.items()]
    page.add(Html('<div class="headline">'))
    page.table(("Metric", "Value", "", "95 % interval", "Cases", "Patients", "Definition"), rows, right={1, 3})
    page.add(Html("</div>"))
    said = facts.get("bootstrap") or {}
    if said:
        page.text(
            f"Intervals: {said.get('interval', 'bootstrap')}; {said.get('draws')} draws, seed {said.get('seed')}."
        )
    _add_cross_check(page, facts)


def _add_cross_check(page: Page, facts: Mapping[str, Any]) -> None:
    """DeLong's interval of the AUROC, beside that of the bootstrap."""
    found = facts.get("delong") or {}
    known = {name: test for name, test in found.items() if test.get("ci_low") is not None}
    if not known:
        return
    entries = [f"{name} {_number(test['auc'])} ({_interval(test)})" for name, test in known.items()]
    more = f"; {len(entries) - _CHECKED} more in metrics.json" if len(entries) > _CHECKED else ""
    definition = facts.get("delong_definition") or "DeLong's interval"
    page.text(f"AUROC once more, {definition}: {'; '.join(entries[:_CHECKED])}{more}.")


def _tiles(metrics: Mapping[str, Any]) -> Html:
    tiles = []
    for name in _main_names(metrics):
        metric = metrics[name]
        tiles.append(
            f'<div class="tile"><span class="name">{escaped(metric_name(name))}</span>'
            f"<strong>{escaped(_number(metric.get('value')))}</strong>"
            f'<span class="ci">{escaped(_interval(metric) or metric.get("reason") or "")}</span></div>'
        )
    return Html(f'<div class="tiles">{"".join(tiles)}</div>' if tiles else "")


def _main_names(metrics: Mapping[str, Any]) -> list[str]:
    found = [next((name for name in names if name in metrics), None) for names in _MAIN]
    return [name for name in found if name is not None]


def _metric_row(name: str, metric: Mapping[str, Any]) -> tuple[Content, ...]:
    reason = metric.get("reason")
    definition = escaped(metric.get("definition", ""))
    if reason:
        definition = Html(f'{definition}<br><span class="reason">{escaped(reason)}</span>')
    return (
        metric_name(name),
        _figure(name, metric),
        _bar(metric, _ONE) if _is_unit(name) else Html(""),
        _interval(metric) or "–",
        metric.get("n"),
        metric.get("n_groups"),
        definition,
    )


def metric_name(name: str) -> str:
    """What a metric is called for people."""
    if name.startswith("macro_"):
        return f"mean {metric_name(name.removeprefix('macro_'))}"
    if name.startswith("sensitivity_at_"):
        return f"sensitivity at {name.removeprefix('sensitivity_at_').removesuffix('_fp')} FP a case"
    return _NAMES.get(name, name.replace("_", " "))


def _is_unit(name: str) -> bool:
    return name.removeprefix("macro_") in _UNIT or name.startswith("sensitivity_at_")


def _number(value: Any) -> str:
    """Three decimals below ten, else four digits; a dash for what is not defined."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, int):
        return f"{value:.0f}"
    return f"{_rounded(value):.3f}" if abs(value) < 10 else f"{value:.4g}"


def _rounded(value: float) -> float:
    """To three digits, and never -0."""
    return round(value, 3) + 0.0


def _figure(name: str, metric: Mapping[str, Any]) -> Html:
    value = metric.get("value")
    value = round(value) if name in _COUNTS and value is not None else value
    reason = metric.get("reason") if value is None else None
    title = f' title="{escaped(reason)}"' if reason else ""
    return Html(f"<strong{title}>{escaped(_number(value))}</strong>")


def _interval(metric: Mapping[str, Any]) -> str:
    low, high = metric.get("ci_low"), metric.get("ci_high")
    return "" if low is None or high is None else f"{_number(low)} to {_number(high)}"


def _bar(metric: Mapping[str, Any], scale: _Scale) -> Html:
    """Value as a dot, interval as a line; a dashed line at the mark."""
    value, low, high = metric.get("value"), metric.get("ci_low"), metric.get("ci_high")
    if value is None:
        return Html("")
    parts = ['<line class="axis" x1="0" x2="100%" y1="9" y2="9"/>']
    if scale.mark is not None:
        x = _place(scale.mark, scale)
        parts.append(f'<line class="mark" x1="{x}" x2="{x}" y1="0" y2="18"/>')
    if low is not None and high is not None:
        parts.append(f'<line class="reach" x1="{_place(low, scale)}" x2="{_place(high, scale)}" y1="9" y2="9"/>')
    parts.append(f'<circle cx="{_place(value, scale)}" cy="9" r="4"/>')
    label = f"{_number(value)}, {_interval(metric) or 'no interval'}"
    return Html(f'<svg class="bar" role="img" aria-label="{escaped(label)}" height="18">{"".join(parts)}</svg>')


def _place(value: float, scale: _Scale) -> str:
    share = (value - scale.low) / ((scale.high - scale.low) or 1.0)
    return f"{100 * min(max(share, 0.0), 1.0):.2f}%"


def _scale_of(name: str, metrics: Sequence[Mapping[str, Any]], mark: float | None) -> _Scale:
    """0 to 1 for what lies there, else around the values that are shown."""
    values = [metric.get(key) for metric in metrics for key in ("value", "ci_low", "ci_high")]
    known = [float(value) for value in (*values, mark) if value is not None]
    if not known or (_is_unit(name) and min(known) >= 0):
        return _Scale(0.0, 1.0, mark)
    room = 0.05 * (max(known) - min(known)) or 0.5
    return _Scale(min(known) - room, max(known) + room, mark)


# --- classes ---------------------------------------------------------------------------------------------------------


def add_classes(page: Page, facts: Mapping[str, Any]) -> None:
    """The table of single classes, where there are several."""
    per_class = facts.get("per_class") or {}
    if not per_class or (len(per_class) == 1 and facts.get("metrics")):
        return
    told = _OF_EACH.get(str(facts.get("task")), _EACH_CLASS)
    page.heading(f"Each {told.noun}")
    shown = [name for name in told.metrics if any(name in metrics for metrics in per_class.values())]
    lead = told.lead
    every = [metrics.get(lead, {}) for metrics in per_class.values()]
    scale = _scale_of(lead, every, told.chance)
    rows = [
        (
            label,
            metrics.get(shown[0], {}).get("n") if shown else None,
            _bar(metrics.get(lead, {}), scale),
            *(_with_interval(name, metrics.get(name, {})) for name in shown),
        )
        for label, metrics in per_class.items()
    ]
    what = metric_name(lead) + ("" if told.chance is None else "; the dashed line is chance")
    header = (told.noun.capitalize(), "Cases", "", *(metric_name(name) for name in shown))
    right = range(3, len(header))
    page.add(Html('<div class="classes">'))
    page.table(header, rows, caption=f"Bars: {what}. Below each number its 95 % interval.", right=right)
    page.add(Html("</div>"))
    _add_reasons(page, per_class, shown)


def _with_interval(name: str, metric: Mapping[str, Any]) -> Html:
    interval = _interval(metric)
    below = f'<br><span class="ci">{escaped(interval)}</span>' if interval else ""
    return Html(f"{_figure(name, metric)}{below}")


def _add_reasons(page: Page, per_class: Mapping[str, Mapping[str, Any]], shown: Sequence[str]) -> None:
    """Why there are dashes."""
    reasons: dict[str, list[str]] = {}
    for label, metrics in per_class.items():
        for name in shown:
            metric = metrics.get(name, {})
            if metric.get("value") is None and metric.get("reason"):
                reasons.setdefault(f"{label}: {metric['reason']}", []).append(metric_name(name))
    if reasons:
        items = "".join(f"<li>{escaped(text)} ({escaped(', '.join(names))})</li>" for text, names in reasons.items())
        page.add(Html(f'<div class="reasons"><p>Dashes are not defined:</p><ul>{items}</ul></div>'))


# --- pictures --------------------------------------------------------------------------------------------------------


def _add_plots(page: Page, pictures: EvalPictures) -> None:
    """The curves."""
    names = [*(name for name in _PLOTS if name in pictures), *(name for name in pictures if name not in _PLOTS)]
    if not names:
        return
    page.heading("Curves")
    figures = []
    for name in names:
        title, text = _PLOTS.get(name, (metric_name(name).capitalize(), ""))
        width = _png_width(pictures[name])
        wide = " wide" if width > 900 else ""
        figures.append(
            f'<figure class="plot{wide}"><h3>{escaped(title)}</h3>{image(pictures[name], f"{title}. {text}")}'
            f"<figcaption>{escaped(text)}</figcaption></figure>"
        )
    page.add(Html(f'<div class="plots">{"".join(figures)}</div>'))


def _png_width(data: bytes) -> int:
    """From the header of a PNG."""
    return int(struct.unpack(">I", data[16:20])[0]) if data.startswith(b"\x89PNG") and len(data) > 20 else 0


# --- groups, another run, missing sequences --------------------------------------------------------------------------


def add_subgroups(page: Page, facts: Mapping[str, Any]) -> None:
    """A table for each column of subgroups."""
    subgroups = facts.get("subgroups") or {}
    if not subgroups:
        return
    page.heading("Groups of cases")
    if facts.get("subgroups_note"):
        page.note(str(facts["subgroups_note"]), "info")
    for column, groups in subgroups.items():
        _forest(page, str(column), [("all", facts), *((str(group.get("value", "")), group) for group in groups)])


def _forest(page: Page, title: str, rows: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """A table with a dot and a line for each row; the first row is what the others are held against."""
    if not rows:
        return
    names = _main_names(rows[0][1].get("metrics") or {})
    if not names:
        return
    lead, rest = names[0], names[1:]
    leads = [(row.get("metrics") or {}).get(lead, {}) for _, row in rows]
    scale = _near_scale(lead, leads)
    body = [
        (
            joined(
                [
                    name,
                    *([Html(f'<br><span class="reason">{escaped(row["reason"])}</span>')] if row.get("reason") else []),
                ]
            ),
            row.get("n"),
            row.get("n_groups"),
            _bar(metric, scale),
            _with_interval(lead, metric),
            *(_with_interval(other, (row.get("metrics") or {}).get(other, {})) for other in rest),
        )
        for (name, row), metric in zip(rows, leads, strict=True)
    ]
    header = (title, "Cases", "Patients", "", *(metric_name(name) for name in names))
    against = f"; the dashed line is {rows[0][0]}" if len(rows) > 1 else ""
    caption = f"Bars: {metric_name(lead)} from {scale.low:.3g} to {scale.high:.3g}{against}."
    page.add(Html('<div class="classes">'))
    page.table(header, body, caption=caption, right=range(4, len(header)))
    page.add(Html("</div>"))


def _near_scale(name: str, metrics: Sequence[Mapping[str, Any]]) -> _Scale:
    """Around what is shown, in steps of a tenth where the metric lies between 0 and 1; marked at the first value."""
    mark = metrics[0].get("value") if len(metrics) > 1 else None
    known = [float(m[key]) for m in metrics for key in ("value", "ci_low", "ci_high") if m.get(key) is not None]
    if not known or not _is_unit(name) or min(known) < 0:
        return _scale_of(name, metrics, mark)
    return _Scale(math.floor(10 * min(known)) / 10, math.ceil(10 * max(known)) / 10, mark)


def add_comparison(page: Page, comparison: Mapping[str, Any] | None) -> None:
    """Differences from another evaluation, with their tests."""
    if not comparison:
        return
    page.heading("Compared with another run")
    page.facts({"other run": _said(comparison.get("other")), **_named(comparison, ("n", "n_groups", "draws", "seed"))})
    tests = comparison.get("tests") or {}
    scale = _scale_of("", list(tests.values()), 0.0)
    rows = [
        (
            metric_name(name),
            _bar({**test, "value": test.get("difference")}, scale),
            Html(f"<strong>{_signed(test.get('difference'))}</strong>"),
            _interval(test) or "–",
            _p(test.get("p")),
            joined([test.get("method", ""), *([Html(f"<br>{escaped(test['reason'])}")] if "reason" in test else [])]),
        )
        for name, test in tests.items()
    ]
    caption = "This run minus the other one; the dashed line is no difference."
    page.table(("Metric", "", "Difference", "95 % interval", "p", "Test"), rows, caption=caption, right={2, 3, 4})
    for text in (
        comparison.get("note"),
        *(f"{name}: {text}." for name, text in (comparison.get("methods") or {}).items()),
    ):
        if text:
            page.add(Html(f'<p class="reason">{escaped(text)}</p>'))


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{_rounded(value):+.3f}" if abs(value) < 10 else f"{value:+.4g}"


def _p(value: float | None) -> str:
    return "–" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _add_missing(page: Page, facts: Mapping[str, Any]) -> None:
    rows = facts.get("missing_sequences") or ()
    if not rows:
        return
    page.heading("When sequences are missing")
    definition = str(facts.get("missing_sequences_definition") or "sequences not named are hidden from the network")
    page.text(f"{definition[:1].upper()}{definition[1:]}.")
    _forest(page, "shown to the network", [(str(row.get("sequences", "")), row) for row in rows])


def _add_slices(page: Page, facts: Mapping[str, Any]) -> None:
    slices = facts.get("slice_level")
    if not slices:
        return
    page.heading("Single slices")
    page.text(f"{str(slices.get('definition', '')).capitalize()}.")
    rows = [_metric_row(name, metric)[:-1] for name, metric in (slices.get("metrics") or {}).items()]
    page.add(Html('<div class="headline">'))
    page.table(("Metric", "Value", "", "95 % interval", "Slices", "Patients"), rows, right={1, 3})
    page.add(Html("</div>"))


def _add_worst(page: Page, facts: Mapping[str, Any]) -> None:
    cases = facts.get("worst_cases") or ()
    if not cases:
        return
    page.heading("Cases farthest off")
    page.text(
        "A look at their images often tells more than the numbers: a wrong label, a broken image, a rare finding."
    )
    listed = _listed if facts.get("task") == "regression" else _present
    rows = [
        (case.get("case_id"), case.get("patient_id"), case.get("loss"), listed(case.get("label")),
         _listed(case.get("predicted")))
        for case in cases
    ]  # fmt: skip
    loss, mean = facts.get("loss_definition"), facts.get("loss")
    caption = "" if loss is None else f"Loss: {loss}." + ("" if mean is None else f" Of all cases: {_number(mean)}.")
    page.table(("Case", "Patient", "Loss", "Reference", "Predicted"), rows, caption=caption)


def _present(label: Any) -> Content:
    """The classes that a case has, or the one."""
    if not isinstance(label, Mapping):
        return _said(label)
    if all(value is None for value in label.values()):
        return "unknown"
    return ", ".join(name for name, value in label.items() if value) or "none"


def _listed(values: Any) -> Content:
    """The greatest few of values by class."""
    known = {name: value for name, value in values.items() if value is not None}
    best = sorted(known.items(), key=lambda entry: (-entry[1], entry[0]))[:_LISTED]
    more = f", and {len(known) - _LISTED} more" if len(known) > _LISTED else ""
    return ", ".join(f"{name} {value:.3g}" for name, value in best) + more


# --- provenance ------------------------------------------------------------------------------------------------------

_LISTED = 4
_PROVENANCE = (
    *("threshold", "thresholds", "threshold_source", "calibrated", "group_by", "n_unlabelled", "n_failed", "model"),
    *("data", "device", "started_at", "elapsed_s", "medssl_version"),
)
_NOT_SHOWN = ("arch",)
"""The settings of a network would fill a page; its digest names it."""


def add_provenance(page: Page, facts: Mapping[str, Any]) -> None:
    """Where the numbers come from."""
    page.heading("Provenance")
    page.facts(_named(facts, _PROVENANCE))


def _named(facts: Mapping[str, Any], names: Sequence[str]) -> dict[str, Content]:
    """Those of the facts that are known, a dictionary as its entries."""
    shown: dict[str, Content] = {}
    for name in names:
        value = facts.get(name)
        if isinstance(value, Mapping):
            shown |= {
                f"{_words(name)}: {_words(key)}": _said(inner)
                for key, inner in value.items()
                if inner is not None and key not in _NOT_SHOWN
            }
        elif value is not None and value != []:
            shown[_words(name)] = _said(value)
    return shown


def _words(name: str) -> str:
    return str(name).replace("_", " ")


def _said(value: Any) -> Content:
    """A value in a few words."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or isinstance(value, (int, float)):
        return value
    if isinstance(value, Mapping):
        return joined([Html(f"{escaped(_words(k))}: {escaped(_said(v))}") for k, v in value.items()], ", ")
    if isinstance(value, (list, tuple)):
        return joined([_said(entry) for entry in value], ", ")
    text = str(value)
    if len(text) == 64 and all(letter in "0123456789abcdef" for letter in text):
        return text[:16]
    return path_text(text)


STYLE = """
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(11rem,1fr));gap:1rem;margin:1rem 0 1.4rem}
.tile{border:1px solid var(--line);border-radius:8px;background:var(--panel);padding:.8rem 1rem;display:flex;
flex-direction:column}
.tile .name{color:var(--soft);font-size:.88rem}
.tile strong{font-size:1.9rem;line-height:1.25;font-variant-numeric:tabular-nums}
.ci,.reason{color:var(--soft);font-size:.85rem;font-weight:400;font-variant-numeric:tabular-nums}
.bar{width:100%;min-width:8rem;display:block;overflow:visible;margin-top:.2rem}
.bar .axis{stroke:var(--line);stroke-width:2}
.bar .mark{stroke:var(--soft);stroke-dasharray:3 3}
.bar .reach{stroke:var(--accent);stroke-width:2.5;opacity:.7}
.bar circle{fill:var(--accent)}
.classes th{white-space:normal;vertical-align:bottom}
.classes .bar{min-width:5.5rem}
.classes :is(td,th){padding:.4rem .5rem}
@media (max-width:44rem){.headline thead{position:absolute;left:-99rem}
.headline tr{display:grid;grid-template-columns:1fr auto auto;gap:.1rem .8rem;padding:.6rem 0;
border-bottom:1px solid var(--line)}
.headline td{border:0;padding:0;min-width:0}
.headline td:nth-child(3){grid-area:2/1/3/4}
.headline td:nth-child(5),.headline td:nth-child(6){display:none}
.headline td:nth-child(7){grid-area:3/1/4/4;color:var(--soft);font-size:.85rem}}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(24rem,100%),1fr));gap:1rem 1.6rem;
align-items:start;margin:1rem 0}
.plot{margin:0;min-width:0}
.plot.wide{grid-column:1/-1}
.plot h3{font-size:1rem;margin:0 0 .4rem}
.plot img{background:#fff;border:1px solid var(--line);padding:.5rem;margin:0 auto}
.plot figcaption{margin-top:.4rem;max-width:46rem}
.reasons{color:var(--soft);font-size:.88rem}
.reasons ul{margin:.2rem 0;padding-left:1.2rem}
""".replace("\n", "")
