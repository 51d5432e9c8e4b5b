from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from medssl_cli.report import grey_values
from medssl_cli.report.case_page import (
    CasePictures,
    Finding,
    Flag,
    Heat,
    Verdict,
    case_page,
    heat_picture,
    similarity_picture,
)
from medssl_cli.report.grey_values import CT_WINDOWS
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


def head_page(text: str = "P1", *, count: int = 8, heat_map: bool = True, noise: float = 0.0) -> Page:
    """A CT with measured values, looked at by a head; slices 2, 5, … were not looked at."""
    volume = ct_volume(count, noise)
    scores = np.where(np.arange(count) % 3 == 2, np.nan, np.arange(count) / count)
    pictures = CasePictures(
        names=(text,),
        plane=lambda z: np.clip(volume[z][None] / 80, 0, 1).astype(np.float32),
        count=count,
        spacing=(1.0, 1.0),
        orientation="LPS",
        colour=False,
        heat=heat(count) if heat_map else None,
        stored=lambda z: volume[z][None],
        value_unit="HU",
    )
    verdict = Verdict(
        findings=(Finding(text, 0.9, 0.8, 0.95, 0.4, True), Finding("other", 0.1, None, None, 0.4, False)),
        calibrated=True,
        interval_definition=text,
        head=text,
        slice_scores_Z=scores,
        slice_score_name=text,
        slice_scores_from="slice_head",
    )
    return case_page(
        text,
        pictures,
        similarity_hw=None,
        similarity_slice=0,
        reference_patch=(0, 0),
        missing=(),
        facts={text: text},
        verdict=verdict,
        flags=(Flag("warning", text, text),),
    )


def ct_volume(count: int, noise: float = 0.0) -> np.ndarray:
    """(Z, Y, X) HU: a ramp over the range of a CT, less steep from slice to slice; in LPS it is shown as it is."""
    if noise:
        return np.random.default_rng(0).normal(30, noise, (count, 512, 512)).astype(np.int16)
    ramp = np.linspace(-1100, 3200, 14 * 18).reshape(14, 18)
    return np.stack([np.rint(ramp / (1 + z)) for z in range(count)]).astype(np.int16)


def test_a_grey_volume_before_a_network_of_colours_can_be_windowed() -> None:
    """And a photograph cannot: its colours are no measured values."""
    volume = ct_volume(2)[:, None].repeat(3, axis=1)
    of_colours = volume + np.array([0, 1, 2])[:, None, None]
    for stored, names in ((volume, [w.name for w in CT_WINDOWS]), (of_colours, [])):
        pictures = CasePictures(
            ("image",), lambda z: np.zeros((3, 14, 18), np.float32), 2, (1.0, 1.0), "LPS", True,
            stored=stored.__getitem__, value_unit="HU",
        )  # fmt: skip
        assert [w.name for greys in pictures.greys for w in greys.windows[:-1]] == names
        assert len(pictures.shown(0)) == 1


def test_r15_names_of_cases_and_sequences_are_inert() -> None:
    for made in (whole_page, head_page):
        plain, evil = Elements(made().render()), Elements(made(EVIL).render())
        assert [tag for tag, _ in evil.tags] == [tag for tag, _ in plain.tags]
        assert not [name for _, attributes in evil.tags for name in attributes if name.startswith("on")]


def test_the_page_of_a_head_says_first_what_it_found() -> None:
    text = head_page("subdural").render()
    headings = re.findall(r"<h2[^>]*>(.*?)</h2>", text)
    assert headings == ["Findings", "Slices", "Provenance"]
    assert (
        text.index('class="note warning"')
        < text.index("<h2")
        < text.index('class="verdict"')
        < text.index('id="strip"')
    )
    thumbs = re.findall(r"<strong>slice (\d)</strong><span>(.*?)</span>", text)
    assert thumbs == [("8", "subdural 0.875"), ("7", "subdural 0.75"), ("5", "subdural 0.5"), ("4", "subdural 0.375"),
                      ("2", "subdural 0.125")]  # fmt: skip
    assert "Slices with the highest scores" in text


def test_pictures_beside_measured_values_are_windowed_alike() -> None:
    """Without scripts one sees the first window of the unit, not what the network was shown."""
    volume = ct_volume(3)
    pictures = CasePictures(
        ("ct",), lambda z: np.zeros((1, 14, 18), np.float32), 3, (1.0, 1.0), "LPS", False,
        stored=lambda z: volume[z][None], value_unit="HU",
    )  # fmt: skip
    (shown,) = pictures.shown(1)
    np.testing.assert_array_equal(shown[..., 0], np.rint(np.clip(volume[1] / 80, 0, 1) * 255))
    with pytest.raises(ValueError, match="1 sequences are stored, 2 have names"):
        CasePictures(("a", "b"), pictures.plane, 3, (1.0, 1.0), "LPS", False, stored=pictures.stored).shown(0)


@pytest.mark.parametrize("made", [whole_page, head_page])
def test_r15_nothing_is_asked_from_outside(made: Callable[[], Page]) -> None:
    text = made().render()
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


Opened = Callable[[Path], tuple[str, list[str]]]


def driven(page: Page, script: str, folder: Path, in_chromium: Opened) -> object:
    """What a script that stands in a copy of the page puts into the title, as JSON."""
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.render())
    (folder / "driven.html").write_text(text.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    document, console = in_chromium(folder / "driven.html")
    assert console == []
    title = re.findall(r"<title>(.*?)</title>", document)[0]  # bars of a chart have titles too
    return json.loads(html.unescape(title))


@pytest.mark.slow
def test_r15_opens_in_a_browser_without_complaint(tmp_path: Path, in_chromium: Opened) -> None:
    head_page(EVIL).write(tmp_path / "head.html")
    document, console = in_chromium(tmp_path / "head.html")
    assert console == []
    assert 'class="measured"' in document, "the measured values were not drawn"
    whole_page(EVIL).write(tmp_path / "report.html")
    document, console = in_chromium(tmp_path / "report.html")
    assert console == []
    assert 'id="controls">' in document, "the script did not run"
    assert ">slice 3 of 4</output>" in document
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    (tmp_path / "bad.html").write_text(text.replace("</main>", "<script>alert(2)</script></main>"), encoding="utf-8")
    _, console = in_chromium(tmp_path / "bad.html")
    assert console, "a foreign script was let through"


@pytest.mark.slow
def test_sliders_keys_and_thumbnails_move_the_viewer(tmp_path: Path, in_chromium: Opened) -> None:
    assert driven(whole_page(), DRIVER, tmp_path, in_chromium) == [
        *(2, 3, 3, 0, 3, 2, 0, 1, "0.7", "0", "0.3", True, False, 2, "0.7")
    ]  # fmt: skip


HEAD_DRIVER = """
window.addEventListener('load',function(){
var seen=[],stage=document.getElementById('stage'),strip=document.getElementById('strip');
var planes=Array.from(document.querySelectorAll('.plane'));
function key(name){stage.dispatchEvent(new KeyboardEvent('keydown',{key:name,bubbles:true,cancelable:true}));}
function set(id,value){var input=document.getElementById(id);input.value=value;input.dispatchEvent(new Event('input'));}
function drag(name,x,y){
stage.dispatchEvent(new PointerEvent(name,{clientX:x,clientY:y,button:2,pointerId:1,pointerType:'mouse'}));
}
function note(){
var canvas=document.querySelector('canvas.measured');
var copy=document.createElement('canvas').getContext('2d',{willReadFrequently:true}),greys=[];
copy.drawImage(canvas,0,0);
var data=copy.getImageData(0,0,canvas.width,canvas.height).data;
for(var i=0;i<data.length;i+=4){greys.push(data[i]);}
seen.push({plane:planes.findIndex(function(p){return !p.hidden;}),greys:greys,
text:document.querySelector('.windowed').textContent,probe:document.querySelector('.probe').textContent,
pressed:Array.from(document.querySelectorAll('#presets [aria-pressed=true]')).map(function(b){return b.textContent;}),
mark:document.getElementById('strip-mark').getAttribute('x1'),
light:document.getElementById('light').hidden,opacity:document.querySelector('.layer').style.opacity});
}
stage.setPointerCapture=function(){};
var box=strip.getBoundingClientRect();
var steps=[function(){},function(){key('w');},function(){key('W');key('W');},
function(){strip.dispatchEvent(new MouseEvent('click',{clientX:box.left+box.width*2.4/8,bubbles:true}));},
function(){document.querySelectorAll('#presets button')[3].click();},
function(){set('centre',100);},
function(){document.getElementById('reset').click();drag('pointerdown',300,300);drag('pointermove',425,300);
drag('pointerup',425,300);},
function(){key('[');},
function(){
var rect=document.querySelector('canvas.measured').getBoundingClientRect();
drag('pointermove',rect.left+rect.width*(3.5/18),rect.top+rect.height*(4.5/14));
}];
function next(){
if(!steps.length){document.title=JSON.stringify(seen);return;}
steps.shift()();setTimeout(function(){note();next();},150);
}
setTimeout(next,300);
});
"""


@pytest.mark.slow
def test_window_and_level_are_those_of_the_measured_values(tmp_path: Path, in_chromium: Opened) -> None:
    """Every pixel of the canvas against the window's formula in float64."""
    seen = driven(head_page(), HEAD_DRIVER, tmp_path, in_chromium)
    assert isinstance(seen, list)
    volume = np.clip(ct_volume(8), -1024, 3071).astype(float)

    def expected(z: int, centre: float, width: float) -> np.ndarray:
        return (255 * np.clip((volume[z] - (centre - width / 2)) / width, 0, 1)).ravel()

    windows = {window.name: (window.centre, window.width) for window in CT_WINDOWS}
    start, after_w, before, clicked, bone, moved, dragged, faded, probed = seen
    for state, z, window in (
        (start, 7, windows["brain"]),
        (after_w, 7, windows["subdural"]),
        (clicked, 2, None),
        (bone, 2, windows["bone"]),
        (moved, 2, (100, windows["bone"][1])),
        (dragged, 7, (40, 120)),
    ):
        assert state["plane"] == z
        if window is not None:
            np.testing.assert_allclose(state["greys"], expected(z, *window), atol=0.51)
    assert [start["pressed"], after_w["pressed"], before["pressed"]] == [["brain"], ["subdural"], ["full range"]]
    assert (bone["text"], dragged["text"]) == ("C 600 W 2800", "C 40 W 120")
    assert start["mark"] == f"{100 * 7.5 / 8}%"
    assert clicked["mark"] == f"{100 * 2.5 / 8}%"
    assert start["light"] is True, "brightness and contrast have no place beside a window"
    assert (start["opacity"], faded["opacity"]) == ("0.7", "0.6")
    assert probed["probe"] == f"{volume[7][4, 3]:.0f} HU"


@pytest.mark.slow
def test_damaged_values_leave_the_pictures(tmp_path: Path, in_chromium: Opened) -> None:
    page = head_page()
    text = re.sub(r'data-values="[^"]*"', 'data-values="AAAA"', page.render())
    (tmp_path / "page.html").write_text(text, encoding="utf-8")
    document, console = in_chromium(tmp_path / "page.html")
    assert console == []
    assert 'class="measured"' not in document
    assert '<div id="light">' in document
    assert '<div id="windowing" hidden' in document


@pytest.mark.slow
def test_the_opacity_slider_changes_what_is_seen(photographed: Callable[[str, str], np.ndarray]) -> None:
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", head_page().render())
    script = "<script>var o=document.getElementById('opacity');o.value=%d;o.dispatchEvent(new Event('input'));</script>"
    pages = {value: text.replace("</body>", f"{script % value}</body>") for value in (0, 50, 100)}
    off, half, full = (photographed(page, f"opacity-{value}") for value, page in pages.items())
    coloured = [int((np.ptp(picture, axis=2) > 60).sum()) for picture in (off, half, full)]
    assert coloured[0] < coloured[1] < coloured[2], "the heat map adds colour to a grey picture"
    assert (np.abs(full - off).max(2) > 40).mean() > 0.01


@pytest.mark.slow
def test_without_scripts_picture_findings_and_chart_are_seen(photographed: Callable[[str, str], np.ndarray]) -> None:
    text = re.sub(r"<script>.*?</script>", "", head_page(heat_map=False).render(), flags=re.S)
    picture = photographed(text, "off")
    assert (picture.sum(2) == 0).mean() > 0.02, "the dark part of the slice"
    assert (picture == (11, 92, 173)).all(2).mean() > 0.002, "bars of the findings and of the chart"


@pytest.mark.slow
def test_a_page_of_many_noisy_slices_stays_small() -> None:
    text = head_page(count=70, noise=12).render()
    assert 'data-values="' in text
    assert len(text) < 15_000_000


def test_values_that_do_not_fit_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "too large" not in head_page().render()
    monkeypatch.setattr(grey_values, "BUDGET", 10)
    text = head_page().render()
    assert "The measured values would make this page too large" in text
    assert 'id="brightness"' in text
