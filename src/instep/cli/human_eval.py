"""`instep human-eval`: the page on which people compare or score samples, and its results."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from instep.human_eval.questions import Mode, choose
from instep.human_eval.samples import Match


@dataclass(frozen=True)
class HumanEvalArgs:
    """A local page on which people compare or score samples of A and B without knowing which is which. The same command resumes it.

    Two runs: instep human-eval runs/first runs/second

    A run's student and its teacher: instep human-eval runs/first runs/first:teacher_50

    Any files, in two folders with a samples.json each: instep human-eval ours theirs

    The results: instep human-eval --report human_eval.sqlite
    """

    samples: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """A and B: runs, RUN:MODEL, or folders with webp, gif, png, mp4 or webm files and a samples.json, a list of {"file", "prompt", "seed"} (or
    samples.jsonl, a row a line). They are matched by prompt and seed (see --match). None: the store that --out names."""
    out: Path = Path("human_eval.sqlite")
    """The store of the answers, an SQLite file. It belongs to these samples; other samples need another store."""
    mode: Mode | None = None
    """pairs: two side by side, answers left, right or equal (the default); score: one at a time, 0 to 2, and whether it is distorted."""
    questions: tuple[str, ...] = ()
    """Questions, default: all. pairs: visual_quality text_alignment motion overall; score: visual_plausibility human_plausibility subject_consistency
    motion_aesthetics instruction_following distorted. Your own: "hands=Which hands look right?"."""
    match: Match = "seed"
    """How samples of A and B are matched: seed, by prompt and seed; prompt, by prompt alone, the first of a prompt in A with the first in B
    (samples of one model with two seeds)."""
    port: int = 8765
    """Port on 127.0.0.1; 0 chooses any free one."""
    seed: int = 0
    """Seed of each annotator's order of items and sides, and of --report's bootstrap."""
    report: Path | None = None
    """Print the results in this store, and serve nothing."""


def human_eval_command(args: HumanEvalArgs) -> int:
    from instep.human_eval.store import Store

    if args.report is not None:
        from instep.human_eval.results import results

        store = Store(args.report)
        print_results(results(store, args.seed))
        return 0
    if len(args.samples) not in (0, 2):
        raise ValueError(f"samples: {len(args.samples)} folder{'s' * (len(args.samples) > 1)} given; name two, A and B (see instep human-eval --help)")
    try:
        from instep.human_eval.guard import tokens_of
        from instep.human_eval.server import HOST, listen, serve
    except ImportError as error:
        raise ValueError(f'human-eval: the page needs {error.name}, which is not installed; run: pip install "instep[human-eval]"') from error
    bound = listen(args.port)
    store = open_store(args)
    tokens, address = tokens_of(store.path), f"http://{HOST}:{bound.getsockname()[1]}"
    kind = "pairs" if store.mode == "pairs" else "samples"
    print(f"{len(store.items())} {kind} to answer for, answers go to {args.out}", flush=True)
    print(f"for the annotators:    {address}/?token={tokens.annotator}", flush=True)
    print(f"for you, the results:  {address}/results?token={tokens.results}   (they name the runs: not for the annotators)", flush=True)
    print("Ctrl-C stops; the same command goes on.", flush=True)
    serve(store, tokens, bound)
    store.close()
    return 0


def open_store(args: HumanEvalArgs):
    """Opens the store `out`, or creates it. Raises ValueError if it was created for other samples, another mode or other questions."""
    from instep.human_eval.create import create
    from instep.human_eval.database import is_new
    from instep.human_eval.samples import match
    from instep.human_eval.store import Store

    new = is_new(args.out)
    if not args.samples and new:
        raise ValueError(f"samples: none were given and {args.out} does not exist; write `instep human-eval A B`, A and B being folders of samples")
    matched = match(args.samples[0], args.samples[1], args.match) if args.samples else None
    if matched is not None and any(matched.alone):
        shared = "prompt" if args.match == "prompt" else "prompt and seed"
        print(f"note: {matched.alone[0]} samples of A and {matched.alone[1]} of B have no partner of the same {shared} and are left out", flush=True)
    if new:
        assert matched is not None
        mode: Mode = args.mode or "pairs"
        return create(args.out, matched, mode, choose(mode, args.questions), args.seed)
    store = Store(args.out)
    mode = args.mode or store.mode
    store.check_same(matched, mode, choose(mode, args.questions) if args.questions else store.questions if mode == store.mode else ())
    store.check_media()
    return store


def print_results(found) -> None:
    """Tables of all metrics with their 95% intervals."""
    from rich.console import Console
    from rich.table import Table

    from instep.human_eval.figure import FEW, interval_text, kappa_text

    console = Console(width=None if Console().is_terminal else 150)
    console.print(f"A: {found.runs[0]}    B: {found.runs[1]}", highlight=False, markup=False)
    if found.preferences:
        table = Table("question", "A wins", "tie", "A loses", "win rate, ties half", "A better : same : B better", "answers", "kappa", "left side")
        for p in found.preferences:
            items = " : ".join(str(round(x.value * x.n)) for x in (p.good, p.same, p.bad))
            rates = [interval_text(x, "percent") for x in (p.win, p.tie, p.loss, p.win_rate)]
            table.add_row(found.label(p.question), *rates, items, str(p.win.n), kappa_text(p.kappa), interval_text(p.left, "percent"))
        console.print(table)
    if found.scores:
        table = Table("question", "A", "B", "A - B", "kappa")
        for s in (*found.scores, *([found.overall] if found.overall else [])):
            name = "Overall (sum)" if s is found.overall else found.label(s.question)
            table.add_row(name, interval_text(s.a, "plain"), interval_text(s.b, "plain"), interval_text(s.difference, "signed"), kappa_text(s.kappa))
        console.print(table)
    if found.distortion:
        d = found.distortion
        table = Table("", "A", "B", "kappa")
        table.add_row("distortion rate", interval_text(d.a, "percent"), interval_text(d.b, "percent"), kappa_text(d.kappa))
        console.print(table)
    if not (found.preferences or found.scores or found.distortion):
        console.print("nobody has answered anything yet")
    elif found.prompts < FEW:
        console.print(f"{found.prompts} prompts are few: below about {FEW} the bootstrap's intervals are too narrow", highlight=False)
    who = ", ".join(f"{name} {done} of {total}" for name, done, total in found.progress) or "none"
    console.print(f"annotators (items answered): {who}", highlight=False, markup=False)
    console.print("95% intervals; rates: Wilson, win rate and scores: bootstrap over prompts; items by majority", highlight=False)
