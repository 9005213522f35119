"""Z-Image text-to-image: one stream of image and text tokens on the rectified flow, whose time runs backwards and whose output is the negative velocity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from instep.core.size import Size
from instep.diffusion.prediction import Condition
from instep.diffusion.transfer import to_device
from instep.models.family import shown_tokens, skipped
from instep.models.image_family import ImageFamily
from instep.models.preset import Preset
from instep.models.prompt_cache import Encoded
from instep.models.ragged_text import RaggedText

TEXT_LENGTH, PATCH = 512, 2

# the pipeline writes guidance w as c + w (c - u): its 4 is 5 here
Z_IMAGE = Preset(source="model card of Tongyi-MAI/Z-Image: 50 steps, guidance 4", guidance=5.0, sampler_steps=50, micro_batch=1)


def _show_tokens(block: Any, args: tuple, output: Tensor) -> None:
    block.tokens(output[:, : block.image_tokens])


class ZImageFamily(ImageFamily):
    """A `ZImagePipeline` seen as a family; latents [B, C, H, W] are shifted and scaled as the transformer sees them.

    The transformer takes a list of texts of unequal length, so each call reads their lengths from the device. Z-Image-Turbo, which is distilled already, is
    read too: its card samples it without guidance (1), which the preset of the base model does not.
    """

    pipeline_class = "ZImagePipeline"
    even_sigmas = True
    preset = Z_IMAGE
    text_length = TEXT_LENGTH
    comfyui_reads_lora = True
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")

    def __init__(self, pipe: Any, size: Size | Sequence[int] | None = None, name: str = "", source: str = "") -> None:
        super().__init__(pipe, size, name, source)
        self.shift = self.shift_of(pipe.scheduler.config)

    @classmethod
    def shift_of(cls, scheduler: Mapping[str, Any]) -> float:
        return float(scheduler.get("shift", 1.0))

    def check_pipeline(self, pipe: Any) -> None:
        """Raises ValueError for a scheduler whose shift depends on the size, and for a transformer that is given images too (Omni)."""
        if pipe.scheduler.config.get("use_dynamic_shifting"):
            raise ValueError("scheduler: use_dynamic_shifting is not allowed; Z-Image's own scheduler has one fixed shift: copy the model's scheduler folder")
        config = pipe.transformer.config
        if config.siglip_feat_dim is not None or PATCH not in config.all_patch_size or 1 not in config.all_f_patch_size:
            raise ValueError(
                f"transformer: siglip_feat_dim {config.siglip_feat_dim}, all_patch_size {tuple(config.all_patch_size)} is not allowed; Z-Image's are None "
                f"and ({PATCH},)"
            )

    def guidance_arguments(self, guidance: float) -> dict[str, float]:
        """The pipeline writes it as c + w (c - u)."""
        return {"guidance_scale": guidance - 1}

    def native_size(self) -> Size:
        return Size(1024, 1024, 1)

    @property
    def unit(self) -> int:
        return self.pipe.vae_scale_factor * PATCH

    @property
    def largest(self) -> int:
        return self.unit * min(self.pipe.transformer.config.axes_lens[1:])

    def encode_text(self, text: str) -> Encoded:
        """`text` [L, D], without padding."""
        (embeddings,), _ = self.pipe.encode_prompt([text], device=self.text_device, do_classifier_free_guidance=False, max_sequence_length=self.text_length)
        return {"text": embeddings}

    def blank(self, n: int) -> tuple[RaggedText, RaggedText]:
        texts = RaggedText.blank(n, TEXT_LENGTH, self.pipe.transformer.config.cap_feat_dim, self.device)
        return texts, texts

    def condition_of(self, encoded: Sequence[Encoded]) -> RaggedText:
        return RaggedText.of([one["text"] for one in encoded], self.device)

    def forward(self, module: nn.Module, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        assert isinstance(cond, RaggedText)
        # planning has shapes and no values; its texts are of full length
        lengths = [cond.text.shape[1]] * len(x_t) if cond.length.is_meta else cond.length.tolist()
        texts = [text[:length] for text, length in zip(cond.text.to(x_t.dtype), lengths, strict=True)]
        block: Any = self._last_shown(module)
        block.image_tokens = (x_t.shape[-2] // PATCH) * (x_t.shape[-1] // PATCH)
        images = module([x[:, None] for x in x_t], to_device(1 - t.float(), x_t.device), texts, return_dict=False)[0]
        return -torch.stack(images).squeeze(2)

    def time_embedders(self, module: nn.Module) -> Sequence[nn.Module]:
        return [module.t_embedder]  # type: ignore[list-item]

    def time_width(self, module: nn.Module) -> int:
        embedder: Any = module.t_embedder
        return embedder.mlp[-1].out_features

    def _last_shown(self, module: nn.Module) -> nn.Module:
        layers: Any = module.layers
        return layers[(2 * len(layers) - 1) // 3]

    def feature_block(self, module: nn.Module) -> nn.Module:
        """At two thirds of the depth, as for Wan. A layer returns image tokens, then text tokens; an identity beside it is shown the image's."""
        block: Any = self._last_shown(module)
        return shown_tokens(block, _show_tokens)

    def feature_width(self, module: nn.Module) -> int:
        config: Any = module.config
        return config.dim

    def skip(self, module: nn.Module, blocks: Sequence[int]) -> AbstractContextManager[None]:
        return skipped(module.layers, blocks)  # type: ignore[arg-type]
