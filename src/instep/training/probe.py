"""Probes: metrics of the student's samples for a fixed set of prompts and noise during training. Health checks and plots read them.

A probe has its own generator, so a run draws the same random numbers with and without probes. It may use the training reward
and the monitor, never a held-out classifier.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from instep.core.rows import slices
from instep.data.prompt import Prompt, as_prompts, with_negative
from instep.diffusion.guidance import GuidanceByLevel
from instep.diffusion.noise import randn
from instep.diffusion.prediction import Condition, Denoiser
from instep.diffusion.sampling import Sampling, sample_ode
from instep.models.family import Family
from instep.models.role import shift_of
from instep.rewards.base import Reward, checked_scores, prompts_for

# steps of the teacher's sampler in a probe
TEACHER_STEPS = 25
# different prompts of a run that its probes sample
PROBE_PROMPTS = 12


class Monitor(Protocol):
    """A classifier that no loss uses: returns metrics of media [B, 3, F, H, W] for the texts of their prompts."""

    def metrics(self, media: Tensor, prompts: Sequence[str]) -> dict[str, float]: ...


@runtime_checkable
class ModeMonitor(Monitor, Protocol):
    """A monitor that also counts the modes among samples of open prompts, those that do not determine the kind of sample: reward hacking loses modes first.

    `open_prompts` are sampled `open_copies` times each, beside the probe's own prompts.
    """

    @property
    def open_prompts(self) -> tuple[Prompt | str, ...]: ...

    @property
    def open_copies(self) -> int: ...

    def modes(self, media: Tensor) -> float:
        """Mean number of modes over the open prompts, 1 to `open_copies`; media [prompts * copies, 3, F, H, W], copies of a prompt adjacent."""
        ...


@dataclass(frozen=True)
class Probe:
    """A fixed set of prompts, each sampled `copies` times from one seed; the monitor's open prompts get the negative prompt `negative`."""

    family: Family
    prompts: tuple[Prompt, ...]
    copies: int = 4
    seed: int = 1234
    reward: Reward | None = None
    monitor: Monitor | None = None
    negative: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", as_prompts(self.prompts))

    @torch.no_grad()
    def figures(self) -> set[str]:
        """Names of the metrics of the student's samples that rise or fall with their quality, from a trial on noise."""
        x = randn((1, *self.family.latent_shape), torch.Generator().manual_seed(self.seed), self.family.device)
        names = set(replace(self, copies=1)._measured(x, self.prompts[:1])) - {"train_spread"}
        return names | {"modes"} if isinstance(self.monitor, ModeMonitor) else names

    @torch.no_grad()
    def student(self, denoiser: Denoiser, sampling: Sampling) -> dict[str, float]:
        """Metrics of the student's samples."""

        def generate(cond: Condition, null: Condition, noise: Tensor, rng: torch.Generator) -> Tensor:
            return sampling(denoiser, cond, null, noise, self.family.path, rng)

        metrics = self._measure(generate)
        if isinstance(self.monitor, ModeMonitor):
            copies = self.monitor.open_copies
            names = [prompt for prompt in with_negative(self.monitor.open_prompts, self.negative) for _ in range(copies)]
            x = self._sample(generate, names)
            metrics["modes"] = _mean([self.monitor.modes(self.family.decode(x[rows]).clamp(0, 1)) for rows in self._groups(len(x), copies)])
        return metrics

    def teacher(self, denoiser: Denoiser, guidance: float | GuidanceByLevel, steps: int = TEACHER_STEPS) -> dict[str, float]:
        """The same metrics of the many-step teacher, as the reference for brightness, saturation, motion and diversity; modes are left out for their cost."""

        def generate(cond: Condition, null: Condition, noise: Tensor, rng: torch.Generator) -> Tensor:
            return sample_ode(denoiser, cond, null, noise, steps=steps, path=self.family.path, shift=shift_of(denoiser, self.family), guidance=guidance)

        return self._measure(generate)

    @torch.no_grad()
    def _sample(self, generate: Callable[..., Tensor], names: Sequence[Prompt]) -> Tensor:
        """Latents of `names`, from the probe's seed."""
        rng = torch.Generator().manual_seed(self.seed)
        noise = randn((len(names), *self.family.latent_shape), rng, self.family.device)
        return generate(self.family.encode(names), self.family.unconditional(names), noise, rng)

    def _groups(self, n: int, copies: int) -> list[slice]:
        """The rows that are decoded and measured together: all of them, or where the run bounds its micro-batch those of one prompt."""
        return slices(n, None if self.family.micro_batch is None else copies)

    @torch.no_grad()
    def _measure(self, generate: Callable[..., Tensor]) -> dict[str, float]:
        names = [prompt for prompt in self.prompts for _ in range(self.copies)]
        x = self._sample(generate, names)
        parts = [self._measured(x[rows], names[rows]) for rows in self._groups(len(names), self.copies)]
        return {key: _mean([part[key] for part in parts]) for key in parts[0]}

    def _measured(self, x: Tensor, names: Sequence[Prompt]) -> dict[str, float]:
        """Metrics of latents x [N, ...], all copies of their prompts."""
        raw, bound = self.family.decode(x), self.family.micro_batch
        media = raw.clamp(0, 1)
        metrics = {
            "mean_brightness": float(media.mean()),
            "saturation": float(((raw < -0.05) | (raw > 1.05)).float().mean()),
            "motion": motion(media),
            "diversity": diversity(media, self.copies),
        }
        if self.reward is not None:
            seen = x if self.reward.space == "latent" else media
            scores = torch.cat([checked_scores(self.reward, seen[rows], names[rows]) for rows in slices(len(names), bound)])
            metrics["train_score"] = float(scores.mean())
            # the unit of a rise of the reward, needed because not every stage scores groups of samples
            metrics["train_spread"] = float(scores.reshape(-1, self.copies).std(1, unbiased=False).mean())
        if self.monitor is not None:
            texts = prompts_for(self.monitor, names)
            found = [(len(media[rows]), self.monitor.metrics(media[rows], texts[rows])) for rows in slices(len(names), bound)]
            metrics |= {key: _mean([part[key] for _, part in found], [n for n, _ in found]) for key in found[0][1]}
        return metrics


def _mean(values: Sequence[float], weights: Sequence[int] | None = None) -> float:
    """Mean of values, weighted; a single one is that one."""
    counts = weights or [1] * len(values)
    return values[0] if len(values) == 1 else sum(n * value for n, value in zip(counts, values, strict=True)) / sum(counts)


# the teacher's metrics on a probe under a guidance, where they were measured before; None where they were not
KnownTeacher = Callable[[Probe, float | GuidanceByLevel], Mapping[str, float] | None]


def few_of(prompts: Sequence[Prompt], n: int) -> tuple[Prompt, ...]:
    """Returns up to n different prompts, evenly spaced over the list, since neighbours in a list are often variations of one prompt."""
    different = tuple(dict.fromkeys(prompts))
    return different if len(different) <= n else tuple(different[i * len(different) // n] for i in range(n))


def motion(media: Tensor) -> float:
    """Mean absolute difference of consecutive frames, in [0, 1]; 0 for images."""
    if media.ndim < 5 or media.shape[2] < 2:
        return 0.0
    return float((media[:, :, 1:] - media[:, :, :-1]).abs().mean())


def diversity(media: Tensor, copies: int) -> float:
    """Mean root-mean-square distance between samples of the same prompt, in [0, 1]; 0 if they are identical."""
    if copies < 2:
        return 0.0
    groups = media.flatten(1).reshape(-1, copies, media[0].numel())
    distance = torch.cdist(groups, groups) / media[0].numel() ** 0.5
    return float(distance.sum() / (len(groups) * copies * (copies - 1)))
