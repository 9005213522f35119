"""What tiny runs of tests draw only to look at is drawn shorter: as usual it takes most of their time, and no test looks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from instep.training import run
from instep.training.probe import PROBE_PROMPTS, Probe

STEPS = 2  # of a teacher, instead of 25 and 50
PROMPTS = 2  # of the probe
ROWS = 8  # of a teacher's samples in place of real ones


def shorten(set_attribute: Callable[[Any, str, Any], None] = setattr) -> None:
    """Shortens the probe, the report's samples, and the samples that stand in for real ones."""
    probe, drawn, instead = Probe.teacher, run.samples, run.teacher_samples

    def report(*args: Any) -> dict[str, Any]:
        return {"teacher_50" if name == f"teacher_{STEPS}" else name: rows for name, rows in drawn(*args, teacher_steps=STEPS).items()}

    set_attribute(run, "PROBE_PROMPTS", PROMPTS)
    set_attribute(Probe, "teacher", lambda self, denoiser, guidance, steps=STEPS: probe(self, denoiser, guidance, steps))
    set_attribute(run, "samples", report)
    set_attribute(run, "TEACHER_STEPS", STEPS)
    set_attribute(run, "teacher_samples", lambda *args, n, **given: instead(*args, n=min(n, ROWS), **given))


@contextmanager
def whole_probes() -> Iterator[None]:
    """For what rests on the figures of a probe: it has as many prompts as usual."""
    with mock.patch.object(run, "PROBE_PROMPTS", PROBE_PROMPTS):
        yield
