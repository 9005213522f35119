"""Stored measurements (benchmarks/results) under the names that metrics have now: the files keep the keys that they were written with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from instep.metrics.compare import Row

RENAMED = {
    "ink": "mean_brightness",
    "prompts_judged": "prompts_shown",
    "floor": "exact_samples",
    "scorer": "latent_reward",
    "absorb": "distill-guidance",
    "aware": "post-distillation",
    "pairs_told": "pairs_decided",
}


def renamed(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {RENAMED.get(key, key): value for key, value in metrics.items()}


def wording(text: str) -> str:
    """A stored name of a row, as it is shown."""
    return text.replace("training judge", "training classifier").replace("predicts=x0", "prediction_type=x0")


def row_of(stored: Mapping[str, Any]) -> Row:
    return Row.of_json({**stored, "values": renamed(stored["values"])})
