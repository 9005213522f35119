"""The cases of benchmarks/gpu.py, the FLOPs of their transformers, and the peaks of known cards."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import Any, Literal

from instep.core.size import Size
from instep.models.outline import PUBLISHED, outline

RANK = 32
SMALLEST = "smallest"
# of the case that runs on a CPU in seconds
SMALLEST_TRANSFORMER = {"num_attention_heads": 2, "attention_head_dim": 16, "text_dim": 16, "freq_dim": 32, "ffn_dim": 64, "num_layers": 2}
SMALLEST_VAE = {"base_dim": 8, "num_res_blocks": 1}

# dense bf16 peaks, FLOP/s, as the vendor states them; utilisation on other cards is left out
PEAKS = ((r"\bA100\b", 312e12), (r"\bH100\b.*\bHBM3\b", 989e12), (r"\bH100 PCIe\b", 756e12), (r"\bH200$", 989e12))


@dataclass(frozen=True)
class Case:
    """One training iteration: `batch` samples, one update of the student and `critic_updates` of the fake, on a model with random weights.

    model: a published size, or `smallest`. micro_batch: rows that go through a network at once. attention: a backend by diffusers' name; None: PyTorch's own.
    """

    model: str = "1.3B"
    recipe: Literal["dmd2", "dm-align-group"] = "dmd2"
    roles: Literal["lora", "copies"] = "lora"
    micro_batch: int = 1
    checkpointing: bool = True
    compile: bool = False
    offload: bool = False
    attention: str | None = None
    batch: int = 4
    critic_updates: int = 5

    @property
    def name(self) -> str:
        options = {
            "checkpointed": self.checkpointing,
            "compiled": self.compile,
            "offloaded": self.offload,
            self.attention: self.attention,
            f"batch-{self.batch}": self.batch != Case.batch,
            f"updates-{self.critic_updates}": self.critic_updates != Case.critic_updates,
        }
        return "-".join([self.model, self.recipe, self.roles, f"micro-{self.micro_batch}", *(str(word) for word, chosen in options.items() if chosen)])

    @property
    def size(self) -> Size:
        return Size(48, 48, 9) if self.model == SMALLEST else Size(480, 832, 81)

    @property
    def text_tokens(self) -> int:
        return 8 if self.model == SMALLEST else 512


def cases() -> list[Case]:
    """Returns every case, those that matter most first, so that an interrupted series has them.

    Without checkpointing a micro-batch of 1 is the only one that may fit. Full copies of the 14B model fit no single card.
    """
    recipes: tuple[Any, ...] = ("dmd2", "dm-align-group")
    roles: tuple[Any, ...] = ("lora", "copies")
    first = [Case(recipe=recipe, roles=kind) for kind, recipe in product(roles, recipes)]
    large = [Case("14B", recipe) for recipe in recipes]
    wider = [replace(case, micro_batch=case.batch) for case in first]
    kept = [replace(case, checkpointing=False) for case in first]
    offloaded = [replace(case, offload=True) for case in first if case.roles == "copies"]
    compiled = [replace(case, compile=True) for case in (*first, *large, *wider, *kept)]
    return [*first, *large, *wider, *kept, *offloaded, *compiled]


def smallest_case() -> Case:
    return Case(SMALLEST, recipe="dm-align-group", micro_batch=2, critic_updates=1)


def peak_flops(card: str | None) -> float | None:
    """Returns the dense bf16 peak of a card by its name; None for one whose peak is not known here."""
    return next((peak for pattern, peak in PEAKS if card and re.search(pattern, card)), None)


@dataclass(frozen=True)
class Counted:
    """Rows that went through a network: without a graph, with one, and once more during the backward pass (micro-batches)."""

    plain: int = 0
    graph: int = 0
    again: int = 0

    def __add__(self, other: Counted) -> Counted:
        return Counted(self.plain + other.plain, self.graph + other.graph, self.again + other.again)


@dataclass(frozen=True)
class PassFlops:
    """FLOPs of one forward pass of one row; a multiply-add is 2.

    With d = width, f = width of the feed-forward layer, T video tokens, S text tokens, r = rank, p = values of a patch, and per block

        video      2 T (6 d^2 + 2 d f)      queries, keys, values and outputs of self-attention, queries and outputs of cross-attention, feed-forward
        text       2 S (2 d^2)              keys and values of cross-attention
        attention  4 T (T + S) d            two products of each attention
        adapter    2 r (T (14 d + 2 f) + S 4 d)    LoRA on all of these layers

    and outside the blocks

        patches    2 T p d, twice: into the network and out of it
        embeddings 2 S (text_dim d + d^2) + 2 (freq_dim d + 7 d^2)

    *Model* FLOPs are those of the algorithm: forward passes, and for a backward pass twice the layers and twice the attention of full copies. Of LoRA roles,
    whose base weights are frozen, it is once the layers between the patches and the loss (text needs no gradient), twice the attention and twice the adapter.
    *Hardware* FLOPs add what is computed again: the blocks under checkpointing, whole passes of micro-batches, and the fifth product that a fused
    attention repeats in its backward pass. The VAE, the reward and the optimisers are in neither; their time is in the measured seconds.
    """

    video: float
    text: float
    attention: float
    adapter: float
    patches: float
    embeddings: float

    @property
    def blocks(self) -> float:
        return self.video + self.text + self.attention

    def forward(self, adapted: bool) -> float:
        return self.blocks + self.patches + self.embeddings + (self.adapter if adapted else 0)

    def backward(self, adapted: bool) -> float:
        if adapted:
            return self.video + self.patches / 2 + 2 * self.attention + 2 * self.adapter
        return 2 * (self.video + self.text + self.attention + self.patches + self.embeddings)

    def model(self, counted: Counted, adapted: bool) -> float:
        return (counted.plain + counted.graph) * self.forward(adapted) + counted.graph * self.backward(adapted)

    def hardware(self, counted: Counted, adapted: bool, checkpointing: bool, fused: bool = True) -> float:
        recomputed = counted.again * self.forward(adapted)
        if checkpointing:
            recomputed += counted.graph * (self.blocks + (self.adapter if adapted else 0))
        return self.model(counted, adapted) + recomputed + (counted.graph * self.attention / 2 if fused else 0)


def pass_flops(config: Any, latent: Sequence[int], text_tokens: int) -> PassFlops:
    """Returns the FLOPs of a pass of a Wan transformer with this configuration; `latent` [C, F, H, W]."""
    d, f, layers = config["num_attention_heads"] * config["attention_head_dim"], config["ffn_dim"], config["num_layers"]
    patch = config["patch_size"]
    t = latent[1] // patch[0] * (latent[2] // patch[1]) * (latent[3] // patch[2])
    s, values = text_tokens, latent[0] * patch[0] * patch[1] * patch[2]
    return PassFlops(
        video=layers * 2 * t * (6 * d * d + 2 * d * f),
        text=layers * 2 * s * 2 * d * d,
        attention=layers * 4 * t * (t + s) * d,
        adapter=layers * 2 * RANK * (t * (14 * d + 2 * f) + s * 4 * d),
        patches=2 * 2 * t * values * d,
        embeddings=2 * s * (config["text_dim"] * d + d * d) + 2 * (config["freq_dim"] * d + 7 * d * d),
    )


@lru_cache
def transformer_config(model: str) -> Any:
    """Returns the configuration of a model's transformer. Raises ValueError for a model that is neither published nor the smallest."""
    if model == SMALLEST:
        from diffusers import WanTransformer3DModel

        return WanTransformer3DModel(**SMALLEST_TRANSFORMER).config  # type: ignore[arg-type]
    if model not in PUBLISHED:
        raise ValueError(f"model: {model!r} is not allowed; allowed: {', '.join([*PUBLISHED, SMALLEST])}")
    network: Any = outline(model).pretrained
    return network.config


def latent_shape(case: Case) -> tuple[int, int, int, int]:
    """Latents [C, F, H, W] of a sample: 8 times smaller in space and 4 times in time."""
    size = case.size
    return (16, (size.frames - 1) // 4 + 1, size.height // 8, size.width // 8)


def weight(case: Case) -> float:
    """FLOPs that the time of a case is about proportional to, for the time left: the critic's passes outnumber all others."""
    return pass_flops(transformer_config(case.model), latent_shape(case), case.text_tokens).forward(False) * case.batch * (2 + case.critic_updates)
