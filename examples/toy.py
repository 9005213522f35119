"""The whole idea on a plane: a teacher that is known exactly, a student of one step, a fake that follows it, a reward, and a picture.

    python examples/toy.py            # under a minute on one core; writes toy.png

The teacher needs many steps to turn noise into one of eight spots. The student has one step. Whatever acts on its samples is a *force*: dL/dx, a tensor
shaped like the samples x, which is descended. Here are two. `Match` moves samples to where the teacher's density is higher than the student's own, and
`Climb` moves them to where a reward is higher. One iteration adds them, and calls autograd once on the samples.
"""

from __future__ import annotations

import argparse
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor

from instep import AdamWConfig, Force, Recipe, RoleConfig, RolloutConfig, Stage, View, as_force
from instep.diffusion.path import RectifiedFlow
from instep.diffusion.sampling import sample_ode
from instep.lab.mixture import ExactTeacher, Mixture, labels
from instep.lab.networks import VelocityMLP
from instep.methods.critics import FakeScoreLoss
from instep.methods.term import Batch
from instep.training.state import TrainedParams, TrainState
from instep.training.step import iteration

BATCH = 256
PATH = RectifiedFlow()  # x_t = (1 - t) x_0 + t noise: t = 1 is noise
MIXTURE = Mixture.ring()  # eight narrow Gaussians on a circle; prompt "0" asks for the upper four, "1" for the lower four


def reward(x: Tensor) -> Tensor:
    """Prefer the right half: scores [B] between 0 and 1 of samples [B, 2]."""
    return torch.sigmoid(2 * x[:, 0])


@dataclass(frozen=True, kw_only=True)
class Match(Force):
    """Distribution matching (DMD): noise the samples, and compare where teacher and fake say they came from."""

    name: str = "match"

    @torch.no_grad()
    def __call__(self, view: View) -> Tensor:
        x, cond = view.samples.point("exit").x, view.samples.cond
        t = 0.02 + 0.96 * view.rand(len(x))
        x_t = view.path.renoise(x, view.randn_like(x), t)
        real, fake = view.roles["teacher"](x_t, t, cond).x0, view.roles["fake"](x_t, t, cond).x0
        # the teacher's estimate minus the fake's points along the difference of their scores; a force is descended, so its sign is the other one
        return as_force((fake - real) / (x - real).abs().mean(1, keepdim=True))


@dataclass(frozen=True, kw_only=True)
class Climb(Force):
    """The gradient of a reward: the loss is minus its mean over the batch."""

    name: str = "climb"

    def __call__(self, view: View) -> Tensor:
        x = view.samples.point("exit").x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(-reward(x).mean(), x)
        return gradient


def recipe(iterations: int) -> Recipe:
    """First match alone, then match and climb together: two stages of a one-step student and a fake that takes five steps for each of its own."""
    optim = AdamWConfig(2e-3, betas=(0.5, 0.99), decay=0.6)
    fake, rollout = (FakeScoreLoss(updates=5),), RolloutConfig((1.0,))
    return Recipe(
        "toy",
        levels=(1.0,),
        roles={"student": RoleConfig(optim), "fake": RoleConfig(optim), "teacher": RoleConfig()},
        stages=(
            Stage("distil", iterations, BATCH, (Match(),), fake, rollout),
            Stage("align", iterations // 2, BATCH, (Match(), Climb(weight=2.0)), fake, rollout),
        ),
    )


def pretrained(steps: int, rng: torch.Generator) -> VelocityMLP:
    """A small network that learns the mixture by flow matching: what student and fake begin as."""
    net = VelocityMLP(PATH)
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(steps):
        cond = prompts(BATCH, rng).cond
        x0 = MIXTURE.sample(cond.label, rng)
        noise, t = torch.randn(BATCH, 2, generator=rng), torch.rand(BATCH, generator=rng)
        loss = (net(PATH.renoise(x0, noise, t), t, cond).v - (noise - x0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net


def prompts(n: int, rng: torch.Generator) -> Batch:
    """n prompts, "0" or "1", as a batch: encoded, and beside them the empty prompt that guidance would need."""
    names = tuple(str(int(c)) for c in torch.randint(2, (n,), generator=rng))
    return Batch(names, labels(names), labels([""] * n))


def train(iterations: int, seed: int = 0) -> dict[str, Tensor]:
    """Train the toy; samples [N, 2] of the teacher, of the student before it was trained, and after each stage."""
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    start, what = pretrained(2 * iterations, rng), recipe(iterations)
    roles = {"student": start, "fake": deepcopy(start), "teacher": ExactTeacher(MIXTURE, PATH)}
    trained = {name: TrainedParams(roles[name].trainable(), config.optim) for name, config in what.roles.items() if config.optim}
    state = TrainState(roles, trained, PATH, (2,), rng)
    seen, noise = prompts(1000, torch.Generator().manual_seed(1)), torch.randn(1000, 2, generator=torch.Generator().manual_seed(2))

    def student() -> Tensor:
        with torch.no_grad():
            return roles["student"](noise, torch.ones(len(noise)), seen.cond).x0

    samples = {
        "teacher, 40 steps": sample_ode(roles["teacher"], seen.cond, seen.null, noise, steps=40, path=PATH, guidance=1.0),
        "1 step, before": student(),
    }
    while state.step < what.steps:
        stage, progress = what.at(state.step)
        iteration(state, stage, [prompts(BATCH, rng)], progress)
        if state.step in what.stage_ends():
            samples[{"distil": "1 step, distilled", "align": "1 step, and aligned"}[stage.name]] = student()
    return samples


def draw(samples: dict[str, Tensor], file: str) -> None:
    """One panel a model, coloured by reward, with the share of samples within three deviations of a mode and the mean reward."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 * len(samples), 3.4), layout="constrained")
    axes = figure.subplots(1, len(samples))
    for axis, (name, x) in zip(axes, samples.items(), strict=True):
        on_mode = (torch.cdist(x, MIXTURE.means).amin(1) < 3 * MIXTURE.sigma).float().mean()
        axis.scatter(*x.T, s=3, alpha=0.5, c=reward(x), cmap="viridis", vmin=0, vmax=1, linewidths=0)
        axis.scatter(*MIXTURE.means.T, s=260, facecolors="none", edgecolors="0.6")
        axis.set(title=name, xlim=(-3, 3), ylim=(-3, 3), aspect="equal", xticks=[], yticks=[])
        axis.set_xlabel(f"on a mode {on_mode:.0%}, reward {float(reward(x).mean()):.2f}")
    figure.savefig(file, dpi=80)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Distil and align a one-step student on a plane; draw what came of it.")
    parser.add_argument("--iterations", type=int, default=1500, help="student updates of the first stage; the second has half as many")
    parser.add_argument("--out", default="toy.png", help="the picture")
    options = parser.parse_args()
    draw(train(options.iterations), options.out)
    print(f"wrote {options.out}")
