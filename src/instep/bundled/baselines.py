"""Rows that never change: the teacher at some numbers of steps, and real videos. Those of the bundled models ship with the package, others are kept in the
user's cache once they were measured."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from instep.bundled.world import Evaluation
from instep.core.disk import make_room
from instep.core.files import write_json
from instep.core.json_files import read_object
from instep.data.prompt import Prompt
from instep.diffusion.sampling import sample_ode
from instep.metrics.compare import Kind, Row
from instep.models.backbone import Backbone
from instep.models.family import Family
from instep.models.role import Role

FILE = "baselines.json"
TIMES = ("seconds", "seconds_wall")  # of the machine that measured: they do not ship
KEPT = 1000  # rows in the user's cache, some 3 kB each
MANY = 20  # steps from which a teacher is no longer called naive sampling


@dataclass(frozen=True)
class Baselines:
    """The rows of one model on one set of prompts. shipped: the folder whose baselines.json may hold them; None: nowhere."""

    family: Family
    evaluation: Evaluation
    eval_set: Any
    shipped: Path | None = None

    @cached_property
    def fingerprint(self) -> str:
        """Of what a row depends on: the model's weights and how it is sampled, the prompts, the classifiers and the version of the protocol."""
        family = self.family
        digest = hashlib.sha256(self.evaluation.fingerprint(self.eval_set))
        digest.update(json.dumps([family.size.height, family.size.width, family.size.frames, family.shift]).encode())
        for part in (family.pipe.transformer, family.pipe.vae, family.pipe.text_encoder):
            hash_weights(digest, "", part)
        return digest.hexdigest()[:16]

    def teacher(self, steps: int, guidance: float) -> Row:
        """The teacher at any number of steps, guided or not."""
        kind: Kind = "teacher" if steps >= MANY else "naive"
        name = f"teacher, {steps} step{'s' * (steps > 1)}{', guided' if guidance != 1 else ''}"
        return self._kept(
            f"teacher-{steps}-{guidance:g}",
            lambda: self.evaluation.row(name, kind, self._sampler(steps, guidance), self.eval_set, steps=steps, guidance=guidance),
        )

    def real(self) -> Row:
        """Another draw of real videos."""
        return self._kept("real", lambda: self.evaluation.real_row(self.eval_set))

    def decoded(self) -> Row:
        """Real videos through the VAE: what no model that draws latents can be better than."""
        family = self.family
        return self._kept("decoded", lambda: self.evaluation.real_row(self.eval_set, lambda media: family.decode(family.encode_media(media))))

    def _sampler(self, steps: int, guidance: float) -> Callable[[Sequence[Prompt], int], Tensor]:
        family = self.family
        teacher = Role("teacher", Backbone(family, family.pretrained))

        def generate(prompts: Sequence[Prompt], seed: int) -> Tensor:
            noise, _ = noise_for(family, prompts, seed)
            cond, null = family.encode(prompts), family.unconditional(prompts)
            return family.decode(sample_ode(teacher, cond, null, noise, steps=steps, path=family.path, shift=family.shift, guidance=guidance))

        return generate

    def _kept(self, key: str, measure: Callable[[], Row]) -> Row:
        """The row that ships or was kept, if it was measured under the same fingerprint; else it is measured and kept."""
        fingerprint = self.fingerprint
        row = shipped_rows(self.shipped, fingerprint).get(key)
        if row is not None and self.evaluation.complete(row):
            return row
        file = cache_folder() / f"{fingerprint}-{key}.json"
        row = _read(file)
        if row is not None and self.evaluation.complete(row):
            return row
        row = measure()
        with contextlib.suppress(OSError):  # a cache that cannot be written costs time the next time, not the metrics
            write_json(file, row.json())
            make_room(file.parent.glob("*.json"), KEPT, lambda stat: 1)
        return row


def _read(file: Path) -> Row | None:
    """A row that was kept; None where there is none, or a damaged one, which is measured again."""
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, OSError):
        return Row.of_json(read_object(file, "INSTEP_CACHE", "remove it"))
    return None


def hash_weights(digest: hashlib._Hash, component: str, part: nn.Module) -> None:
    """Add the names and values of a network's tensors to a digest."""
    for name, value in part.state_dict().items():
        digest.update(f"{component}{name}".encode() + value.detach().cpu().numpy().tobytes())


def noise_for(family: Family, prompts: Sequence[Prompt], seed: int) -> tuple[Tensor, torch.Generator]:
    """Starting noise, the same for every model, and the generator that goes on from it."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(len(prompts), *family.latent_shape, generator=rng), rng


def cache_folder() -> Path:
    """Where rows that never change are kept: $INSTEP_CACHE, or the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "instep"
    return Path(os.environ.get("INSTEP_CACHE") or default)


def shipped_rows(folder: Path | None, fingerprint: str) -> dict[str, Row]:
    """The rows of a folder's baselines.json by their keys; none if it was measured under another fingerprint."""
    file = folder and folder / FILE
    if file is None or not file.is_file():
        return {}
    kept = json.loads(file.read_text(encoding="utf-8"))
    return {key: Row.of_json(row) for key, row in kept["rows"].items()} if kept["fingerprint"] == fingerprint else {}


def measured(baselines: Baselines, teachers: Sequence[tuple[int, float]]) -> dict[str, Any]:
    """What a baselines.json holds: the rows of real videos and of the teacher at (steps, guidance), measured now, without the seconds of this machine."""
    found = {f"teacher-{steps}-{guidance:g}": baselines.teacher(steps, guidance) for steps, guidance in teachers}
    rows = {"real": baselines.real(), "decoded": baselines.decoded()} | found
    timeless = {key: replace(row, values={k: v for k, v in row.values.items() if k not in TIMES}) for key, row in rows.items()}
    return {"fingerprint": baselines.fingerprint, "torch": torch.__version__, "rows": {key: row.json() for key, row in timeless.items()}}
