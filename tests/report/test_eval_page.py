from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medssl_cli.metrics.evaluation import evaluate_classification, evaluate_regression
from medssl_cli.report.eval_page import eval_page, metric_name
from medssl_cli.report.overlay import png_bytes

EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"
PICTURE = png_bytes(np.zeros((4, 6, 3), np.uint8))


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def words(text: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", text))


def measured(classes: tuple[str, ...] = ("any", "never")) -> dict[str, Any]:
    """Of two labels, of which the second never occurs."""
    rng = np.random.default_rng(0)
    labels = np.column_stack([np.arange(40) % 2, np.zeros(40)])
    p = np.clip(0.3 * labels + 0.6 * rng.random((40, 2)), 0, 1)
    groups = [f"P{i // 2}" for i in range(40)]
    return evaluate_classification(p, labels, task="multilabel", classes=classes, groups=groups, draws=50).to_json()


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return measured()


def facts_of(found: dict[str, Any], text: str = "word") -> dict[str, Any]:
    few = {
        name: {**metric, "value": None, "ci_low": None, "ci_high": None} for name, metric in found["metrics"].items()
    }
    groups = [
        {"value": text, "n": 20, "n_groups": 10, "metrics": found["metrics"]},
        {"value": "few", "n": 4, "n_groups": 2, "metrics": few, "reason": "fewer than 10 cases"},
    ]
    test = {"difference": 0.031, "ci_low": -0.01, "ci_high": 0.07, "p": 0.0004, "method": "paired permutation"}
    return {
        "task": "multilabel",
        **{key: found[key] for key in ("n", "n_groups", "metrics", "per_class", "undefined_classes")},
        "bootstrap": {"draws": 50, "seed": 42, "interval": found["interval"]},
        "subgroups": {text: groups},
        "subgroups_note": "Groups are looked at one after another.",
        "comparison": {"other": text, "tests": {"macro_auroc": test}, "note": text, "methods": {text: text}},
        "missing_sequences": [{"sequences": name, **groups[0]} for name in ("all", text)],
        "slice_level": {"definition": "each slice", "n": 90, "n_groups": 20, "metrics": found["metrics"]},
        "worst_cases": [{"case_id": text, "patient_id": text, "loss": 3.2, "label": {"any": 1.0, "never": 0.0},
                         "predicted": {"any": 0.1, "never": 0.2}}],
        "loss_definition": "negative log-likelihood",
        "model": {"head": text, "head_sha256": "a" * 64},
        "data": {"split": "test"},
        "thresholds": [0.5, 0.5],
        "calibrated": True,
        "notes": [text],
    }  # fmt: skip


def test_each_metric_stands_with_value_interval_definition_and_count(found: dict[str, Any]) -> None:
    text = eval_page(facts_of(found), {}).render()
    for name, metric in found["metrics"].items():
        row = next(row for row in re.findall(r"<tr>(.*?)</tr>", text) if f"<td>{metric_name(name)}</td>" in row)
        said = words(row)
        assert f"{metric['value']:.3f}" in said
        assert f"{metric['ci_low']:.3f} to {metric['ci_high']:.3f} 40 20" in said
        assert metric["definition"][:20] in said
    assert "50 draws, seed 42" in text


def test_r24_what_is_not_defined_is_a_dash_with_its_reason(found: dict[str, Any]) -> None:
    text = eval_page(facts_of(found), {}).render()
    row = next(row for row in re.findall(r"<tr>(.*?)</tr>", text) if "<td>never</td>" in row)
    assert row.count(">–</strong>") >= 2
    assert "Not defined for never" in text
    reason = found["per_class"]["never"]["auroc"]["reason"]
    assert reason
    assert f"never: {reason}" in text
    assert "nan" not in words(text).lower().split()


def test_bars_stand_where_the_numbers_are(found: dict[str, Any]) -> None:
    text = eval_page({"metrics": found["metrics"]}, {}).render()
    metric = found["metrics"]["macro_auroc"]
    first = re.findall(r'<svg class="bar".*?</svg>', text)[0]
    assert f'cx="{100 * metric["value"]:.2f}%"' in first
    assert f'x1="{100 * metric["ci_low"]:.2f}%" x2="{100 * metric["ci_high"]:.2f}%"' in first


def test_groups_are_held_against_all_on_one_scale(found: dict[str, Any]) -> None:
    text = eval_page(facts_of(found), {}).render()
    section = text.partition("Groups of cases</h2>")[2].partition("<h2")[0]
    said = words(section)
    assert "Groups are looked at one after another." in said
    assert "the dashed line is all" in said
    low, high = map(float, re.findall(r"from ([\d.]+) to ([\d.]+);", said)[0])
    value = found["metrics"]["macro_auroc"]["value"]
    place = f"{100 * (value - low) / (high - low):.2f}%"
    assert len(re.findall(f'class="mark" x1="{place}"', section)) == 2  # the group that has a value, and all
    assert "few fewer than 10 cases 4 2" in said


def test_the_comparison_has_difference_interval_and_p(found: dict[str, Any]) -> None:
    text = words(eval_page(facts_of(found), {}).render().partition("Compared with another run</h2>")[2])
    assert "mean AUROC +0.031 -0.010 to 0.070 &lt; 0.001 paired permutation" in text


def test_sections_are_there_only_if_asked_for(found: dict[str, Any]) -> None:
    whole = eval_page(facts_of(found), {"roc": PICTURE, "confusion": PICTURE}).render()
    titles = re.findall(r"<h2[^>]*>(.*?)</h2>", whole)
    assert titles == ["Result", "Each class", "Curves", "Groups of cases", "Compared with another run",
                      "When sequences are missing", "Single slices", "Cases farthest off", "Provenance"]  # fmt: skip
    assert re.findall(r"<h3>(.*?)</h3>", whole) == ["ROC curves", "Confusion matrix"]
    assert "dashed diagonal is chance" in whole
    bare = eval_page({}, {}).render()
    assert re.findall(r"<h2[^>]*>(.*?)</h2>", bare) == ["Provenance"]
    asked_nothing = {
        **facts_of(found),
        **dict.fromkeys(("subgroups", "comparison", "missing_sequences", "slice_level")),
    }
    assert "Groups of cases" not in eval_page(asked_nothing, {}).render()


def test_a_regression_has_targets_and_no_chance() -> None:
    rng = np.random.default_rng(0)
    reference = rng.normal(50, 10, (30, 2))
    found = evaluate_regression(
        reference + rng.normal(0, 3, (30, 2)),
        reference,
        targets=("volume", "age"),
        groups=list(map(str, range(30))),
        draws=20,
    ).to_json()
    text = eval_page({"task": "regression", **found}, {"scatter": PICTURE}).render()
    assert "Each target" in text
    assert "mean R²" in text
    assert f"{found['per_class']['volume']['mae']['value']:.3f}" in text
    assert "chance" not in text


def test_r15_names_are_inert(found: dict[str, Any]) -> None:
    plain = eval_page(facts_of(measured(("word", "never")), "word"), {"roc": PICTURE}).render()
    evil = eval_page(facts_of(measured((EVIL, "never")), EVIL), {"roc": PICTURE}).render()
    evil_tags = Tags(evil).tags
    assert [t for t, _ in evil_tags if t not in ("wbr",)] == [t for t, _ in Tags(plain).tags if t not in ("wbr",)]
    assert not [name for _, attributes in evil_tags for name in attributes if name.startswith("on")]
    assert "<script" not in evil


@pytest.mark.slow
def test_r15_opens_in_a_browser_without_complaint(
    found: dict[str, Any], tmp_path: Path, in_chromium: Callable[[Path], tuple[str, list[str]]]
) -> None:
    eval_page(facts_of(found, EVIL), {"roc": PICTURE}).write(tmp_path / "report.html")
    document, console = in_chromium(tmp_path / "report.html")
    assert console == []
    assert "Cases farthest off" in document


def test_a_reference_of_zero_is_a_value_of_a_regression_and_a_certain_prediction_a_number() -> None:
    case = {"case_id": "a", "patient_id": "a", "loss": 1.0, "label": {"grade": 0.0}, "predicted": {"grade": 1.0}}
    page = words(eval_page({"task": "regression", "worst_cases": [case]}, {}).render())
    assert "grade 0 grade 1" in page
    page = words(eval_page({"task": "binary", "worst_cases": [case]}, {}).render())
    assert "none grade 1" in page


def test_settings_of_the_network_do_not_fill_the_page() -> None:
    text = eval_page({"model": {"head": "h", "arch": {"depth": 12}}}, {}).render()
    assert "model: head" in text
    assert "depth" not in text
