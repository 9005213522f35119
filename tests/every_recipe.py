"""Every recipe in small, with the inputs it needs, on a tiny model: for tests of what all of them share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tiny import tiny_wan_pipeline
from torch import Tensor

from instep.core.ranks import ALONE, Ranks
from instep.core.size import Size
from instep.data.prompt import Prompt, as_prompts
from instep.data.samples import PairSamples, RealSamples, TeacherSamples
from instep.methods.recipe import Recipe
from instep.models.family import Family
from instep.models.wan import WanFamily
from instep.recipes import NAMES, find
from instep.recipes.common import Common
from instep.recipes.many_step import ManySteps
from instep.rewards.base import FunctionReward
from instep.rewards.decoded import make_reward_fn, make_reward_grad_fn
from instep.training.batches import BatchSource
from instep.training.build import make_state
from instep.training.execution import Execution
from instep.training.state import TrainState
from instep.training.step import iteration

SIZE = Size(48, 48, 9)
PROMPTS = as_prompts(["a seven moving left fast", "a digit", "an eight", "a two standing still"])
REWARD = FunctionReward(lambda media, prompts: media.flatten(1).mean(1), "brightness", differentiable=True)
# the stages that a recipe has in small, where its defaults would leave some out
STAGES = {
    "dmd2": {"gan": 0.01},
    "dm-align-pair": {"distil": 1, "iterations": 1},
    "dm-align-group": {"distil": 1, "iterations": 1, "group": 2, "top_n": 1},
    "amd": {"group": 2},
    "naive-adaptive": {"group": 2},
    "dmdr": {"warm": 1, "iterations": 1, "group": 2},
    "dollar": {"fit": 1, "iterations": 1, "cd_steps": 2},
    "rl-after": {"distil": 1, "iterations": 1, "group": 2},
    "sft-after": {"distil": 1, "iterations": 1},
    "pso-offline": {"distil": 1, "iterations": 1},
    "flow-grpo": {"group": 2, "kl": 0.1},
    "dance-grpo": {"group": 2},
    "flow-dpo": {"group": 2},
    "apo": {"online": 1, "half_online": 1, "offline": 1, "distill_guidance": 1, "post_distillation": 1, "high": 1, "low": 1},
}
RECIPES = tuple(NAMES)
# those made of the terms and critics of others, and the rest, which has them all
COMPOSED = ("rl-after", "pso-offline", "dance-grpo", "draft", "naive-adaptive")
DISTINCT = tuple(name for name in RECIPES if name not in COMPOSED)


def family(seed: int = 0) -> WanFamily:
    return WanFamily(tiny_wan_pipeline(seed), SIZE, name="tiny")


def small(name: str, *, batch: int = 4, images: bool = False, **common: object) -> Recipe:
    """The recipe with two steps (three of a many-step model), one critic update and one iteration a stage; `images`: for a model of these."""
    many = name in ("flow-grpo", "dance-grpo", "flow-dpo", "draft", "apo")
    shared = ManySteps(**{"steps": 3, "batch": batch, **common}) if many else Common(**{"steps": 2, "batch": batch, "critic_updates": 1, **common})
    own = STAGES.get(name, {}) | ({"kind": "text-image"} if images and name == "dollar" else {})
    return find(name)(shared, **(own if name in STAGES and ("iterations" in own or name == "apo") else {"iterations": 1, **own}))


def state_of(recipe: Recipe, placed: Family, execution: Execution = Execution(), reward: FunctionReward = REWARD, ranks: Ranks = ALONE) -> TrainState:
    """The state of a run at its beginning."""
    return make_state(recipe, placed, 0, make_reward_fn(placed, reward), make_reward_grad_fn(placed, reward), execution=execution, ranks=ranks)


def batches_of(placed: Family, seed: int = 0, ranks: Ranks = ALONE, prompts: Sequence[Prompt] = PROMPTS) -> BatchSource:
    """Batches with everything that any stage needs; samples are noise."""
    rng = torch.Generator().manual_seed(seed)

    def latents() -> Tensor:
        return torch.randn(4, *placed.latent_shape, generator=rng)

    real, pairs = RealSamples(prompts, latents()), PairSamples(prompts, latents(), latents())
    return BatchSource(placed, prompts, real, seed, TeacherSamples(prompts, latents(), latents()), pairs, ranks)


def run_stages(recipe: Recipe, state: TrainState, source: BatchSource) -> list[dict[str, float]]:
    """One iteration of every stage; the scalars of each."""
    return [iteration(state, stage, source.next(stage), 0.0) for stage in recipe.stages if stage.steps]
