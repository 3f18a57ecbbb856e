"""Edits to look at: one HTML file in which a person chooses image and direction and turns strength.

The page needs nothing else: pictures are written into it as PNG, no request leaves it, and a
content policy admits no script but its own. It opens from a disk as well as from a server.
"""

import base64
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lowdim_diffusion import __version__
from lowdim_diffusion._checks import fail
from lowdim_diffusion._files import write_atomic
from lowdim_diffusion._types import ArrayLike
from lowdim_diffusion.editing.masks import check_mask
from lowdim_diffusion.reporting.figures import _data_units, _edges
from lowdim_diffusion.reporting.images import as_pictures
from lowdim_diffusion.reporting.report import _CSS, _data_uri, _text

__all__ = ["write_edit_page"]

_WIDEST = 16_384  # pixels across that every browser draws
_SCALES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0)  # of the difference map

_OWN_CSS = """
:root { --low: #15599b; --mid: #f3f4f6; --high: #c24e08; --size: #6d3fa8; }
@media (prefers-color-scheme: dark) { :root { --low: #62b0ff; --mid: #1c222b; --high: #ff9446;
  --size: #c49bff; } }
[hidden] { display: none !important; }
.layout { display: grid; gap: 1.5rem 2.5rem; margin-top: 1.75rem;
  grid-template-columns: minmax(0, 15.5rem) minmax(0, 1fr); }
.choose { display: grid; gap: 1.25rem; align-content: start; min-width: 0; }
fieldset { border: 0; margin: 0; padding: 0; min-width: 0; }
legend { padding: 0; margin-bottom: .35rem; font-size: .875rem; color: var(--soft); }
.picks { display: grid; gap: .5rem .6rem; max-height: 20rem; overflow: auto; padding: 5px;
  margin: 0 -5px; scrollbar-width: thin;
  grid-template-columns: repeat(auto-fill, minmax(4.4rem, 1fr)); }
.picks label { position: relative; display: block; min-width: 0; font-size: .8rem;
  line-height: 1.3; color: var(--soft); }
.picks input { position: absolute; inset: 0; width: 100%; height: 100%; margin: 0; opacity: 0;
  cursor: pointer; }
.picks img { display: block; width: 100%; object-fit: cover; object-position: 100% 0;
  image-rendering: pixelated; border-radius: 3px; background: var(--panel); }
.picks span { display: block; padding-top: .25rem; overflow-wrap: anywhere; }
.picks input:checked ~ img { box-shadow: 0 0 0 3px var(--accent); }
.picks input:checked ~ span { color: var(--ink); }
.picks input:focus-visible ~ img { outline: 3px solid var(--ink); outline-offset: 2px; }
.stage { display: grid; gap: 1rem .9rem; align-content: start; align-items: start; min-width: 0;
  grid-template-columns: repeat(3, minmax(0, 1fr)); grid-template-areas: "head head head"
    "before after change" "dial dial dial" "key key key" "numbers numbers numbers"; }
.stage > * { min-width: 0; }
.stage h2 { overflow-wrap: anywhere; }
.head { grid-area: head; }
.head p { font-size: .925rem; padding-top: .3rem; }
#before { grid-area: before; }
#after { grid-area: after; }
#change { grid-area: change; }
.frame { position: relative; }
.frame canvas { display: block; width: 100%; height: auto; image-rendering: pixelated;
  border-radius: 3px; }
.frame svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible;
  pointer-events: none; }
.frame path { fill: none; vector-effect: non-scaling-stroke; stroke: #000; stroke-width: 3;
  stroke-opacity: .55; }
.frame path + path { stroke: #ffd43b; stroke-width: 1.5; stroke-opacity: 1; }
.plain .frame svg { display: none; }
.key { grid-area: key; display: flex; flex-wrap: wrap; gap: .4rem 1.75rem; align-items: center;
  font-size: .875rem; }
.key label { display: flex; gap: .5rem; align-items: center; min-height: 2.2rem; }
#numbers { grid-area: numbers; }
.ramp { padding-top: .4rem; }
.ramp div { display: flex; justify-content: space-between; gap: .3rem; line-height: 1.4;
  font-variant-numeric: tabular-nums; font-size: .8rem; color: var(--soft); }
.ramp div:first-child { height: .7rem; border-radius: 3px; border: 1px solid var(--line);
  background: linear-gradient(to right, var(--low), var(--mid), var(--high)); }
.absolute .ramp div:first-child {
  background: linear-gradient(to right, var(--mid), var(--size)); }
.dial { grid-area: dial; display: grid; gap: .4rem .9rem; align-items: start;
  grid-template-columns: auto minmax(0, 1fr) 4.2rem auto; }
button, select { font: inherit; font-size: .9rem; color: var(--ink); background: var(--panel);
  border: 1px solid var(--line); border-radius: 6px; padding: .3rem .8rem; min-height: 2.2rem;
  cursor: pointer; }
button:hover, select:hover { border-color: var(--accent); }
#play { min-width: 4.6rem; }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
input[type=checkbox] { width: 1.1rem; height: 1.1rem; margin: 0; accent-color: var(--accent); }
input[type=range] { appearance: none; -webkit-appearance: none; display: block; width: 100%;
  height: 2.2rem; margin: 0; background: none; cursor: pointer; border-radius: 6px; }
input[type=range]::-webkit-slider-runnable-track { height: 6px; border-radius: 3px;
  background: var(--line); }
input[type=range]::-moz-range-track { height: 6px; border-radius: 3px; background: var(--line); }
input[type=range]::-webkit-slider-thumb { appearance: none; -webkit-appearance: none;
  width: 22px; height: 22px; margin-top: -8px; border-radius: 50%; border: 3px solid var(--page);
  background: var(--accent); box-shadow: 0 0 0 1px var(--line); }
input[type=range]::-moz-range-thumb { width: 16px; height: 16px; border-radius: 50%;
  border: 3px solid var(--page); background: var(--accent); box-shadow: 0 0 0 1px var(--line); }
.ticks { position: relative; height: 1.6rem; margin: -.35rem 11px 0; font-size: .8rem;
  color: var(--soft); font-variant-numeric: tabular-nums; }
.ticks i { position: absolute; top: 0; width: 1px; height: 6px; background: var(--soft); }
.ticks b { position: absolute; top: 6px; transform: translateX(-50%); font-weight: 400; }
output { font-size: 1.1rem; font-weight: 600; line-height: 2.2rem; text-align: right;
  font-variant-numeric: tabular-nums; }
#how { grid-column: 1 / -1; font-size: .875rem; color: var(--soft); }
@media (max-width: 760px) {
  .layout { grid-template-columns: minmax(0, 1fr); gap: 1.25rem; margin-top: 1.1rem; }
  .choose { gap: .6rem; }
  .picks { display: flex; max-height: none; overflow-x: auto; }
  .picks label { flex: 0 0 4.4rem; }
  .picks span { max-height: 2.8em; overflow: hidden; }
  .stage { grid-template-columns: repeat(2, minmax(0, 1fr)); grid-template-areas: "head head"
    "before after" "dial dial" "change key" "numbers numbers"; }
  .key { flex-direction: column; align-items: start; flex-wrap: nowrap; }
  #how { min-height: 2.9em; }
  .dial { grid-template-columns: auto minmax(0, 1fr) auto; }
  .track { grid-column: 1 / -1; grid-row: 1; }
}
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; base-uri 'none'; \
form-action 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'">
<title>{title}</title>
<style>{css}</style>
</head>
<body>
<main>
<header>
<h1>{title}</h1>
{subtitle}
</header>
<noscript><p>This page shows its pictures with JavaScript, which is switched off.</p></noscript>
<div class="layout">
<div class="choose">
<fieldset><legend>Image</legend><div class="picks" id="images"></div></fieldset>
<fieldset><legend>Direction, at its largest strength</legend>
<div class="picks" id="directions"></div></fieldset>
</div>
<div class="stage" id="stage">
<div class="head">
<h2 id="now"></h2>
<p class="note" id="caption"></p>
</div>
<figure id="before"><div class="frame"><canvas id="original" role="img"></canvas>{outline}</div>
<figcaption>Original</figcaption></figure>
<figure id="after"><div class="frame"><canvas id="edited" role="img"></canvas>{outline}</div>
<figcaption>Edited</figcaption></figure>
<div class="dial">
<button type="button" id="play">Play</button>
<div class="track"><input type="range" id="strength" step="any" autocomplete="off" \
aria-label="Strength of the edit"><div class="ticks" id="ticks" aria-hidden="true"></div></div>
<output id="reading" for="strength"></output>
<button type="button" id="zero">Back to 0</button>
<p id="how"></p>
</div>
<figure id="change"><div class="frame"><canvas id="difference" role="img"></canvas>\
{outline}</div>
<figcaption>Edited minus original</figcaption>
<div class="ramp"><div></div><div><span id="low"></span><span id="middle"></span>\
<span id="high"></span></div></div></figure>
<div class="key">
<label><input type="checkbox" id="absolute" autocomplete="off"> size only</label>
<label>amplify <select id="gain" autocomplete="off"></select></label>
<label id="outline-label"><input type="checkbox" id="outline" autocomplete="off" checked> \
mask outline</label>
</div>
<dl class="cards" id="numbers"></dl>
</div>
</div>
<footer>{footer}</footer>
</main>
<script type="application/json" id="data">{data}</script>
<script>{script}</script>
</body>
</html>
"""

_OUTLINE = '<svg preserveAspectRatio="none" aria-hidden="true"><path></path><path></path></svg>'

_SCRIPT = r"""
"use strict";
(() => {
const data = JSON.parse(document.getElementById("data").textContent);
const [height, width] = data.size;
const strengths = data.strengths;
const low = strengths[0], high = strengths[strengths.length - 1], range = high - low;
const state = { image: 0, direction: 0, strength: high, absolute: false, gain: 1, outline: true };
const at = (id) => document.getElementById(id);
const slider = at("strength");
let original = null, frames = null;

const make = (tag, text) => {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  return element;
};
const trim = (x, digits) => String(Number(x.toPrecision(digits)));
const signed = (x, text) => (x > 0 ? "+" : x < 0 ? "\u2212" : "") + (text || trim(Math.abs(x), 3));
const number = (x) => x === null || !Number.isFinite(x) ? "\u2013"
  : x !== 0 && Math.abs(x) < 0.001 ? x.toExponential(1) : String(Number(x.toPrecision(3)));

/* Where the present strength lies: between frames k and k + 1, a share w of the way. */
function place() {
  let k = 0;
  while (k < strengths.length - 2 && strengths[k + 1] <= state.strength) k += 1;
  return [k, (state.strength - strengths[k]) / (strengths[k + 1] - strengths[k])];
}

function snap(value, tolerance) {
  const clipped = Math.min(Math.max(value, low), high);
  const near = strengths.find((s) => Math.abs(s - clipped) <= tolerance * range);
  return near === undefined ? clipped : near;
}

/* Pixels of a row of pictures, one array per picture. */
const decoded = new Map();
async function pixels(uri, count) {
  if (!decoded.has(uri)) {
    const image = new Image();
    image.src = uri;
    await image.decode();
    const canvas = make("canvas");
    canvas.width = width * count;
    canvas.height = height;
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(image, 0, 0);
    const found = [];
    for (let i = 0; i < count; i += 1) {
      found.push(context.getImageData(i * width, 0, width, height).data);
    }
    if (decoded.size > 60) decoded.delete(decoded.keys().next().value);
    decoded.set(uri, found);
  }
  return decoded.get(uri);
}

/* ---- controls ---- */

function picker(box, name, texts) {
  return texts.map((text, i) => {
    const label = make("label"), input = make("input"), image = make("img");
    input.type = "radio";
    input.name = name;
    input.value = String(i);
    input.autocomplete = "off";
    input.addEventListener("change", () => choose({ [name]: i }));
    image.alt = "";
    image.style.aspectRatio = `${width} / ${height}`;
    label.append(input, image, make("span", text));
    box.append(label);
    return { input, image, label, box };
  });
}
const images = picker(at("images"), "image", data.labels);
const directions = picker(at("directions"), "direction", data.directions);
images.forEach((item, i) => { item.image.src = data.originals[i]; });

function mark(items, chosen) {
  items.forEach((item, i) => { item.input.checked = i === chosen; });
  const { label, box } = items[chosen];
  for (const [start, size, scroll, view] of [["offsetLeft", "offsetWidth", "scrollLeft",
    "clientWidth"], ["offsetTop", "offsetHeight", "scrollTop", "clientHeight"]]) {
    const first = label[start] - box[start];
    if (first < box[scroll]) box[scroll] = first - 8;
    const end = first + label[size] - box[view];
    if (end > box[scroll]) box[scroll] = end + 8;
  }
}

slider.min = low;
slider.max = high;
for (const s of strengths) {
  const tick = make("i");
  tick.style.left = `${100 * (s - low) / range}%`;
  at("ticks").append(tick);
}
for (const s of new Set([low, 0, high])) {
  const near = s === 0 && Math.min(-low, high) < 0.08 * range && low !== 0 && high !== 0;
  if (near) continue;
  const text = make("b", signed(s));
  text.style.left = `${100 * (s - low) / range}%`;
  at("ticks").append(text);
}
for (const gain of [1, 2, 4, 8, 16]) {
  const option = make("option", `\u00d7${gain}`);
  option.value = String(gain);
  at("gain").append(option);
}

slider.addEventListener("input", () => {
  pause();
  choose({ strength: snap(Number(slider.value), 0.01) });
});
slider.addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 }[event.key];
  const jump = { PageUp: 1, PageDown: -1 }[event.key];
  if (step === undefined && jump === undefined) return;
  event.preventDefault();
  pause();
  if (step !== undefined) {
    choose({ strength: snap(state.strength + step * 0.02 * range, 1e-6) });
  } else {
    const beyond = strengths.filter((s) => jump * (s - state.strength) > 1e-9 * range);
    const next = jump > 0 ? beyond[0] : beyond[beyond.length - 1];
    if (next !== undefined) choose({ strength: next });
  }
});
at("zero").addEventListener("click", () => { pause(); choose({ strength: 0 }); });
at("absolute").addEventListener("change", (e) => choose({ absolute: e.target.checked }));
at("gain").addEventListener("change", (e) => choose({ gain: Number(e.target.value) }));
at("outline").addEventListener("change", (e) => choose({ outline: e.target.checked }));

let request = 0, heading = 1, before = 0;
function sweep(now) {
  const next = state.strength + heading * range * Math.min(now - before, 100) / 2500;
  before = now;
  if (next >= high) heading = -1;
  if (next <= low) heading = 1;
  state.strength = Math.min(Math.max(next, low), high);
  draw();
  request = requestAnimationFrame(sweep);
}
function pause() {
  if (!request) return;
  cancelAnimationFrame(request);
  request = 0;
  at("play").textContent = "Play";
  remember();
}
at("play").addEventListener("click", () => {
  if (request) return pause();
  at("play").textContent = "Pause";
  if (state.strength >= high) heading = -1;
  before = performance.now();
  request = requestAnimationFrame(sweep);
});

/* ---- the address keeps the view ---- */

function address() {
  const parts = [`image=${state.image}`, `direction=${state.direction}`,
    `strength=${trim(state.strength, 6)}`];
  if (state.absolute) parts.push("difference=absolute");
  if (state.gain !== 1) parts.push(`gain=${state.gain}`);
  return `#${parts.join("&")}`;
}
let timer = 0;
function remember() {
  clearTimeout(timer);
  timer = setTimeout(() => { if (!request) history.replaceState(null, "", address()); }, 150);
}
function recall() {
  const given = new URLSearchParams(location.hash.slice(1));
  for (const [name, count] of [["image", images.length], ["direction", directions.length]]) {
    const i = Number(given.get(name) || NaN);
    if (Number.isInteger(i) && i >= 0 && i < count) state[name] = i;
  }
  const strength = Number(given.get("strength") || NaN);
  if (Number.isFinite(strength)) state.strength = snap(strength, 1e-6);
  if (given.has("difference")) state.absolute = given.get("difference") === "absolute";
  if ([1, 2, 4, 8, 16].includes(Number(given.get("gain")))) state.gain = Number(given.get("gain"));
}

/* ---- drawing ---- */

function choose(change) {
  Object.assign(state, change);
  show();
  remember();
}

let ticket = 0;
async function show() {
  const mine = ++ticket;
  mark(images, state.image);
  mark(directions, state.direction);
  at("absolute").checked = state.absolute;
  at("gain").value = String(state.gain);
  at("stage").classList.toggle("plain", !state.outline);
  at("stage").classList.toggle("absolute", state.absolute);
  const strips = data.strips[state.image];
  directions.forEach((item, i) => {
    if (item.image.src !== strips[i]) item.image.src = strips[i];
  });
  const [first, rest] = await Promise.all([pixels(data.originals[state.image], 1),
    pixels(strips[state.direction], strengths.length)]);
  if (mine !== ticket) return;
  original = first[0];
  frames = rest;
  draw();
}

function color(name) {
  const text = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  return [1, 3, 5].map((i) => parseInt(text.slice(i, i + 2), 16));
}

function paint(id, bytes) {
  const canvas = at(id);
  if (canvas.width !== width || canvas.height !== height) {
    canvas.width = width;
    canvas.height = height;
  }
  canvas.getContext("2d").putImageData(new ImageData(bytes, width, height), 0, 0);
}

function outlines() {
  if (!data.outlines) return;
  const path = data.outlines[Math.min(state.image, data.outlines.length - 1)];
  for (const part of document.querySelectorAll(".frame path")) part.setAttribute("d", path);
}
for (const svg of document.querySelectorAll(".frame svg")) {
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
}

/* Root mean square change of the blend of two frames, from their squares and product. */
function change(side, k, w) {
  const { square, cross } = side;
  const a = square[state.image][state.direction], b = cross[state.image][state.direction];
  if (w === 0) return a[k] === null ? null : Math.sqrt(a[k]);
  if (w === 1) return a[k + 1] === null ? null : Math.sqrt(a[k + 1]);
  if (a[k] === null || a[k + 1] === null) return null;
  const total = (1 - w) * (1 - w) * a[k] + 2 * w * (1 - w) * b[k] + w * w * a[k + 1];
  return Math.sqrt(Math.max(total, 0));
}

function numbers(k, w) {
  const rows = [];
  if (data.inside) {
    const inside = change(data.inside, k, w);
    rows.push(["change inside the mask", number(inside)]);
    if (data.outside) {
      const outside = change(data.outside, k, w);
      rows.push(["change outside", number(outside)]);
      rows.push(["inside / outside", outside ? number(inside / outside) : "\u2013"]);
    }
  } else {
    rows.push(["change", number(change(data.whole, k, w))]);
  }
  for (const [name, values] of data.metrics) {
    const v = values[state.image][state.direction];
    const blend = w === 0 || v.length === 1 ? v[v.length === 1 ? 0 : k] : w === 1 ? v[k + 1]
      : v[k] === null || v[k + 1] === null ? null : (1 - w) * v[k] + w * v[k + 1];
    rows.push([name, number(blend)]);
  }
  const box = at("numbers");
  if (box.children.length !== rows.length) {
    box.replaceChildren(...rows.map(([name]) => {
      const item = make("div");
      item.append(make("dt", name), make("dd"));
      return item;
    }));
  }
  rows.forEach(([, value], i) => { box.children[i].lastChild.textContent = value; });
}

function draw() {
  if (!frames) return;
  const [k, w] = place();
  const a = frames[k], b = frames[k + 1], size = a.length;
  const edited = new Uint8ClampedArray(size), map = new Uint8ClampedArray(size);
  const scale = data.scale / state.gain;
  const middle = color("--mid");
  const ends = state.absolute ? [color("--size"), color("--size")]
    : [color("--low"), color("--high")];
  for (let i = 0; i < size; i += 4) {
    let most = 0;
    for (let c = i; c < i + 3; c += 1) {
      edited[c] = a[c] + w * (b[c] - a[c]);
      const difference = (edited[c] - original[c]) / 127.5;
      if (Math.abs(difference) > Math.abs(most)) most = difference;
    }
    const share = Math.min(Math.abs(most) / scale, 1), end = ends[most < 0 ? 0 : 1];
    for (let c = 0; c < 3; c += 1) map[i + c] = middle[c] + share * (end[c] - middle[c]);
    edited[i + 3] = map[i + 3] = 255;
  }
  paint("original", original);
  paint("edited", edited);
  paint("difference", map);
  outlines();

  const name = data.labels[state.image], way = data.directions[state.direction];
  const text = signed(state.strength);
  slider.value = String(state.strength);
  slider.setAttribute("aria-valuetext", text);
  at("reading").textContent = text;
  at("now").textContent = `${name}, ${way}`;
  const caption = data.captions ? data.captions[state.image][state.direction] : "";
  at("caption").textContent = caption;
  at("caption").hidden = !caption;
  const shown = w === 0 ? strengths[k] : w === 1 ? strengths[k + 1] : null;
  at("how").textContent = shown !== null ? `Computed at strength ${signed(shown)}.`
    : `Blend of the computed strengths ${signed(strengths[k])} and ${signed(strengths[k + 1])}, `
      + `${Math.round(100 * w)} % of the way.`;
  at("low").textContent = state.absolute ? "0" : signed(-scale);
  at("middle").textContent = state.absolute ? "size" : "0";
  at("high").textContent = state.absolute ? trim(scale, 3) : signed(scale);
  at("original").setAttribute("aria-label", `${name}, original`);
  at("edited").setAttribute("aria-label", `${name}, edited along ${way} at strength ${text}`);
  at("difference").setAttribute("aria-label", `edited minus original, scale ${trim(scale, 3)}`);
  numbers(k, w);
  document.body.dataset.shown = address();
}

at("outline-label").hidden = !data.outlines;
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
addEventListener("hashchange", () => { pause(); recall(); choose({}); });
recall();
choose({});
})();
"""


def write_edit_page(
    path: str | os.PathLike[str],
    *,
    originals: ArrayLike,
    edits: ArrayLike,
    strengths: ArrayLike,
    labels: Sequence[str] | None = None,
    directions: Sequence[str] | None = None,
    mask: ArrayLike | None = None,
    captions: Sequence[Sequence[str]] | None = None,
    metrics: Mapping[str, ArrayLike] | None = None,
    title: str = "Edits",
    subtitle: str = "",
) -> pathlib.Path:
    """Write a page for looking at edits of I images in D directions at S strengths.

    One chooses image and direction by pointer or arrow keys and turns the strength, or lets it
    sweep; the page shows original, edited picture and their difference with its scale, the mask's
    outline and the change inside and outside. A picture between two strengths is the linear blend
    of its neighbours, and the page says so. The address follows, as in
    ``edits.html#image=1&direction=2&strength=0.5`` (counted from 0 as in the arrays), so that a
    view can be sent as a link.

    Changes are root mean squares of ``edited - original`` in data units of [-1, 1], computed from
    the numbers given, not from 8-bit pictures; they equal
    :func:`lowdim_diffusion.editing.inside_outside_change` at each strength and for each blend. The
    map shows, where there are three channels, the one that changed most. The file holds about
    ``I D S h w c`` bytes before compression.

    Args:
        path: where to write; replaced whole. Folders are made.
        originals: ``[I, h, w, c]``, c = 1 or 3, or ``[I, h, w]``, floats in [-1, 1] (cut for
            display) or uint8, as :func:`lowdim_diffusion.reporting.as_pictures` takes them.
        edits: ``[I, D, S, h, w, c]`` or ``[I, D, S, h, w]``, likewise.
        strengths: ``[S]``, different, in any order. If 0 is not among them it is added, showing the
            original; give it to show the error of inversion and sampling without an edit.
        labels: a name per image; numbers if None.
        directions: a name per direction; numbers if None.
        mask: the edits' region: ``[h, w]``, ``[h, w, 1 or c]`` or one per image ``[I, h, w]``.
        captions: a text for each image and direction, ``[I][D]``.
        metrics: name to further numbers, ``[I, D]``, or ``[I, D, S]`` in the order of
            ``strengths``, which are blended like the pictures.
        title: heading.
        subtitle: one line under it.

    Returns:
        the path.

    Raises:
        ValueError: if shapes do not fit, strengths repeat or are not finite, or the mask is empty.

    Examples:
        >>> import tempfile
        >>> x = np.zeros((2, 8, 8, 1))
        >>> edits = x[:, None, None] + np.array([-1, 0.0, 1]).reshape(1, 1, 3, 1, 1, 1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     page = write_edit_page(
        ...         pathlib.Path(folder, "edits.html"),
        ...         originals=x, edits=edits, strengths=[-1, 0, 1], title="Brightness",
        ...     )
        ...     page.name
        'edits.html'
    """
    path = pathlib.Path(path)
    content = _content(originals, edits, strengths, mask, metrics or {})
    count, ways = len(content["originals"]), len(content["strips"][0])
    content["labels"] = _names("labels", labels, count, "image")
    content["directions"] = _names("directions", directions, ways, "direction")
    content["captions"] = None
    if captions is not None:
        texts = [list(map(str, row)) for row in captions]
        if len(texts) != count or any(len(row) != ways for row in texts):
            got = f"{len(texts)} rows of {sorted({len(row) for row in texts})}"
            raise fail("write_edit_page", "captions", f"{count} rows of {ways} texts", got)
        content["captions"] = texts
    # "<" is escaped so that no text can end the block; the policy admits this one script only.
    data = json.dumps(content, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    page = _PAGE.format(
        title=_text(title),
        subtitle=f'<p class="subtitle">{_text(subtitle)}</p>' if subtitle else "",
        css=_CSS + _OWN_CSS,
        digest=base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode("ascii"),
        footer=_text(f"Written by lowdim_diffusion {__version__}."),
        outline=_OUTLINE,
        data=data,
        script=_SCRIPT,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_atomic(path, page)


def _names(what: str, names: Sequence[str] | None, count: int, noun: str) -> list[str]:
    """One name each; numbers from 0, as in the arrays and in the page's address."""
    if names is None:
        return [f"{noun} {i}" for i in range(count)]
    if len(names) != count:
        raise fail("write_edit_page", f"number of {what}", f"{count}", len(names))
    return [str(name) for name in names]


def _content(
    originals: Any, edits: Any, strengths: Any, mask: Any, metrics: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything that the page shows, as what JSON can hold."""
    where = "write_edit_page"
    originals, edits = np.asarray(originals), np.asarray(edits)
    if originals.ndim not in (3, 4):
        raise fail(where, "shape of originals", "[I, h, w, 1 or 3] or [I, h, w]", originals.shape)
    base = _data_units(originals)
    before = as_pictures(base)
    shape = before.shape
    base = base.reshape(shape)
    edits = edits[..., None] if edits.ndim == 5 and originals.ndim == 3 else edits
    if edits.ndim != 6 or edits.shape[:1] + edits.shape[3:] != shape or 0 in edits.shape:
        expected = f"({shape[0]}, D, S, {', '.join(map(str, shape[1:]))})"
        raise fail(where, "shape of edits", expected, edits.shape)
    values = np.asarray(strengths, np.float64)
    if values.shape != edits.shape[2:3]:
        raise fail(where, "number of strengths", f"({edits.shape[2]},)", values.shape)
    if not np.isfinite(values).all() or len(np.unique(values)) != len(values):
        raise fail(where, "strengths", "different and finite", values.tolist())
    values[np.abs(values) < 1e-9 * np.abs(values).max()] = 0
    if not values.any():
        raise fail(where, "strengths", "one that is not 0", values.tolist())
    if shape[2] * (len(values) + 1) > _WIDEST:
        expected = f"S * width <= {_WIDEST}"
        raise fail(where, "too large", expected, shape[2] * len(values), "show fewer strengths")
    order = np.argsort(values)
    own_zero = bool((values == 0).any())
    slot = int(np.searchsorted(values[order], 0))  # where 0 goes if it is not there

    def sorted_(x: np.ndarray, at_zero: Any) -> np.ndarray:
        """Along the first axis, in the order of strengths, 0 among them."""
        x = x[order]
        return x if own_zero else np.insert(x, slot, at_zero, axis=0)

    inside, plain = (None, None) if mask is None else _regions(mask, shape)
    sides: dict[str, Any] = {"whole": np.ones(shape, bool)}
    if inside is not None:
        sides = {"inside": inside, "outside": ~inside}
    sides = {name: part for name, part in sides.items() if part.any()}
    squares = {name: ([], []) for name in sides}
    strips, largest = [], 0.0
    for i, example in enumerate(base):
        strips.append([])
        for square, cross in squares.values():
            square.append([])
            cross.append([])
        for d in range(edits.shape[1]):
            row = sorted_(_data_units(edits[i, d]), example)
            pictures = as_pictures(row)
            strips[i].append(_data_uri(np.concatenate(list(pictures), axis=1)))
            shown = np.abs(pictures.astype(np.float64) - before[i].astype(np.float64)[None])
            largest = max(largest, float(shown.max()) / 127.5)
            change = row - example[None]
            for name, part in sides.items():
                within = change[:, part[i]]
                size = max(within.shape[1], 1)
                squares[name][0][i].append(_plain((within**2).sum(1) / size))
                squares[name][1][i].append(_plain((within[1:] * within[:-1]).sum(1) / size))
    content: dict[str, Any] = {
        "size": list(shape[1:]),
        "strengths": sorted_(values, 0.0).tolist(),
        "originals": [_data_uri(picture) for picture in before],
        "strips": strips,
        "scale": next((s for s in _SCALES if s >= largest - 1e-9), 2.0),
        "outlines": None if plain is None else [_outline(part) for part in plain],
        "metrics": [],
    }
    for name, (square, cross) in squares.items():
        content[name] = {"square": square, "cross": cross}
    for name, numbers in metrics.items():
        numbers = np.asarray(numbers, np.float64)
        if numbers.shape not in (edits.shape[:2], edits.shape[:3]):
            expected = f"{edits.shape[:2]} or {edits.shape[:3]}"
            raise fail(where, f"shape of metric {name!r}", expected, numbers.shape)
        if numbers.ndim == 2:
            numbers = numbers[..., None]
        else:
            numbers = np.moveaxis(sorted_(np.moveaxis(numbers, 2, 0), math.nan), 0, 2)
        content["metrics"].append([str(name), [[_plain(v) for v in row] for row in numbers]])
    return content


def _plain(values: np.ndarray) -> list[float | None]:
    """Short numbers for JSON, which has no NaN."""
    return [float(f"{v:.7g}") if math.isfinite(v) else None for v in values.tolist()]


def _regions(mask: Any, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The mask per image, ``[I, h, w, c]``, and where it has any channel, one or I ``[h, w]``."""
    where, mask = "write_edit_page", np.asarray(mask)
    of_one = mask.ndim == 2 or (
        mask.shape[:2] == shape[1:3] and mask.shape[2:] in ((1,), shape[3:])
    )
    if of_one:
        parts = np.asarray(check_mask(where, mask, shape[1:]))[None]
    elif mask.shape == shape[:3]:
        parts = np.stack([np.asarray(check_mask(where, part, shape[1:])) for part in mask])
    else:
        expected = f"{shape[1:3]}, {shape[1:]} or {shape[:3]}"
        raise fail(where, "wrong shape of the mask", expected, mask.shape)
    return np.array(np.broadcast_to(parts, shape)), np.asarray(parts.any(-1))


def _outline(inside: np.ndarray) -> str:
    """The edge of a region along its pixels, as the path of an SVG."""
    steps = (
        f"M{x0} {y0}" + (f"h{x1 - x0}" if y0 == y1 else f"v{y1 - y0}")
        for (x0, y0), (x1, y1) in _edges(inside)
    )
    return "".join(steps)
