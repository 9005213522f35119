"""The two sides of benchmarks/side_by_side.py: one training cycle with this package, and one with nvidia-modelopt's fastgen.

Each side is imported in a process of its own and needs no more than its own package, PyTorch and diffusers.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import cycle as endlessly
from typing import Any, Protocol

import torch
from random_wan import TEXT_WIDTH, random_transformer
from torch import Tensor, nn

LATENT = (16, 3, 6, 6)
# the optimiser of this package's recipes, given to both sides
BETAS, WEIGHT_DECAY, CLIP = (0.0, 0.999), 0.0, 10.0
ROLES = ("student", "fake", "teacher")


@dataclass(frozen=True)
class Case:
    """What both sides compute: a transformer of `layers` blocks of `width`, `batch` samples with `tokens` text tokens each, and one update of the student
    with `critic_updates` of the fake, for a student of `levels`. `shift` is that of the re-noise levels in [`low`, `high`], `rank` that of our LoRA roles.
    """

    width: int = 256
    layers: int = 6
    batch: int = 16
    tokens: int = 8
    levels: tuple[float, ...] = (1.0, 0.9, 0.75, 0.5)
    shift: float = 3.0
    low: float = 0.02
    high: float = 0.98
    guidance: float = 3.0
    critic_updates: int = 5
    student_lr: float = 2e-4
    fake_lr: float = 4e-4
    rank: int = 16
    seed: int = 0


class Side(Protocol):
    """One way of training. `modules` are the networks of the roles, `optimizers` those of student and fake."""

    modules: Mapping[str, nn.Module]
    optimizers: Mapping[str, torch.optim.Optimizer]

    def cycle(self) -> dict[str, float]:
        """Trains one cycle. Returns the fake's mean loss and the norm of the student's gradient before clipping."""
        ...


def make_side(case: Case, variant: str) -> Side:
    """Returns the side of that name: `theirs`, or ours with `reused` or `fresh` rollouts or with `lora` roles."""
    torch.manual_seed(case.seed)
    return Theirs(case) if variant == "theirs" else Ours(case, variant)


def texts(case: Case) -> tuple[Tensor, Tensor]:
    """Returns random embeddings of the prompts and of the negative prompts, [batch, tokens, TEXT_WIDTH] each; both sides get the same."""
    rng = torch.Generator().manual_seed(case.seed)
    text, null = (torch.randn(case.batch, case.tokens, TEXT_WIDTH, generator=rng) for _ in range(2))
    return text, null


class Ours:
    """One iteration of the recipe `dmd2`; full copies of student and fake, or adapters on the teacher, and no averaged student."""

    def __init__(self, case: Case, variant: str) -> None:
        from iteration_cost import RandomWan

        from instep.data.prompt import as_prompts
        from instep.diffusion.levels import few_step_levels
        from instep.methods.role_config import AdamWConfig
        from instep.methods.term import Batch
        from instep.models.wan import WanCondition
        from instep.recipes.common import Common
        from instep.recipes.dmd import dmd2
        from instep.training.build import make_state

        assert few_step_levels(len(case.levels), case.shift) == tuple(case.levels)
        family = RandomWan(case.width, case.layers, LATENT, case.tokens)
        student, fake = (AdamWConfig(lr, BETAS, WEIGHT_DECAY, CLIP) for lr in (case.student_lr, case.fake_lr))
        recipe = dmd2(
            Common(
                steps=len(case.levels),
                batch=case.batch,
                guidance=case.guidance,
                shift=case.shift,
                critic_updates=case.critic_updates,
                reuse=variant != "fresh",
                condition_on_exit=False,
                student=student,
                fake=fake,
                ema=None,
                lora_rank=case.rank if variant == "lora" else None,
            )
        )
        self.state, self.stage = make_state(recipe, family, case.seed, None), recipe.stages[0]
        cond, null = (WanCondition(text=text) for text in texts(case))
        self.batch = Batch(as_prompts(["a"] * case.batch), cond, null)
        self.modules = {name: self.state.roles[name].backbone.module for name in ROLES}
        self.optimizers = {name: trained.optimizer for name, trained in self.state.trained.items()}

    def cycle(self) -> dict[str, float]:
        from instep.training.step import iteration

        log = iteration(self.state, self.stage, [self.batch], 0.0)
        return {"fake_loss": log["critic/fake"], "student_gradient": log["grad/student"]}


class Theirs:
    """Losses of fastgen's DMDPipeline in the loop that its documentation describes: the caller owns optimisers, clipping and alternation.

    Backward simulation draws one level for a whole batch, so the cost of a cycle depends on the draw. Here every level is as frequent, as it is in a batch
    of ours: the seed of each call is one that draws the level whose turn it is.
    """

    def __init__(self, case: Case) -> None:
        from modelopt.torch.fastgen import DMDConfig, DMDPipeline, SampleTimestepConfig, create_fake_score

        teacher = random_transformer(case.width, case.layers, LATENT)
        student = copy.deepcopy(teacher).requires_grad_(True)
        times = SampleTimestepConfig(time_dist_type="shifted", shift=case.shift, min_t=case.low, max_t=case.high, t_list=[*case.levels, 0.0])
        config = DMDConfig(
            pred_type="flow",
            fake_score_pred_type="flow",
            guidance_scale=case.guidance,
            sample_t_cfg=times,
            student_sample_steps=len(case.levels),
            student_sample_type="sde",
            backward_simulation=True,
            num_train_timesteps=1000,
            student_update_freq=case.critic_updates,
        )
        fake = create_fake_score(teacher)
        self.case, self.pipeline = case, DMDPipeline(student, teacher, fake, config)
        self.modules = {"student": student, "fake": fake, "teacher": teacher}
        self.parameters = {"student": list(student.parameters()), "fake": list(fake.parameters())}
        rates = {"student": case.student_lr, "fake": case.fake_lr}
        self.optimizers = {
            name: torch.optim.AdamW(values, lr=rates[name], betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True) for name, values in self.parameters.items()
        }
        self.text, self.null = texts(case)
        self.seeds = endlessly(balanced_seeds(len(case.levels), 1 + case.critic_updates))

    def cycle(self) -> dict[str, float]:
        losses = []
        latents, noise = self.draw()
        self.pipeline.compute_student_loss(latents, noise, self.text, negative_encoder_hidden_states=self.null)["total"].backward()
        gradient = self.step("student")
        for _ in range(self.case.critic_updates):
            latents, noise = self.draw()
            loss = self.pipeline.compute_fake_score_loss(latents, noise, self.text)["total"]
            loss.backward()
            losses.append(loss.detach())
            self.step("fake")
        return {"fake_loss": float(torch.stack(losses).mean()), "student_gradient": gradient}

    def draw(self) -> tuple[Tensor, Tensor]:
        """Latents of the right shape, whose values backward simulation does not read, and noise; seeds the next call."""
        noise = torch.randn(self.case.batch, *LATENT)
        torch.manual_seed(next(self.seeds))
        return torch.empty_like(noise), noise

    def step(self, name: str) -> float:
        norm = nn.utils.clip_grad_norm_(self.parameters[name], CLIP)
        self.optimizers[name].step()
        self.optimizers[name].zero_grad(set_to_none=True)
        return float(norm)


def balanced_seeds(levels: int, calls: int) -> list[int]:
    """Returns seeds for 16 rounds of `levels * calls` calls; the first draw of one of `levels` numbers after seeding is 0, 1, .. in turn."""
    found, seed = [], 0
    while len(found) < 16 * levels * calls:
        torch.manual_seed(seed)
        if int(torch.randint(0, levels, (1,))) == len(found) % levels:
            found.append(seed)
        seed += 1
    return found


def timed(side: Side, cycles: int) -> float:
    """Returns the process CPU seconds of a cycle, the mean of `cycles` of them."""
    start = time.process_time()
    for _ in range(cycles):
        side.cycle()
    return (time.process_time() - start) / cycles


def count_passes(side: Side, case: Case, cycles: int) -> dict[str, dict[str, float]]:
    """Returns for each role the calls, and the samples that go forward and backward for one sample of the batch, in a cycle. Roles are full copies."""
    counts = {name: {"calls": 0.0, "forward": 0.0, "backward": 0.0} for name in side.modules}
    hooks = []
    for name, module in side.modules.items():

        def after(module: nn.Module, args: object, output: Any, seen: dict[str, float] = counts[name]) -> None:
            result = output[0]
            seen["calls"] += 1
            seen["forward"] += len(result) / case.batch
            if result.requires_grad:
                result.register_hook(lambda gradient: seen.update(backward=seen["backward"] + len(gradient) / case.batch))

        hooks.append(module.register_forward_hook(after))
    for _ in range(cycles):
        side.cycle()
    for hook in hooks:
        hook.remove()
    return {name: {key: value / cycles for key, value in seen.items()} for name, seen in counts.items()}


def stored_bytes(tensors: Iterable[Tensor]) -> int:
    """Returns the bytes of the tensors' storages, each counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def memory(side: Side) -> dict[str, int]:
    """Returns the bytes of the networks' weights and buffers and of the optimisers' states, after at least one cycle."""
    weights = [t for module in side.modules.values() for t in (*module.parameters(), *module.buffers())]
    states = [t for optimizer in side.optimizers.values() for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    return {"weights": stored_bytes(weights), "optimizer": stored_bytes(states)}
