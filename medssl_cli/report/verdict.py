"""What a head says of a case, as a table that is read at a glance: bars, intervals, thresholds, decisions, flags.

A page says what its numbers are: whether they are calibrated, what the interval holds, where the threshold lies.

Letters: Z slices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from medssl_cli.report.page import Html, Page, chip, escaped, joined

ALL_SHOWN = 8
"""Classes up to which all stand in one table, in the order of the head."""
FIRST_SHOWN = 6
"""Of more classes so many are shown, and every positive one; the rest is folded away."""
_TOP = 5


@dataclass(frozen=True)
class Finding:
    """One output of a head.

    Args:
        name: The class, or the target of a regression.
        probability: From 0 to 1; of a regression the value in ``unit``.
        low, high: Ends of its interval, as ``Verdict.interval_definition`` says; None without one.
        threshold: From which probability on it counts as positive; None where nothing is decided by a threshold.
        is_positive: The decision; None if there is none.
        unit: Of a regression's value.
    """

    name: str
    probability: float
    low: float | None
    high: float | None
    threshold: float | None
    is_positive: bool | None
    unit: str = ""


@dataclass(frozen=True)
class Verdict:
    """All that a head says of one case.

    Args:
        findings: Its outputs, in the order of the head.
        calibrated: Whether the probabilities were fitted to validation cases.
        interval_definition: What lies between ``low`` and ``high`` of a finding; empty without intervals.
        head: What the head is, in a few words.
        slice_scores_Z: Score of each slice, NaN where none was looked at; None for a picture.
        slice_score_name: Whose score it is.
        slice_scores_from: ``volume_head`` or ``slice_head``.
        top: Slices with the highest scores, best first; empty: the best five of ``slice_scores_Z``.
        is_regression: The findings are values, not probabilities.
    """

    findings: tuple[Finding, ...]
    calibrated: bool
    interval_definition: str
    head: str
    slice_scores_Z: np.ndarray | None
    slice_score_name: str
    slice_scores_from: str
    top: tuple[int, ...] = ()
    is_regression: bool = False

    @property
    def top_slices(self) -> tuple[int, ...]:
        """Slices with the highest scores, best first; equal ones in their order."""
        if self.top or self.slice_scores_Z is None:
            return self.top
        scores = np.asarray(self.slice_scores_Z, float)
        order = np.argsort(np.where(np.isfinite(scores), -scores, np.inf), kind="stable")
        return tuple(int(z) for z in order[: min(_TOP, int(np.isfinite(scores).sum()))])


@dataclass(frozen=True)
class Flag:
    """Something about the case that its reader has to know.

    Args:
        kind: How much it weighs, as the colour of a note.
        title: A few words.
        text: A sentence or two.
    """

    kind: Literal["ok", "info", "warning", "error"]
    title: str
    text: str


# --- the table -------------------------------------------------------------------------------------------------------


def add_flags(page: Page, flags: Sequence[Flag]) -> None:
    """Notes, the gravest first."""
    weight = ("error", "warning", "info", "ok")
    for flag in sorted(flags, key=lambda flag: weight.index(flag.kind)):
        page.note(Html(f"<strong>{escaped(flag.title)}</strong> {escaped(flag.text)}"), flag.kind)


def add_verdict(page: Page, verdict: Verdict) -> None:
    """The findings with bars, intervals, thresholds and decisions, and what all that means."""
    page.style(_STYLE)
    if verdict.is_regression:
        page.add(_values_table(verdict))
    else:
        first, rest = _ordered(verdict.findings)
        page.add(_table(first, verdict))
        if rest:
            page.add(
                Html(
                    f'<details class="more"><summary>{escaped(_more(rest))}</summary>'
                    f"{_table(rest, verdict, caption='The other classes')}</details>"
                )
            )
    page.add(_meaning(verdict))


def _ordered(findings: Sequence[Finding]) -> tuple[list[Finding], list[Finding]]:
    """Few findings as they come; of many the positive ones and those nearest to their threshold, then the others."""
    if len(findings) <= ALL_SHOWN:
        return list(findings), []
    ranked = sorted(findings, key=_nearness, reverse=True)
    shown = max(FIRST_SHOWN, sum(bool(finding.is_positive) for finding in findings))
    return ranked[:shown], ranked[shown:]


def _nearness(finding: Finding) -> tuple[bool, float]:
    """Positive ones first, then by how many times its threshold a probability is."""
    value = finding.probability if math.isfinite(finding.probability) else -1.0
    return bool(finding.is_positive), value / finding.threshold if finding.threshold else value


def _more(rest: Sequence[Finding]) -> str:
    count = f"{len(rest)} more {'class' if len(rest) == 1 else 'classes'}"
    if all(finding.threshold is not None for finding in rest):
        return f"{count}, {'below its threshold' if len(rest) == 1 else 'all below their thresholds'}"
    return f"{count}, less probable"


def _table(findings: Sequence[Finding], verdict: Verdict, caption: str = "Findings") -> Html:
    has_interval = any(finding.low is not None for finding in verdict.findings)
    has_threshold = any(finding.threshold is not None for finding in verdict.findings)
    has_decision = any(finding.is_positive is not None for finding in verdict.findings)
    heads = [("class", ""), ("probability", ' class="number"'), ("", "")]
    heads += [("seen nearby", ' class="number"')] * has_interval + [("threshold", ' class="number"')] * has_threshold
    heads += [("decision", "")] * has_decision
    head = "".join(
        f'<th scope="col"{kind}>{escaped(name)}</th>' if name else '<td class="gauge"></td>' for name, kind in heads
    )
    rows = "".join(_row(finding, has_interval, has_threshold, has_decision) for finding in findings)
    return Html(
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escaped(caption)}"><table class="verdict">'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _row(finding: Finding, has_interval: bool, has_threshold: bool, has_decision: bool) -> str:
    cells = [
        f'<th scope="row">{escaped(finding.name)}</th>',
        f'<td class="number value">{_probability(finding.probability)}</td>',
        f'<td class="gauge">{_gauge(finding)}</td>',
    ]
    if has_interval:
        cells.append(f'<td class="number interval">{_interval(finding)}</td>')
    if has_threshold:
        text = "–" if finding.threshold is None else _probability(finding.threshold)
        cells.append(f'<td class="number threshold">{text}</td>')
    if has_decision:
        cells.append(f'<td class="decision">{_decision(finding)}</td>')
    return f"<tr{' class=positive' if finding.is_positive else ''}>{''.join(cells)}</tr>"


def _gauge(finding: Finding) -> Html:
    """A bar from 0 to 1 with the interval as a line and the threshold as a mark."""
    share = _percent(finding.probability)
    y = 7 if finding.low is None else 3  # in the middle, or above its interval
    parts = [
        f'<rect class="track" x="0" y="{y}" width="100%" height="9" rx="3"/>',
        f'<rect class="fill" x="0" y="{y}" width="{share:.2f}%" height="9" rx="3"/>',
    ]
    said = [f"probability {_probability(finding.probability)}"]
    if finding.low is not None and finding.high is not None:
        low, high = _percent(finding.low), _percent(finding.high)
        parts.append(f'<line class="reach" x1="{low:.2f}%" x2="{high:.2f}%" y1="18" y2="18"/>')
        parts += [f'<line class="reach" x1="{x:.2f}%" x2="{x:.2f}%" y1="15" y2="21"/>' for x in (low, high)]
        said.append(f"seen nearby {_interval(finding)}")
    if finding.threshold is not None:
        x = _percent(finding.threshold)
        parts.append(f'<line class="limit" x1="{x:.2f}%" x2="{x:.2f}%" y1="0" y2="23"/>')
        said.append(f"threshold {_probability(finding.threshold)}")
    return Html(f'<svg role="img" aria-label="{escaped(", ".join(said))}" height="24">{"".join(parts)}</svg>')


def _percent(value: float) -> float:
    return 100 * min(max(value, 0.0), 1.0) if math.isfinite(value) else 0.0


def _probability(value: float) -> str:
    """Two decimals; more for what would look like 0 or 1 and is neither."""
    if not math.isfinite(value):
        return "–"
    if 0 < value < 0.001:
        return "&lt; 0.001"
    if 0.999 < value < 1:
        return "&gt; 0.999"
    return f"{value:.3f}" if value < 0.02 or value > 0.98 else f"{value:.2f}"


def _interval(finding: Finding) -> str:
    if finding.low is None or finding.high is None:
        return "–"
    return f"{finding.low:.2f} to {finding.high:.2f}"


def _decision(finding: Finding) -> Html:
    if finding.is_positive is None:
        return Html("–")
    if finding.threshold is None:  # the most probable of exclusive classes
        return Html('<span class="call yes">predicted</span>') if finding.is_positive else Html("")
    text, kind = ("positive", "yes") if finding.is_positive else ("negative", "no")
    return Html(f'<span class="call {kind}">{text}</span>')


def _values_table(verdict: Verdict) -> Html:
    """Values of a regression with their units."""
    rows = []
    for finding in verdict.findings:
        unit = f" {escaped(finding.unit)}" if finding.unit else ""
        known = finding.low is not None and finding.high is not None
        reach = f"{finding.low:.4g} to {finding.high:.4g}{unit}" if known else "–"
        limit = "–" if finding.threshold is None else f"{finding.threshold:.4g}{unit}"
        rows.append(
            f'<tr{" class=positive" if finding.is_positive else ""}><th scope="row">{escaped(finding.name)}</th>'
            f'<td class="number value">{finding.probability:.4g}{unit}</td><td class="number">{reach}</td>'
            f'<td class="number">{limit}</td><td class="decision">{_decision(finding)}</td></tr>'
        )
    names = [("target", False), ("value", True), ("interval", True), ("threshold", True), ("decision", False)]
    used = [True, True, any(f.low is not None for f in verdict.findings),
            any(f.threshold is not None for f in verdict.findings),
            any(f.is_positive is not None for f in verdict.findings)]  # fmt: skip
    head = "".join(f'<th scope="col"{" class=number" if is_number else ""}>{name}</th>' for name, is_number in names)
    hidden = "".join(f" without-{i + 1}" for i, is_used in enumerate(used) if not is_used)
    return Html(
        f'<div class="scroll" tabindex="0" role="region" aria-label="Values"><table class="verdict values{hidden}">'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _meaning(verdict: Verdict) -> Html:
    """What the bars show and how far the numbers can be trusted."""
    parts: list[str | Html] = []
    if verdict.is_regression:
        text = "Values in the units of the targets they were trained on."
        parts.append(text)
    elif verdict.calibrated:
        parts += [chip("calibrated", "ok"), "The probabilities were fitted to validation cases."]
    else:
        parts += [
            chip("not calibrated", "warning"),
            "A higher number is more suspicious; it is no frequency of disease.",
        ]
    if any(finding.low is not None for finding in verdict.findings) and verdict.interval_definition:
        if not verdict.is_regression:
            parts.append(Html('<span class="key reach"></span>'))
        name = "Interval" if verdict.is_regression else "Seen nearby"
        parts += [f"{name}: {verdict.interval_definition.rstrip('.')}."]
    if any(finding.threshold is not None for finding in verdict.findings) and not verdict.is_regression:
        parts += [
            Html('<span class="key limit"></span>'),
            "Threshold: a probability at or above it counts as positive.",
        ]
    if len(verdict.findings) > ALL_SHOWN and not verdict.is_regression:
        shown = "probability divided by threshold" if verdict.findings[0].threshold else "probability"
        parts.append(f"Ordered by {shown}.")
    return Html(f'<p class="meaning">{joined(parts)}</p>')


_STYLE = """
.verdict,.meaning{--reach:#1c2330;--limit:#c2410c}
@media (prefers-color-scheme:dark){.verdict,.meaning{--reach:#f4f6f9;--limit:#ffb86b}}
.verdict th[scope=row]{background:none;white-space:normal;overflow-wrap:anywhere;min-width:7rem;max-width:22rem}
.verdict td,.verdict th{vertical-align:middle}
.verdict thead td{background:var(--panel)}
.verdict .gauge{width:42%;min-width:9rem;padding-left:0}
.verdict .gauge svg{width:100%;display:block;overflow:visible}
.verdict .value{font-weight:600;font-size:1.05rem}
.verdict td:last-child{min-width:6.5rem}
.verdict .interval,.verdict .threshold{color:var(--soft)}
.verdict .track{fill:var(--line)}
.verdict .fill{fill:var(--soft);opacity:.65}
.verdict .positive .fill{fill:var(--accent);opacity:1}
.verdict .reach{stroke:var(--reach);stroke-width:1.5}
.verdict .limit{stroke:var(--limit);stroke-width:2}
.verdict .call{display:inline-block;padding:.05rem .6rem;border-radius:1rem;font-size:.82rem;font-weight:600;
border:1px solid transparent;white-space:nowrap}
.verdict .yes{background:var(--accent);color:var(--bg)}
.verdict .no{border-color:var(--line);color:var(--soft)}
.meaning{color:var(--soft);font-size:.88rem;max-width:60rem}
.meaning .key{display:inline-block;vertical-align:middle;margin:0 .25rem 0 .6rem}
.meaning .reach{width:1.5rem;border-top:2px solid var(--reach)}
.meaning .limit{height:1rem;border-left:2px solid var(--limit)}
.more summary{cursor:pointer;color:var(--accent);padding:.2rem 0}
.without-3 :is(th,td):nth-child(3),.without-4 :is(th,td):nth-child(4),.without-5 :is(th,td):nth-child(5){display:none}
@media (max-width:40rem){.verdict thead{position:absolute;left:-99rem}
.verdict:not(.values) tr{display:grid;grid-template-columns:1fr auto auto;gap:.1rem .7rem;padding:.5rem 0;
border-bottom:1px solid var(--line);align-items:center}
.verdict:not(.values) :is(td,th){border:0;padding:0}
.verdict:not(.values) .gauge{grid-area:2/1/3/4;width:100%}
.verdict .decision{grid-area:1/3;min-width:0}
.verdict:not(.values) td.interval,.verdict:not(.values) td.threshold{grid-row:3;text-align:left;font-size:.8rem}
.verdict td.interval{grid-column:1}.verdict td.threshold{grid-column:2/4}
.verdict td.interval::before{content:"seen nearby "}.verdict td.threshold::before{content:"threshold "}}
""".replace("\n", "")
