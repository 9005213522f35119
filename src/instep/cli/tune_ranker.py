"""`instep pairs tune-ranker`: a vision-language model fine-tuned on preference pairs, for --reward vlm:OUT."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from instep.core.outputs import check_output


@dataclass(frozen=True)
class TuneRankerArgs:
    """Fine-tunes a vision-language model on pairs: it is asked Diffusion-APO's question about each, in both orders, and learns to answer with the label.

    instep pairs tune-ranker pairs.jsonl models/my-ranker --ranker models/some-vlm --device cuda

    instep train apo --reward "domain=prompt vlm:models/my-ranker" ...
    """

    pairs: Annotated[Path, tyro.conf.Positional]
    """A .jsonl or .parquet file of pairs. Ties are left out; slow copies (`instep pairs slow`) teach the labels of richer motion."""
    out: Annotated[Path, tyro.conf.Positional]
    """The tuned model's folder; nothing is overwritten."""
    ranker: str
    """Folder, or name on the hub, of an image-text-to-text model of transformers, as for --reward vlm:FOLDER."""
    domain: Literal["human", "other", "prompt"] = "prompt"
    """The question: human (people are in the videos) or other for all pairs, or human for each prompt that names people, else other."""
    questions: tuple[str, ...] = ()
    """Only the answers to these; default: all, each row a pair of its own. Slow copies answer motion: name it too, to keep them."""
    frames: int = 40
    """Frames of each video that it is shown at most, evenly spaced. Give the reward as many."""
    rank: int = 16
    """Rank of the LoRA on the language model's linear layers."""
    lr: float = 1e-5
    """Learning rate, of AdamW; raise it where pairs are few."""
    epochs: int = 1
    """Passes over the pairs."""
    batch: int = 1
    """Pairs a step, each in both orders; memory does not grow with it."""
    heldout: float = 0.2
    """Share of the prompts that is held out for measuring."""
    seed: int = 0
    """Seed of the choice of held-out prompts, of the LoRA and of the order of pairs."""
    device: str = "cpu"
    """Device that it is tuned on: cpu, cuda."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Precision of the model, loaded and saved; the LoRA is trained in float32."""


def tune_ranker_command(args: TuneRankerArgs) -> int:
    import torch

    from instep.cli import checked_device, default_threads
    from instep.cli.pairs import chosen_pairs
    from instep.rewards.vlm_local import transformers_endpoint
    from instep.rewards.vlm_tuning import Tuning, check_tunable, measure, preferences_of, record_of, save, tune

    check_output("out", args.out)
    tuning = Tuning(args.domain, args.frames, args.rank, args.lr, args.epochs, args.batch, args.seed)
    device = checked_device(args.device)
    pairs = chosen_pairs(args.pairs, args.questions)
    taught, held = preferences_of(pairs, args.heldout, args.seed)
    torch.set_num_threads(default_threads())
    endpoint = transformers_endpoint(args.ranker, device, args.dtype)
    check_tunable(endpoint)
    before = measure(endpoint, held, tuning, "held out, before")
    tune(endpoint, taught, tuning)
    after = measure(endpoint, held, tuning, "held out, after")
    save(endpoint, args.out, record_of(endpoint, tuning, args.heldout, len(taught), before, after))
    print(f"pairs      {len(pairs)}, {sum(pair.tie for pair in pairs)} of them ties, which are left out; {len(taught)} trained on\nheld out   {len(held)}")
    for when, found in (("before", before), ("after", after)):
        shares = [f"{100 * right / found.pairs:.1f} %" for right in (found.first, found.second, found.both)]
        print(
            f"{when:<10} right {shares[0]} with the preferred first, {shares[1]} with it second, {shares[2]} in both orders; {found.unread} answers no option"
        )
    print(f'wrote {args.out}: --reward "domain={args.domain} frames={args.frames} dtype={args.dtype} vlm:{args.out}"')
    if after.both <= before.both:
        print("warning: it orders no more of the held-out pairs right than before; give more pairs, a higher --lr or more --epochs", file=sys.stderr)
    return 0
