"""The contents of a checkpoint: collects a run's state, restores it, and initialises a new run from another one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from instep.core.json_files import read_object
from instep.core.shards import assign
from instep.diffusion.guidance_scales import GuidanceRange
from instep.diffusion.transfer import widest
from instep.methods.recipe import Recipe
from instep.training import checkpoint
from instep.training.batches import BatchSource
from instep.training.hold import Held
from instep.training.state import NormRatio, TrainState


def contents(state: TrainState, source: BatchSource) -> dict[str, Any]:
    """Returns everything that a resumed run needs to reach the same weights."""
    return {
        "roles": {name: {**state.module_of(name).state(), **trained.state()} for name, trained in state.trained.items()},
        "optim": {name: checkpoint.optimizer_state(trained.optimizer) for name, trained in state.trained.items()},
        "ema": {name: trained.ema for name, trained in state.trained.items() if trained.ema is not None},
        "steps": {name: trained.steps for name, trained in state.trained.items()},
        "rng": checkpoint.rng_state(state.rng),
        "source": source.state(),
        "step": state.step,
        "reward_variance": None if state.reward_variance is None else [float(v) for v in state.reward_variance],
        "reference": {str(i): p.detach() for i, p in enumerate(state.reference)},
        "reference_stage": state.reference_stage,
        **({"ratios": {name: asdict(ratio) for name, ratio in state.ratios.items()}} if state.ratios else {}),
        **({"hold": asdict(state.hold)} if state.hold != Held() else {}),
    }


def load(state: TrainState, source: BatchSource, saved: dict[str, Any]) -> None:
    """Restores the saved state in place."""
    _load_roles(state, saved)
    checkpoint.restore_rng(state.rng, saved["rng"])
    source.load_state(saved["source"])
    state.step = int(saved["step"])
    variance = saved["reward_variance"]
    state.reward_variance = None if variance is None else [torch.tensor(v, dtype=widest(state.device), device=state.device) for v in variance]
    state.reference_stage = saved["reference_stage"]
    state.ratios = {name: NormRatio(**ratio) for name, ratio in saved.get("ratios", {}).items()}
    state.hold = Held.of_json(saved["hold"]) if "hold" in saved else state.hold
    for i, p in enumerate(state.reference):
        assign(p, saved["reference"][str(i)])


def begin_from(state: TrainState, recipe: Recipe, folder: Path, reward: str | None) -> None:
    """Initialises a new run, whose reward is named `reward`, with the trained roles, optimisers and averages of the run in `folder`.

    Raises ValueError if that run has no checkpoint, lacks a role that `recipe` trains, or has a student that does not fit this recipe.
    """
    newest = checkpoint.latest(folder / "checkpoints")
    if newest is None:
        raise ValueError(f"start_from: {folder} holds no checkpoint; give the folder of a run that has at least one")
    saved, record = checkpoint.load(newest), read_object(folder / "recipe.json", "start_from", "give the folder of an intact run")
    theirs, ours = record["config"]["roles"]["student"].get("prediction_type"), recipe.roles["student"].prediction_type
    if theirs != ours:
        raise ValueError(
            f"start_from: that run's student predicts {theirs or 'what its model does'}, this recipe's {ours or 'what its model does'}; start from one "
            "that predicts the same"
        )
    _check_guidance(recipe, record["config"], int(saved["step"]), folder)
    _match_guidance(state, recipe, saved, record["config"]["roles"]["student"].get("guidance_range"))
    if "latent_reward" in saved["roles"] and record["reward"] != reward:
        del saved["roles"]["latent_reward"]
        if state.latent_reward is not None:
            print(f"the latent reward model of {folder} was fitted to {record['reward']!r}, not to {reward!r}: a new one begins")
    _load_roles(state, saved)


def stage_at(config: Mapping[str, Any], step: int | None = None) -> Mapping[str, Any]:
    """Returns the stage of a run after `step` steps (None: the last stage), from the config in its recipe.json."""
    stages = [stage for stage in config["stages"] if stage["steps"]]
    left = sum(stage["steps"] for stage in stages) if step is None else step
    for stage in stages:
        if left <= stage["steps"]:
            return stage
        left -= stage["steps"]
    return stages[-1]


def _check_guidance(recipe: Recipe, theirs: Mapping[str, Any], step: int, folder: Path) -> None:
    """Raises ValueError if guidance would be applied or distilled twice, or not at all."""
    if theirs.get("sampler", "few-step") != "ode" or recipe.sampler != "ode":
        return
    stages = [stage for stage in recipe.stages if stage.steps]
    if not stage_at(theirs, step).get("guided", True):
        guided_twice = next((stage.name for stage in stages if stage.uses_guidance), None)
        if guided_twice is not None:
            raise ValueError(
                f"start_from: the student of {folder} has guidance in its weights, and stage {guided_twice!r} would guide it a second time; give that stage 0 "
                "steps, or start from a run that ended before its guidance was distilled"
            )
    elif theirs["guidance"] != 1 and not stages[0].uses_guidance:
        raise ValueError(
            f"start_from: the student of {folder} is sampled with guidance {theirs['guidance']:g}, and stage {stages[0].name!r} goes on without any; give "
            "distill_guidance steps, or start from a run that did"
        )


def _match_guidance(state: TrainState, recipe: Recipe, saved: dict[str, Any], theirs: dict[str, Any] | None) -> None:
    """Checks that both runs condition on the same guidance ranges; a student without guidance scales begins with a guidance embedding that adds nothing."""
    ours = recipe.roles["student"].guidance_range
    if theirs is not None and (range_there := GuidanceRange.of_json(theirs)) != ours:
        raise ValueError(
            f"start_from: that run's student is conditioned on {range_there}, this recipe's on {ours or 'nothing'}; give the same draw and "
            "draw_skip, or start from its export (--model DIR/student), whose guidance is in its weights"
        )
    if theirs is None and ours is not None:
        new = {key: p for key, p in state.module_of("student").state().items() if key.startswith("guidance_embedding.")}
        for part in (saved["roles"], saved["ema"]):
            if "student" in part:
                part["student"] = {**part["student"], **new}


def _load_roles(state: TrainState, saved: dict[str, Any]) -> None:
    # a run that starts from one without a latent reward model begins with a new one
    new = {"latent_reward"} - saved["roles"].keys()
    missing = [name for name in state.trained if name not in saved["roles"] and name not in new]
    if missing:
        raise ValueError(f"start_from: that run has no role {missing[0]!r}, which this recipe trains; start from a run of a recipe that does, or from none")
    for name, trained in state.trained.items():
        if name in new:
            continue
        state.module_of(name).load_state(saved["roles"][name])
        trained.load_state(saved["roles"][name])
        checkpoint.load_optimizer_state(trained.optimizer, saved["optim"][name])
        trained.steps = int(saved["steps"][name])
        if trained.ema is not None:
            # that run has no average, so the average begins at the weights
            averages = saved["ema"].get(name, saved["roles"][name])
            for key, average in trained.ema.items():
                assign(average, averages[key])
