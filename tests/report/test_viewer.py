from __future__ import annotations

import base64
import hashlib
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from medssl_cli.report.case_page import CasePictures, Heat, case_page, heat_picture, similarity_picture
from medssl_cli.report.overlay import png_bytes
from medssl_cli.report.page import Page
from medssl_cli.report.viewer import Stack, ViewerSlice, add_viewer

EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"
VOID = {"meta", "link", "img", "input", "wbr", "hr", "br"}


class Elements(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag

    def named(self, tag: str, word: str = "") -> list[dict[str, str | None]]:
        return [a for t, a in self.tags if t == tag and (not word or word in (a.get("class") or "").split())]


def heat(count: int = 4) -> Heat:
    grid = np.random.default_rng(0).random((count, 3, 5)).astype(np.float32)
    top = tuple({"rank": i + 1, "slice_index": z, "score": 2.0 - z / 10} for i, z in enumerate((2, 0)[:count]))
    return Heat(grid, "× average", "Attention rollout; no map of lesions.", top)


def volume_pictures(text: str = "ax_t2wi", count: int = 4, orientation: str = "RAS") -> CasePictures:
    planes = np.random.default_rng(0).random((count, 2, 12, 20)).astype(np.float32)
    return CasePictures(
        names=(text, f"{text}2"),
        plane=lambda z: planes[z],
        count=count,
        spacing=(2.0, 1.0),
        orientation=orientation,
        colour=False,
        heat=heat(count),
    )


def whole_page(text: str = "P1") -> Page:
    return case_page(
        text,
        volume_pictures(text),
        similarity_hw=np.linspace(-0.5, 1, 15).reshape(3, 5),
        similarity_slice=1,
        reference_patch=(1, 2),
        missing=(text,),
        facts={text: text},
    )


def test_r15_names_of_cases_and_sequences_are_inert() -> None:
    plain, evil = Elements(whole_page().render()), Elements(whole_page(EVIL).render())
    assert [tag for tag, _ in evil.tags] == [tag for tag, _ in plain.tags]
    assert not [name for _, attributes in evil.tags for name in attributes if name.startswith("on")]


def test_r15_nothing_is_asked_from_outside() -> None:
    text = whole_page().render()
    for tag, attributes in Elements(text).tags:
        for name in ("src", "href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#")), (tag, value)
    assert not re.search(r"https?://|url\(|@import", text)


def test_r15_the_policy_allows_this_script_only() -> None:
    text = whole_page().render()
    (script,) = re.findall(r"<script>(.*?)</script>", text, flags=re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = (a["content"] for a in Elements(text).named("meta") if a.get("http-equiv"))
    assert f"script-src 'sha256-{digest}';" in str(policy)
    assert str(policy).startswith("default-src 'none'")


def test_the_style_stands_in_the_head_once() -> None:
    page = whole_page()
    add_viewer(page, Stack((ViewerSlice("a", (png_bytes(np.zeros((2, 2, 3), np.uint8)),)),), 0, ("x",), (1, 1)))
    head, _, body = page.render().partition("</head>")
    assert head.count(".viewer .plane{") == 1
    assert "<style" not in body


def test_one_slice_is_seen_without_scripts() -> None:
    elements = Elements(whole_page().render())
    planes = elements.named("figure", "plane")
    assert len(planes) == 4
    assert ["hidden" in plane for plane in planes] == [True, True, False, True]  # the hottest is shown
    assert len(elements.named("img", "layer")) == 4
    assert len(elements.named("img", "base")) == 8
    assert len(elements.named("button", "thumb")) == 2
    assert elements.named("noscript")
    assert "hidden" in elements.named("div", "controls")[0]
    assert next(a["style"] for a in elements.named("div", "stack")) == "aspect-ratio:833/1000"  # 20 mm x 24 mm
    assert all(a.get("alt") is not None for a in elements.named("img"))


def test_a_single_picture_needs_no_slider() -> None:
    page = Page("x")
    picture = png_bytes(np.zeros((4, 4, 3), np.uint8))
    add_viewer(page, Stack((ViewerSlice("image", (picture,)),), 0, ("image",), (4, 4)))
    elements = Elements(page.render())
    assert {a.get("id") for a in elements.named("input")} == {"brightness", "contrast"}
    assert not elements.named("span", "side")
    assert not elements.named("fieldset")


@pytest.mark.parametrize(
    ("orientation", "place"), [("RAS", (-1, -1)), ("LPS", (0, 0)), ("LAS", (-1, 0)), ("RPI", (0, -1))]
)
def test_the_patients_right_is_on_the_left_and_anterior_up(orientation: str, place: tuple[int, int]) -> None:
    """A bright corner at the array's first row and column must come to the corner where it belongs."""
    plane = np.zeros((1, 4, 6), np.float32)
    plane[0, 0, 0] = 1  # first row: posterior in RAS; first column: the patient's left in RAS
    pictures = CasePictures(("a",), lambda z: plane, 1, (1.0, 1.0), orientation, False)
    (shown,) = pictures.pictures(0)
    assert shown[place].tolist() == [255] * 3
    assert shown.sum() == 3 * 255


def test_a_photograph_is_shown_as_it_is() -> None:
    colours = np.random.default_rng(0).random((3, 4, 6)).astype(np.float32)
    pictures = CasePictures(("image",), lambda z: colours, 1, (1.0, 1.0), None, True)
    (shown,) = pictures.pictures(0)
    np.testing.assert_array_equal(shown, np.rint(255 * colours).astype(np.uint8).transpose(1, 2, 0))


def test_pictures_of_the_maps_have_the_right_proportions() -> None:
    pictures = volume_pictures()
    height, width = pictures.picture_size(320)
    assert (height, width) == (320, 267)
    picture = heat_picture(pictures)
    assert picture.shape == (2 * (320 + 24) + 2 + 34, 2 * 267 + 2, 3)
    similarity = similarity_picture(np.eye(3, 5), pictures)
    assert similarity.shape == (384, 320, 3)
    assert len(np.unique(similarity.reshape(-1, 3), axis=0)) == 2  # squares, nothing between
    assert similarity[-1, -1].sum() > similarity[0, 0].sum()  # (0, 0) is bright and lies at the lower right in RAS


def test_flat_heat_is_no_heat() -> None:
    flat = Heat(np.ones((2, 3, 3), np.float32), "cosine", "", ())
    assert not flat.unit_hw(0).any()


# --- in a browser ----------------------------------------------------------------------------------------------------

DRIVER = """
window.addEventListener('load',function(){
var planes=Array.from(document.querySelectorAll('.plane'));
function at(){return planes.findIndex(function(p){return !p.hidden;});}
function key(name,target){target.dispatchEvent(new KeyboardEvent('keydown',{key:name,bubbles:true,cancelable:true}));}
var stage=document.getElementById('stage'),seen=[at()];
key('ArrowRight',document.body);seen.push(at());key('ArrowRight',stage);seen.push(at());
key('Home',stage);seen.push(at());key('End',stage);seen.push(at());key('ArrowLeft',stage);seen.push(at());
document.querySelectorAll('.thumb')[1].click();seen.push(at());
var slice=document.getElementById('slice');slice.value=1;slice.dispatchEvent(new Event('input'));seen.push(at());
var layer=document.querySelector('.layer');seen.push(layer.style.opacity);
key('h',stage);seen.push(layer.style.opacity);
var opacity=document.getElementById('opacity');opacity.value=30;opacity.dispatchEvent(new Event('input'));
seen.push(layer.style.opacity);
var radios=document.querySelectorAll('input[name=sequence]');radios[1].click();
var bases=document.querySelectorAll('.plane:not([hidden]) .base');seen.push(bases[0].hidden,bases[1].hidden);
document.getElementById('reset').click();seen.push(at(),layer.style.opacity);
document.title=JSON.stringify(seen);
});
"""


def in_chromium(page: Path, profile: Path) -> tuple[str, list[str]]:
    """(the document after its scripts ran, console lines)."""
    browser = next(
        (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
    )
    if browser is None:
        pytest.skip("no Chromium here: the page was not opened in a browser")
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --virtual-time-budget=3000 --enable-logging=stderr --dump-dom"
    )
    words = [browser, *flags.split(), f"--user-data-dir={profile}", page.as_uri()]
    answer = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)
    return answer.stdout, [line for line in answer.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.slow
def test_r15_opens_in_a_browser_without_complaint(tmp_path: Path) -> None:
    whole_page(EVIL).write(tmp_path / "report.html")
    document, console = in_chromium(tmp_path / "report.html", tmp_path / "profile")
    assert console == []
    assert 'id="controls">' in document, "the script did not run"
    assert ">slice 3 of 4</output>" in document
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    (tmp_path / "bad.html").write_text(text.replace("</main>", "<script>alert(2)</script></main>"), encoding="utf-8")
    _, console = in_chromium(tmp_path / "bad.html", tmp_path / "profile")
    assert console, "a foreign script was let through"


@pytest.mark.slow
def test_sliders_keys_and_thumbnails_move_the_viewer(tmp_path: Path) -> None:
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", whole_page().render())
    (tmp_path / "driven.html").write_text(
        text.replace("</body>", f"<script>{DRIVER}</script></body>"), encoding="utf-8"
    )
    document, console = in_chromium(tmp_path / "driven.html", tmp_path / "profile")
    assert console == []
    (title,) = re.findall(r"<title>(.*?)</title>", document)
    assert title == '[2,3,3,0,3,2,0,1,"0.7","0","0.3",true,false,2,"0.7"]'
