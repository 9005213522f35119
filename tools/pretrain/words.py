"""The parts of the moving-words pipeline before training: a 4x VAE, a token for each letter, a frozen text encoder that tells places, a transformer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from instep.bundled.glyphs import FONTS, LETTERS
from instep.bundled.motions import DIRECTIONS, SPEEDS, direction_and_speed
from instep.bundled.words import HEIGHT, LENGTH, SIZES, WIDTH, Drawn, Spec, describe, draw, motion_of, partial, random_words
from instep.core.progress import Progress
from instep.models.wan_vae import encode_latents
from pretrain.teacher import build_transformer, pad_bias
from pretrain.vae import build_vae

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

VOCABULARY = ("<pad>", "</s>", "<unk>", *LETTERS, "the", "word", "in", "letters", "moving", "standing", "still", *DIRECTIONS, *SPEEDS, *SIZES, *FONTS)


def build_words_vae() -> AutoencoderKLWan:
    """The untrained VAE: base width 8, no patches, so 4x in space."""
    return build_vae(base=8, patch=None)


def word_videos(n: int, rng: torch.Generator) -> Tensor:
    """Fully random training videos: media [n, 3, 9, 32, 64] in [0, 1]."""
    return draw([Spec(word) for word in random_words("train", n, rng)], rng).media


def build_words_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each capital and for each word in small letters, and an end token; the empty prompt is the end token alone."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    letters = pre_tokenizers.Split(Regex("[A-Z]"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), letters])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512, padding_side="right"
    )


def build_words_encoder(seed: int) -> UMT5EncoderModel:
    """A frozen random UMT5 (width 64, 1 layer, 4 heads) whose head k looks at the token k places before.

    So the k-th letter's output holds the token "word", each k along a direction of its own: cross-attention can tell letters and places. The
    weights are rounded to fp16, as they will be stored.
    """
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(seed)
    config = UMT5Config(vocab_size=len(VOCABULARY), d_model=64, d_kv=16, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=0)
    encoder = UMT5EncoderModel(config)
    with torch.no_grad():
        bias = encoder.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight  # [buckets, heads]; bucket k < 8 is k places before
        bias.zero_()
        for head in range(4):
            bias[head + 1, head] = 12.0
    return encoder.half().float().eval().requires_grad_(False)


def build_words_transformer() -> WanTransformer3DModel:
    """The untrained network of moving digits, for texts of width 64 (96 tokens a video)."""
    return build_transformer(text_dim=64)


@dataclass(frozen=True)
class WordLatents:
    """Cached training set: latents x [N, 16, 3, 8, 16] (half), codes [N, 7]: four letters, motion, size, font; and `parts` [N, 3, 8, 16, 5] (half): how much of
    each latent's pixels lies in the box of each of the four letters, and in none."""

    x: Tensor
    codes: Tensor
    parts: Tensor
    first_frame: None = None

    def shown(self, pick: Tensor) -> Tensor:
        """What each latent of videos `pick` [B] shows, as shares [B, 3, 8, 16, 27] of the letters A to Z and of nothing."""
        which = F.one_hot(self.codes[pick, :LENGTH], len(LETTERS)).float()
        parts = self.parts[pick].float()
        return torch.cat([torch.einsum("btyxk,bkc->btyxc", parts[..., :-1], which), parts[..., -1:]], -1)

    def caption(self, i: int, u: Tensor, full: float) -> str:
        """A prompt that video i fits: all that it shows with probability `full`, else less; u [2 or more] uniform numbers."""
        return describe(partial(decoded_spec(self.codes[i].tolist()), u, full))


def encoded_spec(spec: Spec) -> list[int]:
    """A complete spec as four letters, motion, size and font."""
    assert spec.size is not None and spec.font is not None
    return [*map(LETTERS.index, spec.word), motion_of(spec), SIZES.index(spec.size), FONTS.index(spec.font)]


def decoded_spec(code: Sequence[int]) -> Spec:
    """The inverse of `encoded_spec`."""
    *letters, motion, size, font = code
    return Spec("".join(LETTERS[i] for i in letters), *direction_and_speed(motion), SIZES[size], FONTS[font])


@torch.no_grad()
def cache_word_latents(vae: AutoencoderKLWan, n: int, seed: int) -> WordLatents:
    """Encodes n fully random training videos."""
    rng = torch.Generator().manual_seed(seed + 11)
    x, codes, parts = [], [], []
    with Progress("latents", n // 32) as progress:
        for _ in range(n // 32):
            drawn = draw([Spec(word) for word in random_words("train", 32, rng)], rng)
            x.append(encode_latents(vae, drawn.media).half())
            codes += map(encoded_spec, drawn.shown)
            parts.append(letter_parts(drawn).half())
            progress.step()
    return WordLatents(torch.cat(x), torch.tensor(codes), torch.cat(parts))


def letter_parts(drawn: Drawn) -> Tensor:
    """The share of each latent's pixels [N, 3, 8, 16] that lies in the box of each letter, and in none: [N, 3, 8, 16, 5]. A latent spans 4 x 4 pixels; the
    first spans one frame, each other one four."""
    across = _covered(drawn.letters, WIDTH // 4)
    down = _covered(drawn.boxes[..., 1::2], HEIGHT // 4)
    share = across[:, :, None].mT * down[:, :, :, None, None]  # [N, 9, 8, 16, 4]
    share = torch.cat([share[:, :1], share[:, 1:].unflatten(1, (-1, 4)).mean(2)], 1)
    return torch.cat([share, (1 - share.sum(-1, keepdim=True)).clamp(min=0)], -1)


def _covered(ends: Tensor, n: int) -> Tensor:
    """The share of each of n cells of 4 pixels that spans from, to [..., 2] in pixels cover: [..., n]."""
    cell = torch.arange(n) * 4.0
    return (torch.minimum(cell + 4, ends[..., 1:]) - torch.maximum(cell, ends[..., :1])).clamp(min=0) / 4


class WordTexts:
    """Prompts of the grammar, encoded where they are needed: there are too many for a table."""

    tokens = 15  # the longest prompt has 14 with its end token

    def __init__(self, tokenizer: PreTrainedTokenizerFast, encoder: UMT5EncoderModel) -> None:
        self.tokenizer, self.encoder = tokenizer, encoder

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], padded_to: Tensor) -> tuple[Tensor, Tensor]:
        """Prompts as `WanPipeline` encodes them (zeros after the end token), as if padded to `padded_to` [B] tokens: text [B, L, D] and its bias [B, L]."""
        ids = [self.tokenizer(prompt).input_ids for prompt in prompts]
        lengths = torch.tensor([len(row) for row in ids])
        padded = torch.tensor([row + [0] * (self.tokens - len(row)) for row in ids])
        mask = torch.arange(self.tokens)[None] < lengths[:, None]
        text = self.encoder(padded, attention_mask=mask.long()).last_hidden_state * mask[..., None]
        return text, pad_bias(lengths, padded_to, self.tokens)
