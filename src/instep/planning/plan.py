"""Before anything runs: what will be in memory, how much there is to compute, how long an iteration takes.

Everything here is arithmetic on a `Workload`. What is left out, because it is small or not the library's to know: the
VAE and the reward model, text encoders (run once, then unloaded), the CUDA context, AdamW's own arithmetic,
communication between GPUs. GB are 1e9 bytes; a "pass" is one network evaluation of one sample.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from instep.planning.workload import Workload

if TYPE_CHECKING:
    from rich.table import Table

# What a block of self-attention, cross-attention to text and feed-forward (Wan's, in diffusers) keeps for its backward, counted
# by saved-tensor hooks, in vectors of the model's width: (a video token and block, a text token and block, a token outside the
# blocks), by roles and bytes a parameter. Frozen weights need fewer; in two bytes more are kept, because norms run in float32.
KEPT = {("copies", 4): (22, 4, 3), ("copies", 2): (34, 6, 5), ("lora", 4): (15, 3, 1), ("lora", 2): (21, 4, 2)}
# and of the feed-forward width, GELU's input and output
KEPT_FFN = 2
# share of the memory that is kept free: a plan that fills a device meets fragmentation
HEADROOM = 0.08


@dataclass(frozen=True)
class Item:
    """One line of the plan: a number of bytes or passes, and why."""

    name: str
    value: float
    why: str


# --------------------------------------------------------------------------------------------------------------- memory


def memory(w: Workload) -> tuple[Item, ...]:
    """Bytes on one GPU at the peak of an iteration, line by line; the sum is the peak."""
    b, trained = w.bytes_per_parameter, w.trained_params
    if w.roles == "copies":
        why = "the teacher, and of student and fake the trained expert" if w.frozen_experts else "student, fake and teacher: three full copies"
        weights = (w.params + 2 * trained) * b
    else:
        weights, why = (w.params + 2 * trained) * b, f"one frozen network and two adapters of rank {w.lora_rank}"
    # student and fake take turns: gradients of one are cleared before the other's appear
    states = [
        Item("weights", weights, why),
        Item("gradients", trained * b, "of one trained role at a time"),
        Item("AdamW", 4 * trained * b, "two moments for student and for fake"),
        Item("EMA", trained * b if w.ema else 0, "averaged student" if w.ema else "none"),
    ]
    sharded = [replace(item, value=item.value / w.gpus, why=f"{item.why}{f', over {w.gpus} GPUs' if w.gpus > 1 else ''}") for item in states]
    if w.gpus > 1:
        sharded.append(Item("gathered weights", 2 * w.params / w.experts / w.layers * b, "two blocks at a time are whole on each GPU"))
    kept = "one vector a token and block, and one block in full" if w.checkpointing else "every block in full"
    # the teacher's guided pass stacks two batches, without a graph: a few vectors a token live at a time
    working = 2 * w.batch * w.tokens * (4 * w.width + 2 * w.ffn) * b
    return (
        *sharded,
        Item("activations", activations(w), kept),
        Item("working memory", working, "of a guided pass without a graph"),
    )


def activations(w: Workload) -> float:
    """Bytes that one forward with a graph keeps for its backward, the micro-batch w.batch.

    A block keeps `KEPT` vectors a token (times width), GELU's two a token (times ffn), with LoRA the low-rank products;
    with checkpointing only its input, and the block that runs again in full. Attention is assumed to be
    memory-efficient (linear).
    """
    b = w.bytes_per_parameter
    video, text, rest = KEPT[w.roles, b]
    block = w.tokens * (video * w.width + KEPT_FFN * w.ffn) + w.text_tokens * text * w.width
    if w.roles == "lora":
        block += w.lora_rank * (8 * w.tokens + 2 * w.text_tokens)
    outside = rest * (w.tokens + w.text_tokens) * w.width
    blocks = w.layers * w.tokens * w.width + block if w.checkpointing else w.layers * block
    points = w.levels + 1 if w.trajectory else 2 if w.final_live else 1
    return w.batch * b * points * (blocks + outside)


# -------------------------------------------------------------------------------------------------------------- compute


def passes(w: Workload) -> tuple[tuple[Item, ...], tuple[Item, ...]]:
    """Network evaluations of one sample in one iteration: those without a graph, and those with one, which are run back
    as well.

    A rollout to a uniformly drawn exit takes (Q - 1) / 2 steps before the supervised one, Q - 1 others if it goes to
    the end.
    """
    q, n = w.levels, w.critic_updates
    # exit and end are the same step for one sample in Q
    graph = 2 - 1 / q if w.final_live else 1.0
    if w.trajectory:
        # every step carries the graph; the exit is predicted once more from a detached input, unless it is the first
        graph = q + 1 - 1 / q
    if not w.supervised:
        graph = 0.0
    rest = max(0.0, q - graph) if w.needs_final else (q - 1) / 2 + (0 if w.supervised else 1)
    plain = []
    if w.rolls:
        how = "to the end of the levels" if w.needs_final else "up to the exit, on average"
        plain.append(Item("rollout", rest * w.rollout_passes, how + (", guided" if w.rollout_passes > 1 else "")))
    if w.matching:
        plain.append(Item("fake", 1, "score of the sample"))
        why = "no guidance" if w.guidance == 1 else "with and without the prompt"
        plain.append(Item("teacher", 1 if w.guidance == 1 else 2, why))
    if w.other_plain:
        plain.append(Item("other terms", w.other_plain, "without a graph"))
    if not w.reuse:
        plain.append(Item("rollouts for critics", n * (q + 1) / 2, f"{n} fresh ones"))
    trained = [Item("student", graph, "supervised step")] if w.supervised else []
    if w.other_graph:
        trained.append(Item("other terms", w.other_graph, "with a forward of their own"))
    if n * w.critic_passes:
        trained.append(Item("critic", n * w.critic_passes, f"{n} updates"))
    return tuple(plain), tuple(trained)


def pass_flops(w: Workload) -> tuple[float, float]:
    """FLOPs of one pass without a graph, and of one forward and backward; a multiply-add is 2.

    Linear layers: 2 a weight and token (keys and values of cross-attention see the text tokens). Attention: 4 T^2
    width. Backward: twice the forward; with frozen weights once for linear layers, since only activations need
    gradients. Checkpointing adds a forward.
    """
    d, t, s = w.width, w.tokens, w.text_tokens
    linear = w.layers * (2 * t * (6 * d * d + 2 * d * w.ffn) + 2 * s * 2 * d * d)
    attention = w.layers * 4 * t * d * (t + s)
    adapter = 2 * t * w.lora_params / w.trained_experts if w.roles == "lora" else 0
    forward = linear + attention + adapter
    backward = (2 if w.roles == "copies" else 1) * linear + 2 * attention + 2 * adapter
    return forward, forward + backward + (forward if w.checkpointing else 0)


def flops(w: Workload) -> float:
    """FLOPs of one iteration (every accumulated micro-batch) on one GPU."""
    plain, graph = passes(w)
    forward, both = pass_flops(w)
    return w.batch * w.accumulate * (sum(i.value for i in plain) * forward + sum(i.value for i in graph) * both)


# ------------------------------------------------------------------------------------------------------------- the plan


@dataclass(frozen=True)
class Plan:
    """What an iteration costs on one GPU. `throughput` in FLOP/s, `source` says where it comes from, `capacity` in
    bytes.
    """

    workload: Workload
    memory: tuple[Item, ...]
    plain: tuple[Item, ...]
    graph: tuple[Item, ...]
    flops: float
    throughput: float
    source: str
    capacity: float
    advice: tuple[str, ...]

    @property
    def bytes(self) -> float:
        return sum(item.value for item in self.memory)

    @property
    def seconds(self) -> float:
        return self.flops / self.throughput

    @property
    def fits(self) -> bool:
        return self.bytes <= (1 - HEADROOM) * self.capacity

    def verdict(self) -> str:
        """One line: 'fits in 80 GB: yes, 61 GB', or no, and what would."""
        text = f"fits in {gb(self.capacity)}: {'yes' if self.fits else 'no'}, {gb(self.bytes)}"
        if not self.fits and self.bytes <= self.capacity:
            text += f" ({HEADROOM:.0%} are kept free against fragmentation)"
        return text if self.fits or not self.advice else f"{text}; it would {', or '.join(self.advice)}"

    def pace(self) -> str:
        """One line about time and where the number comes from."""
        return f"{duration(self.seconds)} an iteration: {self.flops:.3g} FLOPs at {self.throughput:.3g} FLOP/s ({self.source})"

    def table(self) -> Table:
        """A rich table of the memory and the passes, line by line."""
        from rich.table import Table

        table = Table(title=f"{self.verdict()}\n{self.pace()}", title_justify="left")
        for name in ("", "amount", "why"):
            table.add_column(name, justify="right" if name == "amount" else "left")
        for item in self.memory:
            table.add_row(item.name, gb(item.value), item.why)
        table.add_row("memory of one GPU", gb(self.bytes), "peak", end_section=True, style="bold")
        for items, what in ((self.plain, "forward"), (self.graph, "forward and backward")):
            for item in items:
                table.add_row(item.name, f"{item.value:g} x", f"{what}: {item.why}")
        total = sum(item.value for item in (*self.plain, *self.graph))
        samples = f"{self.workload.batch * self.workload.accumulate} samples an iteration on each GPU"
        table.add_row("passes a sample", f"{total:g}", samples, style="bold")
        return table


def plan(w: Workload, throughput: float, capacity: float, source: str = "stated") -> Plan:
    """Memory, FLOPs and seconds of one iteration; capacity in bytes of one GPU, throughput in FLOP/s
    (`instep.planning.throughput`).
    """
    if throughput <= 0 or capacity <= 0:
        raise ValueError(f"throughput, capacity: {throughput}, {capacity} are not possible; allowed: positive numbers")
    plain, graph = passes(w)
    lines = memory(w)
    advice = () if sum(i.value for i in lines) <= (1 - HEADROOM) * capacity else remedies(w, capacity)
    return Plan(w, lines, plain, graph, flops(w), throughput, source, capacity, advice)


def remedies(w: Workload, capacity: float) -> tuple[str, ...]:
    """Changes, each tried alone and then together, after which the workload fits; the gentlest first."""

    def size(v: Workload) -> float:
        return sum(item.value for item in memory(v))

    single = [
        ("with checkpointing", replace(w, checkpointing=True)),
        ("with a micro-batch of 1 (accumulate the rest)", replace(w, batch=1)),
        ("with LoRA roles", replace(w, roles="lora")),
        ("in bfloat16", replace(w, bytes_per_parameter=2)),
    ]
    found = [f"{name}: {gb(size(v))}" for name, v in single if v != w and size(v) <= (1 - HEADROOM) * capacity]
    if not found:
        everything = replace(w, checkpointing=True, batch=1, roles="lora", bytes_per_parameter=2)
        if size(everything) <= (1 - HEADROOM) * capacity:
            found.append(f"with checkpointing, micro-batch 1, LoRA and bfloat16 together: {gb(size(everything))}")
    for gpus in (2, 4, 8, 16, 32, 64):
        if gpus > w.gpus and size(replace(w, gpus=gpus)) <= (1 - HEADROOM) * capacity:
            found.append(f"sharded over {gpus} GPUs: {gb(size(replace(w, gpus=gpus)))} each")
            break
    return tuple(f"fit {text}" for text in found)


def gb(count: float) -> str:
    """Bytes in words: GB of 1e9, smaller ones in MB."""
    if count >= 1e10:
        return f"{count / 1e9:.0f} GB"
    return f"{count / 1e9:.2g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def duration(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
