"""Class-conditional one-step generation on real digits: the protocol of DMDR's Table 6 in miniature.

    python benchmarks/class_conditional.py --seeds 0 1 2      # under two minutes a cell and seed on one core; resumes
    python benchmarks/class_conditional.py --figure docs/class_conditional.png
    make results

Each cell is kept as benchmarks/results/class/NAME-SEED.json; a cell that is there is not run again. Every student has one step and the same
number of updates; metrics are in the features of the held-out classifier, which nothing was trained on or chosen by.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from pretrain.digits import split_media
from torch import Tensor

from instep.bundled.digit_classifiers import load_digit_classifier
from instep.bundled.worlds import ClassDigits, class_digits
from instep.core.files import write_json
from instep.diffusion.sampling import sample_few_step, sample_ode
from instep.methods.recipe import Recipe
from instep.methods.role_config import AdamWConfig
from instep.metrics import figures as m
from instep.models.backbone import Backbone
from instep.models.role import Role
from instep.recipes.common import Common
from instep.recipes.dmd import dmd2
from instep.recipes.dmdr import dmdr
from instep.recipes.refl import refl
from instep.training.build import averaged
from instep.training.options import RunOptions
from instep.training.run import train

RESULTS = Path(__file__).parent / "results" / "class"
SAMPLES, ITERATIONS = 2000, 150


@dataclass(frozen=True)
class Cell:
    """A row of the table: the teacher at some steps and guidance, or a student's recipe; `rl` says whether a reward is climbed."""

    what: str
    recipe: Callable[[], Recipe] | None = None
    guidance: float = 1.0
    steps: int = 1
    rl: bool = False


def common(guidance: float = 1.0) -> Common:
    """One step, no timestep shift (8 x 8 pixels), and learning rates at which the student moves in so few updates."""
    return Common(steps=1, batch=64, guidance=guidance, shift=1.0, critic_updates=4, student=AdamWConfig(5e-4, decay=0.5), fake=AdamWConfig(1e-3, decay=0.5))


def full(guidance: float) -> Recipe:
    """DMDR: half of the updates tilted with DynaRS and DynaDG, half matching and ReFL as one loss."""
    return dmdr(common(guidance), warm=ITERATIONS // 2, iterations=ITERATIONS - ITERATIONS // 2, tilt="literal", weight_unit="raw")


CELLS = {
    "teacher-50-1": Cell("teacher, 50 steps", steps=50),
    "teacher-50-1.5": Cell("teacher, 50 steps", guidance=1.5, steps=50),
    "naive-1": Cell("teacher, 1 step (naive)"),
    "naive-1.5": Cell("teacher, 1 step (naive)", guidance=1.5),
    "dmd2-1": Cell("DMD2", lambda: dmd2(common(), iterations=ITERATIONS)),
    "dmdr-1": Cell("DMDR", lambda: full(1.0), rl=True),
    "dmd2-1.5": Cell("DMD2", lambda: dmd2(common(1.5), iterations=ITERATIONS), 1.5),
    "dmd2-4": Cell("DMD2", lambda: dmd2(common(4.0), iterations=ITERATIONS), 4.0),
    "dmdr-1.5": Cell("DMDR", lambda: full(1.5), 1.5, rl=True),
    "refl-1-half": Cell("DMD2 and ReFL from the start, weight .5", lambda: refl(common(), iterations=ITERATIONS, weight_unit="raw"), rl=True),
    "refl-1-low": Cell("DMD2 and ReFL from the start, weight .05", lambda: refl(common(), iterations=ITERATIONS, weight=0.05, weight_unit="raw"), rl=True),
    "refl-1-high": Cell("DMD2 and ReFL from the start, weight 5", lambda: refl(common(), iterations=ITERATIONS, weight=5.0, weight_unit="raw"), rl=True),
    "gan-1": Cell("DMD2 with a discriminator on real scans, weight .01", lambda: dmd2(common(), iterations=ITERATIONS, gan=0.01)),
}


def prompts(n: int = SAMPLES) -> list[str]:
    return [str(i % 10) for i in range(n)]


@torch.no_grad()
def sample(role: Role, digits: ClassDigits, cell: Cell, seed: int, n: int) -> Tensor:
    """Unclamped media [n, 3, 8, 8] of `prompts(n)`."""
    family, rng = digits.family, torch.Generator().manual_seed(10_000 + seed)
    noise = torch.randn(n, *family.latent_shape, generator=rng)
    cond = family.encode(prompts(n))
    if cell.recipe is not None:
        return family.decode(sample_few_step(role, cond, noise, (1.0,), family.path, rng))
    x = sample_ode(role, cond, family.unconditional(prompts(n)), noise, steps=cell.steps, path=family.path, shift=family.shift, guidance=cell.guidance)
    return family.decode(x)


@torch.no_grad()
def measure(media: Tensor, names: list[str]) -> dict[str, float]:
    """Metrics of media [N, 3, 8, 8] against the reference split."""
    media, heldout, (real, _) = media.clamp(0, 1), load_digit_classifier("heldout"), split_media("reference")
    features, reference = heldout.features(media), heldout.features(real)
    p = heldout.logits(media).double().softmax(1)
    label = torch.tensor([int(name) for name in names])
    return {
        "fd": m.frechet_distance(features, reference),
        "recall": m.recall(features, reference),
        "inception": float((p * (p.clamp(min=1e-12).log() - p.mean(0).log())).sum(1).mean().exp()),
        "precision": m.precision(features, reference),
        "heldout": float(heldout.correct(media, names).double().mean()),
        "monitor": float(load_digit_classifier("monitor").correct(media, names).double().mean()),
        "training_score": float(load_digit_classifier("training").score(media, names).double().mean()),
        "diversity": sum(spread(media[label == c]) for c in range(10)) / 10,
        "vendi": sum(m.vendi(features[label == c]) for c in range(10)) / 10,
        "nearest_train": nearest_train(media),
        "mean_brightness": float(m.mean_brightness(media).mean()),
    }


def nearest_train(media: Tensor) -> float:
    """Median distance to the nearest training scan, Euclidean over the 64 pixels in [0, 1]: what is remembered lies near 0."""
    return float(torch.cdist(media.mean(1).flatten(1), split_media("train")[0].mean(1).flatten(1)).amin(1).median())


def spread(media: Tensor) -> float:
    """Root-mean-square pixel distance of two images of one class, mean over pairs, in [0, 1]."""
    flat = media.mean(1).flatten(1).double()
    return float(torch.cdist(flat, flat).sum() / (len(flat) * (len(flat) - 1)) / flat.shape[1] ** 0.5)


def real_vs_real() -> dict[str, float]:
    """The training scans against the reference, two disjoint splits."""
    media, names = split_media("train")
    found = measure(media, list(names))
    # the distance of scans to themselves says nothing; that of unseen ones is what a model without memory would have
    found["nearest_train"] = nearest_train(split_media("reference")[0])
    return found


def run_cell(name: str, seed: int) -> None:
    """Trains where there is something to train, samples and measures, unless the result is there."""
    file, cell = RESULTS / f"{name}-{seed}.json", CELLS[name]
    if file.is_file():
        return
    media, about = make(cell, seed)
    metrics = measure(media, prompts()) | {"saturation": float(m.saturation(media).mean())}
    write_json(file, {"what": cell.what, "seed": seed, "guidance": cell.guidance, "rl": cell.rl, "samples": SAMPLES, "figures": metrics, **about})
    print(name, seed, {k: round(v, 3) for k, v in metrics.items()}, about, flush=True)


def make(cell: Cell, seed: int, n: int = SAMPLES) -> tuple[Tensor, dict[str, float]]:
    """Samples of a cell, and what its training took."""
    digits = class_digits()
    if cell.recipe is None:
        return sample(Role("teacher", Backbone(digits.family, digits.family.pretrained)), digits, cell, seed, n), {}
    recipe, cpu = cell.recipe(), time.process_time()
    options = RunOptions(seed=seed, save_every=10**6, probe_every=10**6, keep=1)
    with tempfile.TemporaryDirectory() as folder:
        run = train(
            recipe,
            digits.family,
            out=Path(folder) / "run",
            prompts=digits.prompts,
            reward=digits.reward,
            monitor=digits.monitor,
            real=digits.real() if recipe.needs & {"real"} else None,
            options=options,
        )
    about = {"iterations": recipe.steps, "train_cpu_s": round(time.process_time() - cpu, 1)}
    with averaged(run.state.trained["student"]):
        return sample(run.state.roles["student"], digits, cell, seed, n), about


def draw_figure(to: Path, seed: int = 0) -> None:
    """Rows of classes 0 to 9, eight samples each, for real scans, the teacher, and students with and without the reward."""
    from PIL import Image, ImageDraw

    names = ("teacher-50-1", "naive-1", "dmd2-1", "dmdr-1")
    media, labels = split_media("reference")
    found = [torch.cat([media[[i for i, p in enumerate(labels) if p == str(c)][:8]] for c in range(10)])]
    found += [make(CELLS[name], seed, 80)[0].reshape(8, 10, 3, 8, 8).transpose(0, 1).flatten(0, 1) for name in names]
    titles = ["real", *(CELLS[name].what for name in names)]
    scale, gap, head = 4, 2, 14
    width = 8 * (8 * scale + gap)
    canvas = Image.new("L", (len(found) * (width + 16), head + 10 * (8 * scale + gap)), 255)
    pen = ImageDraw.Draw(canvas)
    for k, (title, images) in enumerate(zip(titles, found, strict=True)):
        pen.text((k * (width + 16), 0), title, fill=0)
        for i, image in enumerate((images.clamp(0, 1).mean(1) * 255).round().byte()):
            tile = Image.fromarray(255 - image.numpy()).resize((8 * scale, 8 * scale), Image.Resampling.NEAREST)
            canvas.paste(tile, (k * (width + 16) + i % 8 * (8 * scale + gap), head + i // 8 * (8 * scale + gap)))
    to.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(to)


def rows(name: str) -> list[dict]:
    """The measured results of one cell, all seeds."""
    return [json.loads(file.read_text()) for file in sorted(RESULTS.glob(f"{name}-[0-9].json"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cells", nargs="+", default=list(CELLS), choices=list(CELLS))
    parser.add_argument("--figure", type=Path, help="write a sheet of samples there and do nothing else")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.figure:
        draw_figure(args.figure)
        return
    write_json(RESULTS / "floor.json", {"what": "real training scans", "figures": real_vs_real()})
    for seed in args.seeds:
        for name in args.cells:
            run_cell(name, seed)


if __name__ == "__main__":
    main()
