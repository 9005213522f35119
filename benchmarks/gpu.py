"""What an iteration of a full-size Wan costs on one GPU: seconds, memory, FLOPs and utilisation.

    python benchmarks/gpu.py                                    # every case on this machine's CUDA card; skips what was measured on it already
    python benchmarks/gpu.py --list                             # the cases, and which of them were measured
    python benchmarks/gpu.py --only '1.3B-dmd2-*' --repeats 5   # some of them
    python benchmarks/gpu.py --only '*-micro-1-checkpointed' --attention _native_cudnn native
    python benchmarks/gpu.py --smallest                         # one tiny case on the CPU, in seconds; nothing is written

A case is one training iteration as a run makes it (the same roles, optimisers and `Execution`) of Wan 2.1 at 480 x 832, 81 frames: latents [16, 21, 60, 104],
texts of 512 tokens. Weights and texts are random; nothing is downloaded. The reward of DM-Align is the mean brightness of what a VAE of Wan's shape decodes.
Each case has a process of its own: one that runs out of memory or crashes becomes a row, and the series goes on. Rows are written to
benchmarks/results/gpu.json after every case; `make results` puts them into docs/gpu.md.

FLOPs follow from a formula (`gpu_cases.PassFlops`) and from the rows that went through each network, which are counted as they pass. Utilisation is FLOPs
over seconds and the card's dense bfloat16 peak. Peaks of memory include the building of the networks and the warm-up. Each row also has
the planner's estimate (`gpu_plan.py`).
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from fnmatch import fnmatchcase
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from gpu_cases import Case, cases, peak_flops, smallest_case, weight
from gpu_plan import planned

from instep.core.files import write_json
from instep.training.execution import Execution

RESULT = Path(__file__).parent / "results" / "gpu.json"
# of an outcome that another attempt would not change
SETTLED = ("measured", "out of memory")
PACKAGES = ("instep", "torch", "diffusers")

Report = Callable[[Mapping[str, Any]], None]


# in the process of a case


def measure(case: Case, device: torch.device, warmup: int, repeats: int, report: Report) -> dict[str, Any]:
    """Returns the outcome of a case; `report` gets the phase that begins and the peaks of memory so far."""
    phase = "building"

    def enter(name: str) -> None:
        nonlocal phase
        phase = name
        report({"phase": phase, "peak": peaks(device)})

    try:
        enter(phase)
        seconds, flops = timed(case, device, warmup, repeats, enter)
    except Exception as error:
        traceback.print_exc()
        outcome = "out of memory" if out_of_memory(error) else "failed"
        first = str(error).strip().split("\n")[0]
        return {"outcome": outcome, "phase": phase, "error": f"{type(error).__name__}: {first}", "peak": peaks(device)}
    peak = peak_flops(card(device))
    shares = {kind: [work[kind] / s / peak for work, s in zip(flops, seconds, strict=True)] for kind in ("model", "hardware")} if peak else None
    return {
        "outcome": "measured",
        "seconds": {"median": statistics.median(seconds), "low": min(seconds), "high": max(seconds)},
        "flops": {kind: statistics.median(work[kind] for work in flops) for kind in ("model", "hardware")},
        "utilisation": shares and {kind: statistics.median(values) for kind, values in shares.items()},
        "peak": peaks(device),
    }


def timed(case: Case, device: torch.device, warmup: int, repeats: int, enter: Callable[[str], None]) -> tuple[list[float], list[dict[str, float]]]:
    """Returns seconds and FLOPs of each measured iteration. Raises FloatingPointError if a gradient is not finite, since its step is left out."""
    from gpu_family import build

    from instep.training.step import iteration

    built = build(case, device)
    seconds, flops = [], []
    with built.execution.attending():
        for i in range(warmup + repeats):
            enter(f"warm-up {i + 1} of {warmup}" if i < warmup else f"iteration {i + 1 - warmup} of {repeats}")
            built.flops()
            wait(device)
            start = time.perf_counter()
            log = iteration(built.state, built.stage, [built.batch], 0.0)
            wait(device)
            if i >= warmup:
                seconds.append(time.perf_counter() - start)
                flops.append(built.flops())
            if skipped := [name for name, value in log.items() if name.endswith("/skipped") and value]:
                raise FloatingPointError(f"{skipped[0]}: the gradient was not finite")
    return seconds, flops


def out_of_memory(error: BaseException | None) -> bool:
    """Whether a device's memory was exhausted: by an error of that type, by a library's own words, or as the cause of another error."""
    if error is None:
        return False
    words = ("out of memory", "ALLOC_FAILED", "can't allocate memory")
    known = isinstance(error, torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and any(word in str(error) for word in words))
    return known or out_of_memory(error.__cause__)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peaks(device: torch.device) -> dict[str, int | None]:
    """Largest memory so far, in bytes: allocated and reserved on the device (None on a CPU), and resident on the host."""
    found: dict[str, int | None] = {"allocated": None, "reserved": None}
    if device.type == "cuda" and torch.cuda.is_initialized():
        found = {"allocated": torch.cuda.max_memory_allocated(device), "reserved": torch.cuda.max_memory_reserved(device)}
    unit = 1 if sys.platform == "darwin" else 1024
    return {**found, "resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}


def card(device: torch.device) -> str | None:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def software() -> dict[str, str]:
    found = {"python": platform.python_version(), "cuda": torch.version.cuda or "none"}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def child(job: Mapping[str, Any]) -> None:
    """Answers one job, a line of JSON an event, the outcome last; whatever else is printed goes to standard error."""
    answers, sys.stdout = sys.stdout, sys.stderr

    def report(event: Mapping[str, Any]) -> None:
        print(json.dumps(event), file=answers, flush=True)

    device = torch.device(job["device"])
    if job["case"] is None:
        report({"card": card(device), "software": software()})
        return
    if device.type == "cpu":
        torch.set_num_threads(1)
    report(measure(Case(**job["case"]), device, job["warmup"], job["repeats"], report))


# in the process of the series


def ask(job: Mapping[str, Any], heard: Report = lambda event: None) -> dict[str, Any]:
    """Returns the outcome of a job in a process of its own; of one that ends without an outcome, a row that says so with the last peaks."""
    last: dict[str, Any] = {}
    process = subprocess.Popen([sys.executable, __file__, "--child", json.dumps(job)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            last = json.loads(line)
            heard(last)
        status = process.wait()
    finally:
        process.kill()
    if "outcome" in last or "card" in last:
        return last
    hint = "; the system ends a process so that exhausts the host's memory" if status == -9 else ""
    return {"outcome": "failed", "phase": last.get("phase"), "error": f"the process ended with status {status}{hint}", "peak": last.get("peak")}


class TimeLeft:
    """The time that cases take, from those that ended and the FLOPs of those to come."""

    def __init__(self, chosen: Sequence[Case]) -> None:
        self.to_come, self.done, self.seconds = [weight(case) for case in chosen], 0.0, 0.0

    def ended(self, seconds: float) -> None:
        self.done += self.to_come.pop(0)
        self.seconds += seconds

    def __str__(self) -> str:
        return f"{self.seconds / self.done * sum(self.to_come) / 60:.0f} min left" if self.done else "time left unknown before a case ends"


def series(chosen: Sequence[Case], device: str, warmup: int, repeats: int, rows: list[dict[str, Any]], save: Callable[[], None], again: bool) -> None:
    """Measures the cases one by one and puts a row for each into `rows`, in place of an older one of the same case and card."""
    machine = ask({"device": device, "case": None})
    if "card" not in machine:
        raise RuntimeError(f"device: {device} does not answer; {machine['error']}, its own error stands above")
    key = [(machine["card"], asdict(case)) for case in chosen]
    measured = [(row["card"], row["case"]) for row in rows if row["outcome"] in SETTLED]
    left = [case for case, found in zip(chosen, key, strict=True) if again or found not in measured]
    print(f"{machine['card'] or 'CPU'}: {len(left)} cases to measure, {len(chosen) - len(left)} measured already", file=sys.stderr)
    time_left = TimeLeft(left)
    for i, case in enumerate(left, 1):
        head = f"[{i}/{len(left)}] {case.name}"

        def heard(event: Mapping[str, Any], head: str = head) -> None:
            if "outcome" not in event:
                print(f"{head}: {event['phase']}, {in_words(event['peak'])}; {time_left}", file=sys.stderr, flush=True)

        estimate = planned(case)
        start = time.monotonic()
        outcome = ask({"device": device, "case": asdict(case), "warmup": warmup, "repeats": repeats}, heard)
        if outcome["outcome"] == "measured":
            time_left.ended(time.monotonic() - start)
        else:
            time_left.to_come.pop(0)
        made = {"name": case.name, "case": asdict(case), **machine, "date": datetime.date.today().isoformat(), "warmup": warmup, "repeats": repeats}
        rows[:] = [row for row in rows if (row["card"], row["case"]) != (machine["card"], asdict(case))]
        rows.append({**made, **outcome, "planned": estimate})
        save()
        spent = f"{outcome['seconds']['median']:.3g} s an iteration" if "seconds" in outcome else outcome["error"]
        print(f"{head}: {outcome['outcome']}, {spent}, {in_words(outcome['peak'])}; {time_left}", file=sys.stderr, flush=True)


def in_words(peak: Mapping[str, int | None] | None) -> str:
    if peak is None:
        return "peak unknown"
    where = "allocated" if peak["allocated"] is not None else "resident"
    return f"peak {(peak[where] or 0) / 1e9:.1f} GB {where}"


def selected(args: argparse.Namespace) -> list[Case]:
    """Returns the cases of the arguments. Raises ValueError for a pattern that no case has, and for an attention backend that does not exist."""
    for backend in args.attention:
        Execution(attention=backend)
    known = [smallest_case()] if args.smallest else cases()
    for pattern in args.only:
        if not any(fnmatchcase(case.name, pattern) for case in known):
            raise ValueError(f"--only: no case is named {pattern!r}; allowed: names and patterns of names in --list, for example '1.3B-dmd2-*'")
    chosen = [case for case in known if not args.only or any(fnmatchcase(case.name, pattern) for pattern in args.only)]
    if args.attention:
        chosen = [replace(case, attention=backend) for case in chosen for backend in args.attention]
    return chosen


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--only", nargs="+", default=[], metavar="PATTERN", help="names of cases, with * and ?")
    made.add_argument("--list", action="store_true", help="lists the cases and runs none")
    made.add_argument("--again", action="store_true", help="measures again what was measured on this card")
    made.add_argument("--attention", nargs="+", default=[], metavar="BACKEND", help="each case with each of these backends, by diffusers' names")
    made.add_argument("--warmup", type=int, default=2, help="iterations before the measured ones")
    made.add_argument("--repeats", type=int, default=3, help="measured iterations")
    made.add_argument("--device", help="default: cuda, and cpu for the smallest case")
    made.add_argument("--out", type=Path, help=f"where rows are read from and written to; default: {RESULT.parent.name}/{RESULT.name}")
    made.add_argument("--smallest", action="store_true", help="one tiny case; it is written only with --out")
    made.add_argument("--child", help=argparse.SUPPRESS)
    return made


def main() -> None:
    args = parser().parse_args()
    if args.child:
        child(json.loads(args.child))
        return
    device = args.device or ("cpu" if args.smallest else "cuda")
    out = args.out or (None if args.smallest else RESULT)
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"] if out and out.is_file() else []
    try:
        if args.warmup < 0 or args.repeats < 1:
            raise ValueError(f"--warmup, --repeats: {args.warmup}, {args.repeats} are not allowed; 0 or more, and 1 or more")
        chosen = selected(args)
        if not args.list:
            Execution(device=device)
    except ValueError as error:
        parser().error(str(error))
    if args.list:
        for case in chosen:
            found = [f"{row['outcome']} on {row['card'] or 'a CPU'}" for row in rows if row["case"] == asdict(case)]
            print(f"{case.name}  {', '.join(found) or 'not measured'}")
        return
    series(chosen, device, args.warmup, args.repeats, rows, lambda: write_json(out, {"rows": rows}) if out else None, args.again)
    if out is None:
        print(json.dumps({"rows": rows}, indent=2))


if __name__ == "__main__":
    main()
