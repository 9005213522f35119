"""Traces one iteration of a stage on the meta device: the very `iteration` that trains, on tensors without memory.

What is done several times alike is traced less often and counted in full:

- Of the slices of a micro-batched pass (`core/rows.py`), one of each size. Slices run one after the other, and each begins and ends with the same tensors alive
  but for the outputs of those before, which are counted. With a graph it is two in every backward pass: autograd adds up what several of them give to one
  parameter before it hands it over. Of a role with a discriminator's head it is all.
- Of inner epochs, of the updates of a critic that prepares something, and of accumulated micro-batches, two. From the second one on they are alike: gradients,
  and the samples that critics look at later, are there already. The samples of further micro-batches are added.
- Of a run of equal blocks, a few and three more (`Depth`). FLOPs are affine in their number, and so is the memory of every moment (`Tally.moments`): a block
  more is one more set of weights, of kept activations and of gradients. The peak is the largest moment at the true number. In steps of three, the block at two
  thirds of the depth, whose tokens a discriminator reads, moves along.

Exits are drawn with equal frequency: a stage whose groups do not cover them evenly is traced once for every shift of its draws, and so is every expert's
band. FLOPs are the mean, and memory is the most. So it is with the iterations that measure the gradient of each term, one more backward pass a term: it is
traced, and its FLOPs count as often as they are measured.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import gcd
from typing import Any

import torch
from torch import nn

from instep.diffusion.bands import Band, in_band
from instep.methods.recipe import Recipe, Stage
from instep.methods.term import Critic
from instep.models.family import Family
from instep.planning.meta import REWARD, Unread, batches_of, blank, register, reward_of, tensors_in, tracing
from instep.planning.tally import Moment, Phase, Tally
from instep.training.build import make_state
from instep.training.execution import Execution
from instep.training.low_bit import MOMENTS, empty_moments
from instep.training.state import TrainState
from instep.training.step import iteration
from instep.training.term_gradients import measured_share

OTHER_BATCHES = "samples of other micro-batches"
# equal blocks by which the two networks that are traced differ
STEP = 3


@dataclass(frozen=True)
class Trace:
    """What is done costs: FLOPs by label (role, decoder) and phase, bytes by kind at every moment, and `scored`, the samples that the reward is given."""

    flops: Mapping[tuple[str, Phase], float]
    moments: Mapping[Moment, Mapping[str, float]]
    scored: float = 0.0

    @property
    def total_flops(self) -> float:
        return sum(self.flops.values())

    @property
    def model_flops(self) -> float:
        """Without recomputation."""
        return sum(count for (_, phase), count in self.flops.items() if phase != "recomputation")

    def memory(self, host: Callable[[str], bool] = lambda kind: False) -> dict[str, float]:
        """Bytes by kind at the peak; kinds that are `host` are in host memory and not counted."""
        device = ({kind: count for kind, count in live.items() if count > 0 and not host(kind)} for live in self.moments.values())
        return max(device, key=lambda live: sum(live.values()), default={})

    def extended(self, *others: tuple[Trace, float]) -> Trace:
        """The trace of deeper networks than those of this one: with each other trace, in which one network has more equal blocks, how many times the difference
        that these blocks make is added.
        """

        def at(a: Mapping[Any, float], rest: list[Mapping[Any, float]], key: Any) -> float:
            first = a.get(key, 0.0)
            return first + sum(share * (b.get(key, 0.0) - first) for b, (_, share) in zip(rest, others, strict=True))

        flops, theirs = self.flops, [other.flops for other, _ in others]
        moments = {}
        for key in (key for key in self.moments if all(key in other.moments for other, _ in others)):
            here, there = self.moments[key], [other.moments[key] for other, _ in others]
            moments[key] = {kind: at(here, there, kind) for kind in {**here, **{k: v for one in there for k, v in one.items()}}}
        return Trace({key: at(flops, theirs, key) for key in {**flops, **{k: v for one in theirs for k, v in one.items()}}}, moments, self.scored)


@dataclass
class Depth:
    """A placed family's state, whole or with fewer of its equal blocks or those of its teacher. `share`: by how many times what it has more than the first
    one the whole networks exceed that one."""

    family: Family
    state: TrainState
    share: float = 0.0


class Model:
    """A recipe's networks on the meta device, ready to be traced; `family` and another `teacher` are on it, placed by `execution`. `terms_every`: see
    `RunOptions`."""

    def __init__(self, recipe: Recipe, family: Family, execution: Execution, terms_every: int = 0, teacher: Family | None = None) -> None:
        self.recipe, self.family, self.terms_every = recipe, family, terms_every
        execution = replace(execution, checkpointing="on" if execution.checkpoints(family.pretrained) else "off", compile=False)
        parts = [part for each in (family, teacher) if each is not None for part in each.parts(each.pretrained).values()]
        self.block_bytes = max(map(_block_bytes, parts), default=0)
        least = 2 + max((len(term.skips) for stage in recipe.stages for term in stage.terms), default=0)
        mine, share = _shallow(family, least)
        theirs, their_share = ([None], 0.0) if teacher is None else _shallow(teacher, least)
        pairs = [(mine[0], theirs[0], 0.0), *((each, theirs[0], share) for each in mine[1:]), *((mine[0], each, their_share) for each in theirs[1:])]
        self.depths = [Depth(each, meta_state(recipe, each, execution, other), times) for each, other, times in pairs]

    def trace(self, stage: Stage) -> Trace:
        """One iteration of a stage: the mean of its cost, and all its moments."""
        measured = measured_share(self.recipe, stage, self.terms_every)
        return self._over_depths(lambda depth: trace_stage(depth.state, stage, depth.family, measured))

    def trace_call(self, call: Callable[[Depth], Any]) -> Trace:
        """One call, beside the state, without a graph."""
        return self._over_depths(lambda depth: _trace_call(depth, call))

    def over_depths(self, count: Callable[[Depth], float]) -> float:
        """A number of the whole networks, from that of each depth."""
        first, *others = (count(depth) for depth in self.depths)
        return first + sum(depth.share * (other - first) for other, depth in zip(others, self.depths[1:], strict=True))

    def _over_depths(self, trace: Callable[[Depth], Trace]) -> Trace:
        found = [trace(depth) for depth in self.depths]
        return found[0].extended(*((one, depth.share) for one, depth in zip(found[1:], self.depths[1:], strict=True)))


def _equal_blocks(network: nn.Module) -> tuple[str, int, nn.ModuleList]:
    """The longest run of equal blocks of a network: the name of their list, where the run begins in it, and its blocks."""
    best: tuple[str, int, nn.ModuleList] = ("", 0, nn.ModuleList())
    for name, blocks in network.named_modules():
        if not isinstance(blocks, nn.ModuleList):
            continue
        looks = [[(key, p.shape, p.dtype) for key, p in block.named_parameters()] for block in blocks]
        start = 0
        for end in range(1, len(looks) + 1):
            if end == len(looks) or looks[end] != looks[start]:
                if end - start > len(best[2]):
                    best = (name, start, blocks[start:end])
                start = end
    return best


def _shallow(family: Family, least: int) -> tuple[list[Family], float]:
    """A family with few equal blocks and with `STEP` more, and how many times that difference the whole one has more than the first; itself if it has few."""
    runs = {len(_equal_blocks(part)[2]) for part in family.parts(family.pretrained).values()}
    blocks = runs.pop() if len(runs) == 1 else 0
    few = least + (blocks - least) % STEP
    if blocks <= few + STEP + 1:
        return [family], 0.0
    return [_with_blocks(family, few), _with_blocks(family, few + STEP)], (blocks - few) / STEP


def _block_bytes(network: nn.Module) -> int:
    """Bytes of the weights of one of the equal blocks."""
    blocks = _equal_blocks(network)[2]
    return sum(p.nbytes for p in blocks[0].parameters()) if len(blocks) else 0


def _with_blocks(family: Family, n: int) -> Family:
    """The family with n of its equal blocks."""
    other = family.placed(family.device, None, family.micro_batch)
    for part in other.parts(other.pretrained).values():
        name, start, run = _equal_blocks(part)
        owner, _, last = name.rpartition(".")
        blocks = list(part.get_submodule(name).children())  # type: ignore[attr-defined]
        setattr(part.get_submodule(owner), last, nn.ModuleList([*blocks[: start + n], *blocks[start + len(run) :]]))
    # one block skipped is like another
    other.skip = lambda module, blocks: family.skip(module, range(len(blocks)))  # type: ignore[method-assign]
    return other


def meta_state(recipe: Recipe, family: Family, execution: Execution, teacher: Family | None = None) -> TrainState:
    """The state of a run on the meta device, with the moments of AdamW; `family` and `teacher` are on it."""
    with torch.device("meta"):
        state = make_state(recipe, blank(family), 0, None, execution=execution, teacher=teacher)
    for trained in state.trained.values():
        for master in trained.masters.values():
            trained.optimizer.state[master] = empty_moments(master) if trained.low_bit else {name: torch.zeros_like(master) for name in MOMENTS}
    return state


def trace_stage(state: TrainState, stage: Stage, family: Family, measured: float = 0.0) -> Trace:
    """One iteration; `state` is `meta_state`'s, and stays as it is. In `measured` of the iterations, in [0, 1], the gradient of each term is measured."""
    short, traced = _shortened(stage), []
    for band in sorted(set(state.bands)):
        levels = [t for t in (stage.rollout.levels if stage.rollout else ()) if bool(in_band(torch.tensor(t), band))]
        often = len(levels) or (0 if stage.rollout else 1)
        shifts = 1 if stage.to_the_end or not levels else len(levels) // gcd(len(levels), stage.batch // stage.group)
        for shift in range(shifts if often else 0):
            traced.append((often / shifts, _trace(state, stage, short, family, band, shift, measured)))
    total = sum(weight for weight, _ in traced)
    flops: dict[tuple[str, Phase], float] = defaultdict(float)
    for weight, one in traced:
        for key, count in one.flops.items():
            flops[key] += weight / total * count
    moments = {(1000 * i + part, span, half): live for i, (_, one) in enumerate(traced) for (part, span, half), live in one.moments.items()}
    return Trace(flops, moments, sum(weight / total * one.scored for weight, one in traced))


def _shortened(stage: Stage) -> Stage:
    """The stage with repetitions left out that are like others."""
    critics = tuple(replace(critic, updates=min(1 if type(critic).prepare is Critic.prepare else 2, critic.updates)) for critic in stage.critics)
    return replace(stage, accumulate=min(2, stage.accumulate), inner_epochs=min(2, stage.inner_epochs), critics=critics)


@dataclass
class _Steps:
    """Cuts what is counted at every optimiser step."""

    tally: Tally
    parts: list[tuple[Mapping[tuple[str, Phase], float], float]] = field(default_factory=list)
    kept: float | None = None

    def __call__(self) -> None:
        tally = self.tally
        self.parts.append((dict(tally.flops), tally.rows[REWARD]))
        tally.flops.clear()
        tally.rows.clear()
        tally.part += 1
        if self.kept is None:
            self.kept = sum(count for kind, count in tally.live.items() if kind.startswith(("activations", "samples")))


def _trace(state: TrainState, stage: Stage, short: Stage, family: Family, band: Band, shift: int, measured: float) -> Trace:
    tally = Tally()
    steps, batches, before = _Steps(tally), batches_of(family, short), state.bands
    hooks = register(tally, state, family)
    for batch in batches:
        for tensor in tensors_in(batch):
            tally.assign(tensor, "samples and conditions")
    state.bands, state.reward_fn, state.reward_grad_fn = (band,), reward_of(family, tally), reward_of(family, tally, graph=True)
    try:
        with tracing(tally, state, steps, shift, measured), tally:
            iteration(state, short, batches, 0.0, Unread(), measure=measured > 0)
    finally:
        state.bands, state.reward_fn, state.reward_grad_fn = before, None, None
        for hook in hooks:
            hook.remove()
    flops: dict[tuple[str, Phase], float] = defaultdict(float)
    scored = 0.0
    for (counted, rows), times in zip(steps.parts, _times(stage, short), strict=True):
        scale = times * stage.accumulate / short.accumulate
        for key, count in counted.items():
            flops[key] += scale * count
        scored += scale * rows
    others = (stage.accumulate - short.accumulate) * (steps.kept or 0) / short.accumulate
    return Trace(flops, {key: {**live, OTHER_BATCHES: others} for key, (_, live) in tally.moments.items()}, scored)


def _times(stage: Stage, short: Stage) -> list[int]:
    """How often each part of the shortened iteration is done: the last epoch, or update of a critic, stands for those that are left out."""
    planned = [*([stage.inner_epochs] if stage.terms else []), *(critic.updates for critic in stage.critics)]
    traced = [*([short.inner_epochs] if stage.terms else []), *(critic.updates for critic in short.critics)]
    return [1 if i < few - 1 else many - few + 1 for many, few in zip(planned, traced, strict=True) for i in range(few)]


@torch.no_grad()
def _trace_call(depth: Depth, call: Callable[[Depth], Any]) -> Trace:
    tally = Tally()
    for hook in register(tally, depth.state, depth.family):
        hook.remove()
    with tracing(tally, depth.state, lambda: None), tally:
        call(depth)
    return Trace(dict(tally.flops), {key: live for key, (_, live) in tally.moments.items()})
