"""Counts what a computation costs: FLOPs, and the bytes of tensors that are alive. On the meta device and on real tensors alike."""

from __future__ import annotations

import weakref
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

Phase = Literal["forward", "backward", "recomputation"]
# a part of what is counted (`Tally.part`), the number of a span in it, and the half of its backward pass, 0 for forward
Moment = tuple[int, int, int]


@dataclass
class Span:
    """A part of a forward pass: its autograd nodes have sequence numbers from `start` up to `end`. Whatever it does is done `times` times."""

    label: str
    times: int
    start: int
    index: int = 0
    end: int | None = None


class Region:
    """Bytes by kind at the moment of a period at which most were alive, and at its end."""

    def __init__(self, live: Mapping[str, int]) -> None:
        self.total, self.peak, self.end = sum(live.values()), dict(live), dict(live)


class Tally(TorchDispatchMode):
    """Counts FLOPs by label and phase, and bytes of storages that are alive by kind, while it is entered.

    A storage counts once, however many tensors look at it, from the operation that makes it until it is freed. Its kind is what `assign` says, else the label
    of the span that made it. A multiply-add is 2 FLOPs; products, convolutions and attention are counted, as in torch's own counter. Forward is what runs
    outside a backward pass, recomputation the forward of checkpoints within one. Of attention's backward, which a fused kernel does with five products, one
    is recomputation.

    `moments`: the most bytes, in all and by kind, of every part, span and half of a backward pass. In a network of n equal blocks each of them is affine in n.
    """

    def __init__(self, label: str = "rest") -> None:
        super().__init__()
        self.flops: dict[tuple[str, Phase], float] = defaultdict(float)
        self.rows: dict[str, float] = defaultdict(float)
        self.part = 0
        # how often what is done now is done on average
        self.often = 1.0
        # checkpointed slices since the last backward pass
        self.graphs = 0
        self.every_slice = False
        self.live: Counter[str] = Counter()
        self.total = 0
        self._known: dict[int, tuple[weakref.ref[Any], str, int]] = {}
        self._open = [Span(label, 1, 0)]
        self._spans: list[Span] = []
        self._starts: list[int] = []
        self._regions: list[Region] = []
        self._last: tuple[Span, int] | None = None
        self.moments: dict[Moment, tuple[int, dict[str, int]]] = {}

    # labels

    @contextmanager
    def span(self, label: str | None = None, times: int = 1) -> Iterator[None]:
        """What is done inside, and the backward of it, carries the label and counts so many times; within a recomputation nothing changes."""
        if torch._C._current_autograd_node() is not None:
            yield
            return
        outer = self._open[-1]
        span = Span(label or outer.label, times * outer.times, torch._C._autograd._get_sequence_nr(), len(self._spans) + 1)
        self._spans.append(span)
        self._starts.append(span.start)
        self._open.append(span)
        try:
            yield
        finally:
            self._open.pop()
            span.end = torch._C._autograd._get_sequence_nr()

    @contextmanager
    def sometimes(self, often: float) -> Iterator[None]:
        """What is done inside, in any pass, counts `often` times as much; bytes are what they are."""
        before, self.often = self.often, self.often * often
        try:
            yield
        finally:
            self.often = before

    def _where(self) -> tuple[Span, int]:
        """The span of what is done now, and 0 in its forward pass, 1 and 2 in the two halves of its backward pass."""
        node = torch._C._current_autograd_node()
        if node is None:
            self._last = None
            return self._open[-1], 0
        self.graphs = 0
        number = node._sequence_nr() if hasattr(node, "_sequence_nr") else -1
        for i in range(bisect_right(self._starts, number) - 1, -1, -1):
            span = self._spans[i]
            if span.end is not None and number < span.end:
                self._last = (span, 1 if 2 * number >= span.start + span.end else 2)
                return self._last
        # a gradient that is handed to its parameter, and sums of gradients outside any span
        return self._last or (self._open[-1], 1)

    # counts

    def count(self, flops: float, again: float = 0) -> None:
        """Adds FLOPs of what is done now; `again`: those of them that repeat earlier work."""
        span, back = self._where()
        phase: Phase = "forward" if not back else "recomputation" if torch.is_grad_enabled() else "backward"
        self.flops[span.label, phase] += self.often * span.times * (flops - again)
        if again:
            self.flops[span.label, "recomputation"] += self.often * span.times * again

    def count_rows(self, name: str, rows: int) -> None:
        """Adds rows that something which is not traced is given; those of a recomputation too."""
        self.rows[name] += self.often * self._where()[0].times * rows

    def assign(self, tensor: Tensor | None, kind: str) -> None:
        """Says what a tensor's storage is; one that is on no list yet is alive from now on."""
        if tensor is None:
            return
        storage = tensor.untyped_storage()
        if (known := self._known.get(id(storage))) is None:
            self._add(storage, kind)
            return
        ref, before, size = known
        self._known[id(storage)] = (ref, kind, size)
        self.live[before] -= size
        self.live[kind] += size

    def _add(self, storage: Any, kind: str) -> None:
        key, size = id(storage), storage.nbytes()

        def freed(_: Any) -> None:
            _, now, size = self._known.pop(key)
            self.live[now] -= size
            self.total -= size

        self._known[key] = (weakref.ref(storage, freed), kind, size)
        self.live[kind] += size
        self.total += size
        for region in self._regions:
            if self.total > region.total:
                region.total, region.peak = self.total, dict(self.live)
        self._note(self.total, self.live)

    def _note(self, total: int, live: Mapping[str, int]) -> None:
        span, half = self._where()
        key = (self.part, span.index, half)
        if key not in self.moments or total > self.moments[key][0]:
            self.moments[key] = (total, dict(live))

    @contextmanager
    def region(self) -> Iterator[Region]:
        """Follows the bytes that are alive."""
        region = Region(self.live)
        self._regions.append(region)
        try:
            yield region
        finally:
            self._regions.remove(region)
            region.end = dict(self.live)

    def consider(self, region: Region) -> None:
        """Takes what was alive in the region beyond what it left to be alive once more, beside all that is alive now."""
        again = Counter(self.live)
        again.update(region.peak)
        again.subtract(region.end)
        total = sum(again.values())
        for outer in self._regions:
            if total > outer.total:
                outer.total, outer.peak = total, dict(again)
        self._note(total, again)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = _on_meta(func, args, kwargs)
        packet = func._overloadpacket
        if packet in ATTENTION:
            back = packet in BACKWARD_ATTENTION
            product = attention_product(*(x.shape for x in (args[1:4] if back else args[:3])))
            self.count(5 * product, product) if back else self.count(2 * product)
        elif (formula := flop_registry.get(packet)) is not None:
            self.count(formula(*args, **kwargs, out_val=out))
        for leaf in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if id(storage) not in self._known:
                    self._add(storage, f"activations of {self._where()[0].label}")
        return out


# outputs of operations on the meta device, by operation and shapes: torch works out most of them in Python, which takes longer than to make them
_SEEN: dict[Any, Any] = {}


def _on_meta(func: Any, args: Any, kwargs: Any) -> Any:
    """`func` of its arguments; on the meta device, of shapes that it was given before, an output like the one before."""
    if any(result.alias_info is not None for result in func._schema.returns):
        return func(*args, **kwargs)
    key = (func, _described(args), _described(tuple(kwargs.items())))
    try:
        seen = _SEEN.get(key)
    except TypeError:  # an argument that cannot be compared
        return func(*args, **kwargs)
    if seen is not None:
        return tree_map(lambda like: like() if isinstance(like, _Like) else like, seen)
    out = func(*args, **kwargs)
    leaves = tree_leaves(out)
    if leaves and all(isinstance(leaf, Tensor) and leaf.is_meta for leaf in leaves) and not any(leaf is arg for leaf in leaves for arg in tree_leaves(args)):
        _SEEN[key] = tree_map(_Like, out)
    return out


class _Like:
    """Makes tensors of the shape, strides and dtype of one on the meta device."""

    def __init__(self, x: Tensor) -> None:
        self.shape, self.strides, self.dtype = x.shape, x.stride(), x.dtype

    def __call__(self) -> Tensor:
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device="meta")


def _described(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.shape, x.stride(), x.dtype, x.device.type
    if isinstance(x, (list, tuple)):
        return tuple(map(_described, x))
    return type(x), x


def attention_product(query: torch.Size, key: torch.Size, value: torch.Size) -> float:
    """FLOPs of one of attention's products, of queries [B, H, N, D] and keys [B, H, M, D]: the mean of its two."""
    return sdpa_flop_count(query, key, value) / 2


_aten = torch.ops.aten
BACKWARD_ATTENTION = {
    _aten._scaled_dot_product_flash_attention_for_cpu_backward,
    _aten._scaled_dot_product_flash_attention_backward,
    _aten._scaled_dot_product_efficient_attention_backward,
    _aten._scaled_dot_product_cudnn_attention_backward,
}
ATTENTION = BACKWARD_ATTENTION | {
    _aten._scaled_dot_product_flash_attention_for_cpu,
    _aten._scaled_dot_product_flash_attention,
    _aten._scaled_dot_product_efficient_attention,
    _aten._scaled_dot_product_cudnn_attention,
}
