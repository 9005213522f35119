"""The rows of the bundled video models that never change: real videos, and the teacher at some numbers of steps; and the teacher's metrics in the probes of
a run. They ship with the package.

    python benchmarks/baselines.py                     # measures anew and writes bundled/assets/MODEL/*.json of every measured model
    python benchmarks/baselines.py moving-digits       # of one
    python benchmarks/baselines.py --control RUN...    # instead the control of a model: finished runs of dmd2 that differ in their seed alone

`instep eval` and the end of a run take these rows as long as their fingerprint fits: weights, sampler, prompts, classifiers and version of the protocol. The
seconds a video of the machine that measured are left out.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from instep.bundled import controls, find, load, settings_of, teacher_probe
from instep.bundled.baselines import FILE, Baselines, measured
from instep.cli.evaluate import evaluation_of, measure_run, measured_worlds
from instep.cli.export import read_run
from instep.core.files import write_json
from instep.recipes.common import Common
from instep.recipes.defaults import with_settings
from instep.training.probe import PROBE_PROMPTS, Probe, few_of

# what runs of 4, 2 and 1 steps are compared with, and what `instep eval` shows without a run
STEPS = (50, 4, 2, 1)


def write_baselines(name: str) -> None:
    """Measures a model's baselines and its teacher's probe anew."""
    evaluation, family = evaluation_of(name), load(name)
    require(evaluation.notice)
    taught = with_settings(Common(), settings_of(name)).guidance
    teachers = [(steps, guidance) for steps in STEPS for guidance in dict.fromkeys((family.preset.guidance, taught, 1.0))]
    rows = measured(Baselines(family, evaluation, evaluation.prompts("quick", 0)), teachers)
    write_json(find(name).folder / FILE, rows)
    print(f"wrote {find(name).folder / FILE}: {len(rows['rows'])} rows")
    own: Any = find(name).ready()
    probe = Probe(own.family, few_of(own.prompts, PROBE_PROMPTS), reward=own.reward, monitor=own.monitor)
    write_json(find(name).folder / teacher_probe.FILE, teacher_probe.measure(probe, taught, *own.classifiers))
    print(f"wrote {find(name).folder / teacher_probe.FILE}")


def write_control(runs: Sequence[Path]) -> None:
    """Measures finished runs of distillation alone and writes their mean as the control of their model."""
    records, rows = [read_run(folder) for folder in runs], []
    name = records[0]["model"]
    require(evaluation_of(name).notice)
    for folder in runs:
        rows.append(next(row for row in measure_run(folder).rows if row.kind == "student"))
    evaluation = evaluation_of(name)
    baselines = Baselines(load(name), evaluation, evaluation.prompts("quick", 0), find(name).folder)
    write_json(find(name).folder / controls.FILE, controls.control_file(baselines, records, rows))
    print(f"wrote {find(name).folder / controls.FILE}")


def require(notice: str | None) -> None:
    """ValueError where the held-out judge is not there: rows that ship have its metrics."""
    if notice:
        raise ValueError(notice)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=measured_worlds(), help=f"default: {', '.join(measured_worlds())}")
    parser.add_argument("--control", nargs="+", type=Path, metavar="RUN", help="runs of a model's control; nothing else is measured then")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or 2))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as empty:
        os.environ["INSTEP_CACHE"] = empty
        if args.control:
            write_control(args.control)
            return
        for name in args.models:
            write_baselines(name)


if __name__ == "__main__":
    main()
