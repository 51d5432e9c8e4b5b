"""A slice viewer inside a page: slices, sequences, a heat map as a layer, thumbnails that jump; no network.

All slices are pictures within the page; the script only shows one of them and sets its brightness and the opacity of
the layer. Without scripts the first slice and the thumbnails are there to be seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from medssl_cli.report.page import Html, Page, escaped, image


@dataclass(frozen=True)
class ViewerSlice:
    """One plane to look at.

    Args:
        label: Shown below it, e.g. ``slice 12 of 24``.
        pictures: PNG or JPEG bytes, one for each sequence.
        layer: PNG bytes with transparency, laid over the same area; None without a heat map.
    """

    label: str
    pictures: tuple[bytes, ...]
    layer: bytes | None = None


@dataclass(frozen=True)
class Stack:
    """The slices of one case.

    Args:
        slices: In the order of the slider.
        first: The one that is shown at the start.
        names: Of the sequences.
        proportions: Width and height of a slice in one unit of length.
        sides: Letters at the left, right, top and bottom; None for a photograph.
    """

    slices: tuple[ViewerSlice, ...]
    first: int
    names: tuple[str, ...]
    proportions: tuple[int, int]
    sides: tuple[str, str, str, str] | None = None


@dataclass(frozen=True)
class Layer:
    """The heat map that lies over the slices.

    Args:
        name: Beside its slider.
        low, high: Said at the ends of the colour bar.
        bar: PNG bytes of its colours, from low to high.
    """

    name: str
    low: str
    high: str
    bar: bytes


@dataclass(frozen=True)
class Thumbnail:
    """A small picture that jumps to a slice.

    Args:
        place: Which of the slices.
        label, detail: Two lines below it.
        picture: PNG or JPEG bytes.
    """

    place: int
    label: str
    detail: str
    picture: bytes


def add_viewer(page: Page, stack: Stack, layer: Layer | None = None, thumbnails: Sequence[Thumbnail] = ()) -> None:
    """Put the viewer into the page; one on a page."""
    planes = "".join(_plane(stack, place) for place in range(len(stack.slices)))
    page.style(_STYLE)
    page.add(
        Html(
            '<div class="viewer"><div class="stage" id="stage" tabindex="0" role="group" '
            'aria-label="Slices; arrow keys move through them">'
            f'{planes}</div><div class="panel">'
            f'<div class="controls" id="controls" hidden>{_controls(stack, layer)}</div>'
            f"{_legend(layer)}{_thumbnails(thumbnails)}"
            "<noscript><p>Scripts are off: the first slice is shown.</p></noscript></div></div>"
        )
    )
    page.script(_SCRIPT)


def _plane(stack: Stack, place: int) -> str:
    plane = stack.slices[place]
    width, height = stack.proportions
    pictures = "".join(
        _shown_at_once(image(data, f"{name}, {plane.label}"), f'class="base" {"" if i == 0 else "hidden "}')
        for i, (name, data) in enumerate(zip(stack.names, plane.pictures, strict=True))
    )
    if plane.layer is not None:
        pictures += _shown_at_once(image(plane.layer, f"heat map, {plane.label}"), 'class="layer" ')
    letters = ""
    if stack.sides is not None:
        places = ("left", "right", "top", "bottom")
        letters = "".join(
            f'<span class="side {where}" aria-hidden="true">{escaped(letter)}</span>'
            for where, letter in zip(places, stack.sides, strict=True)
        )
    return (
        f'<figure class="plane"{"" if place == stack.first else " hidden"}>'
        f'<div class="stack" style="aspect-ratio:{int(width)}/{int(height)}">{pictures}{letters}</div>'
        f"<figcaption>{escaped(plane.label)}</figcaption></figure>"
    )


def _shown_at_once(picture: Html, attributes: str) -> str:
    """Without lazy loading, so that a slice is there as soon as the slider gets to it."""
    return picture.replace(' loading="lazy"', "").replace("<img ", f"<img {attributes}", 1)


def _controls(stack: Stack, layer: Layer | None) -> str:
    parts = []
    if len(stack.slices) > 1:
        parts.append(_slider("slice", "Slice", 0, len(stack.slices) - 1, stack.first))
    if len(stack.names) > 1:
        options = "".join(
            f'<label><input type="radio" name="sequence" value="{i}"{" checked" if i == 0 else ""}>'
            f"<span>{escaped(name)}</span></label>"
            for i, name in enumerate(stack.names)
        )
        parts.append(f'<fieldset class="choice"><legend>Sequence</legend>{options}</fieldset>')
    if layer is not None:
        parts.append(_slider("opacity", f"{layer.name.capitalize()} opacity", 0, 100, 70))
    parts.append(_slider("brightness", "Brightness", 40, 250, 100))
    parts.append(_slider("contrast", "Contrast", 40, 250, 100))
    hints = _hints(stack, layer)
    parts.append(f'<p class="keys">{escaped(hints)} <button type="button" id="reset">Reset</button></p>')
    return "".join(parts)


def _hints(stack: Stack, layer: Layer | None) -> str:
    keys = []
    if len(stack.slices) > 1:
        keys.append("← → through the slices, on the picture also Home, End and, once it is clicked, the wheel")
    if layer is not None:
        keys.append(f"H {layer.name} on and off")
    return f"Keys: {'; '.join(keys)}." if keys else ""


def _slider(name: str, text: str, low: int, high: int, value: int) -> str:
    return (
        f'<label class="slider" for="{name}"><span>{escaped(text)}</span>'
        f'<output id="{name}-value" for="{name}"></output>'
        f'<input type="range" id="{name}" min="{low}" max="{high}" value="{value}"></label>'
    )


def _legend(layer: Layer | None) -> str:
    if layer is None:
        return ""
    bar = _shown_at_once(image(layer.bar, f"colours of the {layer.name}, from low to high"), "")
    return (
        f'<div class="legend"><span>{escaped(layer.low)}</span><span class="bar">{bar}</span>'
        f"<span>{escaped(layer.high)}</span></div>"
    )


def _thumbnails(thumbnails: Sequence[Thumbnail]) -> str:
    if not thumbnails:
        return ""
    buttons = "".join(
        f'<button type="button" class="thumb" data-place="{int(thumb.place)}">'
        f"{_shown_at_once(image(thumb.picture, ''), '')}"
        f"<strong>{escaped(thumb.label)}</strong><span>{escaped(thumb.detail)}</span></button>"
        for thumb in thumbnails
    )
    return f'<h3>Hottest slices</h3><div class="thumbs">{buttons}</div>'


_STYLE = """
.viewer{display:grid;grid-template-columns:minmax(0,34rem) minmax(16rem,1fr);gap:1.2rem 2rem;align-items:start;
margin:1rem 0}
.viewer [hidden]{display:none!important}
.viewer .plane{margin:0}
.viewer .stack{position:relative;background:#000;border-radius:6px;overflow:hidden;width:100%}
.viewer .stack img{position:absolute;inset:0;width:100%;height:100%;max-width:none;border-radius:0}
.viewer .layer{background:none;opacity:.7}
.viewer .side{position:absolute;color:#f2d27a;font:600 .95rem/1 system-ui,sans-serif;
text-shadow:0 0 3px #000,0 0 3px #000}
.viewer .left{left:.5rem;top:50%;transform:translateY(-50%)}
.viewer .right{right:.5rem;top:50%;transform:translateY(-50%)}
.viewer .top{top:.5rem;left:50%;transform:translateX(-50%)}
.viewer .bottom{bottom:.5rem;left:50%;transform:translateX(-50%)}
.viewer figcaption{padding:.35rem 0 0;font-variant-numeric:tabular-nums}
.viewer .slider{display:grid;grid-template-columns:1fr auto;gap:0 .6rem;margin:0 0 .7rem;font-size:.9rem}
.viewer .slider input{grid-column:1/-1;width:100%;margin:.2rem 0 0;accent-color:var(--accent)}
.viewer output{color:var(--soft);font-variant-numeric:tabular-nums}
.viewer .choice{border:0;margin:0 0 .8rem;padding:0;display:flex;flex-wrap:wrap;gap:.3rem;font-size:.9rem}
.viewer .choice legend{padding:0 0 .25rem}
.viewer .choice input{position:absolute;opacity:0}
.viewer .choice span{display:block;padding:.25rem .7rem;border:1px solid var(--line);border-radius:1rem;cursor:pointer}
.viewer .choice input:checked+span{background:var(--accent);border-color:var(--accent);color:var(--bg)}
.viewer .choice input:focus-visible+span{outline:3px solid var(--accent);outline-offset:2px}
.viewer .keys{color:var(--soft);font-size:.82rem;margin:.2rem 0 1rem}
.viewer button{font:inherit;color:inherit;background:var(--panel);border:1px solid var(--line);border-radius:6px;
cursor:pointer}
.viewer .keys button{padding:.05rem .6rem;font-size:.82rem}
.viewer .legend{display:grid;grid-template-columns:auto 1fr auto;gap:.6rem;align-items:center;font-size:.85rem;
color:var(--soft);font-variant-numeric:tabular-nums}
.viewer .legend .bar{background:#3c3c3c;border-radius:4px;overflow:hidden}
.viewer .legend img{width:100%;height:.9rem;background:none;border-radius:0}
.viewer h3{font-size:1rem;margin:1.3rem 0 .5rem}
.viewer .thumbs{display:grid;grid-template-columns:repeat(auto-fill,minmax(6.4rem,1fr));gap:.6rem}
.viewer .thumb{display:flex;flex-direction:column;padding:.3rem;text-align:left;font-size:.8rem;line-height:1.35}
.viewer .thumb img{width:100%;margin-bottom:.25rem}
.viewer .thumb span{color:var(--soft)}
.viewer .thumb[aria-current=true]{border-color:var(--accent);box-shadow:0 0 0 1px var(--accent)}
@media (max-width:52rem){.viewer{grid-template-columns:minmax(0,1fr)}}
@media print{.viewer .controls{display:none}}
""".replace("\n", "")

_SCRIPT = """
(function(){
'use strict';
function byId(id){return document.getElementById(id);}
function all(selector){return Array.prototype.slice.call(document.querySelectorAll(selector));}
var planes=all('.viewer .plane'),thumbs=all('.viewer .thumb'),layers=all('.viewer .layer'),bases=all('.viewer .base');
var stage=byId('stage'),slice=byId('slice'),opacity=byId('opacity'),first=0,last=planes.length-1;
var brightness=byId('brightness'),contrast=byId('contrast'),wheel=0,hidden=false;
planes.forEach(function(plane,i){if(!plane.hidden){first=i;}});
var here=first;
function say(id,text){byId(id+'-value').textContent=text;}
function show(place){
here=Math.max(0,Math.min(last,place));
planes.forEach(function(plane,i){plane.hidden=i!==here;});
thumbs.forEach(function(thumb){thumb.setAttribute('aria-current',String(Number(thumb.dataset.place)===here));});
if(slice){slice.value=here;say('slice',planes[here].querySelector('figcaption').textContent);}
}
function fade(){
if(!opacity){return;}
layers.forEach(function(layer){layer.style.opacity=hidden?0:opacity.value/100;});
say('opacity',hidden?'off':opacity.value+' %');
}
function light(){
var filter='brightness('+brightness.value/100+') contrast('+contrast.value/100+')';
bases.forEach(function(base){base.style.filter=filter;});
say('brightness',brightness.value+' %');say('contrast',contrast.value+' %');
}
function choose(number){
planes.forEach(function(plane){
Array.prototype.forEach.call(plane.querySelectorAll('.base'),function(base,i){base.hidden=i!==number;});
});
}
if(slice){slice.addEventListener('input',function(){show(Number(slice.value));});}
if(opacity){opacity.addEventListener('input',function(){hidden=false;fade();});}
[brightness,contrast].forEach(function(input){input.addEventListener('input',light);});
all('.viewer input[name=sequence]').forEach(function(input){
input.addEventListener('change',function(){choose(Number(input.value));});
});
thumbs.forEach(function(thumb){
thumb.addEventListener('click',function(){
show(Number(thumb.dataset.place));
var box=stage.getBoundingClientRect();
if(box.top<0||box.bottom>window.innerHeight){stage.scrollIntoView({block:'nearest'});}
});
});
byId('reset').addEventListener('click',function(){
[opacity,brightness,contrast].forEach(function(input){if(input){input.value=input.defaultValue;}});
hidden=false;show(first);fade();light();
});
document.addEventListener('keydown',function(event){
if(event.target!==document.body&&event.target!==stage||event.ctrlKey||event.altKey||event.metaKey){return;}
var onStage=event.target===stage,moves={ArrowLeft:here-1,ArrowRight:here+1};
if(onStage){moves.ArrowUp=here+1;moves.ArrowDown=here-1;moves.Home=0;moves.End=last;
moves.PageUp=here+5;moves.PageDown=here-5;}
if(event.key in moves){show(moves[event.key]);event.preventDefault();}
if((event.key==='h'||event.key==='H')&&opacity){hidden=!hidden;fade();}
});
stage.addEventListener('wheel',function(event){
if(document.activeElement!==stage||last===0){return;}
event.preventDefault();wheel+=event.deltaY;
if(Math.abs(wheel)>=40){show(here+(wheel>0?1:-1));wheel=0;}
},{passive:false});
byId('controls').hidden=false;
choose(0);show(first);fade();light();
})();
"""
