"use strict";
document.documentElement.classList.add("js");

// animations: stopped on demand, and from the start where the reader's system asks for less motion
const root = document.documentElement, play = document.getElementById("play");
let moving = !matchMedia("(prefers-reduced-motion: reduce)").matches;
const show = () => {
  root.classList.toggle("still", !moving);
  root.classList.toggle("moving", moving);
  play.textContent = moving ? "Pause animations" : "Play animations";
  play.setAttribute("aria-pressed", String(moving));
};
play.addEventListener("click", () => { moving = !moving; show(); });
show();

const tip = document.getElementById("tip");
const hide = () => { tip.style.visibility = "hidden"; };
const place = (text, x, y) => {
  tip.textContent = text;
  tip.style.visibility = "visible";
  const box = tip.getBoundingClientRect();
  tip.style.left = Math.max(6, Math.min(x + 14, innerWidth - box.width - 6)) + "px";
  tip.style.top = (y + 16 + box.height > innerHeight ? y - box.height - 10 : y + 16) + "px";
};

const short = v => v === 0 ? "0" : Math.abs(v) < 1e-3 || Math.abs(v) >= 1e5 ? v.toExponential(1) : String(+v.toPrecision(3));
const LEFT = 46, RIGHT = 390;  // the plot's edges in the charts' own units

for (const figure of document.querySelectorAll("figure.chart")) {
  const source = figure.querySelector("script"), svg = figure.querySelector("svg"), cross = figure.querySelector(".cross");
  if (source) {
    const data = JSON.parse(source.textContent);
    svg.addEventListener("pointermove", event => {
      const box = svg.getBoundingClientRect();
      const at = (event.clientX - box.left) / box.width * 400;
      const step = data.x[0] + (at - LEFT) / (RIGHT - LEFT) * (data.x[1] - data.x[0]);
      const lines = [], places = [];
      for (const s of data.series) {
        const near = s.points.reduce((a, b) => Math.abs(b[0] - step) < Math.abs(a[0] - step) ? b : a);
        places.push(near[0]);
        lines.push(`${s.name}: ${short(near[1])}`);
      }
      const where = places.reduce((a, b) => Math.abs(b - step) < Math.abs(a - step) ? b : a);
      const x = LEFT + (where - data.x[0]) / (data.x[1] - data.x[0]) * (RIGHT - LEFT);
      cross.setAttribute("x1", x);
      cross.setAttribute("x2", x);
      cross.style.visibility = "visible";
      place([`step ${Math.round(where)}`, ...lines].join("\n"), event.clientX, event.clientY);
    });
    svg.addEventListener("pointerleave", () => { cross.style.visibility = "hidden"; hide(); });
  }
  for (const mark of figure.querySelectorAll("[data-tip]")) {
    mark.querySelector("title").remove();  // ours is quicker; the native one serves readers without scripts
    mark.setAttribute("aria-label", mark.dataset.tip);
    mark.addEventListener("pointermove", event => place(mark.dataset.tip, event.clientX, event.clientY));
    mark.addEventListener("pointerleave", hide);
    mark.addEventListener("focus", () => { const b = mark.getBoundingClientRect(); place(mark.dataset.tip, b.left, b.top); });
    mark.addEventListener("blur", hide);
  }
}
