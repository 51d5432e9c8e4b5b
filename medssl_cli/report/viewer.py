"""A slice viewer inside a page: slices, sequences, heat map and structures as layers, thumbnails that jump; no network.

All slices are pictures within the page. With the measured values beside them the script draws on a canvas and windows
what was measured; without them, or in a browser that cannot unpack them, it sets the brightness of the pictures.
Without scripts the first slice, the thumbnails and the chart are there to be seen.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from medssl_cli.report.grey_values import Greys
from medssl_cli.report.page import Html, Page, escaped, image
from medssl_cli.report.strip import STYLE as STRIP_STYLE
from medssl_cli.report.strip import Strip, strip_html


@dataclass(frozen=True)
class ViewerSlice:
    """One plane to look at.

    Args:
        label: Shown below it, e.g. ``slice 12 of 24``.
        pictures: PNG or JPEG bytes, one for each sequence.
        layer: PNG bytes with transparency, laid over the same area; None without a heat map.
        index: Which slice of the volume it is, counted from 0.
        greys: Measured values, one text of ``grey_values.packed`` for each sequence; empty without them.
        structures: PNG bytes with transparency, one for each ``Structure``; None where it is not in the slice.
    """

    label: str
    pictures: tuple[bytes, ...]
    layer: bytes | None = None
    index: int = 0
    greys: tuple[str, ...] = ()
    structures: tuple[bytes | None, ...] = ()


@dataclass(frozen=True)
class Stack:
    """The slices of one case.

    Args:
        slices: In the order of the slider.
        first: The one that is shown at the start.
        names: Of the sequences.
        proportions: Width and height of a slice in one unit of length.
        sides: Letters at the left, right, top and bottom; None for a photograph.
        greys: What the grey values of each sequence mean; empty without them.
        grid: Height and width of the grey values.
    """

    slices: tuple[ViewerSlice, ...]
    first: int
    names: tuple[str, ...]
    proportions: tuple[int, int]
    sides: tuple[str, str, str, str] | None = None
    greys: tuple[Greys, ...] = ()
    grid: tuple[int, int] = (0, 0)


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
class Structure:
    """One class of a label map, which lies over the slices and can be switched off.

    Args:
        name: Of the class.
        colour: Red, green, blue.
        detail: Said beside it, e.g. its volume.
    """

    name: str
    colour: tuple[int, int, int]
    detail: str = ""


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


def add_viewer(
    page: Page,
    stack: Stack,
    layer: Layer | None = None,
    thumbnails: Sequence[Thumbnail] = (),
    *,
    thumbnails_title: str = "Hottest slices",
    strip: Strip | None = None,
    structures: Sequence[Structure] = (),
) -> None:
    """Put the viewer into the page; one on a page."""
    planes = "".join(_plane(stack, place, structures) for place in range(len(stack.slices)))
    page.style(_STYLE)
    page.style(STRIP_STYLE)
    chart = "" if strip is None else strip_html(strip)
    page.add(
        Html(
            f'<div class="viewer">{chart}{_thumbnails(thumbnails, thumbnails_title)}'
            '<div class="stage" id="stage" tabindex="0" role="group" '
            f'aria-label="Slices; arrow keys move through them"{_grey_data(stack)}>'
            f'{planes}</div><div class="panel">{_structures(structures)}'
            f'<div class="controls" id="controls" hidden>{_controls(stack, layer, structures)}</div>'
            f"{_legend(layer)}"
            "<noscript><p>Scripts are off: one slice is shown.</p></noscript></div></div>"
        )
    )
    page.script(_SCRIPT)


def _grey_data(stack: Stack) -> str:
    """What the script has to know of the grey values."""
    if not stack.greys:
        return ""
    facts: dict[str, Any] = {
        "height": stack.grid[0],
        "width": stack.grid[1],
        "sequences": [
            {
                "offset": greys.offset,
                "step": greys.step,
                "last": greys.last,
                "unit": greys.unit,
                "windows": [[window.name, window.centre, window.width] for window in greys.windows],
            }
            for greys in stack.greys
        ],
    }
    return f' data-greys="{escaped(json.dumps(facts))}"'


def _plane(stack: Stack, place: int, structures: Sequence[Structure]) -> str:
    plane = stack.slices[place]
    width, height = stack.proportions
    pictures = "".join(
        _shown_at_once(image(data, f"{name}, {plane.label}"), f'class="base" {"" if i == 0 else "hidden "}')
        for i, (name, data) in enumerate(zip(stack.names, plane.pictures, strict=True))
    )
    if plane.layer is not None:
        pictures += _shown_at_once(image(plane.layer, f"heat map, {plane.label}"), 'class="layer" ')
    if plane.structures:
        for number, (structure, data) in enumerate(zip(structures, plane.structures, strict=True)):
            if data is not None:
                attributes = f'class="structure-layer" data-structure="{number}" '
                pictures += _shown_at_once(image(data, f"{structure.name}, {plane.label}"), attributes)
    letters = ""
    if stack.sides is not None:
        places = ("left", "right", "top", "bottom")
        letters = "".join(
            f'<span class="side {where}" aria-hidden="true">{escaped(letter)}</span>'
            for where, letter in zip(places, stack.sides, strict=True)
        )
    values = f' data-values="{escaped(" ".join(plane.greys))}"' if plane.greys else ""
    return (
        f'<figure class="plane" data-index="{int(plane.index)}"{values}{"" if place == stack.first else " hidden"}>'
        f'<div class="stack" style="aspect-ratio:{int(width)}/{int(height)}">{pictures}{letters}</div>'
        f"<figcaption>{escaped(plane.label)}</figcaption></figure>"
    )


def _shown_at_once(picture: Html, attributes: str) -> str:
    """Without lazy loading, so that a slice is there as soon as the slider gets to it."""
    return picture.replace(' loading="lazy"', "").replace("<img ", f"<img {attributes}", 1)


def _controls(stack: Stack, layer: Layer | None, structures: Sequence[Structure]) -> str:
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
    if structures:
        parts.append(_slider("cover", "Segmentation opacity", 0, 100, 100))
    if stack.greys:
        parts.append(
            f'<div id="windowing" hidden>{_slider("centre", "Window centre", 0, 1000, 500)}'
            f"{_slider('width', 'Window width', 0, 1000, 500)}"
            '<div class="presets" id="presets" role="group" aria-label="Window presets"></div></div>'
        )
    light = _slider("brightness", "Brightness", 40, 250, 100) + _slider("contrast", "Contrast", 40, 250, 100)
    parts.append(f'<div id="light">{light}</div>')
    hints = _hints(stack, layer, structures)
    parts.append(f'<p class="keys">{hints} <button type="button" id="reset">Reset</button></p>')
    return "".join(parts)


def _hints(stack: Stack, layer: Layer | None, structures: Sequence[Structure]) -> str:
    keys = []
    if len(stack.slices) > 1:
        keys.append(("← →", "slices"))
        keys.append(("Home End wheel", "on the picture"))
    if layer is not None:
        keys.append(("H", f"{layer.name} on and off"))
        keys.append(("[ ]", "its opacity"))
    if structures:
        keys.append(("S", "segmentation on and off"))
        keys.append((", .", "its opacity"))
        if len(structures) > 1:
            keys.append((f"1 … {min(9, len(structures))}", "one structure on and off"))
        if len(stack.slices) > 1:
            keys.append(("N", "next slice with a structure (⇧ N the one before)"))
    if stack.greys:
        keys.append(("W", "next window (⇧ W the one before)"))
        keys.append(("drag", "window: across its width, up and down its centre"))
    return " ".join(f"<span><kbd>{escaped(key)}</kbd> {escaped(text)}</span>" for key, text in keys)


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


def _structures(structures: Sequence[Structure]) -> str:
    """Names, colours and details; the boxes work once the script runs."""
    if not structures:
        return ""
    items = "".join(
        f'<li><label class="structure"><input type="checkbox" checked disabled data-structure="{number}">'
        f'<span class="swatch" style="background:rgb({",".join(str(int(n)) for n in structure.colour)})"></span>'
        f'<span class="name">{escaped(structure.name)}</span><span class="detail">{escaped(structure.detail)}</span>'
        "</label></li>"
        for number, structure in enumerate(structures)
    )
    return f'<ul class="structures" aria-label="Structures">{items}</ul>'


def _thumbnails(thumbnails: Sequence[Thumbnail], title: str) -> str:
    if not thumbnails:
        return ""
    buttons = "".join(
        f'<button type="button" class="thumb" data-place="{int(thumb.place)}">'
        f"{_shown_at_once(image(thumb.picture, ''), '')}"
        f"<strong>{escaped(thumb.label)}</strong><span>{escaped(thumb.detail)}</span></button>"
        for thumb in thumbnails
    )
    return f'<div class="best"><h3>{escaped(title)}</h3><div class="thumbs">{buttons}</div></div>'


_STYLE = """
.viewer{--mark:#c2410c;display:grid;grid-template-columns:minmax(0,38rem) minmax(16rem,1fr);gap:1.2rem 2rem;
align-items:start;margin:1rem 0}
@media (prefers-color-scheme:dark){.viewer{--mark:#ffb86b}}
.viewer [hidden]{display:none!important}
.viewer>.strip,.viewer>.best{grid-column:1/-1;margin:0;min-width:0}
.viewer .stage{user-select:none;-webkit-user-select:none}
.viewer .plane{margin:0}
.viewer .stack{position:relative;background:#000;border-radius:6px;overflow:hidden;width:100%}
.viewer .stack img,.viewer .stack canvas{position:absolute;inset:0;width:100%;height:100%;max-width:none;
border-radius:0}
.viewer .layer{background:none;opacity:.7;pointer-events:none}
.viewer .structure-layer{background:none;pointer-events:none;image-rendering:pixelated}
.viewer .side,.viewer .corner{position:absolute;color:#f2d27a;font:600 .95rem/1 system-ui,sans-serif;
text-shadow:0 0 3px #000,0 0 3px #000;pointer-events:none}
.viewer .corner{bottom:.5rem;font-size:.8rem;font-weight:500;color:#e6e9ee;font-variant-numeric:tabular-nums;
white-space:nowrap}
.viewer .probe{left:.6rem}
.viewer .windowed{right:.6rem}
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
.viewer .choice span,.viewer .presets button{display:block;padding:.2rem .7rem;border:1px solid var(--line);
border-radius:1rem;cursor:pointer;font-size:.85rem}
.viewer .choice input:checked+span,.viewer .presets [aria-pressed=true]{background:var(--accent);
border-color:var(--accent);color:var(--bg)}
.viewer .choice input:focus-visible+span{outline:3px solid var(--accent);outline-offset:2px}
.viewer .presets{display:flex;flex-wrap:wrap;gap:.3rem;margin:0 0 .9rem}
.viewer .keys{color:var(--soft);font-size:.82rem;margin:.2rem 0 1rem;display:flex;flex-wrap:wrap;gap:.25rem .9rem;
align-items:center}
.viewer kbd{font:inherit;font-weight:600;color:var(--fg);border:1px solid var(--line);border-radius:4px;padding:0 .3rem;
background:var(--panel)}
.viewer button{font:inherit;color:inherit;background:var(--panel);border:1px solid var(--line);border-radius:6px;
cursor:pointer}
.viewer .keys button{padding:.05rem .6rem;font-size:.82rem}
.viewer .legend{display:grid;grid-template-columns:auto 1fr auto;gap:.6rem;align-items:center;font-size:.85rem;
color:var(--soft);font-variant-numeric:tabular-nums}
.viewer .legend .bar{background:#3c3c3c;border-radius:4px;overflow:hidden}
.viewer .legend img{width:100%;height:.9rem;background:none;border-radius:0}
.viewer .structures{list-style:none;margin:0 0 1rem;padding:0;font-size:.9rem;max-height:24rem;overflow-y:auto}
.viewer .structure{display:grid;grid-template-columns:auto auto 1fr auto;gap:.55rem;align-items:center;
padding:.25rem 0;border-bottom:1px solid var(--line);cursor:pointer}
.viewer .structure input{margin:0;accent-color:var(--accent)}
.viewer .structure .swatch{width:.9rem;height:.9rem;border-radius:3px;box-shadow:0 0 0 1px var(--line)}
.viewer .structure .name{overflow-wrap:anywhere}
.viewer .structure .detail{color:var(--soft);font-variant-numeric:tabular-nums;white-space:nowrap}
.viewer h3{font-size:1rem;margin:0 0 .5rem}
.viewer .thumbs{display:grid;grid-template-columns:repeat(auto-fill,minmax(7.4rem,10rem));gap:.6rem}
.viewer .thumb{display:flex;flex-direction:column;padding:.3rem;text-align:left;font-size:.8rem;line-height:1.35}
.viewer .thumb img{width:100%;margin-bottom:.25rem}
.viewer .thumb span{color:var(--soft)}
.viewer .thumb[aria-current=true]{border-color:var(--accent);box-shadow:0 0 0 1px var(--accent)}
@media (max-width:52rem){.viewer{grid-template-columns:minmax(0,1fr)}
.viewer .thumbs{display:flex;overflow-x:auto;padding:.15rem}.viewer .thumb{flex:0 0 7.2rem}}
@media print{.viewer .controls{display:none}}
""".replace("\n", "")

_SCRIPT = """
(function(){
'use strict';
function byId(id){return document.getElementById(id);}
function list(found){return Array.prototype.slice.call(found);}
function all(selector){return list(document.querySelectorAll(selector));}
function make(tag,name){var made=document.createElement(tag);made.className=name;return made;}
var planes=all('.viewer .plane'),thumbs=all('.viewer .thumb'),layers=all('.viewer .layer'),bases=all('.viewer .base');
var stage=byId('stage'),slice=byId('slice'),opacity=byId('opacity'),strip=byId('strip'),mark=byId('strip-mark');
var brightness=byId('brightness'),contrast=byId('contrast'),centre=byId('centre'),width=byId('width');
var covers=all('.viewer .structure-layer'),boxes=all('.viewer .structure input'),cover=byId('cover');
var first=0,last=planes.length-1,here,sequence=0,wheel=0,hidden=false,bare=false;
planes.forEach(function(plane,i){if(!plane.hidden){first=i;}});
here=first;
function say(id,text){byId(id+'-value').textContent=text;}
function within(value,low,high){return Math.max(low,Math.min(high,value));}

function show(place){
here=within(place,0,last);
planes.forEach(function(plane,i){plane.hidden=i!==here;});
thumbs.forEach(function(thumb){thumb.setAttribute('aria-current',String(Number(thumb.dataset.place)===here));});
if(slice){
var text=planes[here].querySelector('figcaption').textContent;
slice.value=here;slice.setAttribute('aria-valuetext',text);say('slice',text);
}
if(strip){
var at=100*(Number(planes[here].dataset.index)+0.5)/Number(strip.dataset.count)+'%';
mark.setAttribute('x1',at);mark.setAttribute('x2',at);mark.setAttribute('visibility','visible');
}
draw();
}
function nearest(index){
var best=0;
planes.forEach(function(plane,i){
if(Math.abs(plane.dataset.index-index)<Math.abs(planes[best].dataset.index-index)){best=i;}
});
return best;
}
function fade(){
if(!opacity){return;}
layers.forEach(function(layer){layer.style.opacity=hidden?0:opacity.value/100;});
say('opacity',hidden?'off':opacity.value+' %');
}
function seen(layer){return boxes[Number(layer.dataset.structure)].checked;}
function paint(){
if(!cover){return;}
covers.forEach(function(layer){layer.style.opacity=bare||!seen(layer)?0:cover.value/100;});
say('cover',bare?'off':cover.value+' %');
}
function filled(step){
var place=here+step;
while(place>=0&&place<=last){
if(list(planes[place].querySelectorAll('.structure-layer')).some(seen)){return place;}
place+=step;
}
return here;
}
function light(){
var filter='brightness('+brightness.value/100+') contrast('+contrast.value/100+')';
bases.forEach(function(base){base.style.filter=filter;});
say('brightness',brightness.value+' %');say('contrast',contrast.value+' %');
}
function choose(number){
sequence=number;
planes.forEach(function(plane){
list(plane.querySelectorAll('.base')).forEach(function(base,i){base.hidden=measured||i!==number;});
});
if(measured){settle();}
}

var greys=stage.dataset.greys?JSON.parse(stage.dataset.greys):null,measured=false;
var canvas,brush,picture,probe,windowed,table,pressed=null,opened={},states=[];
function unpack(text){
var bytes=Uint8Array.from(atob(text),function(letter){return letter.charCodeAt(0);});
var stream=new Blob([bytes]).stream().pipeThrough(new DecompressionStream('deflate'));
return new Response(stream).arrayBuffer().then(function(buffer){
var w=greys.width,n=w*greys.height,b=new Uint8Array(buffer),level=new Uint16Array(n),i,left,above,corner,guess,d;
if(b.length!==3*n){throw new Error('grey values of another size');}
for(i=0;i<n;i++){
left=i%w?level[i-1]:0;above=i>=w?level[i-w]:0;
if(i<w){guess=left;}else if(i%w===0){guess=above;}else{
corner=level[i-w-1];
guess=corner>=Math.max(left,above)?Math.min(left,above):
corner<=Math.min(left,above)?Math.max(left,above):left+above-corner;
}
d=(b[i]<<16)|(b[n+i]<<8)|b[2*n+i];
level[i]=guess+(d&1?-(d+1)/2:d/2);
}
return level;
});
}
function values(place,number){
var key=place+' '+number;
if(!opened[key]){opened[key]=unpack(planes[place].dataset.values.split(' ')[number]);}
return opened[key];
}
function plain(){
if(!measured){return;}
measured=false;
[canvas,probe,windowed].forEach(function(part){part.remove();});
byId('windowing').hidden=true;byId('light').hidden=false;
choose(sequence);
}
function draw(){
if(!measured){return;}
var place=here,number=sequence;
values(place,number).then(function(level){
if(!measured||place!==here||number!==sequence){return;}
var pixels=picture.data,i,grey;
for(i=0;i<level.length;i++){grey=table[level[i]];pixels[4*i]=grey;pixels[4*i+1]=grey;pixels[4*i+2]=grey;
pixels[4*i+3]=255;}
brush.putImageData(picture,0,0);
var stack=planes[here].querySelector('.stack');
stack.insertBefore(canvas,stack.firstChild);stack.appendChild(probe);stack.appendChild(windowed);
canvas.dataset.place=place;
[here-1,here+1].forEach(function(next){if(next>=0&&next<=last){values(next,number).catch(plain);}});
}).catch(plain);
}
function state(){return states[sequence];}
function rounded(value){
var step=greys.sequences[sequence].step;
return String(step>=1?Math.round(value):Number(value.toPrecision(4)));
}
function lookup(){
var facts=greys.sequences[sequence],now=state(),low=now.centre-now.width/2,i;
table=new Uint8ClampedArray(facts.last+1);
for(i=0;i<=facts.last;i++){table[i]=255*(facts.offset+facts.step*i-low)/now.width;}
}
function settle(){
var facts=greys.sequences[sequence],now=state(),unit=facts.unit?' '+facts.unit:'';
var span=Math.max(facts.last*facts.step,facts.step);
centre.min=facts.offset;centre.max=facts.offset+span;centre.step=facts.step;
centre.value=now.centre;
width.value=Math.round(1000*Math.log(now.width/facts.step)/Math.max(Math.log(2*span/facts.step),1e-9));
say('centre',rounded(now.centre)+unit);say('width',rounded(now.width)+unit);
windowed.textContent='C '+rounded(now.centre)+' W '+rounded(now.width);
var box=byId('presets');
if(box.dataset.sequence!==String(sequence)){
box.dataset.sequence=sequence;box.textContent='';
facts.windows.forEach(function(preset,i){
var button=make('button','');button.type='button';button.textContent=preset[0];
button.title='centre '+rounded(preset[1])+', width '+rounded(preset[2])+unit;
button.addEventListener('click',function(){take(i);});
box.appendChild(button);
});
}
list(box.children).forEach(function(button,i){
var preset=facts.windows[i];
button.setAttribute('aria-pressed',String(preset[1]===now.centre&&preset[2]===now.width));
});
lookup();draw();
}
function take(number){
var presets=greys.sequences[sequence].windows,i=(number+presets.length)%presets.length;
states[sequence]={preset:i,centre:presets[i][1],width:presets[i][2]};
settle();
}
function widen(middle,span){
var facts=greys.sequences[sequence],whole=Math.max(facts.last*facts.step,facts.step);
states[sequence]={preset:state().preset,centre:within(middle,facts.offset,facts.offset+whole),
width:within(span,facts.step,2*whole)};
settle();
}
function look(event){
var box=canvas.getBoundingClientRect(),place=here,number=sequence;
var x=Math.floor((event.clientX-box.left)/box.width*greys.width);
var y=Math.floor((event.clientY-box.top)/box.height*greys.height);
if(x<0||y<0||x>=greys.width||y>=greys.height){probe.textContent='';return;}
values(place,number).then(function(level){
var facts=greys.sequences[number];
probe.textContent=rounded(facts.offset+facts.step*level[y*greys.width+x])+(facts.unit?' '+facts.unit:'');
}).catch(plain);
}
function start(){
canvas=make('canvas','measured');canvas.width=greys.width;canvas.height=greys.height;
canvas.setAttribute('aria-hidden','true');
brush=canvas.getContext('2d');picture=brush.createImageData(greys.width,greys.height);
probe=make('span','corner probe');windowed=make('span','corner windowed');
greys.sequences.forEach(function(facts){
states.push({preset:0,centre:facts.windows[0][1],width:facts.windows[0][2]});
});
values(here,sequence).then(function(){
measured=true;
byId('windowing').hidden=false;byId('light').hidden=true;
choose(sequence);
}).catch(function(){byId('windowing').hidden=true;});
centre.addEventListener('input',function(){widen(Number(centre.value),state().width);});
width.addEventListener('input',function(){
var facts=greys.sequences[sequence],most=2*Math.max(facts.last*facts.step,facts.step);
var span=facts.step*Math.exp(width.value/1000*Math.log(most/facts.step));
widen(state().centre,facts.step>=1?Math.round(span):span);
});
stage.addEventListener('pointerdown',function(event){
if(!measured||event.pointerType==='touch'){return;}
pressed={x:event.clientX,y:event.clientY,centre:state().centre,width:state().width};
stage.setPointerCapture(event.pointerId);
});
stage.addEventListener('pointermove',function(event){
if(!measured){return;}
if(pressed){
var pace=Math.max(pressed.width,8*greys.sequences[sequence].step)/250;
if(Math.abs(event.clientX-pressed.x)+Math.abs(event.clientY-pressed.y)>2){
widen(pressed.centre+(event.clientY-pressed.y)*pace,pressed.width+(event.clientX-pressed.x)*pace);
}
}
look(event);
});
['pointerup','pointercancel'].forEach(function(name){stage.addEventListener(name,function(){pressed=null;});});
stage.addEventListener('pointerleave',function(){if(measured){probe.textContent='';}});
stage.addEventListener('contextmenu',function(event){if(measured){event.preventDefault();}});
}

if(slice){slice.addEventListener('input',function(){show(Number(slice.value));});}
if(opacity){opacity.addEventListener('input',function(){hidden=false;fade();});}
if(cover){cover.addEventListener('input',function(){bare=false;paint();});}
boxes.forEach(function(box){box.disabled=false;box.addEventListener('change',function(){bare=false;paint();});});
[brightness,contrast].forEach(function(input){input.addEventListener('input',light);});
all('.viewer input[name=sequence]').forEach(function(input){
input.addEventListener('change',function(){choose(Number(input.value));});
});
function bring(){
var box=stage.getBoundingClientRect();
var calm=window.matchMedia&&window.matchMedia('(prefers-reduced-motion:reduce)').matches;
if(box.top<0||box.bottom>window.innerHeight){
stage.scrollIntoView({block:'nearest',behavior:calm?'auto':'smooth'});
}
}
thumbs.forEach(function(thumb){
thumb.addEventListener('click',function(){show(Number(thumb.dataset.place));bring();});
});
if(strip){strip.addEventListener('click',function(event){
var box=strip.getBoundingClientRect();
show(nearest(Math.floor((event.clientX-box.left)/box.width*Number(strip.dataset.count))));
});}
byId('reset').addEventListener('click',function(){
[opacity,cover,brightness,contrast].forEach(function(input){if(input){input.value=input.defaultValue;}});
boxes.forEach(function(box){box.checked=true;});
hidden=false;bare=false;show(first);fade();paint();light();
if(measured){take(0);}
});
document.addEventListener('keydown',function(event){
if(event.target!==document.body&&event.target!==stage||event.ctrlKey||event.altKey||event.metaKey){return;}
var onStage=event.target===stage,moves={ArrowLeft:here-1,ArrowRight:here+1};
if(onStage){moves.ArrowUp=here+1;moves.ArrowDown=here-1;moves.Home=0;moves.End=last;
moves.PageUp=here+5;moves.PageDown=here-5;}
if(event.key in moves){show(moves[event.key]);event.preventDefault();}
if((event.key==='h'||event.key==='H')&&opacity){hidden=!hidden;fade();}
if((event.key==='['||event.key===']')&&opacity){
opacity.value=Number(opacity.value)+(event.key===']'?10:-10);hidden=false;fade();
}
if(cover){
if(event.key==='s'||event.key==='S'){bare=!bare;paint();}
if(event.key===','||event.key==='.'){cover.value=Number(cover.value)+(event.key==='.'?10:-10);bare=false;paint();}
if(event.key==='n'||event.key==='N'){show(filled(event.key==='n'?1:-1));}
var box=boxes.length>1&&event.key>='1'&&event.key<='9'?boxes[Number(event.key)-1]:null;
if(box){box.checked=!box.checked;bare=false;paint();}
}
if((event.key==='w'||event.key==='W')&&measured){take(state().preset+(event.key==='w'?1:-1));}
});
stage.addEventListener('wheel',function(event){
if(document.activeElement!==stage||last===0){return;}
event.preventDefault();wheel+=event.deltaY;
if(Math.abs(wheel)>=40){show(here+(wheel>0?1:-1));wheel=0;}
},{passive:false});
byId('controls').hidden=false;
choose(0);show(first);fade();paint();light();
if(greys&&window.DecompressionStream){start();}
})();
"""
