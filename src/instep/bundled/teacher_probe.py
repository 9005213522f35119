"""The teacher's metrics in the probes of a run, which are the same in every run on a bundled model. They ship with the package, so that a run does not have
to sample the teacher for them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from instep.bundled.baselines import hash_weights
from instep.diffusion.guidance import GuidanceByLevel
from instep.models.backbone import Backbone
from instep.models.role import Role
from instep.training.probe import TEACHER_STEPS, Probe

FILE = "teacher_probe.json"
# raise it whenever a probe gives other numbers or other keys than before
VERSION = 1


class Named(Protocol):
    """A classifier or reader: its name and its network."""

    name: str
    net: Any


def fingerprint(probe: Probe, guidance: float | GuidanceByLevel, *classifiers: Named) -> str:
    """Of what the teacher's metrics depend on: the model's weights and how it is sampled, the probe's prompts and seed, the classifiers, and `VERSION`."""
    family = probe.family
    size = [family.size.height, family.size.width, family.size.frames]
    asked: list[Any] = [VERSION, list(map(str, probe.prompts)), probe.copies, probe.seed, TEACHER_STEPS, repr(guidance), size, family.shift]
    digest = hashlib.sha256(json.dumps(asked).encode())
    for component, part in sorted(family.pipe.components.items()):
        if isinstance(part, nn.Module):
            hash_weights(digest, component, part)
    for classifier in classifiers:
        hash_weights(digest, classifier.name, classifier.net)
    return digest.hexdigest()[:16]


class Own(Protocol):
    """What of a bundled world a probe must use for the metrics that ship to be its own."""

    @property
    def family(self) -> Any: ...

    @property
    def reward(self) -> Any: ...

    @property
    def monitor(self) -> Any: ...

    @property
    def classifiers(self) -> tuple[Any, ...]: ...


def known_metrics(own: Own, folder: Path, probe: Probe, guidance: float | GuidanceByLevel) -> Mapping[str, float] | None:
    """The metrics in a folder's teacher_probe.json; None if there is no such file, if it was measured under another fingerprint, or if the probe has another
    reward, monitor or negative prompt than the world's own."""
    file = folder / FILE
    if probe.reward is not own.reward or probe.monitor is not own.monitor or probe.negative is not None or not file.is_file():
        return None
    kept = json.loads(file.read_text(encoding="utf-8"))
    return kept["metrics"] if kept["fingerprint"] == fingerprint(probe, guidance, *own.classifiers) else None


def measure(probe: Probe, guidance: float, *classifiers: Named) -> dict[str, Any]:
    """Return what a teacher_probe.json holds, measured now."""
    teacher = Role("teacher", Backbone(probe.family, probe.family.pretrained))
    metrics = probe.teacher(teacher, guidance)
    return {"fingerprint": fingerprint(probe, guidance, *classifiers), "metrics": metrics}
