"""A slice viewer inside a page: a slider through the slices and one for the opacity of a heat map; no network.

All slices are pictures within the page; the script only shows one and fades its layer, so that the page can be read,
printed and used with the keyboard, and the top slice is visible even where scripts are off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from medssl_cli.report.page import Html, Page, escaped, image


@dataclass(frozen=True)
class ViewerSlice:
    """One plane to look at.

    Args:
        label: Shown below it, e.g. ``slice 12``.
        picture: PNG or JPEG bytes.
        layer: PNG bytes with transparency, of the same size; None without a heat map.
    """

    label: str
    picture: bytes
    layer: bytes | None = None


def add_viewer(page: Page, slices: Sequence[ViewerSlice], first: int, *, alt: str, layer_name: str = "") -> None:
    """Put the viewer into the page.

    Args:
        page: Where.
        slices: In the order of the slider.
        first: The one that is shown at the start.
        alt: What the pictures show.
        layer_name: Name of the heat map, beside its slider; empty without one.
    """
    planes = []
    for number, plane in enumerate(slices):
        layer = "" if plane.layer is None else image(plane.layer, f"{layer_name} of {plane.label}")
        shown = "" if number == first else " hidden"
        planes.append(
            f'<figure class="plane"{shown}><div class="stack">{image(plane.picture, f"{alt}, {plane.label}")}'
            f'<div class="layer">{layer}</div></div><figcaption>{escaped(plane.label)}</figcaption></figure>'
        )
    opacity = ""
    if layer_name:
        opacity = (
            f"<label>{escaped(layer_name)} <input type=range id=opacity min=0 max=100 value=50 "
            'aria-label="opacity of the heat map in percent"></label>'
        )
    page.add(
        Html(
            f"<style>{_STYLE}</style><div class=viewer>{''.join(planes)}<div class=controls>"
            f"<label>slice <input type=range id=slice min=0 max={len(slices) - 1} value={first} "
            f'aria-label="slice"></label>{opacity}</div></div>'
        )
    )
    page.script(_SCRIPT)


_STYLE = """
.viewer{max-width:42rem}.viewer .plane{margin:0}.viewer [hidden]{display:none}
.viewer .stack{position:relative;background:#000}.viewer .stack>img{width:100%;image-rendering:auto}
.viewer .layer{position:absolute;inset:0;opacity:.5}
.viewer .layer img{width:100%;height:100%;background:none}
.viewer .controls{display:flex;gap:1.5rem;flex-wrap:wrap;margin-top:.6rem}
.viewer label{display:flex;gap:.6rem;align-items:center;flex:1 1 14rem}.viewer input{flex:1}
""".replace("\n", "")

_SCRIPT = """
(function(){
var planes=document.querySelectorAll('.viewer .plane');
var slice=document.getElementById('slice'),opacity=document.getElementById('opacity');
function show(){planes.forEach(function(p,i){p.hidden=i!==Number(slice.value)});}
function fade(){document.querySelectorAll('.viewer .layer').forEach(function(l){l.style.opacity=opacity.value/100});}
slice.addEventListener('input',show);show();
if(opacity){opacity.addEventListener('input',fade);fade();}
document.querySelector('.viewer').addEventListener('wheel',function(e){
e.preventDefault();slice.value=Number(slice.value)+(e.deltaY>0?1:-1);show();},{passive:false});
})();
"""
