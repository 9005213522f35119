"""Builds the roles and optimisers of a run from a recipe and a model family."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from instep.core.allocator import keep_freed_memory
from instep.core.ranks import ALONE, Ranks
from instep.core.shards import is_divided, local
from instep.data.prompt import Prompt
from instep.diffusion.bands import Band, bands_of
from instep.methods.recipe import Recipe
from instep.models.backbone import Backbone
from instep.models.borrow import borrowed
from instep.models.context import ContextParallel
from instep.models.family import Family
from instep.models.residency import Residency
from instep.models.role import Role
from instep.models.sharded import Sharded, free, mesh_of, shard
from instep.training.execution import Execution
from instep.training.state import RewardFn, TrainedParams, TrainState


def make_roles(recipe: Recipe, family: Family, execution: Execution = Execution(), ranks: Ranks = ALONE, teacher: Family | None = None) -> dict[str, Role]:
    """Builds every role of the recipe. Adapters and the frozen teacher share the family's weights; other roles get a copy. The family stays as it is.

    Where the run is sharded, a copy is a network of its own around the family's weights until these are divided among `ranks`: no weight is copied whole.
    `teacher`: the network of the role teacher, and of an adapter that moves it; None: the family's own. All other roles begin with the family's.
    """
    sharded = execution.shards(recipe, family, ranks)
    trained, checkpointing = trained_parts(recipe, family), execution.checkpoints(family.pretrained)
    residency = Residency(family.device) if execution.offload else None
    shared = Backbone(family, borrowed(family.pretrained), checkpointing=checkpointing, trained=trained, residency=residency)
    taught = shared if teacher is None else _teacher_backbone(recipe, teacher, execution, residency)
    # copies come first: an adapter in the shared network would be copied too
    copies = {
        name: Backbone(family, _copy(family, trained, config.optim is not None, sharded), checkpointing=checkpointing, trained=trained, residency=residency)
        for name, config in recipe.roles.items()
        if config.lora is None and (config.optim is not None or config.copy)
    }
    made: dict[str, Role] = {}
    for name, config in recipe.roles.items():
        exits = len(recipe.levels) if config.exits else None
        base = taught if name == "teacher" else shared
        if config.lora is not None:
            base.add_adapter(name, config.lora)
            made[name] = Role(
                name,
                base,
                adapter=name,
                scale=config.scale,
                exits=exits,
                head=config.head,
                prediction_type=config.prediction_type,
                guidance_range=config.guidance_range,
            )
        else:
            made[name] = Role(
                name, copies.get(name, base), exits=exits, head=config.head, prediction_type=config.prediction_type, guidance_range=config.guidance_range
            )
    for backbone in dict.fromkeys((shared, taught, *copies.values())):
        execution.compile_blocks(backbone.family, backbone.module)
    if sharded:
        optimised = {name for name in copies if recipe.roles[name].optim is not None}
        others = {} if taught is shared else {"teacher": taught}
        _shard({"pretrained": shared, **others, **copies}, optimised, family.device, ranks)
    if ranks.context > 1:
        context = ContextParallel(ranks, family.device)
        for backbone in dict.fromkeys((shared, taught, *copies.values())):
            backbone.context = context
            for part in backbone.family.parts(backbone.module).values():
                context.attach(part)
    return made


def _shard(backbones: Mapping[str, Backbone], optimised: Collection[str], device: torch.device, ranks: Ranks) -> None:
    """Divides the networks of a run, which are of one device, among its processes."""
    mesh = mesh_of(ranks, device)
    for name, backbone in backbones.items():
        family = backbone.family
        parts = family.parts(backbone.module)
        trained = {part: name in optimised and part in (backbone.trained or parts) for part in parts}
        shard(parts, trained, [found for part in parts.values() for found in family.called_apart(part)], backbone.dtype, mesh, ranks, device)
        backbone.sharded = Sharded(name, ranks, guarded=dist.get_debug_level() != dist.DebugLevel.OFF)
        if family.boundary is not None:
            backbone.module.needed = backbone.sharded.needed


def _teacher_backbone(recipe: Recipe, teacher: Family, execution: Execution, residency: Residency | None) -> Backbone:
    """The network of a teacher that is not the student's."""
    checkpointing = execution.checkpoints(teacher.pretrained)
    return Backbone(teacher, borrowed(teacher.pretrained), checkpointing=checkpointing, trained=trained_parts(recipe, teacher), residency=residency)


def trained_parts(recipe: Recipe, family: Family) -> tuple[str, ...]:
    """Returns the parts of the network that student and fake train: all, or with two experts those that the recipe names."""
    return {"both": family.denoisers, "high": family.denoisers[:1], "low": family.denoisers[1:]}[recipe.experts]


def trained_bands(recipe: Recipe, family: Family) -> tuple[Band, ...]:
    """Returns the bands of levels of those parts."""
    bands = bands_of(family.boundary)
    return {"both": bands, "high": bands[:1], "low": bands[1:]}[recipe.experts]


def _copy(family: Family, trained: Sequence[str], requires_grad: bool, sharded: bool) -> nn.Module:
    """Returns a copy of the trained parts; a frozen expert is shared with the pretrained model, and all are until they are sharded."""
    network = family.new_backbone(() if sharded else trained)
    for name, part in family.parts(network).items():
        if name in trained:
            part.requires_grad_(requires_grad)
    return network


def make_state(
    recipe: Recipe,
    family: Family,
    seed: int,
    reward_fn: RewardFn | None,
    reward_grad_fn: RewardFn | None = None,
    *,
    execution: Execution = Execution(),
    weights: tuple[float, ...] = (1.0,),
    ranks: Ranks = ALONE,
    teacher: Family | None = None,
) -> TrainState:
    """Builds roles, optimisers and the run's generator, all determined by the seed; `family` is where the run is executed (`Execution.place`), and so is
    `teacher`, the one whose network is the role teacher's (None: the family's own).
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # adapters and heads start from random numbers; the caller's own stream is left alone
        roles = make_roles(recipe, family, execution, ranks, teacher)
        latent_reward = None
        if recipe.latent_reward is not None:
            latent_reward = recipe.latent_reward.shape.build(family.latent_shape, family.unconditional([Prompt("")]), len(weights))
    trained = {
        name: TrainedParams(roles[name].named_parameters(), config.optim, config.ema, host=execution.offload, low_bit=execution.low_bit, ranks=ranks)
        for name, config in recipe.roles.items()
        if config.optim is not None
    }
    for name, role in roles.items():
        if name in trained:
            trained[name].at_home = role.backbone.go_home
            if role.backbone.sharded is not None:
                trained[name].free = partial(free, family.parts(role.backbone.module).values())
                trained[name].exchange = ranks.led.register(trained[name].exchange_shards)
    device = family.device
    if device.type == "cpu":
        keep_freed_memory()
    if latent_reward is not None and recipe.latent_reward is not None:
        trained["latent_reward"] = TrainedParams(dict(latent_reward.on(device).named_parameters()), recipe.latent_reward.optim)
    rng = torch.Generator().manual_seed(seed)
    reference, average = (tuple(roles[name].named_parameters().values()) if name in roles else () for name in ("reference", "average"))
    return TrainState(
        roles,
        trained,
        family.path,
        family.latent_shape,
        rng,
        reward_fn if reward_fn is None or ranks.context == 1 else partial(_alike, reward_fn, ranks),
        reward_grad_fn,
        weights=weights,
        reference=reference,
        average=average,
        latent_reward=latent_reward,
        boundary=family.boundary,
        bands=trained_bands(recipe, family),
        device=device,
        ranks=ranks,
        sharded=execution.shards(recipe, family, ranks),
        micro_batch=family.micro_batch,
    )


def _alike(reward_fn: RewardFn, ranks: Ranks, x: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return ranks.alike(reward_fn(x, prompts))


@contextmanager
def averaged(trained: TrainedParams) -> Iterator[None]:
    """Swaps in the averaged weights for sampling and export; the live weights are restored bit for bit. Nothing is copied where both are float32."""
    if trained.ema is None:
        yield
        return
    trained.at_home()
    kept = {key: p for key, p in trained.parameters.items() if not is_divided(p)}
    live = {key: p.data for key, p in kept.items()}
    for key, p in kept.items():
        p.data = local(trained.ema[key]).to(p)
    trained.exchange()
    try:
        yield
    finally:
        trained.at_home()
        trained.exchange()
        for key, p in kept.items():
            p.data = live[key]
