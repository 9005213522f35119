"""`instep convert`: published weights of a model as the folder that is trained from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from instep.core.outputs import check_output
from instep.models.sit_weights import write_sit
from instep.rewards.convert import read_weights


@dataclass(frozen=True)
class ConvertArgs:
    """Write SiT's published weights, which are a pickle, as a model folder of safetensors, once; no code of the file runs. DiT's need none of it: diffusers
    publishes them as a pipeline folder."""

    file: Annotated[Path, tyro.conf.Positional]
    """The file as it was published: SiT-XL-2-256x256.pt."""
    to: Path
    """The folder to write, for example models/sit-xl: instep train dmd2 --model models/sit-xl."""
    vae: Path
    """Folder of the VAE in whose latents the model works, which is copied: that of stabilityai/sd-vae-ft-ema."""
    heads: int | None = None
    """Attention heads of a network that is not one of the published sizes (S, B, L, XL)."""


def convert_command(args: ConvertArgs) -> int:
    check_output("to", args.to, empty=True)
    write_sit(read_weights(args.file), args.vae, args.to, args.heads)
    print(f"{args.file.name} was SiT; it is now in {args.to}")
    return 0
