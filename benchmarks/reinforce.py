"""DMDR's comparisons on the embedded default, on the student of 2 steps: the one of 4 steps has no room left (docs/results.md).

    python benchmarks/reinforce.py --seeds 0 1 2 --runs runs/benchmark     # hours of CPU time, resumes
    make results

Every cell but the tilted ones goes on from the same distilled student, `dmd2-2` of benchmarks/moving_digits.py, for as many iterations.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from moving_digits import CELLS as DISTILLED
from moving_digits import FEW, MORE, OLD, RESULTS, TWO, Cell, hacking, run_cell
from torch import Tensor

from instep.bundled.classifiers import _wanted
from instep.bundled.worlds import MovingDigits
from instep.core.files import write_json
from instep.recipes.after import rl_after, sft_after
from instep.recipes.amd import amd
from instep.recipes.common import Common
from instep.recipes.dmd import dmd2
from instep.recipes.dmdr import dmdr
from instep.recipes.refl import refl
from instep.rewards.base import FunctionReward
from instep.rewards.several import several

OWN = RESULTS / "reinforce"
# the weight of the reward's gradient that strategies are compared at: the smallest of the sweep of DMDR's Table 5c
BEST = 0.1
START = "dmd2-2"


def part(which: int, name: str):
    """The training classifier's log-probability of the prompt's digit (0) or motion (1) alone, as a differentiable reward."""

    def build(digits: MovingDigits) -> FunctionReward:
        classifier = digits.reward

        def score(media: Tensor, prompts) -> Tensor:
            wanted = _wanted(prompts, media.device)
            mask = (wanted.digits, wanted.motions)[which]
            return classifier.logits(media)[which].log_softmax(1).masked_fill(~mask, -torch.inf).logsumexp(1)

        return FunctionReward(score, name=name, differentiable=True)

    return build


DIGIT, MOTION = part(0, "digit"), part(1, "motion")


ONE = Common(steps=1)
ONE_START = "dmd2-1"


def joint(rl: str, weight: float, **options) -> Cell:
    what = f"joint, {rl.upper()} weight {weight:g}"
    return Cell(lambda: dmdr(TWO, warm=0, iterations=MORE, rl=rl, weight=weight, weight_unit="raw", **options), START, what, probe_every=10)


CELLS = {
    "distil-only": Cell(lambda: dmd2(TWO, iterations=MORE), START, "control: distillation alone", probe_every=10),
    **{
        f"joint-{w:g}": Cell(lambda w=w: refl(TWO, iterations=MORE, weight=w, weight_unit="raw"), START, f"joint, ReFL weight {w:g}", probe_every=10)
        for w in (0.01, 0.02, 0.05, 0.1, 0.5, 1.0, 2.0)
    },
    "one-distil-only": Cell(lambda: dmd2(ONE, iterations=MORE), ONE_START, "1 step, control: distillation alone", probe_every=10),
    **{
        f"one-joint-{w:g}": Cell(
            lambda w=w: refl(ONE, iterations=MORE, weight=w, weight_unit="raw"), ONE_START, f"1 step, joint, ReFL weight {w:g}", probe_every=10
        )
        for w in (0.05, 0.1)
    },
    "rl-refl": Cell(lambda: rl_after(TWO, distil=0, iterations=MORE), START, "ReFL alone after distillation", probe_every=10),
    "rl-dpo": Cell(lambda: rl_after(TWO, distil=0, iterations=MORE, rl="dpo"), START, "online DPO alone after distillation", probe_every=10),
    "rl-grpo": Cell(lambda: rl_after(TWO, distil=0, iterations=MORE, rl="grpo"), START, "GRPO alone after distillation", probe_every=10),
    "sft": Cell(lambda: sft_after(TWO, distil=0, iterations=MORE), START, "fine-tuning on real videos alone after distillation", probe_every=10),
    "joint-dpo": joint("dpo", 0.1),
    "joint-grpo": joint("grpo", 0.1),
    "align-group": Cell(lambda: OLD(TWO, iterations=MORE, sign="signed"), START, "DM-Align (Group)", probe_every=10),
    "amd": Cell(lambda: amd(TWO, iterations=MORE), START, "AMD", probe_every=10),
    "tilted": Cell(lambda: dmdr(TWO, warm=FEW, iterations=0, tilt="literal"), None, "RT-DM from the start (literal, DynaRS, DynaDG)", probe_every=20),
    "tilted-weight": Cell(lambda: dmdr(TWO, warm=FEW, iterations=0, tilt="weight"), None, "exact tilt from the start (DynaRS, DynaDG)", probe_every=20),
    "tilted-more": Cell(lambda: dmdr(TWO, warm=MORE, iterations=0, tilt="literal", dyna_rs=False, dyna_dg=0), "tilted", "RT-DM all the way", probe_every=10),
    "tilted-joint": Cell(lambda: refl(TWO, iterations=MORE, weight=BEST, weight_unit="raw"), "tilted", "RT-DM, then joint", probe_every=10),
    "reward-digit": Cell(lambda: refl(TWO, iterations=MORE, weight=BEST, weight_unit="raw"), START, "joint, digit alone rewarded", DIGIT, probe_every=10),
    "reward-motion": Cell(lambda: refl(TWO, iterations=MORE, weight=BEST, weight_unit="raw"), START, "joint, motion alone rewarded", MOTION, probe_every=10),
    "reward-both": Cell(
        lambda: refl(TWO, iterations=MORE, weight=BEST, weight_unit="raw"),
        START,
        "joint, both as two rewards",
        lambda digits: several((DIGIT(digits), 1.0), (MOTION(digits), 1.0)),
        probe_every=10,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cells", nargs="+", default=list(CELLS), choices=list(CELLS))
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark"))
    parser.add_argument("--flags", action="store_true", help="read the logs of finished runs again, after a change of the health checks")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.flags:
        for name in args.cells:
            for seed in args.seeds:
                file, out = OWN / f"{name}-{seed}.json", args.runs / f"{name}-{seed}"
                if file.is_file() and out.is_dir():
                    write_json(file, json.loads(file.read_text()) | {"hacking": hacking(out, CELLS[name].recipe())})
        return
    for name in args.cells:
        for seed in args.seeds:
            if CELLS[name].start in DISTILLED:
                run_cell(str(CELLS[name].start), seed, args.runs, DISTILLED)
            elif before := CELLS[name].start:
                run_cell(before, seed, args.runs, CELLS, OWN)
            run_cell(name, seed, args.runs, CELLS, OWN)


if __name__ == "__main__":
    main()
