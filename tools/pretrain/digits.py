"""The class-conditional model from raw scans: three classifiers, then a DiT trained by flow matching (SiT, Ma et al. 2024), then measurement.

A few minutes on one core, so nothing is kept of an interrupted run.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from instep.bundled.classifiers import ClassifierName
from instep.bundled.digit_classifiers import ARCHITECTURES, DigitClassifier, load_digit_classifier
from instep.bundled.digits import WORDS, Split, scans_of
from instep.core.files import write_tensors
from instep.core.progress import Progress
from instep.diffusion.sampling import sample_ode
from instep.models.backbone import Backbone
from instep.models.dit import CLASSES, DiTFamily
from instep.models.role import Role
from pretrain.classifiers import SPLITS
from pretrain.files import begin, checksums, write_folder, write_json
from pretrain.optim import Average, Optimisers, finite

if TYPE_CHECKING:
    from diffusers import DiTTransformer2DModel


@dataclass(frozen=True)
class DigitClassifierConfig:
    """Settings of one classifier's training; `smoothing` of the labels keeps the training classifier from saturating as a reward."""

    name: ClassifierName
    seed: int
    steps: int = 900
    batch: int = 128
    lr: float = 3e-3
    muon_lr: float = 0.01
    smoothing: float = 0.05
    ema: float = 0.99


@dataclass(frozen=True)
class ClassTeacherConfig:
    """Settings of the teacher's training: `drop` of labels for guidance, `deformed` the share of scans that are slightly deformed."""

    steps: int = 5000
    batch: int = 128
    drop: float = 0.1
    deformed: float = 0.75
    muon_lr: float = 0.01
    adam_lr: float = 1e-3
    ema: float = 0.999


@dataclass(frozen=True)
class DigitsConfig:
    """Settings of every part."""

    classifiers: tuple[DigitClassifierConfig, ...] = (
        DigitClassifierConfig("training", 101, smoothing=0.1),
        DigitClassifierConfig("monitor", 202, steps=1500),
        DigitClassifierConfig("heldout", 303),
    )
    teacher: ClassTeacherConfig = field(default_factory=ClassTeacherConfig)
    samples: int = 500
    guidances: tuple[float, ...] = (1.0, 1.5, 4.0)


def deform(scans: Tensor, rng: torch.Generator, strength: float = 1.0) -> Tensor:
    """Scans [B, 8, 8] turned, scaled, sheared and moved a little (bicubic): at strength 1 up to .15 rad, 8 %, .15 and half a pixel."""
    n = len(scans)
    u = strength * (torch.rand(6, n, generator=rng) * 2 - 1)
    angle, stretch, aspect, shear = 0.15 * u[0], (0.08 * u[1]).exp(), (0.05 * u[2]).exp(), 0.15 * u[3]
    cos, sin = angle.cos(), angle.sin()
    x, y = stretch * aspect, stretch / aspect
    theta = torch.stack([torch.stack([cos * x, cos * shear - sin * y, u[4] / 8], 1), torch.stack([sin * x, sin * shear + cos * y, u[5] / 8], 1)], 1)
    grid = F.affine_grid(theta, [n, 1, 8, 8], align_corners=False)
    return F.grid_sample(scans[:, None], grid, mode="bicubic", padding_mode="zeros", align_corners=False)[:, 0].clamp(0, 1)


def train_digit_classifier(config: DigitClassifierConfig, seed: int) -> DigitClassifier:
    """One classifier on its own split; scans deformed, with contrast and noise changed, as a generator's samples would be."""
    torch.manual_seed(seed + config.seed)
    rng = torch.Generator().manual_seed(seed + config.seed)
    net, (scans, classes) = ARCHITECTURES[config.name](), scans_of(SPLITS[config.name])
    params = list(net.parameters())
    optimisers = Optimisers([p for p in params if p.ndim >= 2], [p for p in params if p.ndim < 2], config.steps, config.muon_lr, config.lr)
    average = Average(net, config.ema)
    with Progress(f"classifier {config.name}", config.steps) as progress:
        for step in range(config.steps):
            rows = torch.randint(len(scans), (config.batch,), generator=rng)
            seen = deform(scans[rows], rng, 1.5)[:, None]
            gain, level = (torch.rand(config.batch, 1, 1, 1, generator=rng) for _ in range(2))
            seen = (0.85 + 0.3 * gain) * seen + 0.15 * level * torch.randn(seen.shape, generator=rng)
            loss = F.cross_entropy(net(seen), classes[rows], label_smoothing=config.smoothing)
            loss.backward()
            optimisers.step(step)
            average.update(net, step)
            progress.step(loss=finite(loss, config.name, step))
    net.load_state_dict({k: v.half().float() for k, v in average.weights.items()})
    return DigitClassifier(config.name, net)


def build_dit(seed: int = 0) -> DiTTransformer2DModel:
    """The untrained network: width 64, 2 heads, 4 layers, 16 patches of 2 x 2, 10 classes; .4 million parameters.

    As in DiT the modulation of every block starts at zero, so each block starts as the identity, and so does the output.
    """
    from diffusers import DiTTransformer2DModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=32,
            in_channels=1,
            out_channels=1,
            num_layers=4,
            sample_size=8,
            patch_size=2,
            num_embeds_ada_norm=10,
            attention_bias=True,
        )
        for block in net.transformer_blocks:
            nn.init.zeros_(block.norm1.linear.weight)
            nn.init.zeros_(block.norm1.linear.bias)
            nn.init.normal_(block.norm1.emb.class_embedder.embedding_table.weight, std=0.02)
        for layer in (net.proj_out_1, net.proj_out_2):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
    return net


def _loss(net: nn.Module, x0: Tensor, label: Tensor, rng: torch.Generator) -> Tensor:
    """Flow matching: the output is eps - x0; t is stratified and logit-normal for half of the batch, uniform for the other."""
    n = len(x0)
    u = (torch.randperm(n, generator=rng) + torch.rand(n, generator=rng)) / n
    t = torch.where(torch.arange(n) % 2 == 0, u, torch.randn(n, generator=rng).sigmoid())
    eps = torch.randn(x0.shape, generator=rng)
    level = t.view(-1, 1, 1, 1)
    out = net((1 - level) * x0 + level * eps, timestep=t * 1000, class_labels=label, return_dict=False)[0]
    return F.mse_loss(out, eps - x0)


def train_class_teacher(config: ClassTeacherConfig, seed: int) -> DiTTransformer2DModel:
    """The averaged network, weights rounded to half precision and back, as they are stored."""
    rng = torch.Generator().manual_seed(seed + 7)
    net, (scans, classes) = build_dit(seed).train(), scans_of("train")
    for block in net.transformer_blocks:
        block.norm1.emb.class_embedder.dropout_prob = 0.0  # dropped below instead, in all blocks at once and from our own generator
    named = dict(net.named_parameters())
    matrices = [p for n, p in named.items() if n.startswith("transformer_blocks.") and p.ndim == 2 and "emb" not in n]
    chosen = {id(p) for p in matrices}
    optimisers = Optimisers(matrices, [p for p in named.values() if id(p) not in chosen], config.steps, config.muon_lr, config.adam_lr)
    average = Average(net, config.ema)
    with Progress("teacher", config.steps) as progress:
        for step in range(config.steps):
            rows = torch.randint(len(scans), (config.batch,), generator=rng)
            plain, u = scans[rows], torch.rand(2, config.batch, generator=rng)
            images = torch.where((u[0] < config.deformed)[:, None, None], deform(plain, rng), plain)
            label = torch.where(u[1] < config.drop, torch.full_like(rows, 10), classes[rows])
            loss = _loss(net, images[:, None] * 2 - 1, label, rng)
            loss.backward()
            optimisers.step(step)
            average.update(net, step)
            progress.step(loss=finite(loss, "teacher", step))
    net.load_state_dict({k: v.half().float() for k, v in average.weights.items()})
    return net.eval().requires_grad_(False)


def split_media(split: Split) -> tuple[Tensor, tuple[str, ...]]:
    """Real images of a split as media [N, 3, 8, 8], and their classes as prompts."""
    scans, classes = scans_of(split)
    return scans[:, None].expand(-1, 3, -1, -1), tuple(str(int(c)) for c in classes)


@torch.no_grad()
def measure_teacher(family: DiTFamily, classifiers: dict[ClassifierName, DigitClassifier], config: DigitsConfig, seed: int) -> dict[str, Any]:
    """Right classes of every classifier for 50- and 1-step samples, and denoising errors on seen and unseen scans (memory shows as a gap)."""
    teacher, n = Role("teacher", Backbone(family, family.pretrained)), config.samples
    prompts = [str(i % 10) for i in range(n)]
    cond, null = family.encode(prompts), family.unconditional(prompts)
    found: dict[str, Any] = {}
    for steps in (50, 1):
        for w in config.guidances if steps == 50 else (1.0,):
            noise = torch.randn(n, *family.latent_shape, generator=torch.Generator().manual_seed(seed))
            media = family.decode(sample_ode(teacher, cond, null, noise, steps=steps, path=family.path, shift=family.shift, guidance=w)).clamp(0, 1)
            found[f"{steps} steps, guidance {w:g}"] = {name: round(float(j.correct(media, prompts).float().mean()), 4) for name, j in classifiers.items()}
    for split in ("train", "monitor", "reference"):
        scans, classes = scans_of(split)
        losses = [float(_loss(family.pretrained, scans[:, None] * 2 - 1, classes, torch.Generator().manual_seed(i))) for i in range(8)]
        found[f"flow-matching error, {split}"] = round(sum(losses) / len(losses), 4)
    return found


def pretrain_digits(out: Path, seed: int = 0, threads: int = 1, config: DigitsConfig | None = None) -> None:
    """Trains classifiers and teacher from raw scans and writes them to `out`: transformer/ and scheduler/ (fp16), classifiers/, classes.json, pretrain.json.

    ValueError if `threads` is below 1.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    begin(out, threads)
    config, began = config or DigitsConfig(), time.process_time()
    reference, names = split_media("reference")
    for classifier_config in config.classifiers:
        classifier = train_digit_classifier(classifier_config, seed)
        write_tensors(out / "classifiers" / f"{classifier.name}.safetensors", {k: v.half() for k, v in classifier.net.state_dict().items()})
        accuracy = round(float(classifier.correct(reference, names).float().mean()), 4)
        about = {
            "name": classifier.name,
            "architecture": type(classifier.net).__name__,
            "split": SPLITS[classifier_config.name],
            "images": len(reference),
            "accuracy": accuracy,
            "config": asdict(classifier_config),
            "seed": seed,
        }
        write_json(out / "classifiers" / f"{classifier.name}.json", about)
    net = train_class_teacher(config.teacher, seed)
    parameters = sum(p.numel() for p in net.parameters())
    write_folder(out / "transformer", lambda folder: net.half().save_pretrained(folder))
    write_folder(out / "scheduler", FlowMatchEulerDiscreteScheduler(shift=1.0).save_pretrained)
    write_json(out / CLASSES, list(WORDS))
    write_json(out / "pretrain.json", record(out, config, seed, threads, parameters) | {"cpu_seconds": round(time.process_time() - began, 1)})


def record(out: Path, config: DigitsConfig, seed: int, threads: int, parameters: int) -> dict[str, Any]:
    """What pretrain.json says of the model in `out`: how it was made, measured metrics, checksums."""
    classifiers = {j.name: load_digit_classifier(j.name, out / "classifiers") for j in config.classifiers}
    found = {f"classifier {name}": classifier.accuracy for name, classifier in classifiers.items()}
    found |= measure_teacher(DiTFamily.load(out), classifiers, config, seed)
    sums = checksums(out)
    return {
        "command": f"PYTHONPATH=tools python -m pretrain digits --seed {seed} --threads {threads}",
        "seed": seed,
        "threads": threads,
        "config": asdict(config),
        "parameters": parameters,
        "versions": {name: version(name) for name in ("torch", "diffusers", "scikit-learn")},
        "measured": found,
        "bytes": sum((out / name).stat().st_size for name in sums),
        "sha256": sums,
    }
