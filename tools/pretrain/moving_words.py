"""The moving-words pipeline in order: VAE, latents, teacher. Each part is kept, so an interrupted run goes on."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from instep.bundled import words
from instep.core.files import write_tensors
from pretrain.files import begin, write_folder, write_json
from pretrain.moving_digits import load_vae, pipeline_writer, portable_names, record, stage
from pretrain.teacher import TeacherConfig, TeacherRun, train_teacher
from pretrain.vae import VaeConfig, psnr, train_vae
from pretrain.words import (
    WordLatents,
    WordTexts,
    build_words_encoder,
    build_words_tokenizer,
    build_words_transformer,
    build_words_vae,
    cache_word_latents,
    word_videos,
)


@dataclass(frozen=True)
class WordsConfig:
    """Settings of every part."""

    vae: VaeConfig = field(default_factory=lambda: VaeConfig(steps=1800, first_frames=5, full_from=0.85, kl=1e-4, squared=2.0))
    teacher: TeacherConfig = field(default_factory=lambda: TeacherConfig(videos=12288, steps=10000, batch=32, shown=0.2))


def _vae(out: Path, config: VaeConfig, seed: int) -> dict[str, Any]:
    model = train_vae(config, seed, build_words_vae, word_videos)
    write_folder(out / "vae", lambda folder: model.half().save_pretrained(folder))
    held_out = words.render([words.parse(p) for p in words.prompts_of("heldout", 128, seed)], seed)
    return {"psnr_db_heldout": round(psnr(load_vae(out), held_out.media), 2)}


def _teacher(out: Path, config: TeacherConfig, seed: int) -> dict[str, Any]:
    vae, tokenizer, encoder = load_vae(out), build_words_tokenizer(), build_words_encoder(seed)
    cached = out / ".work" / "latents.safetensors"
    if not cached.exists():
        found = cache_word_latents(vae, config.videos, seed)
        write_tensors(cached, {"x": found.x, "codes": found.codes, "parts": found.parts})
    run = TeacherRun(config, seed, WordLatents(**load_file(cached)), WordTexts(tokenizer, encoder), build_words_transformer)
    train_teacher(run, out / ".work" / "teacher.safetensors", pipeline_writer(out, vae, tokenizer, encoder, config.shift))
    return {"steps": run.step, "parameters": sum(p.numel() for p in run.net.parameters())}


def pretrain_moving_words(out: Path, seed: int = 0, threads: int = 1, resume: bool = True) -> None:
    """Trains the moving-words pipeline and writes it to `out` as a diffusers folder, weights in fp16.

    With `resume` an interrupted run of the same seed goes on where it stopped. ValueError if `threads` is below 1.
    """
    begin(out, threads, resume)
    config = WordsConfig()
    stage(out, "vae", config.vae, seed, lambda: _vae(out, config.vae, seed))
    stage(out, "teacher", config.teacher, seed, lambda: _teacher(out, config.teacher, seed))
    portable_names(out)
    write_json(out / "pretrain.json", record(out, "moving-words", ("vae", "teacher"), config, seed, threads))
