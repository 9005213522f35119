"""Moving samples side by side: sprite sheets that one style rule moves, so every animation on the page stays in step and can be stopped."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape, unescape

import torch
from torch import Tensor

from instep.data.animation import sprite_sheet
from instep.report.read import RunRecord, Samples, Views
from instep.report.rows import role_in

MOST_PROMPTS, MOST_VIEWS = 12, 8
CAPTIONS = {
    "generator": ("student's sample", "What the student makes now, decoded."),
    "fake": ("fake prediction", "The sample is noised to level t, and the fake, which knows only the student's videos, says what it was."),
    "real": ("real prediction", "The teacher is asked the same. It tends towards what real videos, and the prompt, want."),
    "force": ("force", "Where the two disagree, as a change of the image (target minus sample): grey leaves it, bright adds light, dark takes it away."),
    "target": ("implied target", "The sample after that change: where this iteration pulls the student."),
}
ALIGN_CAPTIONS = {
    "generator": ("student's sample", "What the student makes now. Samples of a group stand in the order of their rewards, the best first."),
    "preferred": ("preferred estimate", "What a preferred sample was, as the fake says after noise: of the better samples of the group, or of real ones."),
    "align_force": ("alignment force", "From the sample's own estimate to the preferred one, as a change of the image; grey where a sample feels none."),
    "align_target": ("alignment's target", "The sample after that change: where the reward, or the preference, pulls the student."),
    "force": ("matching force", "From the fake's estimate to the teacher's, of the same sample at the same level."),
    "target": ("matching's target", "The sample after that change: where the teacher pulls the student."),
}


def sheet(key: str, videos: Tensor) -> tuple[str, int]:
    """A style rule that holds videos uint8 [N, F, H, W, 3] as the background of `.sheet-KEY`, and the number of frames."""
    uri, frames = sprite_sheet(videos)
    h, w = videos.shape[2:4]
    small = "image-rendering:pixelated;" if max(h, w) <= 64 else ""
    rule = f".sheet-{key}{{background-image:url({uri});background-size:{100 * frames}% {100 * len(videos)}%;aspect-ratio:{w}/{h};{small}--n:{frames}}}"
    return f"<style>{rule}</style>", frames


def animation(key: str, index: int, count: int, label: str) -> str:
    y = 100 * index / (count - 1) if count > 1 else 0
    return f'<div class="film sheet-{key}" role="img" aria-label="{escape(label, quote=True)}" style="background-position-y:{y:.4f}%"></div>'


def tile(film: str, head: str) -> str:
    """An animation with its column's heading below it, which the page shows where the headings above are out of sight."""
    return f"<div class='tile'>{film}<span class='of'>{head}</span></div>"


def plain(text: str) -> str:
    """HTML as text."""
    return unescape(re.sub("<[^>]*>", " ", text))


def grid(key: str, videos: Tensor, heads: Sequence[str], rows: Sequence[str], notes: Sequence[str] = ()) -> str:
    """Videos uint8 [columns, rows, F, H, W, 3] with a heading above each column and a label on each row (all of them HTML)."""
    columns, n = videos.shape[:2]
    style, _ = sheet(key, videos.flatten(0, 1))
    head = "".join(f"<div class='head'>{name}</div>" for name in heads)
    body = []
    for r, row in enumerate(rows):
        body.append(f"<div class='label'>{row}</div>")
        body += [tile(animation(key, c * n + r, columns * n, plain(f"{heads[c]}: {row}")), heads[c]) for c in range(columns)]
    wide = " wide" if columns > 5 else ""
    teach = f"<dl class='teach{wide}'>{''.join(notes)}</dl>" if notes else ""
    half = -(-n // 2) if n >= 4 and columns <= 4 else n  # few columns leave room for two grids side by side
    cut = half * (columns + 1)
    parts = [part for part in (body[:cut], body[cut:]) if part]
    grids = "".join(f"<div class='grid' style='--columns:{columns}'><div class='corner'></div>{head}{''.join(part)}</div>" for part in parts)
    kind = " two" if len(parts) > 1 else wide
    return f"{style}{teach}<div class='grids{kind}'>{grids}</div>"


def model_name(name: str) -> str:
    """`teacher_50` in words."""
    kind, _, steps = name.partition("_")
    if kind in ("teacher", "naive") and steps.isdigit():
        return f"{'naive sampling' if kind == 'naive' else 'teacher'}, {steps} step{'s' * (steps != '1')}"
    return name.replace("_", " ")


def same_inputs(a: Samples, b: Samples) -> bool:
    return a.prompts == b.prompts and a.seed == b.seed and a.videos.shape[2:] == b.videos.shape[2:]


def merged(runs: Sequence[RunRecord]) -> list[tuple[Samples, list[str]]]:
    """Sample sets with a heading a model: runs with the same prompts and seed share one grid, their baselines shown once."""
    sets: list[tuple[Samples, list[str]]] = []
    for run in runs:
        if run.samples is None:
            continue
        own = run.samples
        roles = {"student": role_in(run, runs), "start": "before this run"}
        heads = [roles.get(m, escape(model_name(m))) + (f"<small>{escape(run.label)}</small>" if len(runs) > 1 and m in roles else "") for m in own.models]
        for i, (there, names) in enumerate(sets):
            if same_inputs(there, own):
                new = [c for c, head in enumerate(heads) if head not in names]
                videos = torch.cat([there.videos, own.videos[new]])
                sets[i] = (Samples((*there.models, *(own.models[c] for c in new)), own.prompts, own.seed, videos), names + [heads[c] for c in new])
                break
        else:
            sets.append((own, heads))
    return [in_order(found, heads) for found, heads in sets]


def in_order(found: Samples, heads: Sequence[str]) -> tuple[Samples, list[str]]:
    """The columns with the student first, then what it is compared with: controls, naive sampling, the teacher."""
    ranks = ("student", "control", "before", "naive", "teacher")
    order = sorted(range(len(heads)), key=lambda c: next((i for i, rank in enumerate(ranks) if heads[c].startswith(rank)), len(ranks)))
    return replace(found, models=tuple(found.models[c] for c in order), videos=found.videos[order]), [heads[c] for c in order]


def samples(runs: Sequence[RunRecord]) -> str:
    """Every model on the same prompts and noise (HTML)."""
    parts, sets = [], merged(runs)
    if len(sets) > 1:
        parts.append("<p class='note'>The runs were sampled on different prompts or noise, so their samples stand in grids of their own.</p>")
    for i, (found, heads) in enumerate(sets):
        prompts = found.prompts[:MOST_PROMPTS]
        left = f" These are the first {len(prompts)} of {len(found.prompts)} prompts." if len(found.prompts) > len(prompts) else ""
        parts.append(f"<p class='note'>All models start from the same prompts and the same noise (seed {found.seed}). Nothing was picked.{left}</p>")
        parts.append(grid(f"samples{i}", found.videos[:, : len(prompts)], heads, [escape(prompt) for prompt in prompts]))
    return "".join(parts) or "<p class='none'>Samples are not recorded (samples.safetensors is missing).</p>"


def view_grid(views: Views, key: str, *, teach: bool, captions: Mapping[str, tuple[str, str]] = CAPTIONS) -> str:
    """What forces saw, a column a caption: samples of a group as they are stored, others from the highest level to the lowest (HTML)."""
    names = [name for name in captions if name in views.videos]
    n = min(MOST_VIEWS, len(views.videos[names[0]]))
    videos = torch.stack([views.videos[name][:n] for name in names])
    order = sorted(range(n), key=lambda i: -views.levels[i]) if len(views.levels) >= n and not views.advantages else list(range(n))
    labels = [escape(views.prompts[i] if i < len(views.prompts) else "") + _numbers(views, i) for i in order]
    notes = [f"<div><dt>{captions[name][0]}</dt><dd>{captions[name][1]}</dd></div>" for name in names] if teach else []
    return grid(key, videos[:, order], [captions[name][0] for name in names], labels, notes)


def _numbers(views: Views, i: int) -> str:
    """The level and the advantage of a row, as far as they were recorded (HTML)."""
    level = f" <small>t = {views.levels[i]:.2f}</small>" if i < len(views.levels) else ""
    return level + (f" <small>advantage {views.advantages[i]:+.2f}</small>" if i < len(views.advantages) else "")


def align_views(runs: Sequence[RunRecord]) -> str:
    """The alignment force of each run beside its matching force at the last recorded step, and folded at the first (HTML); empty without one."""
    parts: list[str] = []
    for i, run in enumerate(runs):
        if not run.align_views:
            continue
        latest, early = run.align_views[-1], run.align_views[0]
        name = f"{escape(run.label)}, step {latest.step}" if len(runs) > 1 else f"At step {latest.step}"
        note = (
            "<p class='note'>A run with DM-Align has two forces on a sample (its Fig. 6). Both are shown before their weights, on the same samples at the same "
            "noise levels: alignment should move what is wrong, and matching should keep the image whole.</p>"
        )
        parts.append(("" if parts else note) + f"<h4>{name}</h4>{view_grid(latest, f'align{i}', teach=not parts, captions=ALIGN_CAPTIONS)}")
        if early.step != latest.step:
            body = view_grid(early, f"alignearly{i}", teach=False, captions=ALIGN_CAPTIONS)
            parts.append(f"<details><summary>The same prompts and noise at step {early.step}</summary>{body}</details>")
    return f"<h3>The alignment force beside the matching force</h3>{''.join(parts)}" if parts else ""


def views(runs: Sequence[RunRecord]) -> str:
    """The matching force of each run as it was at the last recorded step, and folded at the first (HTML)."""
    parts, first = [], True
    for i, run in enumerate(runs):
        if not run.views:
            continue
        latest = run.views[-1]
        name = f"{escape(run.label)}, step {latest.step}" if len(runs) > 1 else f"At step {latest.step}"
        parts.append(f"<h3>{name}</h3>{view_grid(latest, f'views{i}', teach=first)}")
        first = False
        if len(run.views) > 1:
            early = run.views[0]
            parts.append(f"<details><summary>The same prompts and noise at step {early.step}</summary>{view_grid(early, f'early{i}', teach=False)}</details>")
    return "".join(parts) or "<p class='none'>Views of the matching force are not recorded (the views folder is empty or missing).</p>"
