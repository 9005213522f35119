"""`instep pairs`: what people preferred as rows a training run reads, and public preference sets in the same form."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

USAGE = """instep pairs: preference pairs, one row a pair, as JSONL or Parquet

  instep pairs export STORE OUT   what people preferred on the page of `instep judge`
  instep pairs import IN OUT      a preference set with columns of other names

Rows have prompt, chosen, rejected (paths of media), question, tie, votes_chosen, votes_rejected, votes_tie, annotators, seed.
Help on one: instep pairs export --help
"""


@dataclass(frozen=True)
class ExportPairsArgs:
    """What people preferred, from the store of `instep judge` to rows (prompt, chosen, rejected, votes).

    instep pairs export judge.sqlite pairs.jsonl --questions overall
    """

    store: Annotated[Path, tyro.conf.Positional]
    """The store."""
    out: Annotated[Path, tyro.conf.Positional]
    """A .jsonl or .parquet file; nothing is overwritten."""
    questions: tuple[str, ...] = ()
    """Only the answers to these; default: all, each with rows of its own."""
    each: bool = False
    """One row an answer, with who gave it; otherwise one row an item, chosen by most votes."""
    ties: bool = True
    """Keep ties, marked as such."""


@dataclass(frozen=True)
class ImportPairsArgs:
    """A preference set with columns of other names as pairs; pictures kept inside a Parquet file are written beside OUT.

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
    """Column of the preferred media: paths, or pictures themselves."""
    rejected_column: str = "rejected"
    """Column of the others."""
    first_column: str | None = None
    """Where a label says which is better: column of the first media, in place of chosen and rejected."""
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
    """What was asked."""
    media: Path | None = None
    """Folder that relative paths begin at; default: that of FILE."""


def export_pairs_command(args: ExportPairsArgs) -> int:
    from instep.data.pairs import check_format, write_pairs
    from instep.judge.pairs import pairs_of
    from instep.judge.store import Store

    _free(args.out)
    check_format(args.out)
    store = Store(args.store)
    found = pairs_of(store, args.questions, each=args.each, ties=args.ties)
    write_pairs(args.out, found)
    print(f"wrote {args.out}: {len(found)} pairs, {sum(pair.tie for pair in found)} of them ties")
    return 0


def import_pairs_command(args: ImportPairsArgs) -> int:
    from instep.data.foreign_pairs import Columns, import_pairs
    from instep.data.pairs import check_format, write_pairs

    _free(args.out)
    check_format(args.out)
    columns = Columns(
        args.prompt_column, args.chosen_column, args.rejected_column, args.first_column, args.second_column, args.label_column,
        (args.first_label, args.second_label, args.tie_label),
    )  # fmt: skip
    found = import_pairs(args.file, columns, args.media or args.file.parent, args.out.parent / f"{args.out.stem}-media", args.question)
    write_pairs(args.out, found)
    print(f"wrote {args.out}: {len(found)} pairs, {sum(pair.tie for pair in found)} of them ties")
    return 0


def _free(out: Path) -> None:
    if out.exists():
        raise ValueError(f"out: {out} exists; choose another name, nothing is overwritten unasked")
