"""A whole WanPipeline with random weights, small enough for tests: built offline, milliseconds a forward."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from diffusers import WanPipeline
    from transformers import PreTrainedTokenizerFast

# 9 frames of 48 x 48 are latents [B, 16, 3, 6, 6], 27 tokens
HEIGHT = WIDTH = 48
FRAMES = 9


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE without merges: any prompt tokenizes; 0 pads, 1 ends."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<pad>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", model_max_length=512
    )


def tiny_wan_pipeline(seed: int = 0, layers: int = 2) -> WanPipeline:
    """Transformer of 2 layers (or `layers`) and width 32, VAE in the Wan 2.2 layout (8x in space, 4x in time), UMT5 of width 16;
    eval, float32.

    The same seed gives the same weights; the global random state is left as it was.
    """
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    tokenizer = byte_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=16, out_channels=16,
            text_dim=16, freq_dim=32, ffn_dim=64, num_layers=layers, rope_max_seq_len=32,
        )  # fmt: skip
        vae = AutoencoderKLWan(
            base_dim=4, decoder_base_dim=4, z_dim=16, dim_mult=[1, 2, 2], num_res_blocks=1, attn_scales=[],
            temperal_downsample=[True, True], is_residual=True, patch_size=2, in_channels=12, out_channels=12,
            scale_factor_spatial=8, scale_factor_temporal=4,
        )  # fmt: skip
        text_encoder = UMT5EncoderModel(
            UMT5Config(
                vocab_size=len(tokenizer),
                d_model=16,
                d_kv=8,
                d_ff=32,
                num_layers=1,
                num_heads=2,
                decoder_start_token_id=0,
            )
        )
    # a few tokens among 512 of padding say little to random weights: louder values let two prompts differ visibly
    with torch.no_grad():
        for block in transformer.blocks:
            block.attn2.to_v.weight.mul_(32)
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder.eval(),
        vae=vae.eval(),
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
