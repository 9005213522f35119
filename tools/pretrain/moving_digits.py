"""The whole pretraining in order: VAE, text encoder, classifiers, teacher, measurement. Each part is kept, so an interrupted run goes on."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import nn

from instep.bundled.digits import describe
from instep.core.files import write_tensors
from instep.models.wan_vae import decode_latents, encode_latents
from pretrain.classifiers import CLASSIFIERS, SPLITS, ClassifierConfig, accuracy, reference_videos, train_classifier
from pretrain.files import begin, checksums, stage_done, write_folder, write_json
from pretrain.measure import MeasureConfig, measure
from pretrain.teacher import Latents, TeacherConfig, TeacherRun, cache_latents, text_table, train_teacher
from pretrain.text import build_text_encoder, build_tokenizer
from pretrain.vae import VaeConfig, psnr, train_vae

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan


@dataclass(frozen=True)
class PretrainConfig:
    """Settings of every part."""

    vae: VaeConfig = field(default_factory=VaeConfig)
    classifiers: tuple[ClassifierConfig, ...] = CLASSIFIERS
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    measure: MeasureConfig = field(default_factory=MeasureConfig)


def stage(out: Path, name: str, config: Any, seed: int, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Runs a part unless it is done; its note holds settings, seed, seconds and what `make` returns."""
    work = out / ".work"
    note = stage_done(work, name, config, seed)
    if note is None:
        start, cpu = time.monotonic(), time.process_time()
        found = make()
        note = {
            "config": asdict(config),
            "seed": seed,
            "seconds": round(time.monotonic() - start, 1),
            "cpu_seconds": round(time.process_time() - cpu, 1),
            "threads": torch.get_num_threads(),
            "measured": found,
        }
        write_json(work / f"{name}.json", note)
    return note


def load_vae(out: Path) -> AutoencoderKLWan:
    """The stored VAE (fp16 weights) in float32, frozen: what every later part sees."""
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan.from_pretrained(out / "vae", torch_dtype=torch.float32, local_files_only=True).eval().requires_grad_(False)


def _vae(out: Path, config: VaeConfig, seed: int) -> dict[str, Any]:
    model = train_vae(config, seed)
    write_folder(out / "vae", lambda folder: model.half().save_pretrained(folder))
    return {"psnr_db_reference": round(psnr(load_vae(out), reference_videos(180, seed)[0]), 2)}


def _classifier(out: Path, config: ClassifierConfig, seed: int) -> dict[str, Any]:
    vae = load_vae(out)
    classifier = train_classifier(config, vae, seed)
    media, specs = reference_videos(1080, seed + 1)
    prompts = [describe(spec) for spec in specs]
    with torch.no_grad():
        decoded = torch.cat([decode_latents(vae, encode_latents(vae, part)) for part in media.split(64)])
    found = {"accuracy": accuracy(classifier, media, prompts), "accuracy_decoded": accuracy(classifier, decoded.clamp(0, 1), prompts)}
    write_tensors(out / "classifiers" / f"{config.name}.safetensors", {k: v.half() for k, v in classifier.net.state_dict().items()})
    about = {"name": config.name, "architecture": type(classifier.net).__name__, "split": SPLITS[config.name], "videos": len(media)}
    write_json(out / "classifiers" / f"{config.name}.json", about | found | {"config": asdict(config), "seed": seed})
    return found


def pipeline_writer(out: Path, vae: AutoencoderKLWan, tokenizer: Any, encoder: nn.Module, shift: float) -> Callable[[nn.Module], None]:
    """A function that writes the whole pipeline with a transformer as it is now, fp16, for those who want to look on."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    half_vae, half_encoder = copy.deepcopy(vae).half(), copy.deepcopy(encoder).half()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)

    def snapshot(net: nn.Module) -> None:
        parts = {"transformer": net.half(), "text_encoder": half_encoder, "tokenizer": tokenizer, "scheduler": scheduler}
        for name, part in parts.items():
            write_folder(out / name, part.save_pretrained)
        WanPipeline(vae=half_vae, **parts).save_config(out)

    return snapshot


def _teacher(out: Path, config: TeacherConfig, seed: int) -> dict[str, Any]:
    vae, tokenizer, encoder = load_vae(out), build_tokenizer(), build_text_encoder(seed)
    cached = out / ".work" / "latents.safetensors"
    if not cached.exists():
        found = cache_latents(vae, config.videos, seed)
        write_tensors(cached, {"x": found.x, "digits": found.digits, "motions": found.motions})
    run = TeacherRun(config, seed, Latents(**load_file(cached)), text_table(tokenizer, encoder))
    train_teacher(run, out / ".work" / "teacher.safetensors", pipeline_writer(out, vae, tokenizer, encoder, config.shift))
    return {"steps": run.step, "parameters": sum(p.numel() for p in run.net.parameters())}


def portable_names(out: Path) -> None:
    """Names the tokenizer's class as transformers 4 and 5 both know it; version 5 writes its own name."""
    for path, key in ((out / "model_index.json", "tokenizer"), (out / "tokenizer" / "tokenizer_config.json", "tokenizer_class")):
        values = json.loads(path.read_text())
        name = "PreTrainedTokenizerFast"
        values[key] = ["transformers", name] if isinstance(values[key], list) else name
        write_json(path, values)


def record(out: Path, model: str, parts: Sequence[str], config: Any, seed: int, threads: int) -> dict[str, Any]:
    """What `pretrain.json` holds of a model: how it was made, what each of its parts measured, versions and checksums."""
    notes = {name: json.loads((out / ".work" / f"{name}.json").read_text()) for name in parts}
    sums = checksums(out)
    return {
        "command": f"PYTHONPATH=tools python -m pretrain {model} --seed {seed}",
        "seed": seed,
        "threads": threads,
        "config": asdict(config),
        "seconds": {name: note["seconds"] for name, note in notes.items()},
        "process_threads": {name: note["threads"] for name, note in notes.items()},
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers", "scikit-learn")},
        "measured": {name: note["measured"] for name, note in notes.items()},
        "bytes": sum((out / name).stat().st_size for name in sums),
        "sha256": sums,
    }


def _classifiers(out: Path, config: PretrainConfig, seed: int, threads: int) -> None:
    """The three classifiers in turn, in a process of their own."""
    torch.set_num_threads(threads)
    for classifier in config.classifiers:
        stage(out, f"classifier-{classifier.name}", classifier, seed, lambda c=classifier: _classifier(out, c, seed))


def _classifiers_and_teacher(out: Path, config: PretrainConfig, seed: int, threads: int) -> None:
    """Classifiers and teacher side by side: on two cores two processes of one thread do more than one process of two threads."""
    beside = get_context("spawn").Process(target=_classifiers, args=(out, config, seed, 1), daemon=True)
    beside.start()
    torch.set_num_threads(max(1, threads - 1))
    stage(out, "teacher", config.teacher, seed, lambda: _teacher(out, config.teacher, seed))
    beside.join()
    if beside.exitcode != 0:
        raise RuntimeError(f"training of the classifiers ended with exit code {beside.exitcode}; its error stands above; the same command goes on from there")


def pretrain_moving_digits(out: Path, seed: int = 0, threads: int = 2, resume: bool = True) -> None:
    """Trains the moving-digits pipeline from raw scans and writes it to `out` as a diffusers folder, weights in fp16.

    About an hour on two cores; with `resume` an interrupted run of the same seed goes on where it stopped. `threads` are used for the VAE and
    the measurement; classifiers and teacher are trained side by side with 1 and `threads` - 1. ValueError if `threads` is below 1.
    """
    begin(out, threads, resume)
    config = PretrainConfig()
    stage(out, "vae", config.vae, seed, lambda: _vae(out, config.vae, seed))
    _classifiers_and_teacher(out, config, seed, threads)
    torch.set_num_threads(threads)
    portable_names(out)
    stage(out, "measure", config.measure, seed, lambda: measure(out, config.measure, seed))
    parts = ("vae", *(f"classifier-{classifier.name}" for classifier in config.classifiers), "teacher", "measure")
    write_json(out / "pretrain.json", record(out, "moving-digits", parts, config, seed, threads))
