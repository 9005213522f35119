"""What fits DOLLAR's latent reward model to any reward, and what climbs it (Eq. 14, 15)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from instep.terms import Critic, Force, Labels, Need, View


@dataclass(frozen=True, kw_only=True)
class LatentFit(Critic):
    """Trains the latent reward model by regression on the reward of decoded samples: the student's at their exit (one-step predictions), and with
    `real` real ones (Eq. 14). The reward is asked once for each sample, however many `updates` see its score.

    With `others` the student's samples are rated once more, each under the next sample's prompt: where samples mostly are what their prompt says,
    nothing else shows a reward of text and video what the text is for. Not in the paper.
    """

    role: str = "scorer"
    updates: int = 1
    real: bool = True
    others: bool = False

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"labels", "scorer", "real"}) if self.real else frozenset({"labels", "scorer"})

    @property
    def passes(self) -> float:
        return 0.0

    @torch.no_grad()
    def prepare(self, view: View, score: Callable[[Tensor, Sequence[str]], Tensor] | None, note: Callable[[str, Tensor], None]) -> View:
        """The rewards. What the model says of the student's samples before it learns from them goes into the log: it has not seen them."""
        samples, batch, scorer = view.samples, view.batch, view.scorer
        assert score is not None and scorer is not None, "a latent reward model imitates a reward; the run must have one"
        made, prompts = samples.point("exit").x.detach(), [prompt for prompt in batch.prompts for _ in range(samples.group)]
        x, cond, n = made, samples.cond, len(made)
        if self.others:
            x, cond, prompts = torch.cat([x, made]), cond.stack(cond[torch.arange(1, n + 1) % n]), [*prompts, *prompts[1:], prompts[0]]
        if self.real and batch.real is not None:
            x, cond, prompts = torch.cat([x, batch.real]), cond.stack(batch.cond), [*prompts, *batch.prompts]
        each = score(x, prompts).to(x)
        reward = each if each.ndim == 1 else each @ each.new_tensor(view.weights)
        scorer.settle(reward)
        said, meant = scorer.rate(made, samples.cond), scorer.standard(reward[:n])
        note("reward/train", reward[:n].mean())
        note("scorer/error", (said - meant).square().mean())
        note("scorer/correlation", torch.corrcoef(torch.stack([said, meant]))[0, 1].nan_to_num())
        return replace(view, labels=Labels(x, cond, reward))

    def losses(self, view: View) -> Iterator[Tensor]:
        labels, scorer = view.labels, view.scorer
        assert labels is not None and scorer is not None, "the latent reward model needs labelled samples"
        yield (scorer.rate(labels.x, labels.cond) - scorer.standard(labels.reward)).square().mean()


@dataclass(frozen=True, kw_only=True)
class LatentGradient(Force):
    """Gradient with respect to x of -mean R(x) / std(R), R the latent reward model (Eq. 15).

    In deviations of the reward, so that a weight means the same for rewards of any unit; the paper's rewards all lie within 0 to 1.
    """

    name: str = "latent"

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"scorer"})

    def __call__(self, view: View) -> Tensor:
        scorer, samples = view.scorer, view.samples
        assert scorer is not None, "the latent reward model is missing"
        x = samples.point(self.on).x.detach().clone().requires_grad_()
        with torch.enable_grad():
            loss = -scorer.rate(x, samples.cond).mean()
            return torch.autograd.grad(loss, x)[0]
