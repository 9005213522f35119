"""What one iteration of distribution matching works on: the numbers that memory and time follow from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import nn

    from instep.methods.recipe import Recipe, Stage
    from instep.models.family import Dimensions


@dataclass(frozen=True)
class Workload:
    """One iteration on one GPU.

    params: of one network, all its experts. experts: parts of equal shape, one of which predicts at each level, layers those
    of one; frozen_experts of them stay as pretrained and are shared by all roles. tokens: video tokens a sample; text_tokens:
    text tokens a sample. batch: samples in one micro-batch on one GPU, accumulate: micro-batches an iteration. levels: steps
    of the student. reuse: critics train on the student's rollout (False: a fresh rollout for every update). needs_final: a
    reward looks at the end of the rollout; final_live: and a force acts there, on the student's last step; trajectory: on all
    of its steps. guidance: of the teacher, 1 means one pass instead of two. other_plain, other_graph: evaluations a sample of
    forces and objectives beside matching's own, without and with a graph; critic_passes: those of one critic update on average.
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
    experts: int = 1
    frozen_experts: int = 0

    def __post_init__(self) -> None:
        if self.roles not in ("copies", "lora"):
            raise ValueError(f"roles: {self.roles!r} is not known; allowed: 'copies' (full copies) or 'lora' (adapters)")
        if self.bytes_per_parameter not in (2, 4):
            raise ValueError(f"bytes_per_parameter: {self.bytes_per_parameter} is not planned for; allowed: 2 (bfloat16) or 4 (float32)")
        counts = ("params", "tokens", "width", "ffn", "layers", "batch", "accumulate", "levels", "lora_rank", "gpus", "experts")
        for name in counts:
            if vars(self)[name] < 1:
                raise ValueError(f"{name}: {vars(self)[name]} is not possible; allowed: 1 or more")
        if self.critic_updates < 0 or self.text_tokens < 0:
            raise ValueError("critic_updates, text_tokens: negative numbers are not possible; allowed: 0 or more")
        if not 0 <= self.frozen_experts < self.experts:
            raise ValueError(f"frozen_experts: {self.frozen_experts} of {self.experts} is not possible; at least one expert is trained")
        if self.final_live and not self.needs_final:
            raise ValueError("final_live: it needs the final sample; set needs_final=True")
        if self.trajectory and not self.final_live:
            raise ValueError("trajectory: there is no gradient at the final sample to carry back; set final_live=True")

    @property
    def trained_experts(self) -> int:
        return self.experts - self.frozen_experts

    @property
    def trained_params(self) -> int:
        """Of one role that is trained."""
        return self.params * self.trained_experts // self.experts if self.roles == "copies" else self.lora_params

    @property
    def lora_params(self) -> int:
        """Of one adapter on every attention projection and both ffn layers of every block of each trained expert."""
        return self.trained_experts * self.layers * self.lora_rank * (18 * self.width + 2 * self.ffn)


def workload(parts: Mapping[str, nn.Module], dimensions: Dimensions) -> Workload:
    """The default workload of a network of these parts, one or one an expert (real or on the meta device); change the rest with `dataclasses.replace`."""
    weights = [p for part in parts.values() for name, p in part.named_parameters() if ".lora_" not in name]
    return Workload(
        params=sum(p.numel() for p in weights),
        tokens=dimensions.tokens,
        width=dimensions.width,
        ffn=dimensions.ffn,
        layers=dimensions.layers,
        text_tokens=dimensions.text_tokens,
        experts=len(parts),
        bytes_per_parameter=min(4, weights[0].element_size()),
    )


def recipe_workload(recipe: Recipe, stage: Stage, base: Workload) -> Workload:
    """`base` (the network and the size, see `workload`) with what `stage` of `recipe` does an iteration."""
    from instep.methods.matching import DistributionMatching

    if recipe.experts != "both" and base.experts == 1:
        raise ValueError(f"experts: {recipe.experts} is not allowed; this model has one network, leave the option out")
    matching = [force for force in stage.forces if isinstance(force, DistributionMatching)]
    lora, rollout = recipe.roles["student"].lora, stage.rollout
    # what decides is whether any level is guided
    guidance = next((w for w in (matching[0].guidance, matching[0].second) if w != 1), 1.0) if matching else 1.0
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
        frozen_experts=0 if recipe.experts == "both" else 1,
    )
