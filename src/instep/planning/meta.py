"""An iteration on the meta device: what stands there for the operations that torch has no meta kernel for or that wait for values, the short ways of
`planning/trace.py`, and what is in memory from the beginning.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import instep.core.rows as core_rows
import instep.models.role as role_module
import instep.training.rollouts as rollouts_module
from instep.core.rows import joined, slices
from instep.data.prompt import Prompt, as_prompts
from instep.data.samples import PairSamples, RealSamples, TeacherSamples
from instep.diffusion.streams import SampleStreams
from instep.methods.recipe import Stage
from instep.methods.term import Batch
from instep.models.borrow import tensors_of
from instep.models.family import Family
from instep.models.role import Role
from instep.planning.tally import Tally
from instep.rewards.decoded import DECODE_BATCH, in_range
from instep.training.batches import BatchSource
from instep.training.low_bit import MOMENTS, plain
from instep.training.scalars import Scalars
from instep.training.state import TrainedParams, TrainState
from instep.training.term_gradients import TermGradients

# rows that a reward scores, with a graph or without; what scoring costs is stated, not traced
REWARD = "reward"


class Unread(Scalars):
    """The scalars of an iteration without values: conditions are taken to hold."""

    def settle(self) -> None:
        flags, self._flags, self._waiting, self._read = self._flags, [], [], []
        for _, then in flags:
            then(True)

    def means(self) -> dict[str, float]:
        return {}


@contextmanager
def tracing(tally: Tally, state: TrainState, stepped: Callable[[], None], shift: int = 0, measured: float = 1.0) -> Iterator[None]:
    """While it lasts, an iteration on the meta device is counted by roles, and takes the short ways of this file.

    `measured`: the part of the iterations that measure the gradient of each term.
    """
    forward = Role._forward

    def labelled(role: Role, *args: Any) -> Any:
        with tally.span(role.name):
            return forward(role, *args)

    call = Role.__call__

    def called(role: Role, *args: Any) -> Any:
        # what a gradient of a head's logit leaves out of a slice stays recomputed until the backward pass ends, once for every slice
        before, tally.every_slice = tally.every_slice, role.head is not None
        try:
            return call(role, *args)
        finally:
            tally.every_slice = before

    measure = TermGradients.add

    def measured_term(gradients: TermGradients, name: str, backward: Callable[[], None], *, last: bool) -> None:
        with tally.sometimes(measured):
            measure(gradients, name, backward, last=last)

    rows = few_of_each_size(tally)
    with ExitStack() as stack:
        for owner, name, value in (
            (Role, "_forward", labelled),
            (Role, "__call__", called),
            (TermGradients, "add", measured_term),
            (core_rows, "by_rows", rows),
            (role_module, "by_rows", rows),
            (rollouts_module, "draw_exits", exits_from(shift)),
            (torch.nn.functional, "scaled_dot_product_attention", fused_attention),
            (torch, "randn", _noise),
            (SampleStreams, "normal", _normal),
        ):
            stack.enter_context(_replaced(owner, name, value))
        for trained in state.trained.values():
            stack.enter_context(_replaced(trained, "step", _step(trained, stepped)))
        for role in state.roles.values():
            backbone = cast(Role, role).backbone
            if backbone.residency is not None:
                stack.enter_context(_replaced(backbone.residency, "moved", _copied(tally)))
        yield
        for role in state.roles.values():
            cast(Role, role).backbone.go_home()


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    there, before = name in vars(owner), getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if there:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What a fused kernel allocates, on the meta device: the output and the logarithms of its sums; for the backward dq, dk and dv."""
    batched = [x if x.ndim == 4 else x[None] for x in (query, key, value)]
    out = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*batched, dropout_p, is_causal, scale=scale)[0]
    return out if query.ndim == 4 else out[0]


_randn = torch.randn
# numbers that are drawn in a trace
FEW = 10_000


def _noise(*shape: Any, generator: torch.Generator | None = None, **kind: Any) -> Tensor:
    """Drawn numbers where they are few, such as levels; the values of noise mean nothing here, and there are billions of them."""
    few = torch.empty(*shape, device="meta").numel() < FEW
    return _randn(*shape, generator=generator, **kind) if few else torch.empty(*shape, **kind)


_drawn = SampleStreams.normal


def _normal(streams: SampleStreams, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """`_noise` of streams."""
    return _drawn(streams, shape, dtype) if math.prod(shape) < FEW else torch.empty(tuple(shape), dtype=dtype)


def _step(trained: TrainedParams, stepped: Callable[[], None]) -> Callable[..., tuple[Tensor, Tensor]]:
    """torch has no AdamW kernel for the meta device. The kernel works in place, on memory that is there already."""

    def step(lr: float, optim: object = None) -> tuple[Tensor, Tensor]:
        stepped()
        trained.optimizer.zero_grad(set_to_none=True)
        return torch.zeros((), device="meta"), torch.ones((), dtype=torch.bool, device="meta")

    return step


def _copied(tally: Tally) -> Callable[[Tensor], Tensor]:
    """A tensor that comes to the device is a copy; on the meta device it would stay where it is."""

    def moved(x: Tensor) -> Tensor:
        there = torch.empty_like(x)
        tally.assign(there, "network in use")
        return there

    return moved


def exits_from(shift: int) -> Callable[..., Tensor]:
    """Exits of groups: each level in turn, from `shift` on."""

    def draw(n_groups: int, group: int, n_levels: int, rng: torch.Generator) -> Tensor:
        return ((torch.arange(n_groups) + shift) % n_levels).repeat_interleave(group)

    return draw


def few_of_each_size(tally: Tally) -> Callable[..., list[Any]]:
    """`by_rows` that computes one slice of each size, or two with a graph; the others are copies of an output."""

    def by_rows(function: Callable[[slice], Any], n: int, size: int | None, *, recompute: bool = False, draws_on: torch.device | None = None) -> list[Any]:
        parts = slices(n, size)
        again = (len(parts) > 1 or recompute) and torch.is_grad_enabled()
        alike: dict[int, list[slice]] = {}
        for part in parts:
            alike.setdefault(part.stop - part.start, []).append(part)
        outputs: list[Any] = []
        for same in alike.values():
            few = 1 if not again or tally.graphs else 2
            done = same if again and tally.every_slice else same[:few]
            tally.graphs += again
            for part in done:
                times = len(same) - len(done) + 1 if part is done[0] else 1
                with tally.span(times=times), tally.region() as seen:
                    output = core_rows.checkpoint(function, part, use_reentrant=False, preserve_rng_state=False) if again else function(part)
                outputs += [output, *(tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, output) for _ in range(times - 1))]
                if times > 1:
                    tally.consider(seen)
        return outputs

    return by_rows


def reward_of(family: Family, tally: Tally, *, graph: bool = False) -> Callable[[Tensor, Sequence[Prompt]], Tensor]:
    """The reward of latents, as `rewards/decoded.py` computes it: decoded, then scored by what stands for a network whose cost is stated."""

    def score(x: Tensor) -> Tensor:
        with tally.span("decoder"):
            # a reward is given a copy in float32
            media = in_range(family.decode(x)).to(torch.float32, copy=True)
        tally.count_rows(REWARD, len(x))
        return media.square().flatten(1).mean(1)

    def reward(x: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        size = family.micro_batch if graph else min(DECODE_BATCH, family.micro_batch or DECODE_BATCH)
        with torch.set_grad_enabled(graph and torch.is_grad_enabled()):
            return joined(lambda rows: score(x[rows]), len(x), size)

    return reward


def register(tally: Tally, state: TrainState, family: Family) -> list[Any]:
    """Tells the tally what the tensors of a state are, and from now on the gradients of its trained roles; returns the hooks that do so."""
    hooks = []
    for name, trained in state.trained.items():
        for key, p in trained.parameters.items():
            master = trained.masters[key]
            tally.assign(p, f"weights of {name}")
            if master is not p:
                tally.assign(master, f"float32 weights of {name}")
            hooks.append(p.register_post_accumulate_grad_hook(lambda _, m=master, kind=f"gradients of {name}": tally.assign(m.grad, kind)))
            for moment in MOMENTS:
                for part in tree_leaves(plain(trained.optimizer.state.get(master, {}).get(moment))):
                    tally.assign(part, f"moments of {name}")
        for mean in (trained.ema or {}).values():
            tally.assign(mean, f"average of {name}")
    trained_ids = {id(p) for trained in state.trained.values() for p in trained.parameters.values()}
    for name in ("reference", "average"):
        for p in getattr(state, name):
            tally.assign(p, f"weights of {name}")
            trained_ids.add(id(p))
    for role in state.roles.values():
        module = cast(Role, role).backbone.module
        for tensor in tensors_of(module).values():
            if id(tensor) not in trained_ids:
                tally.assign(tensor, "frozen weights")
    vae = getattr(family if family.pipe is None else family.pipe, "vae", None)
    for tensor in () if vae is None else tensors_of(vae).values():
        tally.assign(tensor, "decoder")
    return hooks


def batches_of(family: Family, stage: Stage) -> list[Batch]:
    """The micro-batches of an iteration, as `BatchSource` makes them, with everything that a stage may need."""
    n = stage.batch
    prompts = as_prompts([str(i) for i in range(n)])

    def latents() -> Tensor:
        return torch.zeros(n, *family.latent_shape, device=family.device)

    real, pairs = RealSamples(prompts, latents()), PairSamples(prompts, latents(), latents())
    source = BatchSource(blank(family), prompts, real, 0, TeacherSamples(prompts, latents(), latents()), pairs)
    return source.next(stage)


def tensors_in(batch: Any) -> Iterator[Tensor]:
    for value in vars(batch).values():
        if isinstance(value, Tensor):
            yield value
        elif hasattr(value, "__dataclass_fields__"):
            yield from tensors_in(value)


def blank(family: Family) -> Family:
    """The family with conditions that need no text encoders."""
    other = copy(family)
    for i, name in enumerate(("encode", "unconditional")):
        setattr(other, name, lambda prompts, i=i: family.blank(len(prompts))[i])
    return other
