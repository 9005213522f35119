"""A Wan pipeline of any published size with random weights, made where it is used, and a case of benchmarks/gpu.py built on it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from gpu_cases import RANK, SMALLEST, SMALLEST_TRANSFORMER, SMALLEST_VAE, Case, Counted, latent_shape, pass_flops, transformer_config
from torch import Tensor

from instep.data.prompt import Prompt, as_prompts
from instep.diffusion.prediction import Condition
from instep.methods.recipe import Recipe, Stage
from instep.methods.term import Batch
from instep.models.borrow import cast
from instep.models.outline import settings_of_size
from instep.models.wan import WanCondition, WanFamily
from instep.recipes.common import Common
from instep.recipes.defaults import with_settings
from instep.recipes.dm_align import dm_align_group
from instep.recipes.dmd import dmd2
from instep.rewards.base import FunctionReward
from instep.rewards.decoded import make_reward_fn
from instep.training.build import make_state
from instep.training.execution import Execution
from instep.training.state import TrainState


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def random_pipeline(model: str, device: torch.device) -> Any:
    """Returns a WanPipeline without text encoder: the transformer in bfloat16 (what diffusers keeps in float32 is), the VAE of Wan 2.1 in float32.

    Weights are drawn on `device` in their own precision; no more memory is taken than they need.
    """
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

    small = model == SMALLEST
    torch.manual_seed(0)
    with device:
        with default_dtype(torch.bfloat16):
            transformer = WanTransformer3DModel(**SMALLEST_TRANSFORMER) if small else WanTransformer3DModel.from_config(transformer_config(model))  # type: ignore[arg-type]
        vae = AutoencoderKLWan(**SMALLEST_VAE) if small else AutoencoderKLWan()  # type: ignore[arg-type]
    cast(transformer, torch.bfloat16)
    return WanPipeline(tokenizer=None, text_encoder=None, vae=vae.eval(), transformer=transformer.eval(), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))


class RandomWan(WanFamily):
    """The family of a random pipeline, with random texts of `text_tokens` tokens; it counts the rows that go through its networks.

    `counted[adapted]`: with or without an adapter in the network.
    """

    text_tokens = 512

    def __init__(self, pipe: Any, case: Case) -> None:
        super().__init__(pipe, case.size, name=f"random-{case.model}")
        self.text_tokens = case.text_tokens
        self.counted: dict[bool, Counted] = defaultdict(Counted)

    def encode(self, prompts: Sequence[Prompt | str]) -> WanCondition:
        text = torch.randn(len(prompts), self.text_tokens, self.pipe.transformer.config.text_dim, generator=torch.Generator().manual_seed(0))
        return WanCondition(text=text.to(self.device), bias=torch.zeros(text.shape[:2], device=self.device))

    def unconditional(self, prompts: Sequence[Prompt | str]) -> WanCondition:
        cond = self.encode(prompts)
        return WanCondition(text=cond.text.flip(1), bias=cond.bias)

    def blank(self, n: int) -> tuple[WanCondition, WanCondition]:
        texts = self.encode([""] * n)
        return texts, texts

    def forward(self, module: Any, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        adapted = bool(getattr(module.blocks[0].attn1.to_q, "active_adapters", ()))
        backward = torch._C._current_graph_task_id() != -1
        seen = Counted(again=len(x_t)) if backward else Counted(graph=len(x_t)) if torch.is_grad_enabled() else Counted(plain=len(x_t))
        self.counted[adapted] += seen
        return super().forward(module, x_t, t, cond)


@dataclass(frozen=True)
class Built:
    """A case ready to be trained."""

    case: Case
    family: RandomWan
    execution: Execution
    state: TrainState
    stage: Stage
    batch: Batch

    def flops(self, fused: bool = True) -> dict[str, float]:
        """Model and hardware FLOPs of what was computed since the last call."""
        a_pass = pass_flops(self.family.pipe.transformer.config, self.family.latent_shape, self.case.text_tokens)
        rows = dict(self.family.counted)
        self.family.counted.clear()
        return {
            "model": sum(a_pass.model(counted, adapted) for adapted, counted in rows.items()),
            "hardware": sum(a_pass.hardware(counted, adapted, self.case.checkpointing, fused) for adapted, counted in rows.items()),
        }


def execution_of(case: Case, device: torch.device) -> Execution:
    return Execution(
        str(device),
        "bfloat16",
        case.micro_batch,
        checkpointing="on" if case.checkpointing else "off",
        offload=case.offload,
        compile=case.compile,
        attention=case.attention,
    )


def build(case: Case, device: torch.device) -> Built:
    """Builds the networks, roles and optimisers of a case as a run does; the reward is the mean brightness of the decoded samples."""
    execution = execution_of(case, device)
    family = execution.place(RandomWan(random_pipeline(case.model, torch.device("cpu") if case.offload else device), case))
    assert isinstance(family, RandomWan) and family.latent_shape == latent_shape(case)
    reward = FunctionReward(lambda media, prompts: media.mean((1, 2, 3, 4)), "brightness")
    recipe = recipe_of(case)
    (stage,) = recipe.stages
    state = make_state(recipe, family, 0, make_reward_fn(family, reward), execution=execution)
    prompts = as_prompts([f"random text {i}" for i in range(case.batch // stage.group)])
    return Built(case, family, execution, state, stage, Batch(prompts, family.encode(prompts), family.unconditional(prompts)))


def recipe_of(case: Case) -> Recipe:
    """The recipe with the model's published settings, in one stage; DM-Align compares all samples of the batch as one group."""
    common = Common() if case.model == SMALLEST else with_settings(Common(), settings_of_size(case.model))
    common = replace(common, batch=case.batch, accumulate=1, critic_updates=case.critic_updates, lora_rank=RANK if case.roles == "lora" else None)
    if case.recipe == "dmd2":
        return dmd2(common, iterations=1)
    return dm_align_group(common, distil=0, iterations=1, group=case.batch, top_n=min(2, case.batch - 1))
