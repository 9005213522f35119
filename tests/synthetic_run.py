"""Synthetic folders of runs for the report's tests: real digits' videos, made-up metrics (never to be read as results)."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import torch

from instep.bundled import digits
from instep.bundled.evaluation import COLUMNS
from instep.core.files import write_json, write_tensors
from instep.core.version import __version__
from instep.metrics.compare import Row
from instep.metrics.figures import Value
from instep.training.views import to_uint8

PROMPTS = ("a seven moving left fast", "a three moving up slowly", "an eight", "a digit moving right fast", "a two standing still", "a digit")


def make_run(out: Path, *, recipe: str = "dm-align-group", seed: int = 0, steps: int = 160, prompts: tuple[str, ...] = PROMPTS) -> Path:
    """A complete run folder at `out`."""
    out.mkdir(parents=True)
    rng = random.Random(f"{recipe}{seed}")
    stages = [{"name": "distil", "steps": steps // 2}, {"name": "align", "steps": steps - steps // 2}]
    write_json(
        out / "recipe.json",
        {
            "instep": __version__,
            "command": f"instep train {recipe} --seed {seed} --out runs/{out.name}",
            "recipe": recipe,
            "model": "moving-digits",
            "seed": seed,
            "levels": [1.0, 0.9, 0.75, 0.5],
            "config": {"stages": stages, "guidance": 3.0},
        },
    )
    write_lines(
        out / "log.jsonl",
        [{"step": 0, "stage": "start", "probe/mean_brightness": 0.085, "probe/diversity": 0.15}, *(log_row(step, steps, rng) for step in range(1, steps + 1))],
    )
    write_lines(
        out / "health.jsonl",
        [
            {"step": 60, "level": "warn", "flag": "oversaturation", "text": "samples are 31% brighter than the teacher's: lower the guidance"},
            {"step": 100, "level": "ok", "flag": "oversaturation", "text": "cleared: oversaturation"},
            {"step": 120, "level": "alarm", "flag": "hacking", "text": "the training reward rose by 40% while diversity fell by 35%: lower its weight"},
        ],
    )
    baselines = random.Random("baselines")  # measured once and shared by all runs
    rows = [made_up(f"student ({recipe})", "student", 4, 4, 0.93, 6.0, 7.2, rng)]
    rows.append(made_up("teacher, 50 steps, guided", "teacher", 100, 50, 0.95, 5.2, 8.2, baselines))
    rows.append(made_up("teacher, 4 steps, guided", "naive", 8, 4, 0.91, 9.0, 6.0, baselines))
    rows.append(made_up("teacher, 4 steps", "naive", 4, 4, 0.62, 14.0, 6.4, baselines))
    rows.append(made_up("teacher, 2 steps, guided", "naive", 4, 2, 0.71, 16.5, 4.3, baselines))
    decoded = made_up("real videos through the VAE", "real", 0, 0, 0.996, 1.3, 9.9, random.Random("decoded"))
    decoded.values["seconds"] = Value(0.0, 0.0)
    rows.insert(1, decoded)
    real_vs_real = made_up("real videos (another draw)", "real", 0, 0, 0.996, 1.1, 8.6, baselines)
    classifiers = {name: {"digit": 0.991, "motion": 0.999, "both": 0.99} for name in ("train", "monitor", "heldout")}
    columns = [column.json() for column in COLUMNS]
    metrics = {
        "protocol": "quick",
        "columns": columns,
        "rows": [r.json() for r in rows],
        "real_vs_real": real_vs_real.json(),
        "flags": ["hacking"],
        "classifiers": classifiers,
    }
    write_json(out / "metrics.json", metrics)
    write_images(out, prompts, seed)
    return out


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def log_row(step: int, steps: int, rng: random.Random) -> dict:
    u, noise = step / steps, rng.gauss
    row = {
        "step": step,
        "stage": "distil" if u <= 0.5 else "align",
        "cpu_s": 1.8 + noise(0, 0.05),
        "wall_s": 1.0 + noise(0, 0.03),
        "force/dm/norm": 3 * math.exp(-2 * u) * math.exp(noise(0, 0.2)),
        "critic/fake": 0.4 + 0.1 * math.exp(-5 * u) + noise(0, 0.02),
        "grad/student": math.exp(noise(0, 0.3)),
        "grad/student/skipped": 0.0,
        "lr/student": 2e-4 * min(1, 2 - 2 * u),
        "lr/fake": 4e-4,
    }
    if u > 0.5:
        row |= {
            "force/group/norm": 0.4 * math.exp(noise(0, 0.2)),
            "force/cosine/dm~group": -0.2 + noise(0, 0.15),
            "reward/train": -0.6 + 0.6 * (u - 0.5) + noise(0, 0.06),
        }
    if step % 20 == 0:
        monitor, rising = 0.9 - 0.4 * math.exp(-4 * u) + noise(0, 0.01), math.exp(-4 * u)
        row |= {"probe/monitor_both": monitor, "probe/monitor_score": -0.3 - rising, "probe/train_score": -0.2 - rising}
        metrics = {
            "mean_brightness": (0.09 + 0.01 * u, 0.085),
            "saturation": (0.01 * u, 0.002),
            "motion": (0.02 + 0.008 * u, 0.028),
            "diversity": (0.16 - 0.04 * u, 0.15),
        }
        for key, (student, teacher) in metrics.items():
            row |= {f"probe/{key}": student, f"probe/{key}_teacher": teacher}
        row |= {"probe/train_score_teacher": -0.12, "probe/monitor_score_teacher": -0.25, "probe/monitor_both_teacher": 0.95}
    return row


def made_up(name: str, kind: str, nfe: int, steps: int, both: float, fd: float, modes: float, rng: random.Random) -> Row:
    def value(centre: float, se: float) -> Value:
        return Value(centre + rng.gauss(0, se), se)

    values = {f"{classifier}_{part}": value(both, 0.012) for classifier in ("train", "monitor", "heldout") for part in ("digit", "motion", "both")}
    values |= {
        "fd": value(fd, 0.3),
        "fd_open": value(2 * fd, 0.8),
        "precision": value(0.9, 0.02),
        "recall": value(0.8, 0.03),
        "vendi": value(modes / 3, 0.06),
        "modes_motion": value(modes, 0.25),
        "modes_digit": value(modes + 0.3, 0.25),
        "mean_brightness": value(0.08, 0.0006),
        "saturation": value(0.004, 0.0004),
        "wobble": value(0.05, 0.002),
        "flicker": value(0.972, 0.0006),
        "dynamic": value(10.6, 0.2),
        "seconds": Value(0.012 * nfe, 0.0),
    }
    return Row(name, kind, values, nfe, steps, 3.0 if "guided" in name else 1.0, 242)  # type: ignore[arg-type]


def write_images(out: Path, prompts: tuple[str, ...], seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    specs = [digits.parse(p) if not p.startswith("<") else digits.PromptSpec(3) for p in prompts]
    real = digits.render("reference", specs, 1)
    models = {"teacher_50": real, "naive_4": blurred(real, 5), "student": (real + 0.05 * torch.randn(real.shape, generator=rng)).clamp(0, 1)}
    write_tensors(out / "samples.safetensors", {"samples": torch.cat([to_uint8(v) for v in models.values()])})
    write_json(out / "samples.json", {"models": list(models), "prompts": list(prompts), "seed": 4321})
    for step in (0, 100):
        made = blurred(real, 7 if step == 0 else 3)
        views = {
            "generator": made,
            "fake": blurred(made, 3),
            "real": real,
            "force": 0.5 + (real - blurred(made, 3)) / 2,
            "target": made + (real - blurred(made, 3)),
        }
        write_tensors(
            out / "views" / f"step-{step:06d}.safetensors",
            {k: to_uint8(v) for k, v in views.items()} | {"levels": torch.linspace(0.95, 0.2, len(prompts))},
        )
        write_json(out / "views" / f"step-{step:06d}.json", {"step": step, "prompts": list(prompts)})
    write_align_views(out, prompts[0], real)


def write_align_views(out: Path, prompt: str, real: torch.Tensor) -> None:
    """One group: its samples are more and more blurred, and drawn to the best."""
    group = torch.cat([blurred(real[:1], width) for width in (1, 3, 5, 7)])
    preferred, advantages = group[:1].expand_as(group), torch.tensor([1.4, 0.3, -0.6, -1.1])
    pull = (-advantages).clamp(min=0)[:, None, None, None, None] * (preferred - group)
    views = {"generator": group, "preferred": preferred, "align_force": 0.5 + pull, "align_target": group + pull}
    views |= {"force": 0.5 + (real[:1] - group) / 2, "target": (real[:1] + group) / 2}
    numbers = {"levels": torch.full((4,), 0.6), "advantages": advantages}
    write_tensors(out / "views" / "align-000100.safetensors", {k: to_uint8(v) for k, v in views.items()} | numbers)
    write_json(out / "views" / "align-000100.json", {"step": 100, "prompts": [prompt] * 4})


def blurred(media: torch.Tensor, width: int) -> torch.Tensor:
    return torch.nn.functional.avg_pool3d(media, (1, width, width), 1, (0, width // 2, width // 2))
