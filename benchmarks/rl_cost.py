"""What an iteration of reinforcement learning costs on the few-step student and on the many-step model, on the embedded default.

    python benchmarks/rl_cost.py      # about five minutes; process CPU time, medians of interleaved repetitions

The same batch, the same reward, one policy gradient (GRPO over all stochastic steps). DMDR's Table 1 says about ten times in favour of the former.
"""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median

import torch

from instep.bundled.worlds import moving_digits
from instep.core.files import write_json
from instep.methods.term import View
from instep.recipes.after import rl_after
from instep.recipes.common import Common
from instep.recipes.dmdr import dmdr
from instep.recipes.many_step import ManySteps, flow_grpo
from instep.rewards.base import as_reward
from instep.rewards.decoded import make_reward_fn
from instep.training.batches import BatchSource
from instep.training.build import make_state
from instep.training.rollouts import roll_out
from instep.training.step import iteration

REPEATS = 3
RECIPES = {
    "policy gradient alone, student of 2 steps": rl_after(Common(steps=2), distil=0, rl="grpo"),
    "policy gradient alone, student of 4 steps": rl_after(Common(steps=4), distil=0, rl="grpo"),
    "joint with matching, student of 4 steps": dmdr(Common(steps=4), warm=0, rl="grpo", weight_unit="raw"),
    "many-step model, 10 guided steps": flow_grpo(ManySteps(steps=10), kl=0.0),
    "many-step model, 25 guided steps": flow_grpo(ManySteps(steps=25), kl=0.0),
}


def main() -> None:
    torch.set_num_threads(1)
    digits = moving_digits()
    reward = make_reward_fn(digits.family, as_reward(digits.reward))
    made = {}
    for name, recipe in RECIPES.items():
        state = make_state(recipe, digits.family, 0, reward)
        made[name] = (state, recipe.stages[-1], BatchSource(digits.family, digits.prompts, None, 0))
    rollouts: dict[str, list[float]] = {name: [] for name in made}
    whole: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(REPEATS):
        for name, (state, stage, source) in made.items():
            batches = source.next(stage)
            view = View(state.roles, state.path, batches[0], 0.0, state.rng)
            began = time.process_time()
            roll_out(state, stage, view, with_graph=True)
            rolled = time.process_time()
            iteration(state, stage, batches, 0.0)
            rollouts[name].append(rolled - began)
            whole[name].append(time.process_time() - rolled)
    first = next(iter(made))
    rows = [
        {
            "what": name,
            "samples": made[name][1].batch,
            "rollout, CPU s": round(median(rollouts[name]), 2),
            "iteration, CPU s": round(median(whole[name]), 2),
            "rollout, times the first": round(median(rollouts[name]) / median(rollouts[first]), 1),
            "iteration, times the first": round(median(whole[name]) / median(whole[first]), 1),
        }
        for name in made
    ]
    write_json(Path(__file__).parent / "results" / "rl_cost.json", rows)
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
