"""Diffusion-APO on the bundled model: what each way of drawing levels wins at equal cost, and the five stages in sequence, by the held-out classifier.

    python benchmarks/apo_bundled.py --runs runs/benchmark      # an hour of CPU time, resumes; then make results
    python benchmarks/apo_bundled.py --speed                    # seconds of a guided step and of a distilled one
    python benchmarks/apo_bundled.py --drawn-guidance --runs runs/benchmark   # one model for drawn guidance scales

A cell is the offline stage alone on the bundled model's labelled pairs; some are followed by guidance distillation, as the paper's ablation is. Win rates
are against the model that the run began as, on the same noise: a share of samples that score higher by the held-out classifier, ± over prompts. Cells `i2v-...`
are of the image-to-video model, the paper's setting, each prompt with a first frame of the reference split, which no training saw.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import torch
from apo import NONE, jump
from torch import Tensor

from instep.bundled import MOVING_DIGITS, MOVING_DIGITS_I2V, load
from instep.bundled.baselines import noise_for
from instep.bundled.classifiers import load_classifier
from instep.bundled.drawn_frames import first_frame
from instep.bundled.worlds import MovingDigits, MovingDigitsI2V, moving_digits, moving_digits_i2v
from instep.cli.export import read_run, sampling_of, student_of
from instep.core.files import write_json
from instep.core.json_lines import read_rows
from instep.data.prompt import Prompt, texts_of
from instep.diffusion.guidance import guide, skip_layers
from instep.diffusion.prediction import Denoiser, skipping
from instep.diffusion.sampling import Sampling
from instep.models.backbone import Backbone
from instep.models.role import Role
from instep.recipes.apo import apo
from instep.recipes.many_step import ManySteps
from instep.training.options import RunOptions
from instep.training.run import train

RESULTS = Path(__file__).parent / "results" / "apo_bundled"
COMMON = ManySteps()
UPDATES = 20  # of the offline stage, five levels each
COPIES = 3  # noises a prompt
NOISE = 4321


@dataclass(frozen=True)
class Cell:
    """Options of the recipe, and what it shows."""

    what: str
    options: dict[str, Any] = field(default_factory=dict)
    model: str = MOVING_DIGITS


def window(what: str, distill_guidance: int = 0, model: str = MOVING_DIGITS, **changed: Any) -> Cell:
    return Cell(what, {**NONE, "offline": UPDATES, "distill_guidance": distill_guidance, **changed}, model)


DISTILL_UPDATES = 600
CELLS = {
    "dpo": window("Diffusion-DPO: one level of all an update", offline=5 * UPDATES, uniform=1),
    "no-window": window("five levels of all an update", uniform=5),
    "apo": window("Diffusion-APO: a window of four high levels and a low one, near the sampler's", DISTILL_UPDATES),
    "no-shift": window("without the random shift", random_shift=False),
    "no-offset": window("without the random offset", offset=0.0),
    "neither": window("without random shift and offset", DISTILL_UPDATES, random_shift=False, offset=0.0),
    "high-only": window("five high levels", high=5, low=0),
    "low-only": window("five low levels", high=0, low=5),
    "distilled": Cell("guidance distillation alone", {**NONE, "distill_guidance": DISTILL_UPDATES}),
    "distilled-4x": Cell("guidance distillation alone, four times as long", {**NONE, "distill_guidance": 4 * DISTILL_UPDATES}),
    "sequence": Cell("the five stages, with the recipe's defaults"),
    "i2v-dpo": window("from a first frame: Diffusion-DPO", model=MOVING_DIGITS_I2V, offline=5 * UPDATES, uniform=1),
    "i2v-apo": window("from a first frame: Diffusion-APO", model=MOVING_DIGITS_I2V),
    "i2v-sequence": Cell("from a first frame: the five stages", model=MOVING_DIGITS_I2V),
}


@cache
def world(model: str) -> MovingDigits | MovingDigitsI2V:
    return moving_digits_i2v() if model == MOVING_DIGITS_I2V else moving_digits()


@cache
def prompts(model: str = MOVING_DIGITS) -> tuple[Prompt, ...]:
    """Every second prompt of training; each COPIES times in a row."""
    names = moving_digits().prompts[::2]
    if model == MOVING_DIGITS_I2V:
        names = tuple(Prompt(name.text, f"reference/{i}") for i, name in enumerate(names))
    return tuple(name for name in names for _ in range(COPIES))


@torch.no_grad()
def media(role: Denoiser, sampling: Sampling, model: str = MOVING_DIGITS) -> Tensor:
    """Samples [B, 3, F, H, W] of the prompts, always from the same noise."""
    family, names = world(model).family, prompts(model)
    noise, rng = noise_for(family, names, NOISE)
    parts = []
    for rows in torch.arange(len(names)).split(33):
        part = [names[i] for i in rows]
        x = sampling(role, family.encode(part), family.unconditional(part), noise[rows], family.path, rng)
        parts.append(family.decode(x).clamp(0, 1))
    return torch.cat(parts)


@cache
def start(model: str = MOVING_DIGITS) -> Tensor:
    """Samples of the bundled model itself."""
    family = load(model)
    return media(Role("teacher", Backbone(family, family.pretrained)), Sampling(COMMON.levels, "ode", COMMON.guidance), model)


def metrics(seen: Tensor, model: str = MOVING_DIGITS) -> dict[str, float]:
    """Against the start, by the held-out classifier; the standard error is over prompts, whose samples are not independent."""
    classifier, before = load_classifier("heldout"), start(model)
    names = texts_of(prompts(model))
    score = classifier.score(seen, names)
    wins = (0.5 + 0.5 * (score - classifier.score(before, names)).sign()).reshape(-1, COPIES).mean(1).double()
    kept = {
        "win": float(wins.mean()),
        "win_se": float(wins.std() / len(wins) ** 0.5),
        "score": float(score.mean()),
        "right": float(classifier.correct(seen, names).both.float().mean()),
        "motion": float((seen[:, :, 1:] - seen[:, :, :-1]).abs().mean()),
        "change": float((seen - before).square().mean().sqrt()),
    }
    if model == MOVING_DIGITS_I2V:
        given = torch.stack([first_frame(name, world(model).family.size) for name in prompts(model)])
        kept["first_frame"] = float((seen[:, :, 0] - given).square().mean().sqrt())
    return kept


def run_cell(name: str, seed: int, runs: Path) -> None:
    """One cell and seed, kept as NAME-SEED.json."""
    file, out, cell = RESULTS / f"{name}-{seed}.json", runs / f"apo-{name}-{seed}", CELLS[name]
    if file.is_file():
        return
    digits, recipe, began = world(cell.model), apo(COMMON, **cell.options), time.process_time()
    ends = {end: stage.name for stage, end in zip(recipe.stages, recipe.stage_ends(), strict=True)}
    train(
        recipe,
        digits.family,
        out=out,
        prompts=digits.prompts,
        reward=digits.reward,
        monitor=digits.monitor,
        pairs=digits.pairs(),
        real=digits.real(),
        options=RunOptions(seed=seed, save_every=20, probe_every=100),
    )
    cpu, record = time.process_time() - began, read_run(out)
    after: dict[str, dict[str, float]] = {"start": metrics(start(cell.model), cell.model)}
    for end, stage in ends.items():
        role = student_of(out, record, load(cell.model), step=end)
        after[stage] = metrics(media(role, sampling_of(record, end), cell.model), cell.model)
    first = next(iter(ends))
    losses = [row["objective/dpo"] for row in read_rows(out / "log.jsonl") if "objective/dpo" in row and row["step"] <= first]
    write_json(file, {"what": cell.what, "seed": seed, "after": after, "loss_jump": jump(losses), "cpu_s": round(cpu, 1)})
    print(f"{name} seed {seed}: " + ", ".join(f"{k} win {v['win']:.3f} right {v['right']:.3f}" for k, v in after.items()), flush=True)


GUIDANCES = (1.0, 3.0, 5.0)  # guidance that is asked for; scales are drawn from the first to the last


def drawn_guidance(runs: Path) -> None:
    """A student that is told its guidance, and one distilled at 3 alone, against the guided model: root mean square of the difference in pixels."""
    digits, family = moving_digits(), load(MOVING_DIGITS)
    guided = {w: media(Role("teacher", Backbone(family, family.pretrained)), Sampling(COMMON.levels, "ode", w)) for w in GUIDANCES}
    right = load_classifier("heldout").correct
    kept: dict[str, dict[str, dict[str, float]]] = {
        "guided": {f"{w:g}": {"right": float(right(seen, prompts()).both.float().mean()), "distance": 0.0} for w, seen in guided.items()}
    }
    for name, draw in (("drawn", (GUIDANCES[0], GUIDANCES[-1])), ("fixed", None)):
        out = runs / f"apo-drawn-guidance-{name}"
        recipe = apo(COMMON, **{**NONE, "distill_guidance": DISTILL_UPDATES}, draw=draw)
        train(
            recipe,
            digits.family,
            out=out,
            prompts=digits.prompts,
            reward=digits.reward,
            monitor=digits.monitor,
            real=digits.real(),
            options=RunOptions(save_every=100, probe_every=DISTILL_UPDATES),
        )
        record = read_run(out)
        role, sampling = student_of(out, record, load(MOVING_DIGITS)), sampling_of(record)
        kept[name] = {}
        for w in GUIDANCES:
            seen = media(role, replace(sampling, guidance_scales=(w, 0.0)) if draw else sampling)
            metrics = {"right": float(right(seen, prompts()).both.float().mean()), "distance": float((seen - guided[w]).square().mean().sqrt())}
            kept[name][f"{w:g}"] = metrics
            print(name, w, metrics, flush=True)
    write_json(RESULTS / "strengths.json", kept)


def speed(pairs: int = 15) -> None:
    """CPU seconds of a sampling step of 16 videos, interleaved: guided by text and by a pass without a block, guided by text, and distilled."""
    family = load(MOVING_DIGITS)
    role = Role("teacher", Backbone(family, family.pretrained))
    names = prompts()[:16]
    cond, null = family.encode(names), family.unconditional(names)
    noise, _ = noise_for(family, names, NOISE)
    t = torch.full((len(names),), 0.5)

    def by_text() -> tuple[Tensor, Tensor]:
        return role(torch.cat([noise, noise]), torch.cat([t, t]), cond.stack(null)).v.chunk(2)

    def by_both() -> Tensor:
        c, u = by_text()
        return skip_layers(guide(c, u, COMMON.guidance), c, skipping(role, (1,))(noise, t, cond).v, 0.5)

    ways: dict[str, Callable[[], object]] = {"distilled": lambda: role(noise, t, cond).v, "text": by_text, "text and skip-layer": by_both}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with torch.no_grad():
        for i in range(pairs + 1):
            for name, step in ways.items():
                began = time.process_time()
                step()
                if i:  # the first round warms up
                    seconds[name].append(time.process_time() - began)
    one = median(seconds["distilled"])
    kept = {name: {"cpu_ms": 1000 * median(each), "times": median(each) / one} for name, each in seconds.items()}
    write_json(RESULTS / "speed.json", kept)
    print(kept)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cells", nargs="+", default=list(CELLS), choices=list(CELLS))
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark"))
    parser.add_argument("--drawn-guidance", action="store_true", help="only one model for drawn guidance scales")
    parser.add_argument("--speed", action="store_true", help="only the cost of a guided and of a distilled step")
    args = parser.parse_args()
    torch.set_num_threads(1)
    RESULTS.mkdir(parents=True, exist_ok=True)
    if args.speed:
        speed()
        return
    if args.drawn_guidance:
        drawn_guidance(args.runs)
        return
    for name in args.cells:
        for seed in args.seeds:
            run_cell(name, seed, args.runs)


if __name__ == "__main__":
    main()
