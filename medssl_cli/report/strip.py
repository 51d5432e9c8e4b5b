"""Scores of the slices along a volume, as a small chart within the page; a click jumps to the slice.

Letters: Z slices.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from medssl_cli.report.page import Html, escaped

_HEIGHT = 72


@dataclass(frozen=True)
class Strip:
    """One score a slice.

    Args:
        scores_Z: NaN where no slice was looked at.
        name: What is scored.
        note: Where the scores come from, in a sentence.
        top: The best slices, marked.
    """

    scores_Z: np.ndarray
    name: str
    note: str = ""
    top: tuple[int, ...] = ()

    @property
    def limits(self) -> tuple[float, float]:
        """Ends of the scale: 0 and 1 for what lies between them, else the values themselves."""
        known = self.scores_Z[np.isfinite(self.scores_Z)]
        if not known.size or (known.min() >= 0 and known.max() <= 1):
            return 0.0, 1.0
        low, high = min(0.0, float(known.min())), float(known.max())
        return low, high if high > low else low + 1


def strip_html(strip: Strip) -> Html:
    """The chart; the viewer's script moves the mark and listens to clicks."""
    scores = np.asarray(strip.scores_Z, float)
    seen = np.flatnonzero(np.isfinite(scores))
    low, high = strip.limits
    gap = int(np.median(np.diff(seen))) if len(seen) > 1 else 1
    bars = "".join(_bar(int(z), float(scores[z]), strip, gap) for z in seen)
    last = len(scores)
    best = (
        f"; the highest is {_short(scores[seen].max())} at slice {seen[scores[seen].argmax()] + 1}" if len(seen) else ""
    )
    label = escaped(f"{strip.name}: scores of {len(seen)} slices{best}")
    note = f" {escaped(strip.note)}" if strip.note else ""
    return Html(
        f'<figure class="strip"><figcaption><strong>{escaped(strip.name)}</strong> along the slices.{note}</figcaption>'
        f'<div class="chart"><span class="high">{_short(high)}</span><span class="low">{_short(low)}</span>'
        f'<svg id="strip" role="img" aria-label="{label}" data-count="{last}" height="{_HEIGHT}">'
        f'<line class="mid" x1="0" x2="100%" y1="50%" y2="50%"/>{bars}'
        f'<line id="strip-mark" class="mark" y1="0" y2="100%" x1="0" x2="0" visibility="hidden"/></svg>'
        f'<span class="from">slice 1</span><span class="to">{last}</span></div></figure>'
    )


def _bar(z: int, score: float, strip: Strip, gap: int) -> str:
    low, high = strip.limits
    height = 100 * (score - low) / (high - low)
    width = 100 / len(strip.scores_Z)
    kind = "bar chosen" if z in strip.top else "bar"
    return (
        f'<rect class="{kind}" x="{width * z:.3f}%" width="{width * gap * 0.86:.3f}%" y="{100 - max(height, 1):.2f}%" '
        f'height="{max(height, 1):.2f}%"><title>slice {z + 1}: {_short(score)}</title></rect>'
    )


def _short(value: float) -> str:
    return f"{value:.3g}"


STYLE = """
.strip figcaption{padding:0 0 .35rem;max-width:46rem}
.strip figcaption strong{color:var(--fg)}
.strip .chart{display:grid;grid-template:1fr auto/2.4rem 1fr auto;gap:0 .5rem;font-size:.78rem;color:var(--soft);
font-variant-numeric:tabular-nums}
.strip .high{grid-area:1/1;text-align:right;align-self:start;line-height:1}
.strip .low{grid-area:1/1;text-align:right;align-self:end;line-height:1}
.strip svg{grid-area:1/2/2/4;width:100%;background:var(--panel);border-bottom:1px solid var(--soft);
border-radius:4px 4px 0 0;cursor:pointer;display:block;overflow:visible;touch-action:manipulation}
.strip .from{grid-area:2/2}
.strip .to{grid-area:2/3}
.strip .mid{stroke:var(--line);stroke-dasharray:3 3}
.strip .bar{fill:var(--soft);opacity:.75}
.strip .bar.chosen{fill:var(--accent);opacity:1}
.strip .mark{stroke:var(--mark);stroke-width:2}
""".replace("\n", "")
