"""Comparisons of models: rows of metrics with standard errors, whatever was measured and on whichever prompts."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from instep.data.prompt import Prompt
from instep.metrics.figures import Value

Generate = Callable[[Sequence[Prompt], int], Tensor]  # prompts and a seed -> unclamped media [B, 3, F, H, W]
Kind = Literal["student", "control", "teacher", "naive", "real"]
BATCH = 45

# by how a metric's key begins; what begins with a classifier's name is a share of right samples or a log-probability
HIGHER = ("heldout", "monitor", "train", "precision", "recall", "vendi", "modes", "flicker", "diversity", "motion", "reward", "consistency", "inception")
LOWER = ("fd", "sfd", "matching", "first_frame", "wobble", "saturation", "seconds")


def direction(key: str) -> int:
    """+1 if more of a metric is better, -1 if less is, 0 if neither (mean_brightness, dynamic: compare with real videos)."""
    return -1 if key.startswith(LOWER) else int(key.startswith(HIGHER))


@dataclass(frozen=True)
class Row:
    """One model's metrics."""

    name: str
    kind: Kind
    values: dict[str, Value]
    nfe: int = 0
    steps: int = 0
    guidance: float = 1.0
    n: int = 0
    note: str = ""

    def json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of_json(cls, row: Mapping[str, Any]) -> Row:
        return cls(**{**row, "values": {k: Value(**v) for k, v in row["values"].items()}})


@dataclass(frozen=True)
class Cost:
    """Seconds a video of generating: of all CPU threads together, and on the clock."""

    cpu: float = 0.0
    wall: float = 0.0


@torch.no_grad()
def generate_all(generate: Generate, prompts: Sequence[Prompt], seed: int, label: str) -> tuple[Tensor, Cost]:
    """Unclamped media of all prompts, batch by batch with progress, and what a video cost."""
    from rich.progress import track

    parts, cpu, wall = [], time.process_time(), time.perf_counter()
    starts = range(0, len(prompts), BATCH)
    for i, first in enumerate(track(starts, description=label, transient=True)):
        parts.append(generate(prompts[first : first + BATCH], seed * 1000 + i))
    cost = Cost((time.process_time() - cpu) / len(prompts), (time.perf_counter() - wall) / len(prompts))
    return torch.cat(parts), cost


def difference(a: Row, b: Row, key: str) -> Value:
    """a - b with the standard error of the difference of independent metrics."""
    x, y = a.values[key], b.values[key]
    return Value(x.value - y.value, math.hypot(x.se, y.se))


def better(a: Row, b: Row, key: str, z: float = 2.0) -> bool:
    """Whether a is better than b by more than z standard errors of the difference."""
    d = difference(a, b, key)
    return direction(key) * d.value > z * d.se


def combined(rows: Sequence[Row]) -> Row:
    """Several seeds of one row as their mean; its error is the larger of the spread between seeds and what the samples allow."""
    first, s = rows[0], len(rows)
    values = {}
    for key in first.values:
        x = torch.tensor([row.values[key].value for row in rows], dtype=torch.float64)
        within = math.sqrt(sum(row.values[key].se ** 2 for row in rows)) / s
        between = float(x.std()) / math.sqrt(s) if s > 1 else 0.0
        values[key] = Value(float(x.mean()), max(within, between))
    return Row(first.name, first.kind, values, first.nfe, first.steps, first.guidance, sum(row.n for row in rows), f"mean of {s} seeds")
