"""The teacher: a stock `WanTransformer3DModel` trained by flow matching on cached latents of training videos."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from instep.bundled.digits import PromptSpec, describe, motion_spec
from instep.core.files import write_tensors
from instep.core.progress import Progress
from instep.models.wan_vae import encode_latents
from pretrain.attention import TextBias, TrainingAttention
from pretrain.optim import Average, Optimisers, finite
from pretrain.vae import real_videos

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan, WanTransformer3DModel

STOCK_PADDING = 512
SNAPSHOT_SECONDS = 240.0


@dataclass(frozen=True)
class TeacherConfig:
    """Settings of the teacher's training; `autocast`: matrix products in bfloat16; `shown` weighs the cross-entropy of a linear reading of block
    `read_after` that tells what each latent shows (a network for training alone; see `TrainingSet.shown`)."""

    videos: int = 24576
    steps: int = 11000
    batch: int = 64
    shift: float = 3.0
    drop: float = 0.1
    full: float = 0.5
    stock_padding: float = 0.75
    muon_lr: float = 0.01
    adam_lr: float = 2e-3
    ema: float = 0.999
    autocast: bool = True
    shown: float = 0.0
    read_after: int = 3


def build_transformer(text_dim: int = 32) -> WanTransformer3DModel:
    """The untrained network for texts of width `text_dim`: width 128, 4 heads, 6 layers, patches of 1 x 2 x 2, 1.75 million parameters."""
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=16,
        out_channels=16,
        text_dim=text_dim,
        freq_dim=64,
        ffn_dim=512,
        num_layers=6,
        rope_max_seq_len=32,
    )


@dataclass(frozen=True)
class Latents:
    """Cached training set: latents x [N, 16, 3, 6, 6] (half), digits [N], motions [N]; and, where the network is given one, what it sees of the first
    frame beside the noisy latents, [N, 20, 3, 6, 6] (half).
    """

    x: Tensor
    digits: Tensor
    motions: Tensor
    first_frame: Tensor | None = None

    def shown(self, pick: Tensor) -> None:
        """None: nobody says what each latent shows."""

    def caption(self, i: int, u: Tensor, full: float) -> str:
        """A prompt that video i fits: all that it shows with probability `full`, else less; u [2 or more] uniform numbers."""
        return describe(prompt_spec(int(self.digits[i]), int(self.motions[i]), u, full))


class TrainingSet(Protocol):
    """Cached videos, each of which can be captioned in several ways; see `Latents`."""

    @property
    def x(self) -> Tensor: ...

    @property
    def first_frame(self) -> Tensor | None: ...

    def caption(self, i: int, u: Tensor, full: float) -> str: ...

    def shown(self, pick: Tensor) -> Tensor | None:
        """What each latent of videos `pick` [B] shows: shares [B, F, H, W, classes], or None."""
        ...


class Texts(Protocol):
    """Encoded prompts: `tokens` is the most that a prompt has, with one pad token."""

    @property
    def tokens(self) -> int: ...

    def encode(self, prompts: Sequence[str], padded_to: Tensor) -> tuple[Tensor, Tensor]:
        """Prompts as if padded to `padded_to` [B] tokens: text [B, L, D] and its bias [B, L]."""
        ...


def pad_bias(lengths: Tensor, padded_to: Tensor, tokens: int) -> Tensor:
    """What is added to the attention logits [B, L] of texts of `lengths` [B] tokens, as if padded to `padded_to` [B].

    One pad token with log r added to its attention logits weighs as much as r pad tokens; tokens after it weigh nothing.
    """
    lengths, position = lengths[:, None], torch.arange(tokens)[None]
    pads = (padded_to[:, None] - lengths).clamp(min=1).float().log()
    return torch.where(position < lengths, 0.0, torch.where(position == lengths, pads, -math.inf))


@torch.no_grad()
def cache_latents(vae: AutoencoderKLWan, n: int, seed: int) -> Latents:
    """Encodes n fully random training videos."""
    rng = torch.Generator().manual_seed(seed + 11)
    parts = []
    with Progress("latents", n // 64) as progress:
        for _ in range(n // 64):
            media, digits, motions = real_videos(64, rng)
            parts.append((encode_latents(vae, media).half(), digits, motions))
            progress.step()
    return Latents(*(torch.cat(p) for p in zip(*parts, strict=True)))


@dataclass(frozen=True)
class TextTable:
    """Embeddings of every prompt [P, L, D], their lengths [P], and the row of each prompt; the last row is the empty prompt."""

    embeddings: Tensor
    lengths: Tensor
    rows: dict[str, int]

    def condition(self, index: Tensor, padded_to: Tensor) -> tuple[Tensor, Tensor]:
        """Rows [B] as if padded to `padded_to` [B] tokens: text [B, L, D] and its bias [B, L]."""
        return self.embeddings[index], pad_bias(self.lengths[index], padded_to, self.tokens)

    @property
    def tokens(self) -> int:
        """L."""
        return self.embeddings.shape[1]

    def encode(self, prompts: Sequence[str], padded_to: Tensor) -> tuple[Tensor, Tensor]:
        """`condition` of the prompts' rows."""
        return self.condition(torch.tensor([self.rows[prompt] for prompt in prompts]), padded_to)


@torch.no_grad()
def text_table(tokenizer: Any, encoder: Any) -> TextTable:
    """Every prompt of the grammar, encoded as `WanPipeline` does: zeros after the end token."""
    specs = [motion_spec(d, m) for d in (None, *range(10)) for m in range(9)]
    specs += [PromptSpec(d, direction) for d in (None, *range(10)) for direction in (None, "left", "right", "up", "down")]
    prompts = [*dict.fromkeys(map(describe, specs)), ""]
    tokens = [tokenizer(p).input_ids for p in prompts]
    table = torch.zeros(len(prompts), max(map(len, tokens)) + 1, encoder.config.d_model)
    for i, ids in enumerate(tokens):
        table[i, : len(ids)] = encoder(torch.tensor([ids])).last_hidden_state[0]
    return TextTable(table, torch.tensor([len(ids) for ids in tokens]), {p: i for i, p in enumerate(prompts)})


def prompt_spec(digit: int, motion: int, u: Tensor, full: float) -> PromptSpec:
    """A random part of what a video shows: everything with probability `full`, else any less; u [2] uniform numbers."""
    everything = motion_spec(digit, motion)
    if u[0] < full:
        return everything
    direction, speed = everything.direction, everything.speed
    choices = [PromptSpec(digit), PromptSpec(digit, direction), PromptSpec(None, direction, speed), PromptSpec(None, direction)]
    weights = [0.4, 0.25, 0.2, 0.1, 0.05]
    k = int((torch.tensor(weights).cumsum(0) < u[1]).sum().clamp(max=4))
    return [*choices, PromptSpec()][k]


class Reading(nn.Module):
    """A linear reading of a block's output, for training alone: which class each latent shows. Like a label for each place, it teaches the first blocks what
    belongs where long before the squared error would."""

    def __init__(self, net: WanTransformer3DModel, block: int, classes: int) -> None:
        super().__init__()
        self.grid, self.classes, self.hidden = net.config.patch_size, classes, torch.empty(0)
        width = net.config.num_attention_heads * net.config.attention_head_dim
        self.linear = nn.Linear(width, math.prod(self.grid) * classes)
        net.blocks[block].register_forward_hook(self._keep)

    def _keep(self, _module: nn.Module, _args: Any, out: Tensor) -> None:
        self.hidden = out

    def loss(self, shares: Tensor) -> Tensor:
        """Cross-entropy with shares [B, F, H, W, classes], mean over latents."""
        b, f, h, w, _ = shares.shape
        pf, ph, pw = self.grid
        logits = self.linear(self.hidden.float()).view(b, f // pf, h // ph, w // pw, pf, ph, pw, self.classes)
        logits = logits.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(shares.shape)
        return -(shares * logits.log_softmax(-1)).sum(-1).mean()


class TeacherRun:
    """Training state that can be written to one safetensors file and read back; step i always draws the same batch."""

    def __init__(
        self, config: TeacherConfig, seed: int, data: TrainingSet, table: Texts, build: Callable[[], WanTransformer3DModel] = build_transformer
    ) -> None:
        """`build` makes the network as it is before training; parameters that it freezes stay as they are."""
        torch.manual_seed(seed + 21)
        self.config, self.seed, self.data, self.table, self.build, self.step = config, seed, data, table, build, 0
        self.net = build().train()
        shares = data.shown(torch.tensor([0]))
        self.reading = None if shares is None or not config.shown else Reading(self.net, config.read_after, shares.shape[-1])
        self.bias = TextBias(torch.zeros(config.batch, table.tokens))
        for block in self.net.blocks:
            block.attn1.set_processor(TrainingAttention(self.bias))
            block.attn2.set_processor(TrainingAttention(self.bias))
        named = {name: p for name, p in self.net.named_parameters() if p.requires_grad}
        matrices = [p for n, p in named.items() if n.startswith("blocks.") and p.ndim == 2]
        chosen = {id(p) for p in matrices}
        others = [p for p in named.values() if id(p) not in chosen] + ([] if self.reading is None else list(self.reading.parameters()))
        self.optimisers = Optimisers(matrices, others, config.steps, config.muon_lr, config.adam_lr)
        self.average = Average(self.net, config.ema)

    def _batch(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor, torch.Generator]:
        c = self.config
        rng = torch.Generator().manual_seed(self.seed * 1_000_003 + self.step)
        pick = torch.randint(0, len(self.data.x), (c.batch,), generator=rng)
        u = torch.rand(c.batch, 5, generator=rng)
        prompts = ["" if v[2] < c.drop else self.data.caption(i, v, c.full) for i, v in zip(pick.tolist(), u, strict=True)]
        short = (u[:, 4] * math.log(STOCK_PADDING)).exp().ceil()
        padded_to = torch.where(u[:, 3] < c.stock_padding, STOCK_PADDING, short)
        text, self.bias.value = self.table.encode(prompts, padded_to)
        return pick, self.data.x[pick].float(), None if self.data.first_frame is None else self.data.first_frame[pick].float(), text, rng

    def compile(self) -> None:
        """Compiles the network (a third faster); without a C compiler training goes on uncompiled."""
        plain = self.net.forward
        self.net.forward = torch.compile(plain)  # type: ignore[method-assign]
        try:
            self._loss().backward()
        except Exception as error:  # whatever the compiler's backend raises on this machine
            print(f"teacher: not compiled ({type(error).__name__}); training goes on, more slowly", file=sys.stderr)
            torch._dynamo.reset()
            self.net.forward = plain  # type: ignore[method-assign]
        self.net.zero_grad(set_to_none=True)

    def _loss(self) -> Tensor:
        """Flow matching: the network's output is eps - x0, t is uniform, then shifted (t = 1 is noise)."""
        pick, x0, first_frame, text, rng = self._batch()
        u = (torch.randperm(len(x0), generator=rng) + torch.rand(len(x0), generator=rng)) / len(x0)
        t = self.config.shift * u / (1 + (self.config.shift - 1) * u)
        eps = torch.randn(x0.shape, generator=rng)
        level = t.view(-1, 1, 1, 1, 1)
        x_t = (1 - level) * x0 + level * eps
        with torch.autocast("cpu", torch.bfloat16, enabled=self.config.autocast):
            out = self.net(x_t if first_frame is None else torch.cat([x_t, first_frame], 1), t * 1000, text, return_dict=False)[0]
        loss = F.mse_loss(out.float(), eps - x0)
        return loss if self.reading is None else loss + self.config.shown * self.reading.loss(self.data.shown(pick))

    def advance(self) -> float:
        """One step; the loss."""
        loss = self._loss()
        loss.backward()
        self.optimisers.step(self.step)
        self.average.update(self.net, self.step)
        self.step += 1
        return finite(loss, "teacher", self.step)

    def _tensors(self) -> dict[str, Tensor]:
        """Everything to keep, by reference."""
        tensors = {f"net/{k}": v for k, v in self.net.state_dict().items()} | {f"ema/{k}": v for k, v in self.average.weights.items()}
        if self.reading is not None:
            tensors |= {f"reading/{k}": v for k, v in self.reading.state_dict().items()}
        for i, part in enumerate(self.optimisers.parts):
            for j, p in enumerate(part.param_groups[0]["params"]):
                tensors |= {f"optim/{i}/{j}/{k}": v for k, v in part.state[p].items()}
        return tensors

    def save(self, path: Path) -> None:
        """Writes the state atomically."""
        write_tensors(path, self._tensors() | {"step": torch.tensor(self.step)})

    def load(self, path: Path) -> None:
        """Goes on from a state that `save` wrote."""
        from safetensors.torch import load_file

        tensors = load_file(path)
        self.step = int(tensors.pop("step"))
        self.net.load_state_dict({k[4:]: v for k, v in tensors.items() if k.startswith("net/")})
        self.average.weights = {k[4:]: v.clone() for k, v in tensors.items() if k.startswith("ema/")}
        if self.reading is not None:
            self.reading.load_state_dict({k[8:]: v for k, v in tensors.items() if k.startswith("reading/")})
        for name, value in tensors.items():
            if name.startswith("optim/"):
                _, i, j, key = name.split("/")
                part = self.optimisers.parts[int(i)]
                part.state[part.param_groups[0]["params"][int(j)]][key] = value.clone()

    def exported(self) -> nn.Module:
        """The averaged network with stock attention, eval, float32."""
        net = self.build()
        net.load_state_dict(self.average.weights)
        return net.eval().requires_grad_(False)


def train_teacher(run: TeacherRun, checkpoint: Path, snapshot: Callable[[nn.Module], None]) -> None:
    """Trains to the last step; every few minutes writes a checkpoint and hands the averaged network to `snapshot`."""
    if checkpoint.exists():
        run.load(checkpoint)
    run.compile()
    last = time.monotonic()
    first = run.step
    with Progress("teacher", run.config.steps - first) as progress:
        while run.step < run.config.steps:
            progress.step(loss=run.advance())
            if time.monotonic() - last > SNAPSHOT_SECONDS:
                run.save(checkpoint)
                snapshot(run.exported())
                last = time.monotonic()
    snapshot(run.exported())
