"""A whole WanPipeline with random weights, small enough for tests: built offline, milliseconds a forward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, CogVideoXPipeline, StableDiffusion3Pipeline, WanImageToVideoPipeline, WanPipeline
    from transformers import CLIPTokenizer, PreTrainedTokenizerFast

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
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", model_max_length=512)


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
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=16,
            out_channels=16,
            text_dim=16,
            freq_dim=32,
            ffn_dim=64,
            num_layers=layers,
            rope_max_seq_len=32,
        )
        vae = AutoencoderKLWan(
            base_dim=4,
            decoder_base_dim=4,
            z_dim=16,
            dim_mult=[1, 2, 2],
            num_res_blocks=1,
            attn_scales=[],
            temperal_downsample=[True, True],
            is_residual=True,
            patch_size=2,
            in_channels=12,
            out_channels=12,
            scale_factor_spatial=8,
            scale_factor_temporal=4,
        )
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


def tiny_wan22_pipeline(seed: int = 0, boundary: float = 0.875) -> WanPipeline:
    """`tiny_wan_pipeline` with two experts of equal shape and different random weights, as Wan 2.2 A14B has them."""
    from diffusers import WanPipeline

    pipe, other = tiny_wan_pipeline(seed), tiny_wan_pipeline(seed + 100)
    return WanPipeline(**{**pipe.components, "transformer_2": other.transformer}, boundary_ratio=boundary)


def tiny_wan_i2v_pipeline(seed: int = 0, layers: int = 2) -> WanImageToVideoPipeline:
    """The same with a transformer that is given a first frame: 16 + 4 + 16 channels in, no image encoder. The first frame's weights are loud, so that two
    of them differ visibly."""
    from instep.bundled.moving_digits_i2v import around, widened

    base = tiny_wan_pipeline(seed, layers)
    transformer = widened(base.transformer, base.vae_scale_factor_temporal)
    rng = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        new = transformer.patch_embedding.weight[:, 16:]
        new.copy_(0.2 * torch.randn(new.shape, generator=rng))
    return around(base, transformer)


def tiny_cogvideox_pipeline(seed: int = 0, *, rotary: bool = False, layers: int = 2) -> CogVideoXPipeline:
    """Transformer of 2 layers and width 32, VAE (8x in space, 4x in time), T5 of width 16, the scheduler of CogVideoX-2b; eval, float32.

    `rotary`: positions as in the 5B model instead of the 2B one's. 9 frames of 32 x 32, its own size, are latents [B, 4, 3, 4, 4], 12 tokens beside
    226 of text. The same seed gives the same weights; the global random state is left as it was.
    """
    from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
    from transformers import T5Config, T5EncoderModel

    tokenizer = byte_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = CogVideoXTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            time_embed_dim=24,
            text_embed_dim=16,
            num_layers=layers,
            sample_width=4,
            sample_height=4,
            sample_frames=9,
            max_text_seq_length=226,
            use_rotary_positional_embeddings=rotary,
        )
        vae = AutoencoderKLCogVideoX(
            block_out_channels=(4, 4, 4, 4),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
            temporal_compression_ratio=4,
            sample_height=32,
            sample_width=32,
            scaling_factor=0.7,
        )
        text_encoder = T5EncoderModel(T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    # a few tokens among 226 of padding say little to random weights: louder values let two prompts differ visibly
    with torch.no_grad():
        transformer.patch_embed.text_proj.weight.mul_(4)
        for block in transformer.transformer_blocks:
            block.attn1.to_v.weight.mul_(16)
    scheduler = CogVideoXDDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        snr_shift_scale=3.0,
        timestep_spacing="trailing",
        set_alpha_to_one=True,
        clip_sample=False,
    )
    return CogVideoXPipeline(tokenizer=tokenizer, text_encoder=text_encoder.eval(), vae=vae.eval(), transformer=transformer.eval(), scheduler=scheduler)


def tiny_image_vae(**own: Any) -> AutoencoderKL:
    """A VAE of factor 2 and 4 channels with random weights; `own` are the other values of its configuration."""
    from diffusers import AutoencoderKL

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(block_out_channels=(8, 16), **blocks, latent_channels=4, norm_num_groups=4, **own)


def clip_tokenizer(folder: str) -> CLIPTokenizer:
    """CLIP's tokenizer without merges, made in `folder`: any prompt tokenizes, byte by byte."""
    import json
    from pathlib import Path

    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(f"{c}</w>" for c in alphabet), "<|startoftext|>", "<|endoftext|>"]
    Path(folder, "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), encoding="utf-8")
    Path(folder, "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    return CLIPTokenizer(f"{folder}/vocab.json", f"{folder}/merges.txt", model_max_length=77)


def tiny_sd3_pipeline(seed: int = 0, layers: int = 2, dual: bool = False) -> StableDiffusion3Pipeline:
    """Transformer of 2 layers (or `layers`) and width 32, two CLIPs and T5 of width 16, VAE of factor 2; eval, float32. Images of 16 x 16 are latents
    [B, 4, 8, 8]. `dual`: as SD3.5 medium, a second attention in the first block and normed queries and keys. The same seed gives the same weights; the
    global random state is left as it was.
    """
    import tempfile

    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    with tempfile.TemporaryDirectory() as folder:
        clip = clip_tokenizer(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=layers,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=32,
            pooled_projection_dim=32,
            pos_embed_max_size=16,
            dual_attention_layers=(0,) if dual else (),
            qk_norm="rms_norm" if dual else None,
        )
        vae = tiny_image_vae(use_quant_conv=False, use_post_quant_conv=False, scaling_factor=1.5, shift_factor=0.06)
        clips = [
            CLIPTextModelWithProjection(
                CLIPTextConfig(
                    vocab_size=len(clip),
                    hidden_size=16,
                    intermediate_size=32,
                    projection_dim=16,
                    num_hidden_layers=2,
                    num_attention_heads=2,
                    max_position_embeddings=77,
                    bos_token_id=clip.bos_token_id,
                    eos_token_id=clip.eos_token_id,
                )
            )
            for _ in range(2)
        ]
        t5 = T5EncoderModel(T5Config(vocab_size=512, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    parts = {"transformer": transformer, "vae": vae, "text_encoder": clips[0], "text_encoder_2": clips[1], "text_encoder_3": t5}
    for part in parts.values():
        part.eval()
    tokenizers = {"tokenizer": clip, "tokenizer_2": clip, "tokenizer_3": byte_tokenizer()}
    return StableDiffusion3Pipeline(**parts, **tokenizers, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))
