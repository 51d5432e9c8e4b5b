"""The page of an evaluation of masks: figures with intervals and definitions, box plots, lesions, the worst cases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from medssl_cli.core.run import RESEARCH_NOTE
from medssl_cli.core.wording import counted
from medssl_cli.report import masks_plots
from medssl_cli.report.eval_page import (
    STYLE,
    add_classes,
    add_comparison,
    add_headline,
    add_provenance,
    add_subgroups,
    group_unit,
    metric_name,
)
from medssl_cli.report.page import Html, Page, escaped, image

_SPREADS = ("dice", "iou", "accuracy", "f1", "nsd", "hd95", "assd", "volume_error_ml")
_UNITS = {"mm": "mm", "px": "pixels", "voxels": "voxels"}
_EMPTY = (
    ("n_empty_truth", "empty reference"),
    ("n_both_empty", "both empty"),
    ("n_missed", "missed: empty prediction alone"),
    ("n_false_alarm", "false alarm: empty reference alone"),
)


def masks_page(
    facts: Mapping[str, Any], plots: Mapping[str, bytes], worst: Sequence[tuple[Mapping[str, Any], bytes]]
) -> Page:
    """The report.

    Args:
        facts: ``metrics.json``.
        plots: Heading -> PNG of box plots and curves.
        worst: (entry of ``worst_cases``, picture of its worst plane), the lowest Dice first.
    """
    page = Page("Evaluation of masks", _lead(facts))
    page.style(STYLE + _STYLE)
    page.note(RESEARCH_NOTE, "warning")
    for note in facts.get("notes") or ():
        page.note(str(note), "info")
    add_headline(page, {**facts, "metrics": _shortened(facts)})
    page.text(f"Boundary distances, in {_UNITS[facts['distance_unit']]}: {facts['boundary_definition']}.")
    page.text(str(facts["empty_rules"]))
    _add_spreads(page, facts)
    add_classes(page, facts)
    _add_empty(page, facts)
    _add_plots(page, plots)
    _add_lesions(page, facts.get("lesions"))
    add_subgroups(page, facts)
    add_comparison(page, facts.get("comparison"))
    _add_worst(page, facts, worst)
    _add_left_out(page, facts)
    add_provenance(page, facts)
    return page


def _lead(facts: Mapping[str, Any]) -> str:
    n, groups, level = facts["n"], facts["n_groups"], str(facts["group_by"])
    of = "" if level == "case_id" else f" of {groups} {group_unit(level, groups)}"
    structures = ", ".join(facts["classes"][1:])
    return f"Segmentation of {structures}: {counted(n, 'case')}{of}."


def _shortened(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics with what a boundary is said once, below them, instead of in each definition."""
    said = f"; {facts['boundary_definition']}"
    return {
        name: {**metric, "definition": str(metric["definition"]).replace(said, "")}
        for name, metric in facts["metrics"].items()
    }


# --- tables ----------------------------------------------------------------------------------------------------------


def _add_spreads(page: Page, facts: Mapping[str, Any]) -> None:
    page.heading("Mean and standard deviation")
    overall = facts["overall"]
    rows = [
        (
            metric_name(name),
            _spread(overall[name]["cases"]),
            _spread(overall[name]["patients"]),
            _spread((overall[name].get("non_empty_truth") or {}).get("cases")),
            _spread((overall[name].get("non_empty_truth") or {}).get("patients")),
        )
        for name in _SPREADS
        if overall[name]["cases"]["mean"] is not None
    ]
    header = ("Metric", "Over cases", "Over patients", "Non-empty references, cases", "… patients")
    caption = (
        "Mean ± sample standard deviation (n − 1), and n; over patients: the mean of each patient's cases first. "
        f"Distances in {_UNITS[facts['distance_unit']]}."
    )
    page.table(header, rows, caption=caption, right=range(1, 5))


def _spread(facts: Mapping[str, Any] | None) -> Html:
    if not facts or facts["mean"] is None:
        return Html("–")
    std = "" if facts["std"] is None else f" ± {facts['std']:.3f}"
    return Html(f'{facts["mean"]:.3f}{std} <span class="ci">({facts["n"]})</span>')


def _add_empty(page: Page, facts: Mapping[str, Any]) -> None:
    """Cases without the structure in one or both label maps, where there are any."""
    by_class = facts["empty_by_class"]
    if not any(counts[name] for counts in by_class.values() for name, _ in _EMPTY):
        return
    page.heading("Empty masks")
    rows = [(structure, *(counts[name] for name, _ in _EMPTY)) for structure, counts in by_class.items()]
    page.table(("Structure", *(words for _, words in _EMPTY)), rows, caption="Number of cases.")


def _add_left_out(page: Page, facts: Mapping[str, Any]) -> None:
    if not facts.get("n_failed") and not facts.get("extra_predictions"):
        return
    page.heading("Left out")
    if facts.get("n_failed"):
        page.note(f"{counted(facts['n_failed'], 'case')} could not be evaluated: see failures.csv.", "error")
    extra = facts.get("extra_predictions") or ()
    if extra:
        shown = ", ".join(extra[:12]) + (f" and {len(extra) - 12} more" if len(extra) > 12 else "")
        page.note(f"Predictions without a reference: {shown}.", "warning")


# --- pictures --------------------------------------------------------------------------------------------------------


def _add_plots(page: Page, plots: Mapping[str, bytes]) -> None:
    if not plots:
        return
    page.heading("Cases")
    page.text(
        "Boxes reach from the first to the third quartile with the median in between, whiskers to the last case within "
        "1.5 times that range; each dot is a case."
    )
    figures = [
        f'<figure class="plot"><h3>{escaped(title)}</h3>{image(data, title)}</figure>' for title, data in plots.items()
    ]
    page.add(Html(f'<div class="plots">{"".join(figures)}</div>'))


def _add_lesions(page: Page, found: Mapping[str, Any] | None) -> None:
    if not found:
        return
    page.heading("Lesions")
    page.text(
        f"Candidates: {found['candidates']}. {str(found['definition'])[:1].upper()}{str(found['definition'])[1:]}."
    )
    for structure, facts in found["per_class"].items():
        page.text(
            Html(
                f"<strong>{escaped(structure)}</strong>: {facts['n_lesions']} lesions in "
                f"{counted(facts['n_cases_with_lesion'], 'case')}, {facts['n_found']} found, "
                f"{counted(facts['n_false_positives'], 'false positive')}."
            )
        )
        add_headline(page, {"metrics": facts["metrics"]}, heading="")


def _add_worst(page: Page, facts: Mapping[str, Any], worst: Sequence[tuple[Mapping[str, Any], bytes]]) -> None:
    if not worst:
        return
    page.heading("Cases with the lowest Dice")
    swatches = (
        (masks_plots.BOTH, "both"),
        (masks_plots.PREDICTION_ALONE, "prediction alone, or another structure"),
        (masks_plots.REFERENCE_ALONE, "reference alone"),
    )
    key = "".join(
        f'<span class="key"><i style="background:rgb{colour}"></i>{escaped(words)}</span>' for colour, words in swatches
    )
    page.add(Html(f'<p class="keys">{key}</p>'))
    figures = []
    for entry, picture in worst:
        hd95 = "" if entry["hd95"] is None else f", HD95 {entry['hd95']:.1f} {_UNITS[facts['distance_unit']]}"
        where = "" if entry.get("slice") is None else f", slice {entry['slice'] + 1} of {entry['n_slices']}"
        title = f"{entry['case_id']}: Dice {entry['dice']:.3f}{hd95}"
        figures.append(
            f'<figure class="plot"><h3>{escaped(title)}</h3>{image(picture, title)}'
            f"<figcaption>Plane with the most wrong pixels{escaped(where)}.</figcaption></figure>"
        )
    page.add(Html(f'<div class="plots worst">{"".join(figures)}</div>'))


_STYLE = """
.keys{display:flex;flex-wrap:wrap;gap:.3rem 1.4rem}
.key{display:inline-flex;align-items:center;gap:.45rem;font-size:.92rem}
.key i{width:.9rem;height:.9rem;border-radius:3px;display:inline-block}
.worst .plot img{background:#000;padding:0;width:100%;height:auto}
""".replace("\n", "")
