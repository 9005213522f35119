"""A reward on some frames only, as varied in DOLLAR's Table 10: memory and cost grow with the number of scored frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from instep.data.prompt import Prompt
from instep.rewards.base import Reward, check_prompts, checked_scores
from instep.rewards.samples import evenly_spaced
from instep.rewards.several import Several


@dataclass(frozen=True)
class SampledFrames:
    """`reward` on k evenly spaced frames of a video, from the first to the last (the middle one for k = 1). It is differentiable if `reward` is.

    `seen_as`: "images" scores each frame as an image [B k, 3, H, W], the score is the mean over frames; "video" scores one short video
    [B, 3, k, H, W], in which motion is faster by the factor of omitted frames.
    """

    reward: Reward
    k: int
    seen_as: Literal["images", "video"] = "images"
    sees_first_frames = True  # its reward then gets the form it takes

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k: {self.k} is not allowed; it is 1 or more frames")
        if self.seen_as not in ("images", "video"):
            raise ValueError(f"seen_as: {self.seen_as!r} is not allowed; use images or video")
        if isinstance(self.reward, Several):
            raise ValueError("reward: several rewards together are not allowed here, each is normalised by itself; sample the frames of each one of them")
        if self.reward.space != "pixel":
            raise ValueError(f"reward: {self.reward.name!r} looks at latents, which have no frames to choose from; give one that looks at pixels")

    @property
    def name(self) -> str:
        return f"{self.reward.name}, {self.k} frames" + (" as a video" if self.seen_as == "video" else "")

    @property
    def differentiable(self) -> bool:
        return self.reward.differentiable

    @property
    def space(self) -> Literal["pixel", "latent"]:
        return self.reward.space

    def check_prompts(self, prompts: Sequence[Prompt | str]) -> None:
        """RewardError for the first prompt that `reward` cannot score."""
        check_prompts(self.reward, prompts)

    def score(self, media: Tensor, prompts: Sequence[Prompt | str]) -> Tensor:
        """[B] of videos [B, 3, F, H, W]."""
        if media.ndim != 5:
            raise ValueError(f"media: shape {tuple(media.shape)} has no frames; videos are [B, 3, F, H, W], and for images the reward needs no wrapper")
        some = media[:, :, evenly_spaced(media.shape[2], self.k)]
        if self.seen_as == "video":
            return checked_scores(self.reward, some, prompts)
        each = checked_scores(self.reward, some.transpose(1, 2).flatten(0, 1), [prompt for prompt in prompts for _ in range(self.k)])
        return each.unflatten(0, (-1, self.k)).mean(1)
