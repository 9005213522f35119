"""The whole pretraining in order: VAE, text encoder, judges, teacher, measurement. Each part is kept, so an interrupted run goes on."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from instep.data.digits import describe
from instep.models.wan_vae import decode_latents, encode_latents
from instep.pretrain.files import stage_done, write_folder, write_json, write_tensors
from instep.pretrain.judges import JUDGES, SPLITS, JudgeConfig, accuracy, reference_videos, train_judge
from instep.pretrain.vae import VaeConfig, psnr, train_vae

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan


@dataclass(frozen=True)
class PretrainConfig:
    """Settings of every part."""

    vae: VaeConfig = field(default_factory=VaeConfig)
    judges: tuple[JudgeConfig, ...] = JUDGES


def _stage(out: Path, name: str, config: Any, seed: int, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Runs a part unless it is done; its note holds settings, seed, seconds and what `make` returns."""
    work = out / ".work"
    note = stage_done(work, name, config, seed)
    if note is None:
        start, cpu = time.monotonic(), time.process_time()
        found = make()
        note = {"config": asdict(config), "seed": seed, "seconds": round(time.monotonic() - start, 1),
                "cpu_seconds": round(time.process_time() - cpu, 1), "measured": found}  # fmt: skip
        write_json(work / f"{name}.json", note)
    return note


def _load_vae(out: Path) -> AutoencoderKLWan:
    """The stored VAE (fp16 weights) in float32, frozen: what every later part sees."""
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan.from_pretrained(out / "vae", torch_dtype=torch.float32, local_files_only=True).eval().requires_grad_(False)


def _vae(out: Path, config: VaeConfig, seed: int) -> dict[str, Any]:
    model = train_vae(config, seed)
    write_folder(out / "vae", lambda folder: model.half().save_pretrained(folder))
    return {"psnr_db_reference": round(psnr(_load_vae(out), reference_videos(180, seed)[0]), 2)}


@torch.no_grad()
def _judge(out: Path, config: JudgeConfig, seed: int) -> dict[str, Any]:
    vae = _load_vae(out)
    judge = train_judge(config, vae, seed)
    media, specs = reference_videos(1080, seed + 1)
    prompts = [describe(spec) for spec in specs]
    decoded = torch.cat([decode_latents(vae, encode_latents(vae, part)) for part in media.split(64)])
    found = {"accuracy": accuracy(judge, media, prompts), "accuracy_decoded": accuracy(judge, decoded.clamp(0, 1), prompts)}
    write_tensors(out / "judges" / f"{config.name}.safetensors", {k: v.half() for k, v in judge.net.state_dict().items()})
    about = {"name": config.name, "architecture": type(judge.net).__name__, "split": SPLITS[config.name], "videos": len(media)}
    write_json(out / "judges" / f"{config.name}.json", about | found | {"config": asdict(config), "seed": seed})
    return found


def pretrain_moving_digits(out: Path, seed: int = 0, threads: int = 2, resume: bool = True) -> None:
    """Trains the moving-digits pipeline from raw scans and writes it to `out` as a diffusers folder, weights in fp16.

    About an hour on two cores; with `resume` an interrupted run of the same seed goes on where it stopped.
    """
    torch.set_num_threads(threads)
    config = PretrainConfig()
    out.mkdir(parents=True, exist_ok=True)
    if not resume:
        shutil.rmtree(out / ".work", ignore_errors=True)
    notes = {"vae": _stage(out, "vae", config.vae, seed, lambda: _vae(out, config.vae, seed))}
    for judge in config.judges:
        notes[f"judge {judge.name}"] = _stage(out, f"judge-{judge.name}", judge, seed, lambda c=judge: _judge(out, c, seed))
