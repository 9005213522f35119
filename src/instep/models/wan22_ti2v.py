"""Wan 2.2 TI2V-5B, text-to-video and image-to-video: one transformer that reads a level for every token (`expand_timesteps`).

The hub's folder holds a `WanPipeline`, which draws from text alone. A folder that a `WanImageToVideoPipeline` of the same parts was saved to draws from a
given first frame.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from instep.core.size import Size
from instep.data.prompt import Prompt
from instep.diffusion.path import at_least_float32, broadcast
from instep.diffusion.prediction import Condition
from instep.diffusion.transfer import to_device, to_match
from instep.models.borrow import visiting
from instep.models.family import ComfyUI
from instep.models.preset import Distillation, Preset
from instep.models.prompt_cache import Encoded
from instep.models.wan import WanFamily
from instep.models.wan_i2v import WanImageCondition, WanImageFamily
from instep.models.wan_vae import encode_latents

TI2V = Preset(
    source="Wan 2.2's released code (github.com/Wan-Video/Wan2.2), wan/configs/wan_ti2v_5B.py: 50 steps, guidance 5, 121 frames at 24 a second",
    guidance=5.0,
    sampler_steps=50,
    # FastVideo writes guidance w as c + w (c - u): its 3 is 4 here. Its levels 1, 0.757, 0.522 are no evenly spaced list moved by one shift
    distillation=Distillation(
        source="FastVideo (github.com/hao-ai-lab/FastVideo), examples/distill/Wan2.2-TI2V-5B-Diffusers/Data-free/distill_dmd_t2v_5B.yaml: text-to-video by DMD "
        "in 3 steps, one video on each of 64 devices",
        guidance=4.0,
        student_lr=4e-6,
        fake_lr=2e-6,
        student_weight_decay=0.01,
        batch=64,
        critic_updates=5,
    ),
    micro_batch=1,
)
NATIVE = Size(704, 1280, 121)
# tokens are patches of 2 x 2 latents, in the pipeline too
PATCH = 2


class TI2VFamily(WanFamily):
    """A `WanPipeline` with `expand_timesteps` seen as a family.

    Without a first frame the tokens of a sample share one level, and a transformer that is given it once computes the same.
    """

    expand_timesteps = True
    divides_tokens = False
    comfyui: ComfyUI | None = None
    preset = TI2V

    def native_size(self) -> Size:
        return NATIVE


class TI2VImageFamily(WanImageFamily):
    """A `WanImageToVideoPipeline` with `expand_timesteps` seen as a family; a prompt names its first frame, a file (see `data/prompt.py`).

    The transformer sees the first frame's latents in place of the first noisy ones, at level 0. The velocity there is the one that leads to them, so that
    every prediction x0, of student, teacher and fake, begins with the given frame: no force acts on it.
    """

    expand_timesteps = True
    divides_tokens = False
    preset = TI2V

    def native_size(self) -> Size:
        return NATIVE

    def known_channels(self, pipe: Any) -> int:
        """None: what is known takes the place of the first latents."""
        return 0

    def known_shapes(self) -> dict[str, tuple[int, ...]]:
        channels, _, height, width = self.latent_shape
        return {"first_frame": (channels, 1, height, width)}

    @torch.no_grad()
    def encode_first_frame(self, prompt: Prompt) -> Encoded:
        """`first_frame` [z, 1, h, w]: the latents of a video of one frame."""
        frame = to_device(self.first_frame(prompt, self.size), self.device)
        with visiting(self.vaes, self.device):
            return {"first_frame": encode_latents(self.pipe.vae, frame[None, :, None])[0]}

    def timesteps(self, t: Tensor, x_t: Tensor) -> Tensor:
        """One for each token, [B, N]: 0 for those of the first latent frame."""
        _, _, frames, height, width = x_t.shape
        known = torch.ones(frames, (height // PATCH) * (width // PATCH))
        known[0] = 0
        return super().timesteps(t, x_t)[:, None] * to_device(known.flatten(), x_t.device)

    def forward(self, module: nn.Module, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        assert isinstance(cond, WanImageCondition) and cond.first_frame is not None, "a first frame is needed; an unconditional prompt is stacked on one"
        known = to_match(cond.first_frame, x_t)
        v = super(WanImageFamily, self).forward(module, torch.cat([known, x_t[:, :, 1:]], 2), t, cond)
        first = at_least_float32(x_t[:, :, :1])
        led = (first - to_match(cond.first_frame, first)) / broadcast(t.clamp(min=1e-6), first)
        return torch.cat([led, v[:, :, 1:].to(led.dtype)], 2)
