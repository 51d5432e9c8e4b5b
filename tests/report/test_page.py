import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medssl_cli.core.run import RESEARCH_NOTE
from medssl_cli.report.overlay import png_bytes
from medssl_cli.report.page import Html, Page, chip, escaped, image, joined, link

EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>&amp;"


class Elements(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in {"meta", "link", "img", "br", "input"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag


def full_page(text: str) -> Page:
    page = Page(text, lead=text)
    page.heading(text, anchor=text)
    page.text(text)
    page.note(text, "warning")
    page.facts({text: text, "number": 3.14159, "none": None})
    page.table([text], [[text], [1.5], [None], [chip(text, "error")], [link(text, text)]], caption=text, anchors=[text])
    page.figure(png_bytes(np.zeros((2, 2, 3), np.uint8)), text, alt=text)
    page.cards([(text, joined([text, chip("fine", "ok")]))])
    return page


@settings(max_examples=30, deadline=None)
@given(st.text(max_size=60))
def test_r15_any_text_is_inert(text: str) -> None:
    plain, given_text = Elements(full_page("x").render()), Elements(full_page(text).render())
    assert [tag for tag, _ in given_text.tags] == [tag for tag, _ in plain.tags] or not text
    assert not given_text.open
    assert not any(name.startswith("on") for _, attributes in given_text.tags for name in attributes)


def test_r15_script_in_a_case_id_is_text() -> None:
    text = full_page(EVIL).render()
    elements = Elements(text)
    assert not [tag for tag, _ in elements.tags if tag == "script"]
    assert not [a for tag, a in elements.tags if tag == "img" and not (a["src"] or "").startswith("data:image/")]
    assert "&lt;script&gt;" in text


def test_page_asks_for_nothing_outside() -> None:
    elements = Elements(full_page("x").render())
    for tag, attributes in elements.tags:
        for name in ("src", "href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#")), (tag, value)
    policy = next(a["content"] for t, a in elements.tags if t == "meta" and a.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "script-src 'none'" in policy
    assert "@import" not in full_page("x").render()
    assert "url(" not in full_page("x").render()


def test_own_script_is_allowed_by_its_hash() -> None:
    page = Page("x")
    page.script("document.title='y';")
    text = page.render()
    digest = base64.b64encode(hashlib.sha256(b"document.title='y';").digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text
    with pytest.raises(ValueError, match="</"):
        page.script("x='</script>'")


def test_page_says_what_it_is(tmp_path: Path) -> None:
    full_page("Data").write(tmp_path / "a.html")
    text = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    assert RESEARCH_NOTE in text
    assert 'lang="en"' in text
    assert "prefers-color-scheme:dark" in text
    assert str(Path.home()) not in re.sub(r"/tmp\S*", "", text)
    Page("\ud800").write(tmp_path / "b.html")  # a file name that is no UTF-8


def test_only_html_is_added_as_it_is() -> None:
    page = Page("x")
    page.add(Html("<hr>"))
    assert "<hr>" in page.render()
    with pytest.raises(ValueError, match="Html"):
        page.add("<hr>")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="chip"):
        chip("x", "fatal")
    with pytest.raises(ValueError, match="note"):
        page.note("x", "fatal")
    assert escaped(None) == "–"
    assert escaped(0.123456) == "0.1235"
    assert 'src="data:image/jpeg' in image(b"\xff\xd8", "a")
