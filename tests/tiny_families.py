"""Whole pipelines of further families with random weights, small enough for tests: built offline, each once a session (`families.py`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from tiny import byte_tokenizer, clip_tokenizer, tiny_cogvideox_pipeline, tiny_image_vae, tiny_wan_i2v_pipeline, tiny_wan_pipeline

if TYPE_CHECKING:
    from diffusers import (
        CogVideoXPipeline,
        DiTPipeline,
        Flux2KleinPipeline,
        FluxPipeline,
        QwenImagePipeline,
        StableDiffusionXLPipeline,
        WanImageToVideoPipeline,
        WanPipeline,
        ZImagePipeline,
    )
    from transformers import PreTrainedTokenizerFast


def tiny_wan22_i2v_pipeline(seed: int = 0) -> WanImageToVideoPipeline:
    """Two experts of equal shape and different random weights, each given a first frame: 16 + 4 + 16 channels in."""
    from diffusers import WanImageToVideoPipeline

    pipe, other = tiny_wan_i2v_pipeline(seed), tiny_wan_i2v_pipeline(seed + 100)
    return WanImageToVideoPipeline(**{**pipe.components, "transformer_2": other.transformer}, boundary_ratio=0.9)


def tiny_ti2v_pipeline(seed: int = 0) -> WanPipeline:
    """`tiny_wan_pipeline` with a level for every token."""
    from diffusers import WanPipeline

    return WanPipeline(**tiny_wan_pipeline(seed).components, expand_timesteps=True)


def tiny_ti2v_image_pipeline(seed: int = 0) -> WanImageToVideoPipeline:
    """The parts of `tiny_ti2v_pipeline` as the pipeline that begins with a given frame."""
    from diffusers import WanImageToVideoPipeline

    return WanImageToVideoPipeline(**tiny_wan_pipeline(seed).components, expand_timesteps=True)


def tiny_wan21_i2v_pipeline(seed: int = 0) -> WanImageToVideoPipeline:
    """16 + 4 + 16 channels in, and a CLIP of width 16 that reads 8 x 8 pixels as 5 tokens, which are loud so that two first frames differ visibly."""
    from diffusers import WanImageToVideoPipeline, WanTransformer3DModel
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    base = tiny_wan_pipeline(seed)
    config = {key: value for key, value in base.transformer.config.items() if not key.startswith("_")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = WanTransformer3DModel(**{**config, "in_channels": 36, "image_dim": 16, "added_kv_proj_dim": 32})
        encoder = CLIPVisionModel(
            CLIPVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4, projection_dim=16)
        )
    with torch.no_grad():
        for block in transformer.blocks:
            block.attn2.to_v.weight.mul_(32)
            block.attn2.add_v_proj.weight.mul_(4)
    processor = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    return WanImageToVideoPipeline(
        **{**base.components, "transformer": transformer.eval(), "image_encoder": encoder.eval(), "image_processor": processor},
    )


def tiny_sdxl_pipeline(seed: int = 0) -> StableDiffusionXLPipeline:
    """UNet of widths 8 and 16, two CLIPs of width 16, VAE of factor 2, the scheduler of SDXL base; images of 16 x 16 are latents [B, 4, 8, 8]."""
    import tempfile

    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with tempfile.TemporaryDirectory() as folder:
        clip = clip_tokenizer(folder)
    text = CLIPTextConfig(
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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=8,
            layers_per_block=1,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(2, 4),
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=6 * 4 + 16,
            cross_attention_dim=32,
            norm_num_groups=4,
        )
        vae = tiny_image_vae(scaling_factor=0.13025)
        parts = {"unet": unet, "vae": vae, "text_encoder": CLIPTextModel(text), "text_encoder_2": CLIPTextModelWithProjection(text)}
    for part in parts.values():
        part.eval()
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1, interpolation_type="linear"
    )
    return StableDiffusionXLPipeline(**parts, tokenizer=clip, tokenizer_2=clip, scheduler=scheduler)


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """`byte_tokenizer` with a chat template that leaves the content as it is."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return tokenizer


def tiny_z_image_pipeline(seed: int = 0) -> ZImagePipeline:
    """Three layers of width 32, a Qwen3 of width 16, VAE of factor 2; images of 16 x 16 are latents [B, 4, 8, 8]."""
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    tokenizer = chat_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=3,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=16,
            axes_dims=[4, 6, 6],
            axes_lens=[1024, 512, 512],
        )
        vae = tiny_image_vae(scaling_factor=0.36, shift_factor=0.12)
        encoder = Qwen3Model(
            Qwen3Config(
                vocab_size=len(tokenizer),
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=2,
                head_dim=8,
            )
        )
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae.eval(),
        text_encoder=encoder.eval(),
        tokenizer=tokenizer,
        transformer=transformer.eval(),
    )


def tiny_cogvideox15_pipeline(seed: int = 0) -> CogVideoXPipeline:
    """`tiny_cogvideox_pipeline` with patches over two latent frames: 9 frames of 32 x 32 are latents [B, 4, 4, 4, 4], the first of them padding."""
    from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel

    base = tiny_cogvideox_pipeline(seed, rotary=True)
    config = {key: value for key, value in base.transformer.config.items() if not key.startswith("_")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = CogVideoXTransformer3DModel(**{**config, "patch_size_t": 2, "patch_bias": False, "sample_height": 300, "sample_width": 300})
    with torch.no_grad():
        transformer.patch_embed.text_proj.weight.mul_(4)
        for block in transformer.transformer_blocks:
            block.attn1.to_v.weight.mul_(16)
    return CogVideoXPipeline(**{**base.components, "transformer": transformer.eval()})


def tiny_flux2_klein_pipeline(seed: int = 0) -> Flux2KleinPipeline:
    """One block of two streams and two of one, width 32; a Qwen3 of 27 layers, as three of them are read; images of 16 x 16 are latents [B, 16, 4, 4]."""
    from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = chat_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = Flux2Transformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            timestep_guidance_channels=32,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        )
        vae = AutoencoderKLFlux2(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
        )
        vae.bn.running_mean.normal_(0, 0.1)
        vae.bn.running_var.uniform_(0.5, 2)
        encoder = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=len(tokenizer),
                hidden_size=8,
                intermediate_size=16,
                num_hidden_layers=27,
                num_attention_heads=1,
                num_key_value_heads=1,
                head_dim=8,
            )
        )
    # a few tokens among 512 of padding say little to random weights: louder values let two prompts differ visibly
    with torch.no_grad():
        for block in transformer.transformer_blocks:
            block.attn.add_v_proj.weight.mul_(16)
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae.eval(),
        text_encoder=encoder.eval(),
        tokenizer=tokenizer,
        transformer=transformer.eval(),
    )


def tiny_flux_pipeline(seed: int = 0) -> FluxPipeline:
    """One block of two streams and two of one, width 32, told guidance; CLIP and T5 of width 16; images of 16 x 16 are latents [B, 4, 8, 8]."""
    import tempfile

    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    with tempfile.TemporaryDirectory() as folder:
        clip = clip_tokenizer(folder)
    tokenizer = byte_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            guidance_embeds=True,
            axes_dims_rope=(4, 4, 8),
        )
        vae = tiny_image_vae(scaling_factor=0.36, shift_factor=0.12)
        text = CLIPTextConfig(
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
        parts = {
            "transformer": transformer,
            "vae": vae,
            "text_encoder": CLIPTextModel(text),
            "text_encoder_2": T5EncoderModel(T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)),
        }
    for part in parts.values():
        part.eval()
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)
    return FluxPipeline(**parts, tokenizer=clip, tokenizer_2=tokenizer, scheduler=scheduler)


def tiny_qwen_image_pipeline(seed: int = 0) -> QwenImagePipeline:
    """Two blocks of width 32, a Qwen2.5-VL of width 16, VAE of factor 4 and 4 channels; images of 32 x 32 are latents [B, 4, 8, 8]."""
    from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImagePipeline, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer = byte_tokenizer()
    size = {"hidden_size": 16, "intermediate_size": 32}
    language = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": len(tokenizer)}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6}
    vision = {"depth": 1, "num_heads": 2, "out_hidden_size": 16, "fullatt_block_indexes": [0]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = QwenImageTransformer2DModel(
            in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=(4, 6, 6)
        )
        vae = AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True],
            latents_mean=[0.1, -0.1, 0.2, 0.0],
            latents_std=[1.5, 0.7, 1.2, 1.0],
        )
        encoder = Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(text_config={**size, **language, "rope_parameters": rope}, vision_config={**size, **vision}, image_token_id=0, video_token_id=0)
        )
    # a few tokens after those of the instruction say little to random weights: louder values let two prompts differ visibly
    with torch.no_grad():
        for block in transformer.transformer_blocks:
            block.attn.add_v_proj.weight.mul_(16)
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02),
        vae=vae.eval(),
        text_encoder=encoder.eval(),
        tokenizer=tokenizer,
        transformer=transformer.eval(),
    )


def tiny_dit_pipeline(seed: int = 0) -> DiTPipeline:
    """Two layers of width 16 with learned variances, a thousand classes, one of two names, VAE of factor 2; images of 16 x 16 are latents [B, 4, 8, 8]."""
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8)
        vae = tiny_image_vae(scaling_factor=0.18215)
    with torch.no_grad():  # two classes of random weights differ little
        for block in transformer.transformer_blocks:
            block.norm1.emb.class_embedder.embedding_table.weight.mul_(4)
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=True)
    return DiTPipeline(transformer.eval(), vae.eval(), scheduler, id2label={"1": "goldfish, Carassius auratus"})
