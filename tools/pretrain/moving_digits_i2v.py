"""The bundled image-to-video model: the bundled text-to-video transformer, widened by the first frame's channels and trained on."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from instep.bundled import MOVING_DIGITS, folder_of
from instep.bundled.classifiers import load_classifier
from instep.bundled.digits import full_prompts
from instep.bundled.drawn_frames import drawn_video
from instep.bundled.moving_digits_i2v import CHANGED, MovingDigitsImageFamily, around, changed, widened
from instep.bundled.worlds import VIDEO
from instep.core.files import write_tensors
from instep.core.progress import Progress
from instep.data.prompt import Prompt, texts_of
from instep.diffusion.sampling import sample_ode
from instep.models.backbone import Backbone
from instep.models.role import Role
from instep.models.wan_i2v import known_latents
from instep.models.wan_vae import decode_latents, encode_latents
from pretrain.files import begin, checksums, write_folder, write_json
from pretrain.measure import CLASSIFIER_NAMES, shares_right
from pretrain.moving_digits import portable_names, stage
from pretrain.teacher import Latents, TeacherConfig, TeacherRun, text_table, train_teacher
from pretrain.vae import real_videos

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan, WanPipeline

# what ships: the transformer's own tensors beside its configuration and the record
SHIPPED = "shipped"


@dataclass(frozen=True)
class ImageConfig:
    """Training (`teacher`, whose videos and steps are fewer than a teacher's from scratch) and measurement."""

    teacher: TeacherConfig = field(default_factory=lambda: TeacherConfig(videos=6144, steps=2400, muon_lr=3e-3, adam_lr=1e-3, ema=0.998))
    repeats: int = 2
    steps: tuple[int, ...] = (50, 8, 4)
    guidances: tuple[float, ...] = (3.0, 1.0)


def base_pipeline() -> WanPipeline:
    """The bundled text-to-video pipeline, float32."""
    from diffusers import WanPipeline

    return WanPipeline.from_pretrained(folder_of(MOVING_DIGITS), torch_dtype=torch.float32, local_files_only=True)


@torch.no_grad()
def cache_with_first_frames(vae: AutoencoderKLWan, n: int, seed: int) -> Latents:
    """n random training videos as latents, each with what is known of it from its first frame."""
    rng = torch.Generator().manual_seed(seed + 31)
    parts = []
    with Progress("latents", n // 64) as progress:
        for _ in range(n // 64):
            media, digits, motions = real_videos(64, rng)
            parts.append((encode_latents(vae, media).half(), digits, motions, known_latents(vae, media[:, :, 0], media.shape[2]).half()))
            progress.step()
    return Latents(*(torch.cat(p) for p in zip(*parts, strict=True)))


def _train(out: Path, config: TeacherConfig, seed: int) -> dict[str, Any]:
    base = base_pipeline()
    vae = base.vae.eval().requires_grad_(False)
    cached = out / ".work" / "latents.safetensors"
    if not cached.exists():
        write_tensors(cached, vars(cache_with_first_frames(vae, config.videos, seed)))
    table = text_table(base.tokenizer, base.text_encoder)
    run = TeacherRun(config, seed, Latents(**load_file(cached)), table, lambda: widened(base.transformer, base.vae_scale_factor_temporal))

    def snapshot(net: nn.Module) -> None:
        """The whole pipeline as it is now, and what ships of it; fp16."""
        write_tensors(out / SHIPPED / CHANGED, changed(net, base.transformer))
        whole = around(base, net.half())  # type: ignore[arg-type]
        parts = {"vae": copy.deepcopy(base.vae).half(), "text_encoder": copy.deepcopy(base.text_encoder).half()}
        for name in ("transformer", "text_encoder", "vae", "scheduler", "tokenizer"):
            write_folder(out / name, parts.get(name, getattr(whole, name)).save_pretrained)
        whole.save_config(out)
        (out / SHIPPED / "transformer").mkdir(parents=True, exist_ok=True)
        shutil.copyfile(out / "transformer" / "config.json", out / SHIPPED / "transformer" / "config.json")

    train_teacher(run, out / ".work" / "teacher.safetensors", snapshot)
    trained = sum(p.numel() for p in run.net.parameters() if p.requires_grad)
    return {"steps": run.step, "parameters": sum(p.numel() for p in run.net.parameters()), "trained": trained}


def image_to_video_prompts(repeats: int, split: str = "reference") -> list[Prompt]:
    """The 90 prompts that say everything, `repeats` times, each with a first frame of its own from `split`."""
    return [Prompt(prompt, f"{split}/{90 * i + j}") for i in range(repeats) for j, prompt in enumerate(full_prompts())]


def first_frame_distances(media: Tensor, first_frames: Tensor, reconstructed: Tensor) -> dict[str, float]:
    """Root-mean-square distances of first frames, in [0, 1]: media [B, 3, F, H, W] to the given first frames [B, 3, H, W], their VAE reconstructions to
    them, media to these reconstructions, and media to the neighbours' given first frames (what a model that ignores its own would show, roughly).
    """

    def rms(a: Tensor, b: Tensor) -> float:
        return round(float((a - b).square().mean((1, 2, 3)).sqrt().mean()), 4)

    first = media[:, :, 0]
    return {
        "first_frame_to_given": rms(first, first_frames),
        "reconstruction_to_given": rms(reconstructed, first_frames),
        "first_frame_to_reconstruction": rms(first, reconstructed),
        "first_frame_to_another_given": rms(first, first_frames.roll(1, 0)),
    }


@torch.no_grad()
def measure_image_to_video(out: Path, config: ImageConfig, seed: int) -> dict[str, Any]:
    """Classifiers' shares and first-frame distances of the model in `out`, on first frames of the reference split; and of real videos."""
    family = MovingDigitsImageFamily.load(out, VIDEO)
    teacher, classifiers = Role("teacher", Backbone(family, family.pretrained)), {name: load_classifier(name) for name in CLASSIFIER_NAMES}
    prompts = image_to_video_prompts(config.repeats)
    texts = texts_of(prompts)
    real = torch.stack([drawn_video(prompt) for prompt in prompts])
    first_frames = torch.stack([family.first_frame(prompt, family.size) for prompt in prompts])
    decoded = torch.cat([decode_latents(family.pipe.vae, encode_latents(family.pipe.vae, part)) for part in real.split(90)]).clamp(0, 1)
    found: dict[str, Any] = {"real": shares_right(classifiers, real, texts), "real through the VAE": shares_right(classifiers, decoded, texts)}

    def sampled(names: Sequence[Prompt], steps: int, guidance: float) -> Tensor:
        parts = []
        for i in range(0, len(names), 90):
            cond, null = family.encode(names[i : i + 90]), family.unconditional(names[i : i + 90])
            noise = torch.randn(len(cond), *family.latent_shape, generator=torch.Generator().manual_seed(seed + 7 + i))
            x = sample_ode(teacher, cond, null, noise, steps=steps, path=family.path, shift=family.shift, guidance=guidance)
            parts.append(family.decode(x).clamp(0, 1))
        return torch.cat(parts)

    with Progress("measure", len(config.steps) * len(config.guidances)) as progress:
        for steps in config.steps:
            for w in config.guidances:
                media = sampled(prompts, steps, w)
                distances = first_frame_distances(media, first_frames, decoded[:, :, 0])
                found[f"{steps} steps, guidance {w:g}"] = shares_right(classifiers, media, texts) | distances
                progress.step()
    return found


def _about(out: Path, config: ImageConfig, seed: int, threads: int) -> dict[str, Any]:
    """What `pretrain.json` says."""
    notes = {name: json.loads((out / ".work" / f"{name}.json").read_text()) for name in ("teacher", "measure")}
    sums = checksums(out / SHIPPED)
    return {
        "command": f"PYTHONPATH=tools python -m pretrain moving-digits-i2v --seed {seed} --threads {threads}",
        "seed": seed,
        "threads": threads,
        "config": asdict(config),
        "seconds": {name: note["seconds"] for name, note in notes.items()},
        "cpu_seconds": {name: note["cpu_seconds"] for name, note in notes.items()},
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers", "scikit-learn")},
        "base": checksums(folder_of(MOVING_DIGITS) / "transformer"),
        "measured": {name: note["measured"] for name, note in notes.items()},
        "bytes": sum((out / SHIPPED / name).stat().st_size for name in sums),
        "sha256": sums,
    }


def pretrain_moving_digits_i2v(out: Path, seed: int = 0, threads: int = 1, resume: bool = True, config: ImageConfig | None = None) -> None:
    """Trains the image-to-video model from the bundled text-to-video one, writes the stock pipeline (fp16) to `out`, and what ships of it to
    `out`/shipped: the tensors that differ, the transformer's configuration and the record of how it was made.

    A quarter of an hour on one core; with `resume` an interrupted run of the same seed goes on where it stopped. ValueError if `threads` is below 1.
    """
    begin(out, threads, resume)
    config = config or ImageConfig()
    stage(out, "teacher", config.teacher, seed, lambda: _train(out, config.teacher, seed))
    portable_names(out)
    stage(out, "measure", config, seed, lambda: measure_image_to_video(out, config, seed))
    write_json(out / SHIPPED / "pretrain.json", _about(out, config, seed, threads))
