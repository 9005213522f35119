"""The cost of one training cycle beside a neighbour: our `dmd2`, and the DMD2 of nvidia-modelopt (`modelopt.torch.fastgen`).

    python benchmarks/side_by_side.py --their-python DIR/bin/python     # a quarter of an hour on one core
    python benchmarks/side_by_side.py                                   # our side alone, nothing is written
    python benchmarks/side_by_side.py --smoke                           # the smallest case of our side, in seconds

The neighbour runs in an environment of its own, because it has dependencies that this package does not need. Make it outside the repository, with the
PyTorch build and the versions of this one:

    python3 -m venv DIR
    DIR/bin/python -m pip install "torch==2.13.0"
    DIR/bin/python -m pip install -c constraints.txt nvidia-modelopt diffusers transformers accelerate peft

Both sides train the same Wan transformer with random weights in float32 on one thread: the same batch, conditions, student levels, guidance, updates of
the fake, re-noise levels, AdamW and clipping, without an averaged student. Theirs runs in a process, ours in another; both are started anew several
times, rounds are interleaved and their order rotates. Measured are the process CPU time of a cycle, the passes through each network (counted by hooks,
outside the timed rounds), and the bytes of weights and optimiser states. Writes benchmarks/results/side_by_side.json after each size of a batch.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import math
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from sides import Case, count_passes, make_side, memory, timed

RESULT = Path(__file__).parent / "results" / "side_by_side.json"
OURS = ("reused", "fresh", "lora")
THEIRS = "theirs"
PACKAGES = ("instep", "nvidia-modelopt", "torch", "diffusers")
SMALLEST = Case(width=32, layers=1, batch=4)
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


class Worker:
    """A process that trains some variants and answers one command a line. Raises RuntimeError if it ends before it answers."""

    def __init__(self, python: str, case: Case, variants: Sequence[str]) -> None:
        environment = {**os.environ, **ONE_THREAD}
        if variants == (THEIRS,):
            environment.pop("PYTHONPATH", None)
        command = [python, __file__, "--worker", json.dumps(asdict(case)), *variants]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        self.python = python

    def ask(self, what: str, variant: str = "", cycles: int = 1) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"what": what, "variant": variant, "cycles": cycles}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # the empty answer below is reported
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"side_by_side: the worker of {self.python} ended with status {self.process.wait()}; its error stands above")
        return json.loads(answer)

    def close(self) -> None:
        if self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
        self.process.wait()


def work(case: Case, variants: Sequence[str]) -> None:
    """Answers commands on standard input until it ends; whatever else is printed goes to standard error."""
    answers, sys.stdout = sys.stdout, sys.stderr
    torch.set_num_threads(1)
    sides = {name: make_side(case, name) for name in variants}
    for line in sys.stdin:
        command = json.loads(line)
        what, side, cycles = command["what"], sides.get(command["variant"]), command["cycles"]
        if what == "versions":
            answer: Any = versions()
        elif what == "losses":
            answer = averaged([side.cycle() for _ in range(cycles)])
        elif what == "time":
            answer = timed(side, cycles)
        elif what == "passes":
            answer = count_passes(side, case, cycles)
        elif what == "memory":
            answer = memory(side)
        else:
            raise ValueError(f"what: {what!r} is no command of a worker; allowed are versions, losses, time, passes and memory")
        print(json.dumps(answer), file=answers, flush=True)


def averaged(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: statistics.fmean(row[key] for row in rows) for key in rows[0]}


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


@contextlib.contextmanager
def workers(case: Case, their_python: str | None) -> Iterator[dict[str, Worker]]:
    """Yields the worker of each variant; ours share one."""
    ours = Worker(sys.executable, case, OURS)
    made = dict.fromkeys(OURS, ours)
    if their_python is not None:
        made[THEIRS] = Worker(their_python, case, (THEIRS,))
    try:
        yield made
    finally:
        for worker in set(made.values()):
            worker.close()


def cycles_of_a_round(case: Case) -> int:
    """The smallest number of cycles in which every level is drawn as often as every other, where one is drawn for a whole batch."""
    return len(case.levels) // math.gcd(len(case.levels), 1 + case.critic_updates)


def measure(case: Case, launches: int, rounds: int, their_python: str | None) -> dict[str, Any]:
    """Returns the case, how it was measured, the load of the machine before and after, the versions, and one row for each variant.

    Every launch starts the processes anew, since one process can be faster than another of the same program by some hundredths, whatever its rounds are.
    The losses of the first cycles, which warm up, show that all variants train alike.
    """
    cycles, load = cycles_of_a_round(case), os.getloadavg()[0]
    names = [*OURS, THEIRS] if their_python else [*OURS]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    passes: dict[str, Any] = {}
    for launch in range(launches):
        with workers(case, their_python) as made:
            losses = {name: made[name].ask("losses", name, cycles) for name in names}
            for turn in range(rounds):
                first = (launch * rounds + turn) % len(names)
                for name in names[first:] + names[:first]:
                    seconds[name].append(made[name].ask("time", name, cycles))
            if launch == 0:
                passes = {name: made[name].ask("passes", name, cycles) for name in names if name != "lora"}
            sizes = {name: made[name].ask("memory", name) for name in names}
            found = {name: made[name].ask("versions") for name in names if name in (THEIRS, OURS[0])}
    # adapters share a network, where hooks cannot tell roles apart; they make the passes of full copies
    passes["lora"] = passes["reused"]
    base = (seconds[THEIRS], sizes[THEIRS]) if their_python else None
    rows = {name: row(seconds[name], passes[name], sizes[name], losses[name], base) for name in names}
    how = {"launches": launches, "rounds": rounds, "cycles_of_a_round": cycles, "load": [round(load, 2), round(os.getloadavg()[0], 2)]}
    return {"case": asdict(case), **how, "versions": found, "rows": rows}


def row(
    seconds: Sequence[float],
    passes: Mapping[str, Mapping[str, float]],
    sizes: Mapping[str, int],
    losses: Mapping[str, float],
    theirs: tuple[Sequence[float], Mapping[str, int]] | None,
) -> dict[str, Any]:
    """Medians and ranges of a variant; with the neighbour's seconds and sizes also its ratios to them, of seconds round by round."""
    made: dict[str, Any] = {"cpu_s": spread(seconds)}
    if theirs is not None:
        made["cpu_ratio"] = spread([mine / other for mine, other in zip(seconds, theirs[0], strict=True)])
        made["memory_ratio"] = round(sum(sizes.values()) / sum(theirs[1].values()), 4)
    return {**made, "passes": passes, "bytes": sizes, "first_cycles": {key: round(value, 4) for key, value in losses.items()}}


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": round(statistics.median(values), 4), "low": round(min(values), 4), "high": round(max(values), 4)}


def processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--their-python", metavar="PATH", help="the interpreter of the neighbour's environment; without it our side runs alone")
    parser.add_argument("--width", type=int, default=Case.width)
    parser.add_argument("--layers", type=int, default=Case.layers)
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 32], help="samples, measured one after the other; multiples of the student's 4 levels")
    parser.add_argument("--launches", type=int, default=4, help="how often the processes are started anew")
    parser.add_argument("--rounds", type=int, default=2, help="rounds of a launch")
    parser.add_argument("--smoke", action="store_true", help="the smallest case, one round; nothing is written")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(Case(**json.loads(args.worker[0])), args.worker[1:])
        return
    if uneven := [batch for batch in args.batch if batch < 1 or batch % len(Case.levels)]:
        parser.error(f"--batch: {uneven[0]} is not allowed; it is a multiple of the student's {len(Case.levels)} levels, for example {Case.batch}")
    cases = [SMALLEST] if args.smoke else [replace(Case(), width=args.width, layers=args.layers, batch=batch) for batch in args.batch]
    launches, rounds = (1, 1) if args.smoke else (args.launches, args.rounds)
    result: dict[str, Any] = {"date": datetime.date.today().isoformat(), "processor": processor(), "measured": []}
    for case in cases:
        result["measured"].append(measure(case, launches, rounds, args.their_python))
        if args.their_python and not args.smoke:
            from instep.core.files import write_json

            write_json(RESULT, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
