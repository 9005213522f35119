"use strict";
// One page, three views: start, item, end. What is chosen but not sent yet, and what was sent but not heard of, survive a reload.
const $ = (id) => document.getElementById(id);
const kept = {
  get: (key) => { try { return JSON.parse(sessionStorage.getItem(key)); } catch { return null; } },
  set: (key, value) => { try { sessionStorage.setItem(key, JSON.stringify(value)); } catch { /* without storage a reload asks again */ } },
};
const WORDS = { left: "Left", right: "Right", equal: "Equal", yes: "Yes", no: "No" };
const SCALE = { 0: "poor", 1: "fair", 2: "good" };
let name = kept.get("name"), state = null, answers = {}, active = 0, busy = false, player = null;

history.replaceState(null, "", location.pathname); // the token is in a cookie by now

function unique() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (b) => b.toString(16).padStart(2, "0")).join("");
}

function trouble(text) {
  $("trouble").textContent = text || "";
  $("trouble").hidden = !text;
}

const wait = (ms) => new Promise((done) => setTimeout(done, ms));

// Repeats until the server answers: the body carries its own number, so that a repeat counts once.
async function post(path, body) {
  for (;;) {
    try {
      const answer = await fetch(path, { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) });
      const data = await answer.json();
      if (answer.status < 500) {
        trouble("");
        return { status: answer.status, data };
      }
    } catch { /* not reached */ }
    trouble("The server does not answer. Your answer is kept on this page and sent again until it does.");
    await wait(1500);
  }
}

function view(id) {
  for (const part of ["start", "item", "end"]) $(part).hidden = part !== id;
}

async function send(path, body) {
  if (busy) return;
  busy = true;
  kept.set("pending", { path, body });
  const { status, data } = await post(path, body);
  kept.set("pending", null);
  busy = false;
  if (status === 200) return show(data);
  if (status === 409) {
    const now = await post("/api/state", { name });
    if (now.status === 200) show(now.data);
    return trouble("This item was answered already, in another window perhaps. Undo to change it.");
  }
  trouble(data.error);
  if (status === 422 && path !== "/api/answer") { name = null; kept.set("name", null); view("start"); }
}

function show(next) {
  state = next;
  const bar = document.querySelector(".bar");
  bar.setAttribute("aria-valuemax", next.total);
  bar.setAttribute("aria-valuenow", next.done);
  $("bar").style.width = `${next.total ? (100 * next.done) / next.total : 0}%`;
  $("count").textContent = `${next.done} of ${next.total}`;
  $("who").textContent = name;
  $("undo").hidden = next.done === 0;
  if (player) player.stop();
  player = null;
  if (!next.item) return view("end");
  const draft = kept.get("draft");
  answers = draft && draft.item === next.item.id ? draft.answers : { ...next.item.before };
  $("prompt").textContent = next.item.prompt;
  document.body.classList.toggle("single", next.mode === "score");
  $("right").hidden = !next.item.right;
  $("left").querySelector("figcaption").hidden = !next.item.right;
  questions();
  view("item");
  player = new Player([["left", next.item.left], ["right", next.item.right]].filter(([, clip]) => clip));
  window.scrollTo(0, 0);
}

function questions() {
  const rows = state.questions.map((question, i) => {
    const row = document.createElement("fieldset");
    row.dataset.key = question.key;
    const legend = document.createElement("legend");
    legend.textContent = question.label;
    const hint = document.createElement("small");
    hint.textContent = question.hint;
    legend.append(hint);
    const choices = document.createElement("div");
    choices.className = "choices";
    for (const value of question.choices) {
      const button = document.createElement("button");
      button.type = "button";
      button.dataset.value = value;
      button.textContent = WORDS[value] || value;
      if (value in SCALE) {
        const small = document.createElement("small");
        small.textContent = SCALE[value];
        button.append(small);
      }
      button.addEventListener("click", () => { choose(i, value); button.blur(); });
      choices.append(button);
    }
    row.append(legend, choices);
    return row;
  });
  $("questions").replaceChildren(...rows);
  active = Math.max(0, state.questions.findIndex((question) => !(question.key in answers)));
  $("keys").textContent = state.mode === "pairs"
    ? "Keys: ← left, → right, ↓ equal, ↑ back one question"
    : "Keys: 0 1 2 for a score, Y and N, ↑ back one question";
  mark();
}

function mark(moved) {
  const rows = [...$("questions").children];
  rows.forEach((row, i) => {
    const { key } = state.questions[i];
    row.classList.toggle("active", i === active);
    if (i === active && moved) row.scrollIntoView({ block: "nearest" });
    row.querySelectorAll("button").forEach((button) => button.setAttribute("aria-pressed", String(answers[key] === button.dataset.value)));
  });
  $("next").disabled = !state.questions.every((question) => question.key in answers);
}

function choose(i, value) {
  if (busy || !state.item || !state.questions[i].choices.includes(value)) return;
  answers[state.questions[i].key] = value;
  kept.set("draft", { item: state.item.id, answers });
  active = Math.min(i + 1, state.questions.length - 1);
  mark(true);
}

const submit = () => { if (!$("next").disabled && !$("item").hidden) send("/api/answer", { name, request: unique(), item: state.item.id, answers }); };
const undo = () => { if (state && state.done > 0) send("/api/undo", { name, request: unique() }); };

// Both sides on one clock: sheets of frames are drawn by time, videos are started, stopped and set back together.
class Player {
  constructor(parts) {
    this.playing = true;
    this.stopped = false;
    this.elapsed = 0;
    this.last = null;
    this.sheets = [];
    this.videos = [];
    this.images = [];
    this.waiting = parts.map(([side, clip]) => this.load($(side).querySelector(".screen"), clip));
    $("stage").classList.add("loading");
    Promise.all(this.waiting).then(() => {
      if (this.stopped) return;
      $("stage").classList.remove("loading");
      this.length = Math.max(0, ...this.sheets.map((sheet) => sheet.ends.at(-1)));
      const still = !this.videos.length && !this.images.length && this.sheets.every((sheet) => sheet.ends.length === 1);
      $("play").hidden = still || (!this.videos.length && !this.sheets.length); // a browser cannot stop an animated image
      $("restart").hidden = still;
      this.restart();
      requestAnimationFrame((now) => this.tick(now));
    });
  }
  load(screen, clip) {
    const url = `/media/${clip.id}`;
    return new Promise((done) => {
      const failed = () => { screen.textContent = "This sample cannot be shown here."; done(); };
      if (clip.kind === "video") {
        const video = document.createElement("video");
        Object.assign(video, { src: url, muted: true, playsInline: true, preload: "auto" });
        video.addEventListener("canplaythrough", done, { once: true });
        video.addEventListener("error", failed, { once: true });
        video.addEventListener("ended", () => { if (this.videos.every((other) => other.ended || other.error)) this.restart(); });
        this.videos.push(video);
        screen.replaceChildren(video);
        return;
      }
      const image = new Image();
      image.addEventListener("error", failed, { once: true });
      image.addEventListener("load", () => {
        if (clip.kind === "frames") {
          const canvas = document.createElement("canvas");
          canvas.width = clip.width;
          canvas.height = clip.height;
          canvas.classList.toggle("small", Math.max(clip.width, clip.height) <= 128);
          canvas.setAttribute("role", "img");
          canvas.setAttribute("aria-label", "sample");
          let sum = 0;
          const ends = clip.durations.map((ms) => (sum += ms));
          this.sheets.push({ canvas, image, clip, ends, at: -1 });
          screen.replaceChildren(canvas);
        } else {
          this.images.push({ image, url });
          screen.replaceChildren(image);
        }
        done();
      }, { once: true });
      image.src = url;
    });
  }
  tick(now) {
    if (this.stopped) return;
    if (this.last !== null && this.playing) this.elapsed += now - this.last;
    this.last = now;
    this.draw();
    requestAnimationFrame((then) => this.tick(then));
  }
  draw() {
    const time = this.length ? this.elapsed % this.length : 0;
    for (const sheet of this.sheets) {
      const found = sheet.ends.findIndex((end) => time < end);
      const at = found < 0 ? sheet.ends.length - 1 : found; // the shorter one waits on its last frame
      if (at === sheet.at) continue;
      sheet.at = at;
      const { width, height, columns } = sheet.clip;
      sheet.canvas.getContext("2d").drawImage(sheet.image, (at % columns) * width, Math.floor(at / columns) * height, width, height, 0, 0, width, height);
    }
  }
  restart() {
    this.elapsed = 0;
    for (const { image, url } of this.images) { image.src = ""; image.src = url; }
    for (const video of this.videos) video.currentTime = 0;
    this.play(true);
    this.draw();
  }
  play(on) {
    this.playing = on;
    for (const video of this.videos) on ? video.play().catch(() => {}) : video.pause();
    $("play").querySelector("span").textContent = on ? "Pause" : "Play";
  }
  stop() {
    this.stopped = true;
    for (const video of this.videos) { video.pause(); video.removeAttribute("src"); video.load(); }
    document.querySelectorAll(".screen").forEach((screen) => screen.replaceChildren());
  }
}

$("play").addEventListener("click", (event) => { if (player) player.play(!player.playing); event.currentTarget.blur(); });
$("restart").addEventListener("click", (event) => { if (player) player.restart(); event.currentTarget.blur(); });
$("next").addEventListener("click", submit);
$("undo").addEventListener("click", (event) => { event.currentTarget.blur(); undo(); });
$("join").addEventListener("submit", async (event) => {
  event.preventDefault();
  const { status, data } = await post("/api/join", { name: $("name").value });
  if (status !== 200) return trouble(data.error);
  name = data.name;
  kept.set("name", name);
  kept.set("draft", null);
  show(data);
});

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.tagName === "INPUT" || !state) return;
  const pressed = event.key.toLowerCase();
  const does = { u: undo, backspace: undo };
  if (!$("item").hidden && state.item) {
    Object.assign(does, { enter: submit, r: () => player.restart(), " ": () => player.play(!player.playing), arrowup: () => { active = Math.max(0, active - 1); mark(true); } });
    const keys = state.mode === "pairs" ? { arrowleft: "left", arrowright: "right", arrowdown: "equal" } : { 0: "0", 1: "1", 2: "2", y: "yes", n: "no" };
    for (const [key, value] of Object.entries(keys)) does[key] = () => choose(active, value);
  }
  if (!(pressed in does)) return;
  // a focused button takes Space and Enter itself, for those who move with Tab
  if (event.target.tagName === "BUTTON" && (pressed === " " || pressed === "enter")) return;
  event.preventDefault();
  if (!event.repeat) does[pressed]();
});

(async function begin() {
  const pending = kept.get("pending");
  if (name && pending) return send(pending.path, pending.body);
  if (name) {
    const { status, data } = await post("/api/state", { name });
    if (status === 200) return show(data);
    if (status === 401) return trouble(data.error);
    name = null;
  }
  $("task").textContent = "You will see samples of the same prompt and say how good they are. What made them is hidden, and the order is drawn for you alone.";
  view("start");
  $("name").focus();
})();
