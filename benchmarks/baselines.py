"""The rows of the bundled video models that never change: real videos, and the teacher at some numbers of steps; and the teacher's metrics in the probes of
a run. They ship with the package.

    python benchmarks/baselines.py                     # measures anew and writes bundled/assets/MODEL/*.json of every measured model
    python benchmarks/baselines.py moving-digits       # of one

`instep eval` and the end of a run take these rows as long as their fingerprint fits: weights, sampler, prompts, classifiers and version of the protocol. The
seconds a video of the machine that measured are left out.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from typing import Any

import torch

from instep.bundled import find, load, teacher_probe
from instep.bundled.baselines import FILE, Baselines, measured
from instep.cli.evaluate import evaluation_of, measured_worlds
from instep.core.files import write_json
from instep.recipes.common import Common
from instep.training.probe import PROBE_PROMPTS, Probe, few_of

# (steps, guidance): what runs of 4, 2 and 1 steps are compared with, and what `instep eval` shows without a run
TEACHERS = ((50, 3.0), (50, 1.0), (4, 3.0), (4, 1.0), (2, 3.0), (2, 1.0), (1, 3.0), (1, 1.0))

# of every recipe by default
GUIDANCE = Common().guidance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=measured_worlds(), help=f"default: {', '.join(measured_worlds())}")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or 2))
    for name in parser.parse_args().models:
        with tempfile.TemporaryDirectory() as empty:
            os.environ["INSTEP_CACHE"] = empty
            evaluation = evaluation_of(name)
            rows = measured(Baselines(load(name), evaluation, evaluation.prompts("quick", 0)), TEACHERS)
        write_json(find(name).folder / FILE, rows)
        print(f"wrote {find(name).folder / FILE}: {len(rows['rows'])} rows")
        own: Any = find(name).ready()
        probe = Probe(own.family, few_of(own.prompts, PROBE_PROMPTS), reward=own.reward, monitor=own.monitor)
        write_json(find(name).folder / teacher_probe.FILE, teacher_probe.measure(probe, GUIDANCE, own.reward, own.monitor.classifier))
        print(f"wrote {find(name).folder / teacher_probe.FILE}")


if __name__ == "__main__":
    main()
