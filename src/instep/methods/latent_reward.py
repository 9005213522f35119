"""The critic that fits DOLLAR's latent reward model to any reward (Eq. 14), and the force along its gradient (Eq. 15)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from instep.data.prompt import Prompt
from instep.diffusion.transfer import constants, to_match
from instep.methods.term import Critic, Force, Labels, Need, View


@dataclass(frozen=True, kw_only=True)
class LatentFit(Critic):
    """Trains the latent reward model by regression on the reward of decoded samples: the student's at their exit (one-step predictions), and with
    `real` real ones (Eq. 14). The reward is evaluated once an iteration, and all `updates` share its scores; `reward/train` in the log is the
    reward at the exits, including early ones.

    With `others` the student's samples are rated once more, each under the next prompt of the batch: if samples mostly match their prompts, a model
    of text and video needs such mismatches to learn the role of the text. This is not in the paper.
    """

    role: str = "latent_reward"
    updates: int = 1
    real: bool = True
    others: bool = False

    def __post_init__(self) -> None:
        if self.updates < 1:
            raise ValueError(f"latent_reward_updates: {self.updates} is not allowed; 1 or more (the paper: 1), and weight 0 leaves the latent reward model out")

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"labels", "latent_reward", "real"}) if self.real else frozenset({"labels", "latent_reward"})

    @torch.no_grad()
    def prepare(self, view: View, reward_fn: Callable[[Tensor, Sequence[Prompt]], Tensor] | None, note: Callable[[str, Tensor], None]) -> View:
        """Computes the rewards. Also logs the model's predictions for the student's samples before it learns from them, as held-out predictions."""
        samples, batch, latent_reward = view.samples, view.batch, view.latent_reward
        assert reward_fn is not None and latent_reward is not None, "a latent reward model imitates a reward; the run must have one"
        made, prompts, k = samples.point("exit").x.detach(), [prompt for prompt in batch.prompts for _ in range(samples.group)], samples.group
        x, cond, n = made, samples.cond, len(made)
        if self.others and (len(batch.prompts) > 1 or batch.following is not None):
            rolled, last = cond.rolled(k), prompts[:k]
            if batch.following is not None:
                rolled, last = rolled[: n - k].stack(batch.following[1].repeat(k)), [batch.following[0]] * k
            x, cond, prompts = torch.cat([x, made]), cond.stack(rolled), [*prompts, *prompts[k:], *last]
        if self.real and batch.real is not None:
            x, cond, prompts = torch.cat([x, to_match(batch.real, x)]), cond.stack(batch.cond), [*prompts, *batch.prompts]
        reward = to_match(reward_fn(x, prompts), x)
        latent_reward.settle(reward, view.ranks)
        target = latent_reward.standard(reward, view.weights)
        note("reward/train", (reward[:n] if reward.ndim == 1 else reward[:n] @ constants(view.weights, reward)).mean())
        for i in range(reward.shape[1] if reward.ndim > 1 else 0):
            note(f"reward/train/{i}", reward[:n, i].mean())
        predicted, expected = latent_reward.rate(made, samples.cond), target[:n]
        note("latent_reward/error", (predicted - expected).square().mean())
        if n > 1:
            note("latent_reward/correlation", correlation(predicted, expected).nan_to_num())
        return replace(view, labels=Labels(x, cond, target))

    def losses(self, view: View) -> Iterator[Tensor]:
        labels, latent_reward = view.labels, view.latent_reward
        assert labels is not None and latent_reward is not None, "the latent reward model needs labelled samples"
        yield (latent_reward.rate(labels.x, labels.cond) - labels.target).square().mean()


def correlation(x: Tensor, y: Tensor) -> Tensor:
    """Pearson's correlation of two vectors, a scalar tensor; `torch.corrcoef` waits for the device."""
    both = torch.stack([x, y])
    centred = both - both.mean(1, keepdim=True)
    covariance = centred @ centred.T / (len(x) - 1)
    deviation = covariance.diagonal().sqrt()
    return (covariance[0, 1] / deviation[0] / deviation[1]).clamp(-1, 1)


@dataclass(frozen=True, kw_only=True)
class LatentGradient(Force):
    """Gradient with respect to x of -mean R(x) / std(R), R the latent reward model (Eq. 15).

    The unit is the reward's standard deviation, so that a weight has the same effect for rewards of any unit.
    """

    name: str = "latent"

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"latent_reward"})

    def __call__(self, view: View) -> Tensor:
        latent_reward, samples = view.latent_reward, view.samples
        assert latent_reward is not None, "the latent reward model is missing"
        x = samples.point(self.on).x.detach().clone().requires_grad_()
        with torch.enable_grad():
            loss = -latent_reward.rate(x, samples.cond).mean()
            return torch.autograd.grad(loss, x)[0]
