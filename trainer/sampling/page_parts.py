"""Style and script of the HTML page of a sheet. The script gets no text of the user's."""

from __future__ import annotations

STYLE = """
:root { --cell: 220px; color-scheme: light dark;
  --paper: #fff; --ink: #181a1e; --faint: #656c78; --line: #e3e5e9; --band: #f5f6f8;
  --accent: #3257d6; --wrong: #aa281e; --hole: #eceef1; }
@media (prefers-color-scheme: dark) { :root { --paper: #15171b; --ink: #e8eaee; --faint: #9aa2b0;
  --line: #2b2f37; --band: #1c1f25; --accent: #8aa5ff; --wrong: #ff8a7d; --hole: #23262d; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 14px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
header { padding: 22px 24px 12px; }
h1 { margin: 0 0 4px; font-size: 22px; font-weight: 650; letter-spacing: -.01em; }
.note { color: var(--faint); max-width: 110ch; margin: 0; overflow-wrap: anywhere; }
.note b { color: var(--ink); font-weight: 500; }
.bar { position: sticky; top: 0; left: 0; z-index: 5; display: flex; flex-wrap: wrap; gap: 8px 16px;
  align-items: center; padding: 8px 24px; background: var(--band);
  border-block: 1px solid var(--line); }
.bar label { display: inline-flex; gap: 6px; align-items: center; color: var(--faint); }
.bar button, .bar select { font: inherit; color: var(--ink); background: var(--paper);
  border: 1px solid var(--line); border-radius: 6px; padding: 4px 10px; max-width: 240px; }
.bar button { cursor: pointer; min-width: 64px; }
.bar button:hover, .bar select:hover { border-color: var(--accent); }
.bar input { accent-color: var(--accent); width: 110px; }
.count { margin-left: auto; color: var(--faint); }
main { padding: 12px 24px 48px; }
table { border-collapse: separate; border-spacing: 8px; margin-left: -8px; }
th { font-weight: 500; text-align: left; vertical-align: top; overflow-wrap: anywhere; }
thead th { padding: 2px 0; vertical-align: bottom; max-width: var(--cell); }
tbody th { width: 150px; min-width: 110px; max-width: 220px; padding: 4px 8px 4px 0; }
th small { color: var(--faint); font-weight: 400; margin-right: 6px; }
td { padding: 0; vertical-align: top; width: var(--cell); }
figure { margin: 0; width: var(--cell); }
video, figure img { display: block; width: 100%; height: auto; background: var(--hole);
  border-radius: 6px; cursor: zoom-in; }
.hole { width: var(--cell); min-height: calc(var(--cell) * .56); padding: 10px 12px;
  background: var(--hole); border-radius: 6px; color: var(--faint); overflow-wrap: anywhere; }
.hole.failed { color: var(--wrong); }
.hole b { display: block; font-weight: 600; }
[hidden] { display: none !important; }
dialog { border: 0; border-radius: 10px; padding: 0; max-width: 94vw; max-height: 94vh;
  background: var(--paper); color: var(--ink); box-shadow: 0 20px 60px rgb(0 0 0 / .4); }
dialog::backdrop { background: rgb(0 0 0 / .6); }
dialog video, dialog img { max-width: 94vw; max-height: 72vh; min-width: min(480px, 94vw);
  display: block; margin: 0 auto; image-rendering: auto; }
dialog pre { margin: 0; padding: 14px 18px; font: 13px/1.5 ui-monospace, Consolas, monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; max-width: 90ch; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
"""

SCRIPT = """
"use strict";
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const videos = all("main video");
const find = (id) => document.getElementById(id);
const inView = new Set();
let playing = !matchMedia("(prefers-reduced-motion: reduce)").matches;

function follow(video) {
  if (playing && inView.has(video)) video.play().catch(() => {});
  else video.pause();
}
const watcher = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (entry.isIntersecting) inView.add(entry.target);
    else inView.delete(entry.target);
    follow(entry.target);
  }
});
for (const video of videos) watcher.observe(video);

function show() {
  const button = find("play");
  if (button) button.textContent = playing ? "Pause" : "Play";
  videos.forEach(follow);
}
function toggle() { playing = !playing; show(); }
function together(share) {
  for (const video of videos) if (video.duration) video.currentTime = share * video.duration;
}
find("play")?.addEventListener("click", toggle);
find("restart")?.addEventListener("click", () => { together(0); playing = true; show(); });
find("speed")?.addEventListener("change", (event) => {
  for (const video of videos) video.playbackRate = Number(event.target.value);
});
find("time")?.addEventListener("input", (event) => {
  playing = false; show(); together(event.target.value / 1000 * 0.999);
});
find("size").addEventListener("input", (event) => {
  document.documentElement.style.setProperty("--cell", event.target.value + "px");
});

function filter() {
  const chosen = new Map(all("select[data-axis]").map((one) => [one.dataset.axis, one.value]));
  const fits = (places) => places.split(" ").every((place) => {
    const [axis, index] = place.split(":");
    return !chosen.get(axis) || chosen.get(axis) === index;
  });
  for (const part of all("[data-place]")) part.hidden = !fits(part.dataset.place);
  const cells = all("td").filter((cell) => !cell.hidden && !cell.parentElement.hidden);
  find("count").textContent = cells.length + " of " + all("td").length + " shown";
}
for (const select of all("select[data-axis]")) select.addEventListener("change", filter);

const dialog = document.querySelector("dialog");
function enlarge(figure) {
  const copy = figure.querySelector("video, img").cloneNode();
  if (copy.tagName === "VIDEO") { copy.controls = true; copy.autoplay = true; }
  const words = document.createElement("pre");
  words.textContent = figure.dataset.details;
  dialog.replaceChildren(copy, words);
  dialog.showModal();
}
for (const figure of all("figure")) {
  figure.addEventListener("click", () => enlarge(figure));
  figure.addEventListener("keydown", (event) => { if (event.key === "Enter") enlarge(figure); });
}
dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
dialog.addEventListener("close", () => dialog.replaceChildren());
document.addEventListener("keydown", (event) => {
  if (event.key === " " && !dialog.open && !/^(BUTTON|SELECT|INPUT)$/.test(event.target.tagName)) {
    event.preventDefault(); toggle();
  }
});
filter();
show();
"""
