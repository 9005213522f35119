"""How a run is executed: device, precision, memory. Nothing else in training knows of it; `instep plan` reads the same object."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from instep.core.numbers import check_whole
from instep.core.ranks import Ranks
from instep.methods.recipe import Recipe
from instep.models.family import Family
from instep.training.low_bit import check_installed

# networks of more parameters are trained with activation checkpointing by default, and in the micro-batches of their preset
LARGE = 500_000_000

# variants of a compiled block: adapters, with and without a graph, sizes of a batch; torch's own limit is 8
VARIANTS = 64
COMPILE: dict[str, Any] = {}

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Execution:
    """Where and in which precision a run computes, and what it keeps in memory. The results agree up to rounding, whatever is chosen here.

    Precision is the policy of FSDP2's `MixedPrecisionPolicy`: networks compute in `dtype`, except for the modules that diffusers keeps in float32. Trained
    weights, moments and averages are float32 (see `TrainedParams`), and so are predictions, norms and losses. Frozen networks and the VAE stay in the dtype
    that they were loaded in.
    """

    device: str | None = None
    """cpu, cuda, cuda:1, mps ...; default: the accelerator, if there is one."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """What the networks compute in; default: bfloat16 on CUDA, else float32; a pipeline given as an object keeps its own."""
    micro_batch: int | None = None
    """Most rows that go through the network, the decoder or the reward at once; default: all rows of a batch, and of networks
    of more than 500 million parameters as many as their preset says. A batch may be larger, and so may a group: its rows are then computed a few at a time,
    for one more forward pass, with the same gradient."""
    checkpointing: Literal["auto", "on", "off"] = "auto"
    """Activation checkpointing: less memory, one more forward pass; auto: on for networks of more than 500 million parameters."""
    offload: bool = False
    """Keep float32 weights, moments and averages in host memory and step them there; networks and VAE take turns on the device. Slower: networks are moved,
    and each forward pass with a graph is computed twice."""
    moments: Literal["float32", "8bit"] = "float32"
    """AdamW's moments: 8bit keeps them in a quarter of the memory, by torchao (pip install 'instep[lowbit]'), rounded after each step. A run resumes in what
    it began with."""
    compile: bool = False
    """torch.compile of the network's repeated blocks: minutes at the start, faster steps."""
    shard: Literal["auto", "on", "off"] = "auto"
    """In several processes (torchrun): each keeps its part of every network, of the moments and of the averages, and gathers the weights of a block when it
    is computed (FSDP2). Memory falls with the number of processes, and weights travel in every pass. auto: on where full copies of a network of more than
    500 million parameters are trained; smaller networks and adapters (--lora-rank) fit on one card, and send less. Not together with offload, compile and
    moments 8bit."""
    context_parallel: int = 1
    """In several processes (torchrun): how many compute each sample together, each a part of its tokens (long videos; Wan). Activations of a network fall with
    it. A divisor of the number of processes, of heads and of a sample's tokens. Not together with offload, compile and attention."""
    attention: str | None = None
    """Attention backend by diffusers' name, for example _native_cudnn, flash, _flash_3, sage; default: PyTorch's own choice."""

    def __post_init__(self) -> None:
        if self.micro_batch is not None and (not isinstance(self.micro_batch, int) or self.micro_batch < 1):
            raise ValueError(f"micro_batch: {self.micro_batch} is not allowed; 1 or more rows, or None for whole batches")
        if self.checkpointing not in ("auto", "on", "off"):
            raise ValueError(f"checkpointing: {self.checkpointing!r} is not allowed; allowed: auto, on, off")
        if self.shard not in ("auto", "on", "off"):
            raise ValueError(f"shard: {self.shard!r} is not allowed; allowed: auto, on, off")
        if self.shard == "on" and (other := self._alone):
            raise ValueError(f"shard: on is not allowed together with {other}; leave one of the two out")
        check_whole("context_parallel", self.context_parallel, 1)
        if self.context_parallel > 1 and (other := "offload" if self.offload else "compile" if self.compile else "attention" if self.attention else ""):
            raise ValueError(f"context_parallel: {self.context_parallel} is not allowed together with {other}; leave one of the two out")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"dtype: {self.dtype!r} is not allowed; allowed: {', '.join(DTYPES)}")
        if self.moments not in ("float32", "8bit"):
            raise ValueError(f"moments: {self.moments!r} is not allowed; allowed: float32, 8bit")
        if self.low_bit:
            check_installed()
        if self.device is not None:
            _check_device(self.device)
        if self.attention is not None and self.attention not in (allowed := _attention_backends()):
            raise ValueError(f"attention: {self.attention!r} is not allowed; allowed: {', '.join(allowed)}")

    def check(self) -> None:
        """Raises ValueError for a device without values, and for an attention backend whose package is missing: a run cannot be executed so, though planned."""
        if self.target.type == "meta":
            raise ValueError(f"device: {self.device} is not allowed for a run: its tensors have no values; cpu, cuda, cuda:1 or mps, or leave it out")
        if self.attention is not None and (missing := _missing_for(self.attention)):
            usable = [name for name in _attention_backends() if not _missing_for(name)]
            raise ValueError(f"attention: {self.attention} is not usable here: {missing}; usable: {', '.join(usable)}, or leave it out")

    def check_shared(self, ranks: Ranks) -> None:
        """Raises ValueError if processes of one machine would share an accelerator."""
        if ranks.count == 1 or self.target.type == "cpu":
            return
        if self.target.index is not None:
            raise ValueError(
                f"device: {self.device} is not allowed for {ranks.count} processes, which would share it; give {self.target.type}, and each takes its own"
            )
        if (there := torch.accelerator.device_count()) < ranks.local:
            raise ValueError(
                f"device: this machine has {there} of {self.target.type} for {ranks.local} processes; start as many, --nproc-per-node {there}, or give "
                "--device cpu"
            )

    @property
    def _alone(self) -> str:
        """The option that a sharded run cannot have; empty: none."""
        return "offload" if self.offload else "compile" if self.compile else "moments 8bit" if self.low_bit else ""

    def shards(self, recipe: Recipe, family: Family, ranks: Ranks) -> bool:
        """Whether the networks of a run are divided among its processes."""
        if ranks.count == 1 or self.shard != "auto":
            return ranks.count > 1 and self.shard == "on"
        copies = any(role.lora is None and role.optim is not None for role in recipe.roles.values())
        return copies and not self._alone and is_large(family.pretrained)

    @property
    def low_bit(self) -> bool:
        return self.moments == "8bit"

    @property
    def target(self) -> torch.device:
        """The device of a run."""
        return accelerator() if self.device is None else torch.device(self.device)

    def device_of(self, family: Family) -> torch.device:
        """The device that a family trains on: the one that was asked for, else the accelerator that it is on already or that there is."""
        return self.target if self.device is not None or family.device.type == "cpu" else family.device

    def dtype_of(self, family: Family) -> torch.dtype:
        """The dtype that a family's network computes in: the one that was asked for, else its own."""
        return family.dtype if self.dtype is None else DTYPES[self.dtype]

    def rows_of(self, family: Family) -> int | None:
        """The most rows that go through a family's network at once; None: all of a batch."""
        return self.micro_batch or (family.preset.micro_batch if is_large(family.pretrained) else None)

    def loading_dtype(self) -> torch.dtype:
        """The dtype to load a pipeline's network in."""
        if self.dtype is not None:
            return DTYPES[self.dtype]
        return torch.bfloat16 if self.target.type == "cuda" else torch.float32

    def checkpoints(self, network: nn.Module) -> bool:
        """Whether a network is trained with activation checkpointing."""
        return self.checkpointing == "on" or (self.checkpointing == "auto" and is_large(network))

    @contextmanager
    def attending(self) -> Iterator[None]:
        """The attention backend, for everything inside."""
        if self.attention is None:
            yield
            return
        from diffusers.models.attention_dispatch import attention_backend

        with attention_backend(self.attention):
            yield

    def compile_blocks(self, family: Family, network: nn.Module) -> None:
        """Compiles the repeated blocks of a network, if the run is to. A block is compiled anew for each adapter, with and without a graph."""
        if not self.compile:
            return
        # the gradient of one term is measured before that of all, through the same graph
        torch._functorch.config.donated_buffer = False
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
        for name, part in family.parts(network).items():
            if not getattr(part, "_repeated_blocks", None):
                raise ValueError(f"compile: the {name} of {family.name}, a {type(part).__name__}, has no repeated blocks to compile; leave the option out")
            part.compile_repeated_blocks(**COMPILE)  # type: ignore[operator]

    def place(self, family: Family, sharded: bool = False, *, decodes: bool = True) -> Family:
        """The family on the run's device and in its precision; the one that is given stays as it is. Networks that are offloaded, or will be `sharded`, stay in
        host memory. `decodes`: whether its VAE comes along.

        Raises ValueError for a network in float16, whose range the gradients of training leave.
        """
        device = self.device_of(family)
        dtype = self.dtype_of(family)
        if dtype not in (torch.bfloat16, torch.float32, torch.float64):
            raise ValueError(
                f"dtype: {family.name} is loaded in {str(family.dtype).removeprefix('torch.')}, whose range is too small for training; load it with "
                'dtype=torch.bfloat16, or let the run cast it: dtype="bfloat16"'
            )
        if device.type == "cuda" and dtype == torch.float32:
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        return family.placed(device, dtype, self.rows_of(family), offload=self.offload or sharded, decodes=decodes)


def _attention_backends() -> list[str]:
    """diffusers' names, without those that download a kernel."""
    from diffusers.models.attention_dispatch import AttentionBackendName

    return [backend.value for backend in AttentionBackendName if "hub" not in backend.value]


def _missing_for(backend: str) -> str:
    """What a backend lacks on this machine, in diffusers' words; empty: nothing."""
    from diffusers.models import attention_dispatch

    name = attention_dispatch.AttentionBackendName(backend)
    if name not in attention_dispatch._AttentionBackendRegistry._backends:
        return "this version of diffusers does not run it"
    try:
        attention_dispatch._check_attention_backend_requirements(name)
    except RuntimeError as error:
        return str(error).rstrip(".")
    return ""


def is_large(network: nn.Module) -> bool:
    return sum(p.numel() for p in network.parameters()) > LARGE


def accelerator() -> torch.device:
    """The accelerator of this process, or the CPU."""
    found = torch.accelerator.current_accelerator(check_available=True) if torch.accelerator.is_available() else None
    return torch.device("cpu") if found is None else found


def _check_device(name: str) -> None:
    """Raises ValueError for a name that is no device, or for a device that is not there."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device: {name!r} is not allowed; cpu, cuda, cuda:1 or mps") from error
    if device.type in ("cpu", "meta"):
        return
    found = accelerator()
    count = torch.accelerator.device_count() if found.type == device.type else 0
    if (device.index or 0) >= count:
        raise ValueError(f"device: {name} is not there; this machine has {f'{count} of {found.type}' if count else 'no ' + device.type}, and cpu")
