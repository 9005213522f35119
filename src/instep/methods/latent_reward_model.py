"""DOLLAR's latent reward model: a small network that imitates any reward of the decoded sample, on the latent (Section 3.4, Tables 11 to 13).

Its gradient needs neither decoder nor reward model, and the reward itself may be anything: a file's size, a command, a server.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor, nn

from instep.core.ranks import ALONE, Ranks
from instep.diffusion.prediction import Condition
from instep.diffusion.transfer import constants, widest

Kind = Literal["image", "text-image", "video", "text-video"]
Frames = Literal["average", "volume"]
WIDTH = 128
# number of labels that the reward's mean and deviation are estimated from
SETTLE = 512


class LatentReward(nn.Module):
    """Base: `rate(x, cond)` of latents [B, ...] is [B], the standardised reward; its mean and deviation are estimated from the first labels.

    Rewards are standardised because they come in any unit: a file's size in kilobytes and a log-probability then have forces of equal size, and several
    `rewards` count by their weights.
    """

    total: Tensor
    square: Tensor
    seen: Tensor

    def __init__(self, rewards: int = 1) -> None:
        super().__init__()
        # sums over labels, in double where there is one: a mean of a million and a deviation of one must not drown in rounding
        for name, size in (("total", rewards), ("square", rewards), ("seen", 1)):
            self.register_buffer(name, torch.zeros(size, dtype=torch.float64))

    def on(self, device: torch.device) -> Self:
        """Itself, moved to a device, with its sums in the widest dtype there: in float32 a deviation below 1e-3 of the mean counts as none."""
        for name in ("total", "square", "seen"):
            setattr(self, name, getattr(self, name).to(widest(device)))
        return self.to(device)

    def rate(self, x: Tensor, cond: Condition) -> Tensor:
        raise NotImplementedError

    @property
    def mean(self) -> Tensor:
        """Of each reward, [R]."""
        return self.total / self.seen.clamp(min=1)

    @property
    def variance(self) -> Tensor:
        """Of each reward, [R]; 0 while all labels were alike but for rounding."""
        variance = self.square / self.seen.clamp(min=1) - self.mean.square()
        return torch.where(variance > (1e-12 if variance.dtype == torch.float64 else 1e-6) * self.mean.square(), variance, torch.zeros_like(variance))

    @property
    def std(self) -> Tensor:
        """Of each reward, [R]; 1 while all labels were alike."""
        return torch.where(self.variance > 0, self.variance.sqrt(), torch.ones_like(self.variance))

    def standard(self, reward: Tensor, weights: Sequence[float] = (1.0,)) -> Tensor:
        """Rewards [B] or [B, R], each in deviations from its mean, weighted and added: [B]."""
        each = reward[:, None] if reward.ndim == 1 else reward
        return (((each.to(self.total) - self.mean) / self.std) @ constants(weights, self.mean)).to(reward)

    @torch.no_grad()
    def settle(self, reward: Tensor, ranks: Ranks = ALONE) -> None:
        """Updates mean and deviation from rewards [B] or [B, R] of all ranks until there are enough labels and they differ; later ones are ignored."""
        counts = ((self.seen < SETTLE) | (self.variance <= 0).any()).to(self.total)
        each = (reward[:, None] if reward.ndim == 1 else reward).to(self.total)
        total, square = ranks.parts * ranks.mean(torch.stack([each.sum(0), each.square().sum(0)]))
        self.total += counts * total
        self.square += counts * square
        self.seen += counts * len(each) * ranks.parts

    def state(self) -> dict[str, Tensor]:
        """Parameters, mean and deviation."""
        return {key: value.detach() for key, value in self.state_dict().items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state`. Raises ValueError if the saved model has another kind or size."""
        own = self.state_dict()
        wrong = [key for key in own.keys() | state.keys() if key not in own or key not in state or own[key].shape != state[key].shape]
        if wrong:
            raise ValueError(
                f"latent_reward: {sorted(wrong)[0]} of the saved latent reward model does not fit this one; start from a run with the same --kind and --frames"
            )
        self.load_state_dict({key: state[key] for key in own})


class ConvLatentReward(LatentReward):
    """Tables 12 and 13: two strided convolutions with group norm, pooling, one more layer; with text, attention of the pooled features over its tokens.

    A latent [B, C, H, W], or [B, C, F, H, W] frame by frame with the mean taken over frames; `volume` reads frames together with 3-D
    convolutions (the paper's experiments take the mean over frames). Deviations from Table 13: the text keeps its tokens and the image features are added
    to what was attended to, with SiLU before the last layer. As printed, one pooled token gives a softmax of 1, and the image would drop out of the score.
    """

    def __init__(self, channels: int, *, text_width: int | None = None, volume: bool = False, patch: int = 4, rewards: int = 1) -> None:
        super().__init__(rewards)
        self.volume = volume
        conv: type[nn.Module] = nn.Conv3d if volume else nn.Conv2d
        pool = nn.AdaptiveAvgPool3d if volume else nn.AdaptiveAvgPool2d
        kernel, stride = ((3, 4, 4), (1, patch, patch)) if volume else (4, patch)
        self.features = nn.Sequential(
            conv(channels, WIDTH, kernel, stride, padding=1),
            nn.GroupNorm(32, WIDTH),
            nn.SiLU(),
            conv(WIDTH, WIDTH, 3, 2, padding=1),
            nn.GroupNorm(32, WIDTH),
            nn.SiLU(),
            pool(1),
            conv(WIDTH, WIDTH, 1),
            nn.Flatten(),
        )
        self.text = None if text_width is None else nn.Sequential(nn.Linear(text_width, WIDTH, bias=False), nn.LayerNorm(WIDTH))
        if text_width is not None:
            self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, 1)

    def rate(self, x: Tensor, cond: Condition) -> Tensor:
        frames = 1
        if x.ndim == 5 and not self.volume:
            frames, x = x.shape[2], x.movedim(2, 1).flatten(0, 1)
        h = self.features(x.float())
        if self.text is not None:
            tokens, there = cond.tokens()
            h = nn.functional.silu(h + self._attend(h, tokens.repeat_interleave(frames, 0), there.repeat_interleave(frames, 0)))
        return self.out(h).reshape(-1, frames).mean(1)

    def _attend(self, h: Tensor, tokens: Tensor, there: Tensor) -> Tensor:
        """Softmax(Q(e_x) K(e_c)^T / sqrt(width)) V(e_c) over the tokens [B, L, D] that are `there` [B, L] (Table 11 has no scale)."""
        assert self.text is not None
        text = self.text(tokens.float())
        logits = torch.einsum("bd,bld->bl", self.query(h), self.key(text)) / WIDTH**0.5
        weights = logits.masked_fill(~there, -torch.inf).softmax(1)
        return torch.einsum("bl,bld->bd", weights, self.value(text))


@dataclass(frozen=True)
class LatentRewardShape:
    """Which latent reward model: its kind (Table 11), whether frames are rated one by one or as a volume, and the size of its first step."""

    kind: Kind = "text-video"
    frames: Frames = "volume"
    patch: int | None = None

    def __post_init__(self) -> None:
        if self.patch is not None and self.patch < 1:
            raise ValueError(f"patch: {self.patch} is not allowed; 1 or more (the paper's first layer strides by 4), or none to choose by the latent's size")

    def build(self, latent_shape: tuple[int, ...], cond: Condition, rewards: int = 1) -> ConvLatentReward:
        """The network for latents of `latent_shape`, prompts encoded like `cond` and as many rewards; ValueError for a kind that does not fit them."""
        video = len(latent_shape) == 4
        if self.kind.endswith("video") != video:
            raise ValueError(
                f"kind: {self.kind!r} does not fit this model, whose latents are {'videos' if video else 'images'} {latent_shape}; "
                f"use {'text-video or video' if video else 'text-image or image'}"
            )
        width = cond.tokens()[0].shape[-1] if self.kind.startswith("text") else None
        # the paper's stride of 4 leaves 6 x 10 of its latents; of a small one it would leave nothing
        patch = self.patch or (4 if min(latent_shape[-2:]) >= 16 else 2)
        return ConvLatentReward(latent_shape[0], text_width=width, volume=video and self.frames == "volume", patch=patch, rewards=rewards)
