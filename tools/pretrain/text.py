"""Tokenizer and text encoder: a word-level vocabulary and a frozen, random UMT5. Cross-attention learns the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from instep.bundled.digits import DIRECTIONS, SPEEDS, WORDS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

VOCABULARY = ("<pad>", "</s>", "<unk>", "a", "an", "digit", *WORDS, "moving", "standing", "still", *DIRECTIONS, *SPEEDS)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Lower-cased words and an end token; the empty prompt is the end token alone."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512, padding_side="right"
    )


def build_text_encoder(seed: int) -> UMT5EncoderModel:
    """The random UMT5 (width 32, 2 layers); its weights are rounded to fp16, as they will be stored."""
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(seed)
    config = UMT5Config(vocab_size=len(VOCABULARY), d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, decoder_start_token_id=0)
    return UMT5EncoderModel(config).half().float().eval().requires_grad_(False)
