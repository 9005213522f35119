"""DOLLAR's comparisons on the embedded default: distillation, consistency, and a latent copy of a reward that has no gradient.

    python benchmarks/dollar.py --seeds 0 1 2 --runs runs/benchmark     # hours of CPU time, resumes
    make results

The reward is a number and nothing else: the training classifier's probability of the prompt, as a black box. Students of 2 steps go on from the same
distilled one, `dmd2-2` (variational score distillation is DMD2 without a discriminator), for as many iterations as their control, which is there
already: `distil-only` of benchmarks/reinforce.py, for 1 step `one-distil-only`, for 4 steps `dmd2-4-more` of benchmarks/moving_digits.py.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

import torch
from moving_digits import CELLS as DISTILLED
from moving_digits import FEW, MORE, RESULTS, TWO, Cell, run_cell
from torch import Tensor

from instep.bundled.evaluation import evaluation_set
from instep.bundled.worlds import MovingDigits, moving_digits
from instep.cli.evaluate import sampler_of
from instep.cli.export import read_run, sampling_of, student_of
from instep.core.files import write_json
from instep.core.json_lines import read_rows
from instep.metrics import figures as metrics
from instep.metrics.compare import generate_all
from instep.recipes.common import Common
from instep.recipes.dmdr import dmdr
from instep.recipes.dollar import dollar
from instep.rewards.base import FunctionReward, Reward
from instep.rewards.jpeg import JPEG
from instep.rewards.motion import DynamicDegree

OWN = RESULTS / "dollar"
FIT = 200  # iterations in which the latent reward model learns before it is followed
WEIGHT = 0.1  # of its gradient, in deviations of the reward


def probability(digits: MovingDigits) -> FunctionReward:
    """What the training classifier gives the prompt, 0 to 1; no gradient."""
    classifier = digits.reward
    return FunctionReward(lambda media, prompts: classifier.score(media, prompts).exp(), name="probability")


def on(steps: int) -> dict[str, Cell]:
    """The comparison for students of `steps` steps."""
    common, start, name = Common(steps=steps), f"dmd2-{steps}", "" if steps == 2 else f"{steps}-"
    add = lambda recipe, what, begin=start, **more: Cell(recipe, begin, what, probability, 20, **more)  # noqa: E731
    return {
        f"{name}vsd-cd": add(lambda: dollar(common, weight=0, iterations=MORE), "VSD + CD, m = 5"),
        f"{name}fit": add(lambda: dollar(common, fit=FIT, iterations=0), "the start with a latent reward model fitted on it"),
        f"{name}vsd-lrm": add(lambda: dollar(common, fit=0, cd=0, weight=WEIGHT, iterations=MORE), "VSD + LRM", f"{name}fit"),
        f"{name}dollar": add(lambda: dollar(common, fit=0, weight=WEIGHT, iterations=MORE), "VSD + CD + LRM", f"{name}fit"),
    }


def blind(reward: Reward, what: str, weight: float = 0.3, **options) -> Cell:
    """A reward that knows nothing of prompts, with a latent copy that does not either, fitted for 40 iterations and then followed."""
    recipe = lambda: dollar(TWO, fit=40, cd=0, kind="video", weight=weight, iterations=MORE, **options)  # noqa: E731
    return Cell(recipe, "dmd2-2", what, lambda digits: reward, 10)


CELLS = {
    **on(2),
    "vsd-cd-1": Cell(lambda: dollar(TWO, weight=0, cd_steps=1, iterations=MORE), "dmd2-2", "VSD + CD, m = 1", probability, 20),
    "vsd-cd-huber": Cell(lambda: dollar(TWO, weight=0, distance="huber", iterations=MORE), "dmd2-2", "VSD + CD, m = 5, Huber", probability, 20),
    "vsd-cd-average": Cell(lambda: dollar(TWO, weight=0, target="average", iterations=MORE), "dmd2-2", "VSD + CD, m = 5, target the average", probability, 20),
    "vsd-ddpo": Cell(lambda: dmdr(TWO, warm=0, iterations=MORE, rl="ddpo", weight=1.0, weight_unit="raw"), "dmd2-2", "VSD + DDPO", probability, 20),
    "cd": Cell(lambda: dollar(TWO, matching=0, weight=0, cd=1.0, iterations=FEW), None, "CD alone from the teacher, m = 5", probability, 20),
    "cd-same": Cell(lambda: dollar(TWO, weight=0, iterations=FEW), None, "VSD + CD from the teacher, velocity as the teacher's", probability, 20),
    "cd-x0": Cell(lambda: dollar(TWO, weight=0, iterations=FEW, prediction_type="x0"), None, "VSD + CD from the teacher, x0 instead", probability, 20),
    "vsd-lrm-0.3": Cell(lambda: dollar(TWO, fit=0, cd=0, weight=0.3, iterations=MORE), "fit", "VSD + LRM, weight .3", probability, 20),
    "lrm-alone": Cell(lambda: dollar(TWO, fit=0, cd=0, matching=0, weight=WEIGHT, iterations=MORE), "fit", "LRM alone after distillation", probability, 20),
    "jpeg": blind(JPEG(), "compressible JPEG, VSD + LRM"),
    "jpeg-3": blind(JPEG(frames=3), "compressible JPEG of 3 frames of 9, VSD + LRM"),
    "jpeg-frames": blind(JPEG(), "compressible JPEG, LRM frame by frame", frames="average"),
    "dynamic": blind(DynamicDegree(), "dynamic degree, VSD + LRM, weight .3"),
    "dynamic-0.03": blind(DynamicDegree(), "dynamic degree, VSD + LRM, weight .03", 0.03),
    "dynamic-alone": blind(DynamicDegree(), "dynamic degree, LRM alone, weight .3", matching=0),
    **on(1),
    **on(4),
}
KEYFRAMES = (0, 4, 8)  # DOLLAR's Eq. 17 takes frames that are evenly spaced


def within(features: Tensor, group: Tensor) -> Tensor:
    """Features [N, D] in as many numbers as a group has members: the inner products inside each group are the same, which is all that a Vendi score reads."""
    out = torch.zeros(len(features), int(group.bincount().max()), dtype=torch.float64)
    for g in group.unique():
        rows = (group == g).nonzero()[:, 0]
        small = torch.linalg.qr(features[rows].double().T).R.T
        out[rows, : small.shape[1]] = small
    return out


def look(name: str, seed: int, runs: Path) -> None:
    """What the protocol does not say of a finished run's student, on its open prompts: Vendi of pixels (Eq. 17), JPEG size, dynamic degree; and how well the
    latent reward model predicted, from the log."""
    file, folder = OWN / "look" / f"{name}-{seed}.json", runs / f"{name}-{seed}"
    if file.is_file() or not (folder / "recipe.json").is_file():
        return
    record = read_run(folder)
    family, eval_set = moving_digits().family, evaluation_set("full")
    raw, _ = generate_all(sampler_of(student_of(folder, record, family), family, sampling_of(record)), eval_set.open, eval_set.seed, name)
    media, rank = raw.clamp(0, 1), {prompt: i for i, prompt in enumerate(dict.fromkeys(eval_set.open))}
    group = torch.tensor([rank[prompt] for prompt in eval_set.open])
    pixels = [metrics.vendi_by_group(within(media[:, 0, k].flatten(1), group), group) for k in KEYFRAMES]
    # the frames of a video are not independent: the error is not divided by their number
    values = {"vendi_pixels": metrics.Value(sum(v.value for v in pixels) / len(pixels), max(v.se for v in pixels))}
    for key, reward in (("kilobytes", JPEG("large")), ("dynamic_degree", DynamicDegree())):
        values[key] = metrics.of_mean(torch.cat([reward.score(part, ()) for part in media.split(64)]), group)
    rows = [row for row in read_rows(folder / "log.jsonl") if "latent_reward/correlation" in row]
    part = max(1, len(rows) // 5)
    latent_reward = [
        {"step": some[-1]["step"]} | {key: sum(row[f"latent_reward/{key}"] for row in some) / len(some) for key in ("correlation", "error")}
        for some in (rows[i : i + part] for i in range(0, len(rows), part))
    ]
    write_json(file, {"values": {key: asdict(value) for key, value in values.items()}, "latent_reward": latent_reward})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cells", nargs="+", default=list(CELLS), choices=list(CELLS))
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark"))
    parser.add_argument("--look", action="store_true", help="of finished runs, what the protocol does not say: Vendi of pixels, JPEG size, dynamic degree")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.look:
        controls = {"1-": "one-distil-only", "4-": "dmd2-4-more"}
        for name in dict.fromkeys([*(controls.get(name[:2], "distil-only") for name in args.cells), *args.cells]):
            for seed in args.seeds:
                look(name, seed, args.runs)
        return
    for name in args.cells:
        for seed in args.seeds:
            start = CELLS[name].start
            if start in DISTILLED:
                run_cell(start, seed, args.runs, DISTILLED)
            elif start:
                if CELLS[start].start in DISTILLED:
                    run_cell(str(CELLS[start].start), seed, args.runs, DISTILLED)
                run_cell(start, seed, args.runs, CELLS, OWN)
            run_cell(name, seed, args.runs, CELLS, OWN)


if __name__ == "__main__":
    main()
