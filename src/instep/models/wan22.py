"""Wan 2.2 A14B text-to-video: two experts by noise level, `transformer` from the boundary up and `transformer_2` below it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from instep.core.size import Size
from instep.diffusion.prediction import Condition
from instep.models.family import ComfyUI
from instep.models.preset import Preset
from instep.models.wan import WAN21_DMD, WanFamily

# the experts of high and of low noise are distilled with guidance 4 and 3, written as c + w (c - u): 5 and 4 here
WAN22 = Preset(
    source="model card of Wan-AI/Wan2.2-T2V-A14B-Diffusers: 40 steps, guidance 4 and 3, boundary 0.875",
    guidance=4.0,
    guidance_2=3.0,
    sampler_steps=40,
    distillation=replace(
        WAN21_DMD,
        source="Self-Forcing-Plus (github.com/GoatWu/Self-Forcing-Plus, branch wan22), configs/wan22_high.yaml and configs/wan22_low.yaml: each expert by DMD",
        guidance=5.0,
        guidance_2=4.0,
    ),
    micro_batch=1,
)


class Experts(nn.Module):
    """Two transformers as one network: each row of a batch is predicted by the expert of its level, and a batch of one band calls one expert only.

    In a batch of both bands each expert predicts every row and the rows are chosen afterwards: such batches are rare (training draws one band a micro-batch, a
    sampler has one level a step), and what a call depends on besides its arguments stays the same for both.
    """

    def __init__(self, transformer: nn.Module, transformer_2: nn.Module, boundary: float) -> None:
        super().__init__()
        self.transformer, self.transformer_2, self.boundary = transformer, transformer_2, boundary
        # shown the feature tokens of whichever expert predicts a row
        self.tokens: nn.Identity | None = None
        # of a sharded network: the experts [high, low] that are called, where a batch needs these
        self.needed: Callable[[Tensor], Tensor] | None = None

    def enable_gradient_checkpointing(self, function: Callable[..., Any]) -> None:
        for expert in (self.transformer, self.transformer_2):
            expert.enable_gradient_checkpointing(function)  # type: ignore[operator]

    def show_tokens(self) -> nn.Module:
        """The submodule that is given the feature tokens [B, N, width] of every forward from now on."""
        if self.tokens is None:
            self.tokens = nn.Identity()
            for expert in (self.transformer, self.transformer_2):
                _feature_block(expert).register_forward_hook(_keep_tokens)
        return self.tokens

    def forward(self, t: Tensor, call: Callable[[nn.Module], Tensor]) -> Tensor:
        """The output [B, ...] for levels t [B]; `call(expert)` is an expert's output for the whole batch."""
        upper = t >= self.boundary
        experts = torch.stack([upper.any(), (~upper).any()])
        high, low = (experts if self.needed is None else self.needed(experts.cpu())).tolist()
        if not (high and low):
            expert = self.transformer if high else self.transformer_2
            output = call(expert)
            if self.tokens is not None:
                self.tokens(_taken(expert))
            return output
        outputs = [call(expert) for expert in (self.transformer, self.transformer_2)]
        if self.tokens is not None:
            self.tokens(_chosen(upper, *(_taken(expert) for expert in (self.transformer, self.transformer_2))))
        return _chosen(upper, *outputs)


def _chosen(upper: Tensor, high: Tensor, low: Tensor) -> Tensor:
    return torch.where(upper.reshape(-1, *[1] * (high.ndim - 1)), high, low)


def _feature_block(expert: Any) -> Any:
    return expert.blocks[(2 * len(expert.blocks) - 1) // 3]


def _keep_tokens(block: Any, args: tuple, output: Tensor) -> None:
    block.kept_tokens = output


def _taken(expert: Any) -> Tensor:
    """The tokens that the expert's last forward left, which are not kept any longer."""
    block = _feature_block(expert)
    tokens = block.kept_tokens
    del block.kept_tokens
    return tokens


class Wan22Family(WanFamily):
    """A `WanPipeline` of two experts seen as a family."""

    denoisers = ("transformer", "transformer_2")
    comfyui: ComfyUI | None = None
    preset = WAN22

    def check_pipeline(self, pipe: Any) -> None:
        """Raises ValueError without a boundary in (0, 1)."""
        super().check_pipeline(pipe)
        ratio = pipe.config.boundary_ratio
        if ratio is None or not 0 < ratio < 1:
            raise ValueError(f"boundary_ratio: {ratio} is not allowed for two experts; it lies between 0 and 1: 0.875 for T2V-A14B, 0.9 for I2V-A14B")
        self.boundary = float(ratio)

    def native_size(self) -> Size:
        return Size(720, 1280, 81)

    def parts(self, network: nn.Module) -> dict[str, nn.Module]:
        return {name: getattr(network, name) for name in self.denoisers}

    def join(self, parts: Mapping[str, nn.Module]) -> nn.Module:
        assert self.boundary is not None
        return Experts(parts["transformer"], parts["transformer_2"], self.boundary).eval()

    def prepare(self, module: nn.Module, current: Callable[[], Condition | None]) -> None:
        for expert in self.parts(module).values():
            super().prepare(expert, current)

    def forward(self, module: nn.Module, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return module(t, lambda expert: super(Wan22Family, self).forward(expert, x_t, t, cond))

    def time_embedders(self, module: nn.Module) -> Sequence[nn.Module]:
        return [embedder for expert in self.parts(module).values() for embedder in super(Wan22Family, self).time_embedders(expert)]

    def time_width(self, module: nn.Module) -> int:
        return super().time_width(module.transformer)  # type: ignore[arg-type]

    def feature_block(self, module: nn.Module) -> nn.Module:
        return module.show_tokens()  # type: ignore[operator]

    def skip(self, module: nn.Module, blocks: Sequence[int]) -> AbstractContextManager[None]:
        return _all(super(Wan22Family, self).skip(expert, blocks) for expert in self.parts(module).values())


@contextmanager
def _all(contexts: Any) -> Any:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield
