"""The state of a run between iterations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from instep.data.prompt import Prompt
from instep.diffusion.bands import WHOLE, Band
from instep.diffusion.path import Path
from instep.diffusion.prediction import Denoiser
from instep.methods.latent_reward_model import LatentReward
from instep.methods.recipe import AdamWConfig

RewardFn = Callable[[Tensor, Sequence[Prompt]], Tensor]


class TrainedParams:
    """A role that is trained: its parameters, optimiser and, with `ema`, its averaged copy."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], optim: AdamWConfig, ema: float | None = None) -> None:
        self.parameters, self.optim, self.decay = dict(parameters), optim, ema
        values = list(self.parameters.values())
        self.optimizer = torch.optim.AdamW(values, lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay, fused=True)
        self.ema = {key: p.detach().clone() for key, p in self.parameters.items()} if ema is not None else None
        self.steps = 0

    def step(self, lr: float, optim: AdamWConfig | None = None) -> tuple[float, bool]:
        """Clips the gradient, steps (with the settings `optim`; None: its own), updates the average and clears the gradient.

        Returns the gradient's norm and whether it was finite; a step with a gradient that is not finite is skipped.
        """
        optim = optim or self.optim
        values = list(self.parameters.values())
        norm = nn.utils.clip_grad_norm_(values, optim.clip)
        finite = bool(norm.isfinite())
        if finite:
            for group in self.optimizer.param_groups:
                group |= {"lr": lr, "betas": optim.betas, "weight_decay": optim.weight_decay}
            self.optimizer.step()
            self.steps += 1
            self._average()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm), finite

    @torch.no_grad()
    def _average(self) -> None:
        if self.ema is None or self.decay is None:
            return
        # a young average forgets its start sooner: after n steps its horizon is at most n / 10 steps
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(list(self.ema.values()), [p.detach() for p in self.parameters.values()], 1 - decay)


@dataclass
class TrainState:
    """The state of a run between iterations. `reward_fn` maps latents [B, ...] and prompts to rewards [B], or is None; `reward_grad_fn` does the same
    with a graph, if the reward is differentiable.

    Several rewards give [B, R] and are weighted by `weights`. `reward_variance` is the running mean of each reward's within-group variance: the
    scale of advantages in stages that share one. `reference` holds the parameters of the role of that name, in the student's order, and
    `reference_stage` the stage at whose beginning they were copied from the student. `average` holds those of the role of that name, which follows
    the student's running average; `latent_reward` is the latent reward model.

    `boundary` is the level between two experts, and `bands` are the bands of the trained experts; a model of one network has one band of all levels.
    """

    roles: Mapping[str, Denoiser]
    trained: Mapping[str, TrainedParams]
    path: Path
    shape: tuple[int, ...]
    rng: torch.Generator
    reward_fn: RewardFn | None = None
    reward_grad_fn: RewardFn | None = None
    step: int = 0
    reward_variance: list[float] | None = None
    weights: tuple[float, ...] = (1.0,)
    reference: Sequence[nn.Parameter] = ()
    reference_stage: str | None = None
    average: Sequence[nn.Parameter] = ()
    latent_reward: LatentReward | None = None
    boundary: float | None = None
    bands: tuple[Band, ...] = (WHOLE,)

    def module_of(self, name: str) -> Any:
        """Returns the owner of the parameters in `trained[name]`: a role, or the latent reward model; both have `state` and `load_state`."""
        return self.latent_reward if name == "latent_reward" else self.roles[name]
