"""Training of the two word readers, each from a seed of its own, on drawn words of the training split, damaged, disturbed and partly through the VAE."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from instep.bundled import words
from instep.bundled.ctc import ctc_log_probability
from instep.bundled.word_networks import ARCHITECTURES, ReaderName, Trunk
from instep.bundled.word_readers import WordReader
from instep.bundled.words import Drawn, Spec, draw, random_words
from instep.core.files import write_tensors
from instep.core.progress import Progress
from instep.models.wan_vae import decode_latents, encode_latents
from pretrain.files import begin, write_json
from pretrain.moving_digits import load_vae, stage
from pretrain.optim import Average, Optimisers, finite
from pretrain.word_damage import Labelled, joined, labelled

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

TESTED = 512  # held-out videos that a reader's accuracy is measured on
FRAMES = 3  # of each video that are read in an update; its neighbours look alike


@dataclass(frozen=True)
class ReaderConfig:
    """Settings of one reader's training; `pool` videos of `decoded` in each batch come from the VAE, `smoothing` keeps a column's symbols from certainty."""

    name: ReaderName
    seed: int
    steps: int = 700
    batch: int = 40
    decoded: int = 14
    pool: int = 512
    lr: float = 3e-3
    muon_lr: float = 0.01
    smoothing: float = 0.02
    ema: float = 0.99


READERS = (ReaderConfig("training", 101), ReaderConfig("monitor", 202))


def random_videos(n: int, rng: torch.Generator) -> Drawn:
    """Fully random videos of words of the training split."""
    return draw([Spec(word) for word in random_words("train", n, rng)], rng)


@torch.no_grad()
def round_trip(vae: AutoencoderKLWan, media: Tensor, noise: Tensor | None = None) -> Tensor:
    """Videos after encoding and decoding; noise: what is added to the latents, broadcast over [B, 16, 3, 8, 16], in their standard deviations."""
    x = encode_latents(vae, media)
    return decode_latents(vae, x if noise is None else x + noise).clamp(0, 1)


class Pool:
    """Videos through the VAE, their latents disturbed by up to 0.3 standard deviations as a generator's would be; drawn once, damaged anew for each batch."""

    def __init__(self, vae: AutoencoderKLWan, n: int, rng: torch.Generator) -> None:
        parts = []
        with Progress("videos through the VAE", n // 32) as progress:
            for _ in range(n // 32):
                drawn = random_videos(32, rng)
                noise = torch.randn(32, 16, 3, 8, 16, generator=rng) * torch.rand(32, 1, 1, 1, 1, generator=rng).square() * 0.3
                parts.append((drawn, round_trip(vae, drawn.media, noise).mean(1).half()))
                progress.step()
        self.media = torch.cat([grey for _, grey in parts])
        self.boxes, self.letters, self.whole = (torch.cat([getattr(drawn, key) for drawn, _ in parts]) for key in ("boxes", "letters", "whole"))
        self.shown = [spec for drawn, _ in parts for spec in drawn.shown]

    def draw(self, n: int, rng: torch.Generator) -> Labelled:
        rows = torch.randint(len(self.shown), (n,), generator=rng)
        media = self.media[rows].float()[:, None]
        return labelled(Drawn(media, self.boxes[rows], self.letters[rows], self.whole[rows], tuple(self.shown[i] for i in rows.tolist())), rng)


def loss_of(net: Trunk, batch: Labelled, smoothing: float, placed: float, rng: torch.Generator) -> Tensor:
    """Minus the log-probability of the letters in a few frames of each video, a letter; and the cross-entropies of motion, size and font, 0.3 each.

    `placed`: weight of the letters at the columns of their centres, without which a network reads blanks alone for long.
    """
    n = len(batch.ink)
    frames = torch.rand(n, words.FRAMES, generator=rng).argsort(1)[:, :FRAMES]
    rows = torch.arange(n)[:, None]
    log_p, _, look = net.read(1 - batch.ink[rows, frames].flatten(0, 1))
    whole = batch.whole[rows, frames].flatten()
    read = ctc_log_probability(log_p, *(x.repeat_interleave(FRAMES, 0) for x in (batch.letters, batch.lengths)))
    centres = ((batch.centres[rows, frames].flatten(0, 1) - 0.75) / 2).round().long().clamp(0, log_p.shape[1] - 1)
    there = log_p[torch.arange(len(log_p))[:, None], centres, batch.letters.repeat_interleave(FRAMES, 0)]
    counts = whole[:, None] & (torch.arange(words.LENGTH) < batch.lengths.repeat_interleave(FRAMES)[:, None])
    loss = -(read[whole].mean() / words.LENGTH + smoothing * log_p.mean() + placed * there[counts].mean())
    looks = look.unflatten(0, (n, FRAMES)).mean(1)[batch.clear]
    motion, size, font = batch.classes.unbind(1)
    heads = ((net.moved(net.watch(batch.ink)), motion), (net.size(looks), size[batch.clear]), (net.font(looks), font[batch.clear]))
    return loss + sum(0.3 * F.cross_entropy(logits, classes, label_smoothing=0.1) for logits, classes in heads)


def train_reader(config: ReaderConfig, vae: AutoencoderKLWan | None, seed: int) -> WordReader:
    """One reader; a third of every batch comes through the VAE where there is one."""
    torch.manual_seed(seed + config.seed)
    rng = torch.Generator().manual_seed(seed + config.seed)
    net = ARCHITECTURES[config.name]()
    pool = None if vae is None else Pool(vae, config.pool, rng)
    fresh = config.batch - (config.decoded if pool is not None else 0)
    params = list(net.parameters())
    optimisers = Optimisers([p for p in params if p.ndim >= 3], [p for p in params if p.ndim < 3], config.steps, config.muon_lr, config.lr)
    average = Average(net, config.ema)
    with Progress(f"reader {config.name}", config.steps) as progress:
        for step in range(config.steps):
            batch = labelled(random_videos(fresh, rng), rng)
            if pool is not None:
                batch = joined(batch, pool.draw(config.decoded, rng))
            loss = loss_of(net, batch, config.smoothing, max(0.0, 1 - 2 * step / config.steps), rng)
            loss.backward()
            nn.utils.clip_grad_norm_(params, 5.0)
            optimisers.step(step)
            average.update(net, step)
            progress.step(loss=finite(loss, config.name, step))
    net.load_state_dict({k: v.half().float() for k, v in average.weights.items()})
    return WordReader(config.name, net, {})


def accuracy(reader: WordReader, media: Tensor, prompts: list[str]) -> dict[str, float]:
    """Shares right of word, motion, size and font together, word and motion together."""
    right = reader.correct(media, prompts)
    return {key: round(float(getattr(right, key).float().mean()), 4) for key in ("word", "motion", "look", "both")}


def reference_videos(n: int, seed: int) -> tuple[Tensor, list[str]]:
    """n real videos of held-out words and the prompts that say everything they show."""
    prompts = words.prompts_of("heldout", n, seed, full=1.0)
    return words.render([words.parse(prompt) for prompt in prompts], seed).media, prompts


def _reader(out: Path, config: ReaderConfig, seed: int) -> dict[str, Any]:
    vae = load_vae(out) if (out / "vae").is_dir() else None
    reader = train_reader(config, vae, seed)
    media, prompts = reference_videos(TESTED, seed + 1)
    found = {"real": accuracy(reader, media, prompts)}
    if vae is not None:
        found["through the VAE"] = accuracy(reader, torch.cat([round_trip(vae, part) for part in media.split(32)]), prompts)
    write_tensors(out / "readers" / f"{config.name}.safetensors", {k: v.half() for k, v in reader.net.state_dict().items()})
    about = {"name": config.name, "architecture": type(reader.net).__name__, "videos": len(media), "accuracy": found["real"]}
    write_json(out / "readers" / f"{config.name}.json", about | {"accuracy_through_vae": found.get("through the VAE"), "config": asdict(config), "seed": seed})
    return found


def pretrain_word_readers(out: Path, seed: int = 0, threads: int = 1, resume: bool = True) -> None:
    """Trains both readers and writes them to `out`/readers, weights in fp16; `out`/vae, where it is there, is the VAE that a third of the videos pass.

    With `resume` a reader of the same seed and settings that is done is kept. ValueError if `threads` is below 1.
    """
    begin(out, threads, resume)
    for config in READERS:
        stage(out, f"reader-{config.name}", config, seed, lambda c=config: _reader(out, c, seed))
