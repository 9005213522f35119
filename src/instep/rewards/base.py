"""Rewards: anything that scores media for prompts, for example a plain Python function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from instep.core.user_code import line_of
from instep.data.prompt import Prompt, as_prompts, texts_of


class RewardError(ValueError):
    """An error whose message already names the reward, the sample and the fix; it is passed on unchanged."""


@runtime_checkable
class Reward(Protocol):
    """Scores media [B, 3, F, H, W] in [0, 1] for B prompts: [B], higher is better.

    `name` is also the reward's fingerprint: a run resumes only with a reward of the same name. The name contains every setting that changes a score, and
    nothing that differs between processes (no object id, no token). A reward gets the prompts' texts alone; if it has a true `sees_first_frames`, it gets
    `Prompt` values, with the first frames of image-to-video prompts. One that cannot score every prompt has a method `check_prompts(prompts)`, which raises
    RewardError for the first that it cannot; a run calls it before it begins.
    """

    @property
    def name(self) -> str: ...

    @property
    def differentiable(self) -> bool: ...

    @property
    def space(self) -> Literal["pixel", "latent"]: ...

    def score(self, media: Tensor, prompts: Sequence[str]) -> Tensor: ...


@dataclass(frozen=True)
class FunctionReward:
    """A plain function (media, prompts) -> scores as a reward; it is called without gradients unless `differentiable`."""

    function: Callable[[Tensor, Sequence[str]], Any]
    name: str = "reward"
    differentiable: bool = False
    space: Literal["pixel", "latent"] = "pixel"
    sees_first_frames: bool = False

    def __post_init__(self) -> None:
        if self.space not in ("pixel", "latent"):
            raise ValueError(f"space: {self.space!r} of reward {self.name!r} is not allowed; pixel or latent")
        if not isinstance(self.differentiable, bool):
            raise ValueError(f"differentiable: {self.differentiable!r} of reward {self.name!r} is not allowed; True or False")

    def score(self, media: Tensor, prompts: Sequence[str]) -> Tensor:
        return torch.as_tensor(self.function(media, prompts), dtype=torch.float32, device=media.device)


def as_reward(reward: Reward | Callable[[Tensor, Sequence[str]], Any]) -> Reward:
    """Return a reward as it is, and a function, or an object with `score` or `__call__` alone, wrapped as one.

    The object's own attributes (`name`, `differentiable`, `space`, `sees_first_frames`) are kept. Raises ValueError for a class in place of an object
    and for what cannot score.
    """
    if isinstance(reward, type):
        raise ValueError(f"reward: {reward.__name__} is a class; give an object of it, {reward.__name__}(...)")
    if isinstance(reward, Reward):
        return reward
    function = getattr(reward, "score", reward)
    if not callable(function):
        raise ValueError(f"reward: {reward!r} is neither a Reward nor a function (media, prompts) -> scores")
    given = {key: getattr(reward, key) for key in ("differentiable", "space", "sees_first_frames") if hasattr(reward, key)}
    name = next((getattr(reward, key) for key in ("name", "__name__") if hasattr(reward, key)), type(reward).__name__)
    return FunctionReward(function, name=name, **given)


def prompts_for(reader: object, prompts: Sequence[Prompt | str]) -> Sequence[Any]:
    """Prompts in the form that a reward, ranker or monitor takes: `Prompt` values if it has a true `sees_first_frames`, else texts."""
    return as_prompts(prompts) if getattr(reader, "sees_first_frames", False) else texts_of(prompts)


def check_prompts(reward: object, prompts: Sequence[Prompt | str]) -> None:
    """Raises RewardError for the first prompt that a reward with a method `check_prompts` cannot score; other rewards take any prompt."""
    check = getattr(reward, "check_prompts", None)
    if check is not None:
        check(prompts_for(reward, prompts))


def checked_scores(reward: Reward, media: Tensor, prompts: Sequence[Prompt | str]) -> Tensor:
    """Returns scores [B]. Raises RewardError, naming the reward, the first sample and the line of the user's code, if it fails, ends the
    program (sys.exit) or gives a score that is not finite.

    The reward gets a copy of the media in float32 (float64 stays), with their graph: what it changes in place reaches nobody else.
    """
    own = media.to(torch.promote_types(media.dtype, torch.float32), copy=True)
    try:
        scores = reward.score(own, prompts_for(reward, prompts))
    except RewardError:
        raise
    except (Exception, SystemExit) as error:
        raise RewardError(
            f"reward {reward.name!r} raised {type(error).__name__}: {' '.join(str(error).split())}{line_of(error)}. It was given media {tuple(media.shape)} in "
            f"[0, 1] and {len(prompts)} prompts, the first {str(prompts[0])!r}; call it on such a batch by itself to find the cause"
        ) from error
    if not isinstance(scores, Tensor) or tuple(scores.shape) != (len(prompts),):
        got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise RewardError(f"reward {reward.name!r} returned {got} for {len(prompts)} samples; it returns one number a sample, shape ({len(prompts)},)")
    bad = (~scores.isfinite()).nonzero().flatten()
    if len(bad):
        i = int(bad[0])
        raise RewardError(
            f"reward {reward.name!r} returned {float(scores[i])} for {len(bad)} of {len(prompts)} samples, first for prompt {str(prompts[i])!r} "
            f"(sample {i} of the batch); every score is a finite number"
        )
    return scores
