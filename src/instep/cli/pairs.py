"""`instep pairs`: people's preferences as rows for training, public preference sets in the same form, slow copies, and a reward learned from all of them."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from instep.bundled import DEFAULT, LISTED
from instep.core.outputs import check_output

if TYPE_CHECKING:
    from instep.data.pairs import PreferencePair

FEATURES_HELP = (
    f"Its features: from the training classifier of a bundled model ({LISTED}; of the monitor with :monitor after it), or the folder of a CLIP or SigLIP of "
    "transformers."
)
USAGE = """instep pairs: preference pairs, one row a pair, as JSONL or Parquet

  instep pairs export STORE OUT        preferences collected by `instep human-eval`
  instep pairs import IN OUT           a preference set with columns of other names
  instep pairs slow IN OUT             negatives in slow motion, of your own videos or the preferred ones of pairs
  instep pairs fit PAIRS OUT           a reward that orders samples as people did, for --reward preferences:OUT
  instep pairs tune-ranker PAIRS OUT   a vision-language model fine-tuned to prefer as people did, for --reward vlm:OUT

Rows have prompt, chosen, rejected (paths of media), question, tie, votes_chosen, votes_rejected, votes_tie, annotators, seed.
Help on one: instep pairs export --help
"""


@dataclass(frozen=True)
class ExportPairsArgs:
    """Exports preferences from the store of `instep human-eval` as rows (prompt, chosen, rejected, votes).

    instep pairs export human_eval.sqlite pairs.jsonl --questions overall
    """

    store: Annotated[Path, tyro.conf.Positional]
    """The store."""
    out: Annotated[Path, tyro.conf.Positional]
    """A .jsonl or .parquet file; nothing is overwritten."""
    questions: tuple[str, ...] = ()
    """Only the answers to these; default: all, each with rows of its own."""
    each: bool = False
    """One row an answer, with its annotator; otherwise one row an item, chosen by majority."""
    ties: bool = True
    """Keep ties, marked as ties."""


@dataclass(frozen=True)
class ImportPairsArgs:
    """Imports a preference set whose columns have other names; images stored inside a Parquet file are written beside OUT.

    The better one in a column of its own: instep pairs import set.parquet pairs.jsonl --prompt-column caption --chosen-column win --rejected-column lose

    Two columns and a label: instep pairs import set.parquet pairs.jsonl --prompt-column caption --first-column jpg_0 --second-column jpg_1
    --label-column label_0
    """

    file: Annotated[Path, tyro.conf.Positional]
    """A .jsonl or .parquet file."""
    out: Annotated[Path, tyro.conf.Positional]
    """A .jsonl or .parquet file; nothing is overwritten."""
    prompt_column: str = "prompt"
    """Column of the prompts."""
    chosen_column: str = "chosen"
    """Column of the preferred media: paths, or images themselves."""
    rejected_column: str = "rejected"
    """Column of the others."""
    first_column: str | None = None
    """Column of the first media, for sets with a preference label in place of chosen and rejected columns."""
    second_column: str | None = None
    """Column of the second media."""
    label_column: str | None = None
    """Column of the label."""
    first_label: str = "1"
    """The label that prefers the first."""
    second_label: str = "0"
    """The label that prefers the second."""
    tie_label: str = "0.5"
    """The label of a tie."""
    question: str = "overall"
    """The question that the pairs answer."""
    media: Path | None = None
    """Folder that relative paths begin at; default: that of FILE."""


@dataclass(frozen=True)
class SlowPairsArgs:
    """Makes pairs in which a video is preferred to its own slow motion, so that a learned reward, or DPO, does not prefer videos that hardly move.

    Of your videos: instep pairs slow my-videos slow.jsonl; of pairs, which stay in the file: instep pairs slow pairs.jsonl more.jsonl --share 0.15
    """

    source: Annotated[Path, tyro.conf.Positional]
    """Pairs or preferred samples, .jsonl or .parquet; or a folder or an index of videos as for `instep train --real`."""
    out: Annotated[Path, tyro.conf.Positional]
    """A .jsonl or .parquet file; nothing is overwritten. The slow copies are written beside it, into OUT-media."""
    factor: float = 2.0
    """How many times slower, above 1: the first half of the video is spread over all frames, by blending neighbours."""
    share: float = 1.0
    """Share of the videos that get a slow copy, above 0 to 1. Diffusion-APO added about 1 slow pair for 7 labelled ones."""
    frames: int | None = None
    """Frames that the model takes, for animations that keep equal frames once; default: frames as they are stored."""
    seed: int = 0
    """Seed of the choice of videos."""

    def __post_init__(self) -> None:
        if not self.factor > 1:
            raise ValueError(f"factor: {self.factor} is not allowed; it slows by more than 1")
        if not 0 < self.share <= 1:
            raise ValueError(f"share: {self.share} is not allowed; it is above 0, and 1 at most")


@dataclass(frozen=True)
class FitPairsArgs:
    """Fits a reward to pairs: a small head on frozen features, with ties, measured on held-out prompts.

    On a model of your own, downloaded once: instep pairs fit pairs.jsonl runs/liked --features models/siglip-base

    instep train refl --reward preferences:runs/liked
    """

    pairs: Annotated[Path, tyro.conf.Positional]
    """A .jsonl or .parquet file of pairs."""
    out: Annotated[Path, tyro.conf.Positional]
    """The reward's folder; nothing is overwritten."""
    features: Annotated[str, tyro.conf.arg(help=FEATURES_HELP)] = DEFAULT
    frames: int = 8
    """Number of evenly spaced frames of each video that a CLIP or SigLIP gets."""
    questions: tuple[str, ...] = ()
    """Only the answers to these; default: all, each row a pair of its own."""
    hidden: int = 0
    """Width of a hidden layer; 0: the reward is linear in the features."""
    steps: int = 300
    """Steps of training."""
    decay: float = 1.0
    """Strength of the penalty on the weights; raise it (10, 100) if pairs are few or people disagree."""
    heldout: float = 0.2
    """Share of the prompts that is held out for measuring."""
    seed: int = 0
    """Seed of the choice of held-out prompts."""
    device: str = "cpu"
    """Device that computes the features: cpu, cuda."""

    def __post_init__(self) -> None:
        for name, value in {"frames": self.frames, "steps": self.steps}.items():
            if value < 1:
                raise ValueError(f"{name}: {value} is not allowed; it is 1 or more")
        for name, number in {"hidden": self.hidden, "decay": self.decay}.items():
            if number < 0:
                raise ValueError(f"{name}: {number} is not allowed; it is 0 or more")
        if not 0 < self.heldout < 1:
            raise ValueError(f"heldout: {self.heldout} is not allowed; it is above 0 and below 1")


def export_pairs_command(args: ExportPairsArgs) -> int:
    from instep.data.pairs import check_format, write_pairs
    from instep.human_eval.pairs import pairs_of
    from instep.human_eval.store import Store

    check_output("out", args.out)
    check_format(args.out)
    store = Store(args.store)
    found = pairs_of(store, args.questions, each=args.each, ties=args.ties)
    write_pairs(args.out, found)
    print(f"wrote {args.out}: {len(found)} pairs, {sum(pair.tie for pair in found)} of them ties")
    return 0


def import_pairs_command(args: ImportPairsArgs) -> int:
    from instep.data.foreign_pairs import Columns, import_pairs
    from instep.data.pairs import check_format, write_pairs

    check_output("out", args.out)
    check_format(args.out)
    columns = Columns(
        args.prompt_column,
        args.chosen_column,
        args.rejected_column,
        args.first_column,
        args.second_column,
        args.label_column,
        (args.first_label, args.second_label, args.tie_label),
    )
    found = import_pairs(args.file, columns, args.media or args.file.parent, args.out.parent / f"{args.out.stem}-media", args.question)
    write_pairs(args.out, found)
    print(f"wrote {args.out}: {len(found)} pairs, {sum(pair.tie for pair in found)} of them ties")
    return 0


def slow_pairs_command(args: SlowPairsArgs) -> int:
    import random

    from instep.data.pairs import check_format, write_pairs
    from instep.data.slow_copies import slow_copies, videos_of

    check_output("out", args.out)
    check_format(args.out)
    pairs, videos = videos_of(args.source)
    chosen = sorted(random.Random(args.seed).sample(range(len(videos)), max(1, round(args.share * len(videos)))))
    found = slow_copies(_watched([videos[i] for i in chosen]), args.out.parent / f"{args.out.stem}-media", args.factor, args.frames)
    if not found.pairs:
        raise ValueError(f"source: none of {len(chosen)} videos of {args.source} moves, so none can be slowed; give videos, not images")
    write_pairs(args.out, [*pairs, *found.pairs])
    print(f"wrote {args.out}: {len(pairs)} pairs as they were, {len(found.pairs)} of a video and its slow copy; {found.still} videos hardly move")
    return 0


def fit_pairs_command(args: FitPairsArgs) -> int:
    import torch

    from instep.bundled.features import features_of
    from instep.cli import checked_device, default_threads
    from instep.rewards.preferences import learn, save

    check_output("out", args.out)
    torch.set_num_threads(default_threads())
    device = checked_device(args.device)
    pairs = chosen_pairs(args.pairs, args.questions)
    found = learn(
        pairs,
        features_of(args.features, args.frames),
        _watched,
        hidden=args.hidden,
        steps=args.steps,
        decay=args.decay,
        heldout=args.heldout,
        seed=args.seed,
        device=device,
    )
    save(found, args.out)
    fitted, right = found.fitted, found.accuracy
    assert right.low is not None and right.high is not None
    print(
        f"pairs      {found.pairs} of {found.prompts} prompts, {100 * found.ties:.0f} % of them ties; {fitted.pairs} trained on\n"
        f"held out   {fitted.heldout} pairs of other prompts: {100 * right.value:.1f} % of preferences ordered right (95 % interval {100 * right.low:.1f} to "
        f"{100 * right.high:.1f} %)\n"
        f"           log probability {fitted.log_prob:.3f} a pair; chance at the same share of ties has {fitted.coin:.3f}\n"
        f"wrote {args.out}: --reward preferences:{args.out}"
    )
    if right.low <= 0.5 or fitted.log_prob <= fitted.coin:
        print("warning: a coin might do as well; give more pairs, other features or more --decay before training on this", file=sys.stderr)
    return 0


def chosen_pairs(file: Path, questions: Sequence[str]) -> list[PreferencePair]:
    """The pairs of a file that answer one of `questions`; without any, all. ValueError for a question that no row answers."""
    from instep.data.pairs import read_pairs

    pairs = read_pairs(file)
    there = sorted({pair.question for pair in pairs})
    if unknown := set(questions) - set(there):
        raise ValueError(f"questions: {sorted(unknown)[0]!r} is in no row of {file}; there are {', '.join(there)}")
    return [pair for pair in pairs if not questions or pair.question in questions]


def _watched(todo: list[Any]) -> Iterator[Any]:
    """Yields the items; after 5 seconds it shows a bar on a terminal, and elsewhere prints a line every 30 seconds."""
    from rich.console import Console
    from rich.progress import Progress

    console, begun = Console(stderr=True), time.monotonic()
    reported = begun - 25
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("media", total=len(todo), visible=False)
        for done, item in enumerate(todo):
            yield item
            now = time.monotonic()
            bar.update(task, completed=done + 1, visible=now - begun > 5)
            if not console.is_terminal and now - reported > 30:
                reported = now
                left = (now - begun) / (done + 1) * (len(todo) - done - 1)
                print(f"media: {done + 1}/{len(todo)}, {left / 60:.1f} min left", file=sys.stderr, flush=True)
