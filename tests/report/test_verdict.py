from __future__ import annotations

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from medssl_cli.report.page import Page
from medssl_cli.report.strip import Strip, strip_html
from medssl_cli.report.verdict import ALL_SHOWN, FIRST_SHOWN, Finding, Flag, Verdict, add_flags, add_verdict

EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"
DEFINITION = "95 % Wilson interval of the nearest validation cases"


def verdict(findings: list[Finding], **facts: object) -> Verdict:
    known = {
        "calibrated": True, "interval_definition": DEFINITION, "head": "linear", "slice_scores_Z": None,
        "slice_score_name": "any", "slice_scores_from": "volume_head",
    }  # fmt: skip
    return Verdict(tuple(findings), **{**known, **facts})  # type: ignore[arg-type]


def shown(told: Verdict) -> str:
    page = Page("x")
    add_verdict(page, told)
    return page.render().partition("<h1>")[2].partition("<footer>")[0]


def words(text: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", text))


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_bar_interval_and_threshold_stand_where_they_belong() -> None:
    text = shown(verdict([Finding("any", 0.73, 0.6, 0.81, 0.42, True)]))
    tags = Tags(text).tags
    (fill,) = [a for t, a in tags if t == "rect" and a["class"] == "fill"]
    assert fill["width"] == "73.00%"
    (limit,) = [a for t, a in tags if t == "line" and a["class"] == "limit"]
    assert limit["x1"] == limit["x2"] == "42.00%"
    reach = [a for t, a in tags if t == "line" and a["class"] == "reach"]
    assert (reach[0]["x1"], reach[0]["x2"]) == ("60.00%", "81.00%")
    (label,) = [a["aria-label"] for t, a in tags if t == "svg"]
    assert label == "probability 0.73, seen nearby 0.60 to 0.81, threshold 0.42"
    assert "any 0.73 0.60 to 0.81 0.42 positive" in words(text)
    assert DEFINITION in text


@pytest.mark.parametrize(("calibrated", "says"), [(True, "calibrated"), (False, "not calibrated")])
def test_it_says_whether_probabilities_are_calibrated(calibrated: bool, says: str) -> None:
    text = shown(verdict([Finding("any", 0.5, None, None, 0.5, True)], calibrated=calibrated))
    assert f">{says}</span>" in text
    assert ("no frequency of disease" in text) is not calibrated
    assert DEFINITION not in text  # there is no interval


def test_few_findings_keep_the_order_of_the_head() -> None:
    names = ["any", "z", "a", "m"]
    text = shown(
        verdict(
            [Finding(name, p, None, None, 0.5, p >= 0.5) for name, p in zip(names, (0.1, 0.9, 0.2, 0.8), strict=True)]
        )
    )
    assert re.findall(r'<th scope="row">(.*?)</th>', text) == names
    assert "<details" not in text


def test_of_many_findings_the_nearest_to_their_threshold_come_first_and_the_rest_is_folded() -> None:
    p = np.linspace(0.02, 0.35, 13)
    thresholds = np.where(np.arange(13) == 2, 0.05, 0.5)  # the third passes its low threshold
    findings = [
        Finding(f"c{i}", float(p[i]), None, None, float(thresholds[i]), bool(p[i] >= thresholds[i])) for i in range(13)
    ]
    first, _, rest = shown(verdict(findings)).partition("<details")
    assert re.findall(r'<th scope="row">(.*?)</th>', first) == ["c2", "c12", "c11", "c10", "c9", "c8"]
    assert len(re.findall(r'<th scope="row">', rest)) == 13 - FIRST_SHOWN
    assert "7 more classes, all below their thresholds" in rest
    assert "probability divided by threshold" in rest


def test_every_positive_finding_is_shown() -> None:
    findings = [Finding(f"c{i}", 0.9, None, None, 0.5, i < 10) for i in range(ALL_SHOWN + 5)]
    first, _, _ = shown(verdict(findings)).partition("<details")
    assert len(re.findall(">positive<", first)) == 10


def test_exclusive_classes_have_a_prediction_and_no_threshold() -> None:
    text = shown(verdict([Finding("a", 0.2, None, None, None, False), Finding("b", 0.8, None, None, None, True)]))
    assert ">predicted<" in text
    assert "negative" not in text
    assert "threshold" not in text.lower()


def test_values_of_a_regression_have_their_unit_and_no_bar() -> None:
    text = shown(verdict([Finding("volume", 42.345, 30.1, 55.2, None, None, "ml")], is_regression=True))
    assert "volume 42.34 ml 30.1 to 55.2 ml" in words(text)
    assert "<svg" not in text
    assert "calibrated" not in text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0004, "&lt; 0.001"), (0.9999, "&gt; 0.999"), (0.0123, "0.012"), (1.0, "1.000"), (float("nan"), "–")],
)
def test_small_probabilities_are_not_rounded_to_nothing(value: float, text: str) -> None:
    assert f'<td class="number value">{text}</td>' in shown(verdict([Finding("a", value, None, None, None, None)]))


def test_r15_names_are_inert() -> None:
    plain = shown(verdict([Finding("a", 0.5, 0.1, 0.9, 0.5, True, "ml")], head="a", interval_definition="a"))
    evil = shown(verdict([Finding(EVIL, 0.5, 0.1, 0.9, 0.5, True, EVIL)], head=EVIL, interval_definition=EVIL))
    assert [tag for tag, _ in Tags(evil).tags] == [tag for tag, _ in Tags(plain).tags]
    strips = [str(strip_html(Strip(np.array([0.1, 0.9]), name, name, (1,)))) for name in ("a", EVIL)]
    assert [tag for tag, _ in Tags(strips[0]).tags] == [tag for tag, _ in Tags(strips[1]).tags]


def test_flags_stand_with_the_gravest_first() -> None:
    page = Page("x")
    kinds = ("ok", "warning", "info", "error")
    add_flags(page, [Flag(kind, f"title {kind}", f"text {EVIL}") for kind in kinds])  # type: ignore[arg-type]
    text = page.render()
    assert re.findall(r'class="note (\w+)"', text) == ["error", "warning", "info", "ok"]
    assert "<script" not in text
    assert "<strong>title error</strong>" in text


def test_top_slices_are_the_best_with_ties_in_their_order() -> None:
    scores = np.array([0.2, np.nan, 0.9, 0.9, 0.1, 0.95, 0.3])
    assert verdict([], slice_scores_Z=scores).top_slices == (5, 2, 3, 6, 0)
    assert verdict([], slice_scores_Z=scores, top=(4, 5)).top_slices == (4, 5)
    assert verdict([]).top_slices == ()


def test_strip_has_a_bar_for_each_slice_that_was_looked_at() -> None:
    text = str(strip_html(Strip(np.array([0.25, np.nan, 1.0, np.nan, 0.0]), "any", top=(2,))))
    bars = [a for t, a in Tags(text).tags if t == "rect"]
    assert [bar["x"] for bar in bars] == ["0.000%", "40.000%", "80.000%"]
    assert [bar["height"] for bar in bars] == ["25.00%", "100.00%", "1.00%"]
    assert [bar["class"] for bar in bars] == ["bar", "bar chosen", "bar"]
    assert "<title>slice 3: 1</title>" in text
    assert "the highest is 1 at slice 3" in text
    assert 'data-count="5"' in text


def test_scores_beyond_one_have_a_scale_of_their_own() -> None:
    assert Strip(np.array([-2.0, 6.0, np.nan]), "x").limits == (-2, 6)
    assert Strip(np.array([0.1, 0.2]), "x").limits == (0, 1)
    assert Strip(np.array([np.nan]), "x").limits == (0, 1)
    assert "scores of 0 slices" in strip_html(Strip(np.array([np.nan]), "x"))
