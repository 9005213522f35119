"""How close an iteration is to the passes it cannot avoid, and how many network evaluations it makes.

    python benchmarks/iteration_cost.py

A cycle is one student update and five of the fake, of `dmd2` with four levels. *Unavoidable* are the passes of the same
networks that the algorithm itself needs, each timed alone: the rollout to the exit, the student's forward and backward, one fake
and one stacked teacher evaluation, the fake's forwards and backwards, and the AdamW steps. Process CPU time, medians of interleaved
measurements; one thread. Writes benchmarks/results/iteration_cost.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from random_wan import TEXT_WIDTH, random_transformer

from instep.core.files import write_json
from instep.data.prompt import Prompt, as_prompts
from instep.diffusion.levels import few_step_levels
from instep.diffusion.path import RectifiedFlow
from instep.methods.term import Batch
from instep.models.wan import WanCondition, WanFamily
from instep.recipes.common import Common
from instep.recipes.dmd import dmd2
from instep.training.build import make_state
from instep.training.state import TrainState
from instep.training.step import iteration


class RandomWan(WanFamily):
    """A Wan transformer with random weights and random text: what the time depends on, without a pipeline around it."""

    def __init__(self, width: int, layers: int, latent: tuple[int, ...], tokens: int) -> None:
        self._network = random_transformer(width, layers, latent)
        self.name, self.path, self.latent_shape, self.shift, self.tokens = "random-wan", RectifiedFlow(), latent, 3.0, tokens

    def encode(self, prompts: Sequence[Prompt | str]) -> WanCondition:
        n = len(prompts)
        return WanCondition(text=torch.ones(n, self.tokens, TEXT_WIDTH), bias=torch.zeros(n, self.tokens))

    def unconditional(self, prompts: Sequence[Prompt | str]) -> WanCondition:
        return self.encode(prompts)


def cpu(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def count_evaluations(state: TrainState) -> list[int]:
    """Samples evaluated by any role from now on, appended call by call."""
    seen: list[int] = []
    for role in state.roles.values():
        role.backbone.module.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    return seen


def unavoidable(state: TrainState, batch: Batch, levels: Sequence[float], updates: int, reuse: bool) -> dict[str, Callable[[], object]]:
    """The passes of one cycle, each a function that does just that."""
    n, q = len(batch.prompts), len(levels)
    roles = state.roles
    x, t = torch.randn(n, *state.shape), torch.full((n,), 0.5)
    both = batch.cond.stack(batch.null)

    def rollouts() -> None:
        # samples exit evenly: before its exit a sample needs (q - 1) / 2 evaluations on average
        with torch.no_grad():
            for j in range(1, q):
                rows = slice(0, n * j // q)
                roles["student"](x[rows], t[rows], batch.cond[rows])

    def fresh() -> None:
        for _ in range(updates):
            with torch.no_grad():
                for j in range(1, q + 1):
                    rows = slice(0, n * j // q)
                    roles["student"](x[rows], t[rows], batch.cond[rows])

    def trained(name: str) -> None:
        state.roles[name](x, t, batch.cond).x0.square().mean().backward()

    def step(name: str) -> None:
        state.trained[name].optimizer.step()
        state.trained[name].optimizer.zero_grad(set_to_none=True)

    def predictions() -> None:
        with torch.no_grad():
            roles["teacher"](torch.cat([x, x]), torch.cat([t, t]), both)
            roles["fake"](x, t, batch.cond)

    def critic() -> None:
        for _ in range(updates):
            trained("fake")
            step("fake")

    parts = {
        "rollout": rollouts,
        "student": lambda: (trained("student"), step("student")),
        "teacher and fake": predictions,
        "critic": critic,
    }
    return parts if reuse else parts | {"fresh rollouts": fresh}


def measure(width: int, layers: int, batch_size: int, repeats: int, reuse: bool) -> dict[str, float]:
    family = RandomWan(width, layers, (16, 3, 6, 6), 8)
    recipe = dmd2(Common(batch=batch_size, reuse=reuse, ema=None, condition_on_exit=False))
    state = make_state(recipe, family, 0, None)
    prompts = as_prompts(["a"] * batch_size)
    batch = Batch(prompts, family.encode(prompts), family.unconditional(prompts))
    parts = unavoidable(state, batch, few_step_levels(4, 3.0), 5, reuse)
    stage = recipe.stages[0]

    def cycle() -> None:
        iteration(state, stage, [batch], 0.0)

    cycle(), [part() for part in parts.values()]  # warm-up
    whole, sums = [], []
    for _ in range(repeats):
        whole.append(cpu(cycle))
        sums.append(sum(cpu(part) for part in parts.values()))
    seen = count_evaluations(state)
    cycle()
    ratios = [w / s for w, s in zip(whole, sums, strict=True)]
    return {
        "reuse": reuse,
        "parameters": sum(p.numel() for p in family.pretrained.parameters()),
        "cycle_cpu_s": round(statistics.median(whole), 4),
        "unavoidable_cpu_s": round(statistics.median(sums), 4),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_low": round(min(ratios), 3),
        "ratio_high": round(max(ratios), 3),
        "evaluations_a_sample": sum(seen) / batch_size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for reuse in (True, False):
        rows.append(measure(args.width, args.layers, args.batch, args.repeats, reuse))
        print(json.dumps(rows[-1]), flush=True)
    write_json(Path(__file__).parent / "results" / "iteration_cost.json", rows)


if __name__ == "__main__":
    main()
