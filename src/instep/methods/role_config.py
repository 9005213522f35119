"""How a role of a recipe is built and trained: its adapter, its optimiser, and what it is conditioned on; and a latent reward model's."""

from __future__ import annotations

from dataclasses import dataclass

from instep.core.numbers import check_number, check_whole
from instep.diffusion.guidance_scales import GuidanceRange
from instep.diffusion.prediction import PredictionType
from instep.methods.latent_reward_model import LatentRewardShape

# the ranks of matrices of the widest networks here end at a few thousand: a larger adapter adds parameters and nothing else
LARGEST_RANK = 2048


@dataclass(frozen=True)
class LoRA:
    """A low-rank adapter in place of a full copy; the effective scale is alpha / rank."""

    rank: int = 32
    alpha: float = 32.0

    def __post_init__(self) -> None:
        check_whole("lora_rank", self.rank, 1, LARGEST_RANK, what=f"1 to {LARGEST_RANK}, 4 to 128 are usual")
        check_number("lora_alpha", self.alpha, 0, open_below=True)


@dataclass(frozen=True)
class AdamWConfig:
    """AdamW for one role, with its learning-rate schedule."""

    lr: float
    """Learning rate."""
    betas: tuple[float, float] = (0.0, 0.999)
    """Decay of the two moments."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    clip: float = 10.0
    """Largest norm of the gradient; larger gradients are scaled down to it."""
    warmup: int = 0
    """Steps over which the learning rate rises from zero, at the start of the run."""
    decay: float = 0.0
    """Last fraction of each stage over which the learning rate falls to zero."""

    def __post_init__(self) -> None:
        check_number("lr", self.lr, 0, open_below=True, what="it is positive and finite")
        for i, beta in enumerate(self.betas):
            check_number(f"betas[{i}]", beta, 0, 1, open_above=True)
        check_number("weight_decay", self.weight_decay, 0)
        check_number("clip", self.clip, 0, open_below=True, what="it is a positive norm; 1e9 never scales a gradient down, and 0 would train nothing")
        check_whole("warmup", self.warmup, 0)
        check_number("decay", self.decay, 0, 1, what="it is the fraction of a stage, between 0 and 1")

    def lr_at(self, step: int, progress: float) -> float:
        """Learning rate at the run's step (0-based) and a stage's progress in [0, 1)."""
        rising = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        falling = min(1.0, (1 - progress) / self.decay) if self.decay else 1.0
        return self.lr * rising * falling


@dataclass(frozen=True)
class RoleConfig:
    """How a role is built: frozen without `optim`, an adapter on the shared backbone with `lora`, else a full copy.

    `copy`: its own copy although it is not trained (a reference). `exits`: the role is conditioned on a sample's exit. `scale`: the default scale of
    its adapter (a teacher's is 0: it is the plain teacher except where a force adapts it). `head`: it has a
    discriminator head. `ema`: decay of an averaged copy (None: no copy). `prediction_type`: the type of its network's output, if it differs from the
    pretrained model's (DOLLAR's heterogeneous student: x0); such a student loads in no stock pipeline and is not exported.
    `guidance_range`: it is conditioned on guidance scales in this range.
    """

    optim: AdamWConfig | None = None
    lora: LoRA | None = None
    copy: bool = False
    exits: bool = False
    scale: float = 1.0
    head: bool = False
    ema: float | None = None
    prediction_type: PredictionType | None = None
    guidance_range: GuidanceRange | None = None

    def __post_init__(self) -> None:
        if self.ema is not None:
            check_number("ema", self.ema, 0, 1, open_above=True, what="a decay lies in [0, 1), or None for no average")


@dataclass(frozen=True)
class LatentRewardConfig:
    """A latent reward model: its shape and its optimiser."""

    shape: LatentRewardShape = LatentRewardShape()
    optim: AdamWConfig = AdamWConfig(1e-3, betas=(0.9, 0.999))
