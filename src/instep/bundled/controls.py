"""The control of a run on a bundled model: distillation alone for as many updates. Its row ships with the package, so that a run is told from longer training
without training twice."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from instep.bundled.baselines import TIMES, Baselines
from instep.metrics.compare import Row, combined

FILE = "control.json"
NAME = "DMD2 for as many updates"


def setup_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a run and its control have in common, from a run's recipe.json: model, prompts, levels, guidance, optimisers, batch, updates in all, and the fake's
    updates for each of them.

    The methods differ; so may the number of stages and the size of a group.
    """
    config = record["config"]
    stages = [stage for stage in config["stages"] if stage["steps"]]
    optimisers = {name: {key: config["roles"][name][key] for key in ("optim", "lora", "ema")} for name in ("student", "fake") if name in config["roles"]}
    return {
        **{key: record[key] for key in ("model", "weights", "dtype", "levels", "prompts", "negative_prompt", "start_from")},
        **{key: config[key] for key in ("guidance", "guidance_2", "sampler", "experts")},
        "optimisers": optimisers,
        "batches": sorted({stage["batch"] * stage["accumulate"] for stage in stages}),
        "fake_updates": sorted({critic["updates"] for stage in stages for critic in stage["critics"] if critic["role"] == "fake"}),
        "updates": sum(stage["steps"] for stage in stages),
    }


def shipped_control(baselines: Baselines, record: Mapping[str, Any]) -> Row | None:
    """The row in the model's control.json, if it was measured on the same prompts by the same classifiers and trained as the run in `record` was; else None."""
    file = baselines.shipped and baselines.shipped / FILE
    if file is None or not file.is_file():
        return None
    kept = json.loads(file.read_text(encoding="utf-8"))
    if kept["setup"] != setup_of(record) or kept["fingerprint"] != baselines.fingerprint:
        return None
    row = Row.of_json(kept["row"])
    return row if baselines.evaluation.complete(row) else None


def control_file(baselines: Baselines, records: Sequence[Mapping[str, Any]], rows: Sequence[Row]) -> dict[str, Any]:
    """What a control.json holds: the mean of the rows of finished runs that differ in their seed alone, without the seconds of this machine.

    ValueError for runs that differ otherwise.
    """
    setups = [setup_of(record) for record in records]
    if any(setup != setups[0] for setup in setups):
        raise ValueError("runs: their setups differ, and one control has one; give runs that differ in their seed alone")
    many = len(rows) > 1
    row = combined(rows) if many else rows[0]
    values = {key: value for key, value in row.values.items() if key not in TIMES}
    row = replace(row, name=NAME, kind="control", values=values, n=rows[0].n, note=f"mean of {len(rows)} seeds, {row.n} videos" if many else "")
    return {"fingerprint": baselines.fingerprint, "setup": setups[0], "seeds": [record["seed"] for record in records], "row": row.json()}
