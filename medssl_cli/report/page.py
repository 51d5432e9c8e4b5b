"""One HTML file that needs nothing else: no network, no script of a stranger, every text escaped.

A Content-Security-Policy in the page itself forbids whatever is not in the file; scripts of our own are allowed by
their hash. The page is readable in light and dark, on paper and with the keyboard alone.
"""

from __future__ import annotations

import base64
import hashlib
import html
import sys
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from medssl_cli.core.run import RESEARCH_NOTE, hide_home, package_version, write_text

KINDS = ("error", "warning", "info", "ok")


class Html(str):
    """Text that is HTML already, made by the functions of this file; everything else is escaped."""

    __slots__ = ()


Content = str | int | float | None


def escaped(content: Content) -> Html:
    """``content`` as HTML: numbers in short form, None as a dash, text escaped, Html as it is."""
    if isinstance(content, Html):
        return content
    if content is None:
        return Html("–")
    if isinstance(content, float):
        return Html(f"{content:.4g}")
    return Html(html.escape(str(content), quote=True))


def chip(text: str, kind: str) -> Html:
    """A small coloured label; ``kind`` is error, warning, info or ok."""
    if kind not in KINDS:
        raise ValueError(f"a chip is one of {KINDS}, got {kind!r}")
    return Html(f'<span class="chip {kind}">{escaped(text)}</span>')


def link(text: str, anchor: str) -> Html:
    """A link to a place of the same page."""
    return Html(f'<a href="#{html.escape(anchor, quote=True)}">{escaped(text)}</a>')


def path_text(path: str) -> Html:
    """A path that may break after each separator."""
    return Html(escaped(path).replace("/", "/<wbr>"))


def image(data: bytes, alt: str, *, width: int | None = None) -> Html:
    """A PNG or JPEG within the page; ``alt`` says what it shows."""
    kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
    size = "" if width is None else f' width="{int(width)}"'
    source = base64.b64encode(data).decode("ascii")
    return Html(f'<img src="data:image/{kind};base64,{source}" alt="{escaped(alt)}" loading="lazy"{size}>')


def joined(parts: Iterable[Content], between: str = " ") -> Html:
    """Several contents in one."""
    return Html(escaped(between).join(escaped(part) for part in parts))


class Page:
    """A page in the making; sections appear in the order in which they are added.

    Args:
        title: Heading and window title.
        lead: One sentence below it.
    """

    def __init__(self, title: str, lead: Content = "") -> None:
        self.title = title
        self.lead = lead
        self._parts: list[str] = []
        self._contents: list[tuple[str, str]] = []
        self._scripts: list[str] = []
        self._styles: list[str] = []

    def heading(self, text: str, anchor: str = "") -> None:
        """A section heading; it stands in the contents at the top when there are several."""
        anchor = anchor or f"section-{len(self._contents) + 1}"
        self._contents.append((text, anchor))
        self._parts.append(f'<h2 id="{escaped(anchor)}">{escaped(text)}</h2>')

    def text(self, content: Content) -> None:
        """A paragraph."""
        self._parts.append(f"<p>{escaped(content)}</p>")

    def note(self, content: Content, kind: str = "info") -> None:
        """A paragraph set apart; ``kind`` as for a chip."""
        if kind not in KINDS:
            raise ValueError(f"a note is one of {KINDS}, got {kind!r}")
        self._parts.append(f'<p class="note {kind}" role="note">{escaped(content)}</p>')

    def facts(self, facts: Mapping[str, Content] | Sequence[tuple[str, Content]]) -> None:
        """Names with their values."""
        pairs = facts.items() if isinstance(facts, Mapping) else facts
        rows = "".join(f"<div><dt>{escaped(k)}</dt><dd>{escaped(v)}</dd></div>" for k, v in pairs)
        self._parts.append(f'<dl class="facts">{rows}</dl>')

    def table(
        self,
        header: Sequence[str],
        rows: Iterable[Sequence[Content]],
        *,
        caption: str = "",
        anchors: Sequence[str] = (),
        right: Collection[int] = (),
    ) -> None:
        """A table that scrolls sideways on a narrow screen; numbers stand right.

        Args:
            header: Column names.
            rows: Cells; text, number, None or Html.
            caption: Said above the table.
            anchors: One id a row, for links.
            right: Columns whose texts stand right as numbers do.
        """
        rows = list(rows)
        head = "".join(
            _head(name, [row[i] for row in rows if i < len(row)], i in right) for i, name in enumerate(header)
        )
        body = []
        for number, row in enumerate(rows):
            anchor = f' id="{escaped(anchors[number])}"' if number < len(anchors) else ""
            body.append(f"<tr{anchor}>{''.join(_cell(cell, i in right) for i, cell in enumerate(row))}</tr>")
        title = f"<caption>{escaped(caption)}</caption>" if caption else ""
        label = escaped(caption or "table")
        self._parts.append(
            f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table>{title}'
            f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
        )

    def figure(self, data: bytes, caption: Content = "", *, alt: str, width: int | None = None) -> None:
        """A PNG or JPEG with its caption."""
        self._parts.append(
            f"<figure>{image(data, alt, width=width)}<figcaption>{escaped(caption)}</figcaption></figure>"
        )

    def cards(self, cards: Iterable[tuple[str, Html]]) -> None:
        """A grid of (anchor, content) cards."""
        body = "".join(f'<article class="card" id="{escaped(anchor)}">{content}</article>' for anchor, content in cards)
        self._parts.append(f'<div class="cards">{body}</div>')

    def add(self, content: Html) -> None:
        """HTML made by a caller who has escaped what is in it."""
        if not isinstance(content, Html):
            raise ValueError("only Html is added as it is; plain text goes through text()")
        self._parts.append(content)

    def script(self, code: str) -> None:
        """JavaScript of our own, allowed by its hash; data must be put into attributes of escaped HTML."""
        if "</" in code:
            raise ValueError("a script may not hold '</': it would end there")
        self._scripts.append(code)

    def style(self, rules: str) -> None:
        """CSS of our own for what ``add`` brings, put into the head; the same rules twice count once."""
        if "</" in rules:
            raise ValueError("a style may not hold '</': it would end there")
        if rules not in self._styles:
            self._styles.append(rules)

    def render(self) -> str:
        """The whole file."""
        contents = ""
        if len(self._contents) > 2:
            items = "".join(f"<li>{link(text, anchor)}</li>" for text, anchor in self._contents)
            contents = f'<nav aria-label="Contents"><ul>{items}</ul></nav>'
        lead = f'<p class="lead">{escaped(self.lead)}</p>' if self.lead else ""
        scripts = "".join(f"<script>{code}</script>" for code in self._scripts)
        return (
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta http-equiv="Content-Security-Policy" content="{self._policy()}">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            '<meta name="color-scheme" content="light dark"><meta name="referrer" content="no-referrer">'
            f'<title>{escaped(self.title)}</title><link rel="icon" href="data:,">'
            f"<style>{_STYLE}{''.join(self._styles)}</style></head>"
            f'<body><a class="skip" href="#main">Skip to the content</a><main id="main">'
            f"<header><h1>{escaped(self.title)}</h1>{lead}</header>{contents}\n"
            + "\n".join(self._parts)
            + f"\n</main>{_footer()}{scripts}</body></html>\n"
        )

    def write(self, path: Path) -> None:
        """Write the page whole or not at all."""
        write_text(path, self.render().encode("utf-8", "replace").decode("utf-8"))

    def _policy(self) -> str:
        hashes = [base64.b64encode(hashlib.sha256(code.encode()).digest()).decode() for code in self._scripts]
        allowed = " ".join(f"'sha256-{value}'" for value in hashes) or "'none'"
        return (
            f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {allowed}; "
            "base-uri 'none'; form-action 'none'"
        )


def _head(name: str, column: Sequence[Content], is_right: bool) -> str:
    """The name stands right above numbers."""
    told = [content for content in column if content is not None]
    kind = ' class="number"' if is_right or (told and all(map(_is_number, told))) else ""
    return f'<th scope="col"{kind}>{escaped(name)}</th>'


def _cell(content: Content, is_right: bool) -> str:
    kind = ' class="number"' if is_right or _is_number(content) else ""
    return f"<td{kind}>{escaped(content)}</td>"


def _is_number(content: Content) -> bool:
    return isinstance(content, (int, float)) and not isinstance(content, bool)


def _footer() -> str:
    command = hide_home(" ".join(["medssl", *sys.argv[1:]]))
    made = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    return (
        f"<footer><p><strong>{escaped(RESEARCH_NOTE)}</strong></p>"
        f"<p>medssl {escaped(package_version())}, {made}</p><p><code>{escaped(command)}</code></p></footer>"
    )


_STYLE = """
:root{--bg:#fff;--fg:#1c2330;--soft:#5b6677;--line:#dfe4ea;--panel:#f6f8fa;--accent:#0b5cad;
--error:#b3261e;--error-bg:#fdecea;--warning:#7a5200;--warning-bg:#fff4d6;--info:#0b4f8a;--info-bg:#e5f1fb;
--ok:#1b6b3a;--ok-bg:#e4f5ea}
@media (prefers-color-scheme:dark){:root{--bg:#12161c;--fg:#e4e8ee;--soft:#9aa6b5;--line:#2b333e;--panel:#1a2028;
--accent:#7bb8f5;--error:#ffb4ab;--error-bg:#4a1512;--warning:#ffd58a;--warning-bg:#41300a;--info:#a9d2fb;
--info-bg:#12304c;--ok:#9fdcb4;--ok-bg:#12361f}}
*{box-sizing:border-box}
html{scroll-behavior:smooth;scroll-padding-top:1rem}
body{margin:0;background:var(--bg);color:var(--fg);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main,footer{max-width:76rem;margin:0 auto;padding:0 1.5rem}
header{padding:2.2rem 0 .6rem}
h1{font-size:1.7rem;line-height:1.25;margin:0;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:2.2rem 0 .7rem;padding-bottom:.3rem;border-bottom:1px solid var(--line)}
p{max-width:46rem;margin:.6rem 0}
.lead{font-size:1.05rem;color:var(--soft)}
a{color:var(--accent)}
a:focus-visible,[tabindex]:focus-visible,summary:focus-visible,input:focus-visible,button:focus-visible{
outline:3px solid var(--accent);outline-offset:2px;border-radius:3px}
.skip{position:absolute;left:-99rem}
.skip:focus{left:1rem;top:1rem;background:var(--bg);padding:.4rem .8rem}
nav ul{display:flex;flex-wrap:wrap;gap:.3rem 1.2rem;list-style:none;margin:.8rem 0;padding:0}
.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(13rem,1fr));gap:.6rem 1.5rem;margin:1rem 0}
.facts div{border-left:3px solid var(--line);padding-left:.7rem;min-width:0}
dt{color:var(--soft);font-size:.85rem}
dd{margin:0;font-weight:600;overflow-wrap:anywhere}
.scroll{overflow-x:auto;margin:1rem 0}
table{border-collapse:collapse;width:100%;font-size:.92rem}
caption{text-align:left;color:var(--soft);padding-bottom:.4rem}
th{text-align:left;background:var(--panel);font-weight:600;white-space:nowrap}
th,td{padding:.45rem .7rem;border-bottom:1px solid var(--line);vertical-align:top;overflow-wrap:break-word}
td{max-width:32rem}
td:last-child{min-width:12rem}
td.number,th.number{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
td.number:last-child{min-width:0}
tr:target,.card:target{background:var(--warning-bg)}
figure{margin:1rem 0}
figcaption{color:var(--soft);font-size:.9rem}
img{max-width:100%;height:auto;background:#000;border-radius:4px;display:block}
.chip{display:inline-block;padding:.05rem .55rem;border-radius:1rem;font-size:.8rem;font-weight:600;white-space:nowrap}
.error{color:var(--error);background:var(--error-bg)}
.warning{color:var(--warning);background:var(--warning-bg)}
.info{color:var(--info);background:var(--info-bg)}
.ok{color:var(--ok);background:var(--ok-bg)}
.note{padding:.6rem .9rem;border-radius:6px}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(22rem,100%),1fr));gap:1rem;margin:1rem 0}
.card{border:1px solid var(--line);border-radius:8px;padding:.8rem;background:var(--panel);min-width:0}
.card h3{font-size:1rem;margin:0 0 .5rem;overflow-wrap:anywhere}
.card p{margin:.4rem 0 0;font-size:.85rem;overflow-wrap:anywhere}
code{font:.9em ui-monospace,SFMono-Regular,Menlo,monospace;overflow-wrap:anywhere}
footer{margin-top:3rem;padding-top:1rem;padding-bottom:2rem;border-top:1px solid var(--line);
color:var(--soft);font-size:.88rem}
@media print{.skip,nav{display:none}.card,tr{break-inside:avoid}.scroll{overflow:visible}}
""".replace("\n", "")
