"""The bundled image-to-video model: what ships is what its transformer has of its own; everything else is the bundled text-to-video model's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from instep.bundled import MOVING_DIGITS, MOVING_DIGITS_I2V, digits, drawn_frames, folder_of
from instep.core.quiet import quiet
from instep.core.size import Size
from instep.data.prompt import Prompt, as_prompts
from instep.models.wan_i2v import WanImageFamily

if TYPE_CHECKING:
    from diffusers import WanImageToVideoPipeline, WanTransformer3DModel

CHANGED = "changed.safetensors"
# what stays the text-to-video model's: how text and levels are read
FROZEN = (".condition_embedder.", ".attn2.", ".norm2.")


class MovingDigitsImageFamily(WanImageFamily):
    """The image-to-video family of the moving digits, whose prompts also name first frames that are drawn: `Prompt("a seven", "train/17")`."""

    def first_frame(self, prompt: Prompt, size: Size) -> Tensor:
        """The prompt's first frame [3, H, W] in [0, 1] at `size`, drawn or from a file."""
        return drawn_frames.first_frame(prompt, size)

    def first_frame_key(self, prompt: Prompt) -> str:
        """What the first frame depends on: a drawn one on the text too."""
        return str(Prompt(prompt.text, prompt.image)) if drawn_frames.is_drawn(prompt) else super().first_frame_key(prompt)

    def check_prompts(self, prompts: Sequence[Prompt | str]) -> None:
        """ValueError for the first prompt without a first frame, with a file that cannot be read, or with a drawn one and a text outside the grammar."""
        found = as_prompts(prompts)
        for prompt in found:
            if drawn_frames.is_drawn(prompt):  # drawing it takes longer and finds no more
                digits.parse(prompt.text or "a digit")
        super().check_prompts([prompt for prompt in found if not drawn_frames.is_drawn(prompt)])


def widened(base: WanTransformer3DModel, stride: int) -> WanTransformer3DModel:
    """The image-to-video transformer that says what the text-to-video one says: patch-embedding weights of the new channels are 0, float32.

    `stride` is the VAE's in time: so many channels are the mask. Parameters that stay are frozen.
    """
    config = {key: value for key, value in base.config.items() if not key.startswith("_")}
    net = type(base)(**{**config, "in_channels": 2 * config["in_channels"] + stride})
    weights = {key: value.detach().float().clone() for key, value in base.state_dict().items()}
    old = weights["patch_embedding.weight"]
    weights["patch_embedding.weight"] = torch.cat([old, old.new_zeros(old.shape[0], old.shape[1] + stride, *old.shape[2:])], 1)
    net.load_state_dict(weights)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(not any(part in f".{name}" for part in FROZEN))
    return net


def changed(net: nn.Module, base: nn.Module) -> dict[str, Tensor]:
    """The tensors of `net` that are not `base`'s, as they are stored (float16)."""
    own, theirs = net.state_dict(), base.state_dict()
    return {
        key: value.half().contiguous() for key, value in own.items() if value.shape != theirs[key].shape or not torch.equal(value.half(), theirs[key].half())
    }


def bundled_pipeline(folder: Path | None = None) -> WanImageToVideoPipeline:
    """The stock pipeline in float32; `folder` holds the transformer's own tensors (None: those that ship)."""
    with quiet():
        from diffusers import WanPipeline

        base = WanPipeline.from_pretrained(folder_of(MOVING_DIGITS), dtype=torch.float32, local_files_only=True)
        net = widened(base.transformer, base.vae_scale_factor_temporal)
        net.load_state_dict(net.state_dict() | {k: v.float() for k, v in load_file((folder or folder_of(MOVING_DIGITS_I2V)) / CHANGED).items()})
        return around(base, net)


def around(base: Any, net: WanTransformer3DModel) -> WanImageToVideoPipeline:
    """The image-to-video pipeline of `net` and the text-to-video pipeline's other parts."""
    from diffusers import WanImageToVideoPipeline

    return WanImageToVideoPipeline(
        tokenizer=base.tokenizer, text_encoder=base.text_encoder, vae=base.vae, scheduler=base.scheduler, transformer=net.eval().requires_grad_(False)
    )
