"""What a run left on disk, read with patience: a file that is missing or damaged is a gap in the report, never a crash."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from instep.metrics.columns import Column
from instep.metrics.compare import Row

VIEW_NAMES = ("generator", "fake", "real", "force", "target")
ALIGN_NAMES = ("generator", "preferred", "align_force", "align_target", "force", "target")
# the files of views: of the matching force, and of the alignment force beside it
KINDS = {"step": VIEW_NAMES, "align": ALIGN_NAMES}


@dataclass(frozen=True)
class Samples:
    """Videos uint8 [models, prompts, F, H, W, 3] of the same prompts and noise."""

    models: tuple[str, ...]
    prompts: tuple[str, ...]
    seed: int
    videos: Tensor


@dataclass(frozen=True)
class Views:
    """What forces saw at one step: videos by name, uint8 [N, F, H, W, 3], with their prompts; the levels they looked at, and advantages within a group."""

    step: int
    prompts: tuple[str, ...]
    levels: tuple[float, ...]
    videos: dict[str, Tensor]
    advantages: tuple[float, ...] = ()


@dataclass(frozen=True)
class Metrics:
    """metrics.json: measured rows, the real-vs-real row, the classifiers' own accuracies, what the metrics are called.

    control: the name of the row that was trained as long on the same model without a reward; "" where there is none. notice: what a reader must know.
    """

    rows: tuple[Row, ...]
    real_vs_real: Row | None
    classifiers: Mapping[str, Mapping[str, float]]
    protocol: str
    columns: tuple[Column, ...] = ()
    control: str = ""
    notice: str = ""


@dataclass(frozen=True)
class RunRecord:
    """A run as far as it was recorded; None where nothing was."""

    folder: Path
    label: str
    recipe: dict[str, Any] | None
    log: list[dict[str, Any]] | None
    health: list[dict[str, Any]] | None
    metrics: Metrics | None
    samples: Samples | None
    views: tuple[Views, ...]
    align_views: tuple[Views, ...]
    problems: tuple[str, ...]

    @property
    def stages(self) -> list[tuple[str, int]]:
        """Names of the stages and their first logged step; the probe before training (step 0) is none."""
        found: list[tuple[str, int]] = []
        for row in self.log or []:
            name = str(row.get("stage", ""))
            if name and row["step"] > 0 and (not found or found[-1][0] != name):
                found.append((name, int(row["step"])))
        return found

    @property
    def iterations(self) -> int:
        """Logged iterations; the probe before training is none."""
        return sum(row["step"] > 0 for row in self.log or [])

    def total(self, key: str) -> float | None:
        """Sum of a per-iteration scalar over the log."""
        values = [row[key] for row in self.log or [] if isinstance(row.get(key), int | float)]
        return float(sum(values)) if values else None


def read_runs(folders: Sequence[Path]) -> list[RunRecord]:
    """Records of the folders, each folder once, with labels that tell them apart."""
    once = {Path(folder).resolve(): Path(folder) for folder in folders}
    records = [read_run(folder) for folder in once.values()]
    for name_of in (lambda record: record.folder.name, lambda record: str(record.folder)):  # the shorter, where it is enough
        seen = [record.label for record in records]
        labels = [f"{r.label.removesuffix(f' ({r.folder.name})')} ({name_of(r)})" if seen.count(r.label) > 1 else r.label for r in records]
        records = [replace(record, label=label) for record, label in zip(records, labels, strict=True)]
    return records


def read_run(folder: Path) -> RunRecord:
    """Everything readable in a run's folder. Raises ValueError only where there is no such folder."""
    if not folder.is_dir():
        raise ValueError(f"run_dirs: {folder} is not a folder; give folders that `instep train --out` wrote")
    problems: list[str] = []

    def attempt(path: Path, reader: Callable[[Path], Any]) -> Any:
        if not path.is_file():
            return None
        try:
            return reader(path)
        except Exception as error:  # any damage: the page says so and goes on
            problems.append(f"{path.relative_to(folder)} could not be read ({type(error).__name__}: {error})")
            return None

    recipe = attempt(folder / "recipe.json", _recipe)
    label = f"{recipe.get('recipe', folder.name)} · seed {recipe.get('seed', '?')}" if recipe else folder.name
    views: dict[str, tuple[Views, ...]] = {}
    for kind, names in KINDS.items():
        found = [attempt(file, partial(_views, names=names)) for file in sorted((folder / "views").glob(f"{kind}-*.safetensors"))]
        views[kind] = tuple(one for one in found if one is not None)
    return RunRecord(
        folder,
        label,
        recipe,
        attempt(folder / "log.jsonl", _log),
        attempt(folder / "health.jsonl", _lines),
        attempt(folder / "metrics.json", _metrics),
        attempt(folder / "samples.safetensors", _samples),
        views["step"],
        views["align"],
        tuple(problems),
    )


def _mapping(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def _recipe(path: Path) -> dict[str, Any]:
    recipe = _mapping(path)
    levels, config = recipe.get("levels") or [], recipe.get("config") or {}
    stages = (config.get("stages") or []) if isinstance(config, dict) else None
    if not isinstance(levels, list) or not all(isinstance(level, int | float) for level in levels):
        raise ValueError("levels are not a list of numbers")
    if not isinstance(stages, list) or not all(isinstance(s, dict) and isinstance(s.get("steps"), int) for s in stages):
        raise ValueError("config.stages are not a list of objects with steps")
    return recipe


def _lines(path: Path) -> list[dict[str, Any]]:
    """JSON lines up to the first that is broken: a run that was killed leaves half a line."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            break
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _log(path: Path) -> list[dict[str, Any]]:
    return [row for row in _lines(path) if isinstance(row.get("step"), int)]


def _metrics(path: Path) -> Metrics:
    found = _mapping(path)
    real_vs_real = found.get("real_vs_real")
    rows = tuple(_row(row) for row in found.get("rows") or [])
    columns = tuple(Column(**column) for column in found.get("columns") or ())
    said = {key: str(found.get(key) or "") for key in ("protocol", "control", "notice")}
    return Metrics(rows, _row(real_vs_real) if real_vs_real else None, found.get("classifiers") or {}, columns=columns, **said)


def _row(found: Mapping[str, Any]) -> Row:
    """A row of its finite metrics; one that could not be measured is a gap."""
    row = Row.of_json(found)
    finite = {key: v for key, v in row.values.items() if all(isinstance(x, int | float) and math.isfinite(x) for x in (v.value, v.se))}
    return replace(row, values=finite)


def _samples(path: Path) -> Samples:
    from safetensors.torch import load_file

    about, videos = _mapping(path.with_suffix(".json")), load_file(path)["samples"]
    models, prompts = tuple(map(str, about["models"])), tuple(map(str, about["prompts"]))
    return Samples(models, prompts, int(about["seed"]), videos.reshape(len(models), len(prompts), *videos.shape[1:]))


def _views(path: Path, names: Sequence[str]) -> Views:
    from safetensors.torch import load_file

    about, tensors = _mapping(path.with_suffix(".json")), load_file(path)
    videos = {name: tensors[name] for name in names if name in tensors}
    if not videos:
        raise ValueError("it holds none of " + ", ".join(names))
    levels, advantages = (tuple(tensors[name].tolist()) if name in tensors else () for name in ("levels", "advantages"))
    return Views(int(about.get("step", path.stem.split("-")[-1])), tuple(map(str, about["prompts"])), levels, videos, advantages)
