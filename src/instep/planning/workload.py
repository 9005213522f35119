"""What one iteration of distribution matching works on: the numbers that memory and time follow from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from instep.core.size import VideoSize

if TYPE_CHECKING:
    from instep.methods.recipe import Recipe, Stage

# Wan 2.1 text-to-video, from the published configurations
WAN_1_3B: Mapping[str, Any] = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30}
WAN_14B: Mapping[str, Any] = {"num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824, "num_layers": 40}


@dataclass(frozen=True)
class Workload:
    """One iteration on one GPU.

    params: of one network. tokens: video tokens a sample; text_tokens: text tokens a sample. batch: samples in one
    micro-batch on one GPU, accumulate: micro-batches an iteration. levels: steps of the student. reuse: critics train
    on the student's rollout (False: a fresh rollout for every update). needs_final: a reward looks at the end of the
    rollout; final_live: and a force acts there, on the student's last step; trajectory: on all of its steps. guidance:
    of the teacher, 1 means one pass instead of two. other_plain, other_graph: evaluations a sample of forces and
    objectives beside matching's own, without and with a graph; critic_passes: those of one critic update on average.
    matching: whether there is distribution matching; rolls: whether samples are rolled out; supervised: whether a step of
    the rollout carries the graph; rollout_passes: evaluations a step of it (2 with guidance).
    roles: three full copies (student, fake, teacher), or two adapters on one frozen network. gpus: over how many the
    states are sharded (fully sharded data parallel). ema: an averaged copy of what the student trains.
    """

    params: int
    tokens: int
    width: int
    ffn: int
    layers: int
    text_tokens: int = 512
    batch: int = 1
    accumulate: int = 1
    levels: int = 4
    critic_updates: int = 5
    reuse: bool = True
    needs_final: bool = False
    final_live: bool = False
    trajectory: bool = False
    guidance: float = 3.0
    roles: Literal["copies", "lora"] = "lora"
    lora_rank: int = 32
    bytes_per_parameter: int = 2
    checkpointing: bool = True
    ema: bool = True
    gpus: int = 1
    other_plain: float = 0.0
    other_graph: float = 0.0
    critic_passes: float = 1.0
    matching: bool = True
    rolls: bool = True
    supervised: bool = True
    rollout_passes: int = 1

    def __post_init__(self) -> None:
        if self.roles not in ("copies", "lora"):
            raise ValueError(f"roles: {self.roles!r} is not known; allowed: 'copies' (full copies) or 'lora' (adapters)")
        if self.bytes_per_parameter not in (2, 4):
            raise ValueError(f"bytes_per_parameter: {self.bytes_per_parameter} is not planned for; allowed: 2 (bfloat16) or 4 (float32)")
        counts = ("params", "tokens", "width", "ffn", "layers", "batch", "accumulate", "levels", "lora_rank", "gpus")
        for name in counts:
            if vars(self)[name] < 1:
                raise ValueError(f"{name}: {vars(self)[name]} is not possible; allowed: 1 or more")
        if self.critic_updates < 0 or self.text_tokens < 0:
            raise ValueError("critic_updates, text_tokens: negative numbers are not possible; allowed: 0 or more")
        if self.final_live and not self.needs_final:
            raise ValueError("final_live: it needs the final sample; set needs_final=True")
        if self.trajectory and not self.final_live:
            raise ValueError("trajectory: there is no gradient at the final sample to carry back; set final_live=True")

    @property
    def lora_params(self) -> int:
        """Of one adapter on every attention projection and both ffn layers of every block."""
        return self.layers * self.lora_rank * (18 * self.width + 2 * self.ffn)


def wan_module(config: Mapping[str, Any]) -> Any:
    """A WanTransformer3DModel with shapes and no memory (meta device); `config` overrides the class's defaults (those
    of 14B).
    """
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        return WanTransformer3DModel(**config)


def wan_tokens(config: Mapping[str, Any], size: VideoSize, spatial: int = 8, temporal: int = 4) -> int:
    """Video tokens of one sample; spatial, temporal: the VAE's compression."""
    pt, ph, pw = config["patch_size"]
    return ((size.frames - 1) // temporal + 1) // pt * (size.height // spatial // ph) * (size.width // spatial // pw)


def wan_workload(module: Any, size: VideoSize, *, spatial: int = 8, temporal: int = 4) -> Workload:
    """The default workload of a Wan transformer (real or on the meta device); change the rest with
    `dataclasses.replace`.
    """
    config = module.config
    return Workload(
        params=sum(p.numel() for name, p in module.named_parameters() if ".lora_" not in name),
        tokens=wan_tokens(config, size, spatial, temporal),
        width=config.num_attention_heads * config.attention_head_dim,
        ffn=config.ffn_dim,
        layers=config.num_layers,
        bytes_per_parameter=min(4, next(module.parameters()).element_size()),
    )


def recipe_workload(recipe: Recipe, stage: Stage, base: Workload) -> Workload:
    """`base` (the network and the video size, see `wan_workload`) with what `stage` of `recipe` does an iteration."""
    from instep.methods.matching import DistributionMatching

    matching = [force for force in stage.forces if isinstance(force, DistributionMatching)]
    lora, rollout = recipe.roles["student"].lora, stage.rollout
    guidance = matching[0].guidance if matching else 1.0
    standard = DistributionMatching(guidance=guidance).passes(stage.group)[0] if matching else 0.0
    levels = len(rollout.levels) if rollout else 1
    guided = 2 if rollout and rollout.guidance != 1 else 1
    plain = graph = 0.0
    for term in stage.terms:
        more = stage.inner_epochs * (guided if "trajectory" in term.needs else 1)
        plain, graph = (x + more * y for x, y in zip((plain, graph), term.passes(stage.group, levels - 1), strict=True))
    updates = sum(critic.updates for critic in stage.critics if critic.passes)
    critics = sum(critic.updates * critic.passes for critic in stage.critics)
    final_live = "final" in stage.live
    return replace(
        base,
        batch=stage.batch,
        accumulate=stage.accumulate,
        levels=levels,
        guidance=guidance,
        critic_updates=updates,
        reuse=all(critic.reuse for critic in stage.critics),
        needs_final=stage.to_the_end,
        final_live=final_live,
        trajectory=final_live and rollout is not None and rollout.through == "trajectory",
        roles="copies" if lora is None else "lora",
        lora_rank=base.lora_rank if lora is None else lora.rank,
        ema=recipe.roles["student"].ema is not None,
        other_plain=plain - standard,
        other_graph=graph,
        critic_passes=critics / updates if updates else 1.0,
        matching=bool(matching),
        rolls=rollout is not None,
        supervised=bool(stage.live),
        rollout_passes=guided,
    )
