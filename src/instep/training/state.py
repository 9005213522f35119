"""The state of a run between iterations."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from instep.core.ranks import ALONE, Ranks
from instep.core.shards import assign, is_divided, local, total_norm
from instep.data.prompt import Prompt
from instep.diffusion.bands import WHOLE, Band
from instep.diffusion.path import Path
from instep.diffusion.prediction import Denoiser
from instep.methods.latent_reward_model import LatentReward
from instep.methods.role_config import AdamWConfig
from instep.training.hold import Held
from instep.training.low_bit import adamw8bit

RewardFn = Callable[[Tensor, Sequence[Prompt]], Tensor]


class TrainedParams:
    """A role that is trained: its parameters, optimiser and, with `ema`, its averaged copy.

    A parameter in less than float32 has a *master* copy in float32, which the optimiser steps and the average follows; the network gets it rounded. At small
    learning rates a step is less than the spacing of bfloat16 numbers, and would be lost. Gradients are added up in float32 too. `host`: masters, moments
    and average are kept and stepped in host memory, and only the network is on the device. `low_bit`: the moments are kept in 8 bit (`low_bit.py`).

    Of a sharded network parameters, masters, moments and averages are DTensors, divided among `ranks`; those that each rank has whole (norms in float32, heads)
    have replicated masters around the same memory.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        optim: AdamWConfig,
        ema: float | None = None,
        *,
        host: bool = False,
        low_bit: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        self.parameters, self.optim, self.decay, self.ranks = dict(parameters), optim, ema, ranks
        mesh = next((p.device_mesh for p in self.parameters.values() if isinstance(p, DTensor)), None)
        self.masters = {key: _replicated(_master(p, host), mesh) for key, p in self.parameters.items()}
        self._rounded = [(p, self.masters[key]) for key, p in self.parameters.items() if self.masters[key] is not p]
        for p, master in self._rounded:
            p.register_post_accumulate_grad_hook(partial(_hand_over, master=master))
        values, self.low_bit = list(self.masters.values()), low_bit
        self.optimizer: torch.optim.Optimizer
        if low_bit:
            self.optimizer = adamw8bit(values, optim.lr, optim.betas, optim.weight_decay)
        else:
            self.optimizer = torch.optim.AdamW(values, lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay, fused=True)
        self.ema = {key: p.detach().clone() for key, p in self.masters.items()} if ema is not None else None
        self.steps = 0
        self.tried = 0  # calls of `step`, whose gradient may not have been finite
        # where networks take turns on a device: takes the one that is there home, before weights are exchanged
        self.at_home: Callable[[], None] = lambda: None
        # frees what is still whole of a sharded network, before its weights change
        self.free: Callable[[], None] = lambda: None
        # swaps weights and averages of divided parameters, on all ranks
        self.exchange: Callable[[], None] = self.exchange_shards

    def step(self, lr: float, optim: AdamWConfig | None = None) -> tuple[Tensor, Tensor]:
        """Clips the gradient, steps (with the settings `optim`; None: its own) and clears the gradient.

        Returns two scalar tensors: the gradient's norm, and whether it was finite. A step with a gradient that is not finite changes nothing. The caller
        passes the second one to `settle`, where there is an average before the next step.
        """
        self.tried += 1
        optim = optim or self.optim
        self.free()
        gradients = [p.grad for p in self.masters.values() if p.grad is not None]
        norm = total_norm(gradients, self.ranks)
        factor = (optim.clip / (norm + 1e-6)).clamp(max=1)
        # most gradients are short enough; what is in host memory is read without waiting
        if gradients and not (factor.device.type == "cpu" and factor == 1):
            torch._foreach_mul_([local(g) for g in gradients], factor)
        finite = norm.isfinite()
        for group in self.optimizer.param_groups:
            group |= {"lr": torch.tensor(lr) if self.low_bit else lr, "betas": optim.betas, "weight_decay": optim.weight_decay}
        if not self.low_bit:
            # the fused kernel looks at it on the device and then leaves weights and moments alone
            self.optimizer.found_inf = (~finite).to(torch.float32)  # type: ignore[attr-defined]
            self.optimizer.step()
        elif bool(finite):  # waits for the device: torchao's step has no such flag
            self.optimizer.step()
        self.round()
        self.optimizer.zero_grad(set_to_none=True)
        return norm, finite

    def settle(self, finite: bool) -> None:
        """Counts the last step and moves the average towards the weights, if the step was taken."""
        if finite:
            self.steps += 1
            self._average()

    @torch.no_grad()
    def round(self) -> None:
        """Gives the network its masters, rounded."""
        apart = [(p, local(master)) for p, master in self._rounded if local(master).data_ptr() != p.data_ptr()]
        if apart:
            torch._foreach_copy_([p for p, _ in apart], [master for _, master in apart])

    @torch.no_grad()
    def exchange_shards(self) -> None:
        """Swaps weights and average of the parameters that are divided, a tensor at a time."""
        self.free()
        for key, p in self.parameters.items():
            if self.ema is not None and is_divided(p):
                mine, mean = local(p), local(self.ema[key])
                kept = mine.clone()
                mine.copy_(mean)
                mean.copy_(kept)

    def even_out(self) -> None:
        """Gives each parameter a gradient that has one on another rank: of two experts the samples of a rank may need one alone."""
        there = self.ranks.any_of(torch.tensor([p.grad is not None for p in self.masters.values()]))
        for p, has in zip(self.masters.values(), there.tolist(), strict=True):
            if has and p.grad is None:
                p.grad = torch.zeros_like(p)

    def to_average(self) -> list[Tensor]:
        """The gradients of which each rank has the mean over its own samples; those of divided parameters are means over all already."""
        return [local(p.grad) for p in self.masters.values() if p.grad is not None and not is_divided(p)]

    @torch.no_grad()
    def _average(self) -> None:
        if self.ema is None or self.decay is None:
            return
        # a young average forgets its start sooner: after n steps its horizon is at most n / 10 steps
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_([local(x) for x in self.ema.values()], [local(p.detach()) for p in self.masters.values()], 1 - decay)

    def state(self) -> dict[str, Tensor]:
        """The masters."""
        return {key: p.detach() for key, p in self.masters.items()}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes masters whose names and shapes are right, and rounds the network's weights from them."""
        self.free()
        for key, p in self.masters.items():
            assign(p, state[key])
        self.round()


def _master(p: nn.Parameter, host: bool) -> nn.Parameter:
    """The parameter that is stepped: the network's own, or a copy in float32, or one in host memory."""
    wide = p.dtype in (torch.float32, torch.float64)
    if wide and not host:
        return p
    copied = p.detach().to(device="cpu" if host and not p.is_meta else p.device, dtype=p.dtype if wide else torch.float32, copy=True)
    return nn.Parameter(copied)


def _replicated(master: nn.Parameter, mesh: Any) -> nn.Parameter:
    """A parameter that each rank has whole as a DTensor around the same memory: an optimiser's fused step takes DTensors or plain tensors, not both."""
    if mesh is None or isinstance(master, DTensor):
        return master
    return nn.Parameter(DTensor.from_local(master.detach(), mesh, [Replicate()], run_check=False))


def _hand_over(p: nn.Parameter, master: nn.Parameter) -> None:
    """Adds a parameter's gradient to its master's as soon as it is there, so that the network's own gradients never exist all at once."""
    assert p.grad is not None
    gradient = p.grad.to(local(master))
    if isinstance(master, DTensor):
        gradient = DTensor.from_local(gradient, master.device_mesh, master.placements, run_check=False)
    if master.grad is None:
        master.grad = gradient
    else:
        master.grad += gradient
    p.grad = None


@dataclass(frozen=True)
class NormRatio:
    """Running means of the norms of matching's gradient (with its weight) and of a term's own (without).

    The mean is that of all measurements up to `HORIZON`, and from then on an exponential one of that horizon.
    """

    matching: float = 0.0
    own: float = 0.0
    count: int = 0

    HORIZON: ClassVar[int] = 5

    @property
    def value(self) -> float:
        """The weight at which both gradients have one norm; 0 as long as the term had no gradient."""
        return self.matching / self.own if self.own > 0 else 0.0

    def moved(self, matching: float, own: float) -> NormRatio:
        """The means after one more measurement; the same if it is not finite."""
        if not (math.isfinite(matching) and math.isfinite(own)):
            return self
        count = min(self.count + 1, self.HORIZON)
        return NormRatio(self.matching + (matching - self.matching) / count, self.own + (own - self.own) / count, count)


@dataclass
class TrainState:
    """The state of a run between iterations. `reward_fn` maps latents [B, ...] and prompts to rewards [B], or is None; `reward_grad_fn` does the same
    with a graph, if the reward is differentiable.

    Several rewards give [B, R] and are weighted by `weights`. `reward_variance` is the running mean of each reward's within-group variance: the
    scale of advantages in stages that share one. `reference` holds the parameters of the role of that name, in the student's order, and
    `reference_stage` the stage at whose beginning they were copied from the student. `average` holds those of the role of that name, which follows
    the student's running average; `latent_reward` is the latent reward model.

    `device` is where samples and networks are; the generator `rng` is on the host.

    `ratios` are those of terms whose weight is a share of matching's gradient, by stage and term; `hold` is the state of the controller
    that moves the weights of all reward terms, where figures are held. `ranks` are the processes that share the run: each has the same state, or with `sharded`
    its part of each network and the same rest.

    `micro_batch` is the most rows that go through a network at once (None: any number), for what is computed for several updates together.

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
    reward_variance: list[Tensor] | None = None
    weights: tuple[float, ...] = (1.0,)
    reference: Sequence[nn.Parameter] = ()
    reference_stage: str | None = None
    average: Sequence[nn.Parameter] = ()
    latent_reward: LatentReward | None = None
    boundary: float | None = None
    bands: tuple[Band, ...] = (WHOLE,)
    device: torch.device = torch.device("cpu")
    ratios: dict[str, NormRatio] = field(default_factory=dict)
    hold: Held = Held()
    ranks: Ranks = ALONE
    sharded: bool = False
    micro_batch: int | None = None

    @property
    def multiplier(self) -> float:
        """The factor on the weights of all reward terms."""
        return self.hold.multiplier

    def module_of(self, name: str) -> Any:
        """Returns the owner of the parameters in `trained[name]`: a role, or the latent reward model; both have `state` and `load_state`."""
        return self.latent_reward if name == "latent_reward" else self.roles[name]
