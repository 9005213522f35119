"""`instep eval` and `instep report`: metrics of runs beside the teacher, naive sampling and real videos."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor

from instep.bundled.classifiers import Classifier, load_classifier
from instep.cli import default_threads
from instep.cli.export import newest_step, read_run, sampling_of, student_of
from instep.core.files import write_json
from instep.data.prompt import Prompt
from instep.diffusion.prediction import Denoiser
from instep.diffusion.sampling import Sampling, sample_ode
from instep.metrics.compare import EvalSet, Generate, Row, evaluate, evaluation_set, real_vs_real_row
from instep.models import MOVING_DIGITS, MOVING_DIGITS_I2V, bundled, load
from instep.models.backbone import Backbone
from instep.models.family import Family
from instep.models.role import Role
from instep.training import checkpoint, stop
from instep.training.health import flags

Protocol = Literal["quick", "full"]
MEASURED = (MOVING_DIGITS, MOVING_DIGITS_I2V)
CLASSIFIERS: dict[str, Literal["training", "monitor", "heldout"]] = {"train": "training", "monitor": "monitor", "heldout": "heldout"}


@dataclass(frozen=True)
class EvalArgs:
    """Measure the students of runs on the moving-digits protocol, also from a first frame; writes metrics.json into each."""

    dirs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Folders of runs; none: the teacher and naive sampling alone."""
    protocol: Protocol = "quick"
    """quick: 242 videos a model; full: 612."""
    seed: int = 0
    """Seed of the noise."""
    teacher_steps: tuple[int, ...] = ()
    """More rows of the teacher, guided and not, at these numbers of steps."""
    teacher: Literal["moving-digits", "moving-digits-i2v"] = "moving-digits"
    """The model of these rows."""


@dataclass(frozen=True)
class ReportArgs:
    """One self-contained HTML page of one or several runs."""

    dirs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of runs."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("report.html")
    """The page; an earlier report is replaced."""


def eval_command(args: EvalArgs) -> int:
    torch.set_num_threads(default_threads())
    for folder in args.dirs:
        print_rows(measure_run(folder, args.protocol, args.seed))
    if args.teacher_steps or not args.dirs:
        family, classifiers = load(args.teacher), load_classifiers()
        eval_set = evaluation_set(args.protocol, args.seed, image_to_video=args.teacher == MOVING_DIGITS_I2V)
        steps = args.teacher_steps or (50, 4, 2, 1)
        rows = [baseline(family, classifiers, eval_set, n, w) for n in steps for w in (3.0, 1.0)]
        print_rows([real_vs_real_row(eval_set, classifiers), *rows])
    return 0


def report_command(args: ReportArgs) -> int:
    from instep.report import write_report

    for folder in args.dirs:
        read_run(folder)
    write_report(list(args.dirs), args.out)
    print(f"wrote {args.out}")
    return 0


def load_classifiers() -> dict[str, Classifier]:
    return {short: load_classifier(name) for short, name in CLASSIFIERS.items()}


def measure_run(folder: Path, protocol: Protocol = "quick", seed: int = 0) -> list[Row]:
    """Rows of a run's student, its baselines at equal NFE, the 50-step teacher and real-vs-real; also written to metrics.json.

    There `flags` are the health flags open at the end, `health` all that were raised and from which step to which, `hacking` whether that one ever was,
    `stopped` where and why the run stopped itself (null: it did not).
    """
    record = read_run(folder)
    model, known = model_of(record, folder)
    # a student with an adapter puts it into its family's network: the teacher's rows are those of a network of their own
    family, plain, classifiers = load(model), load(model), load_classifiers()
    eval_set = evaluation_set(protocol, seed, image_to_video=known == MOVING_DIGITS_I2V, negative=record.get("negative_prompt"))
    sampling, guidance = sampling_of(record, newest_step(folder)), float(record["config"]["guidance"])
    levels = sampling.levels
    student = student_of(folder, record, family)
    name = f"student ({record['recipe']})"
    row = evaluate(name, "student", sampler_of(student, family, sampling), eval_set, classifiers, steps=len(levels), guidance=sampling.guidance)
    q, before = len(levels), []
    for stage, step in stage_ends(record)[:-1]:
        if checkpoint.at(folder / "checkpoints", step) is not None:
            then = sampling_of(record, step)
            earlier = sampler_of(student_of(folder, record, other := load(model), step=step), other, then)
            before.append(evaluate(f"student after stage {stage!r}", "control", earlier, eval_set, classifiers, steps=q, guidance=then.guidance))
    pairs = [(50, guidance), (q, guidance), (q, 1.0), *([(q // 2, guidance)] if q > 1 else [])]
    decoded = real_vs_real_row(eval_set, classifiers, through=lambda media: family.decode(family.encode_media(media)))
    rows = [row, *before, decoded, *(baseline(plain, classifiers, eval_set, n, w) for n, w in dict.fromkeys(pairs))]
    real, health = real_vs_real_row(eval_set, classifiers), flags(folder)
    write_json(
        folder / "metrics.json",
        {
            "protocol": f"{protocol}{', from a first frame' * eval_set.image_to_video}",
            "rows": [r.json() for r in rows],
            "real_vs_real": real.json(),
            "flags": [raised.flag for raised in health if raised.cleared is None],
            "health": [{"flag": r.flag, "level": r.level, "step": r.step, "cleared": r.cleared} for r in health],
            "hacking": any(raised.flag == "hacking" for raised in health),
            "stopped": asdict(stopped) if (stopped := stop.read(folder)) else None,
            "classifiers": {short: classifier.accuracy for short, classifier in classifiers.items()},
        },
    )
    return [real, *rows]


def model_of(record: dict[str, Any], folder: Path) -> tuple[str, str]:
    """What `load` takes for the model of the run in `folder`, and which of `MEASURED` it is or was tuned from; ValueError if it is none of them."""
    if record["model"] in MEASURED:
        return record["model"], record["model"]
    file = Path(record["model_path"]) / "instep_export.json"
    known = json.loads(file.read_text(encoding="utf-8"))["info"]["base_model"] if file.is_file() else None
    if known not in MEASURED:
        raise ValueError(f"dir: {folder} was trained on {record['model']!r}; the classifiers know {' and '.join(MEASURED)} alone, and exports of runs on them")
    return record["model_path"], known


def stage_ends(record: dict[str, Any]) -> list[tuple[str, int]]:
    """Name of each stage of a run that has steps, and the step at which it is complete."""
    ends, total = [], 0
    for stage in record["config"]["stages"]:
        total += stage["steps"]
        if stage["steps"]:
            ends.append((stage["name"], total))
    return ends


def sampler_of(student: Denoiser, family: Family, sampling: Sampling) -> Generate:
    """The student's own sampler as a generator of unclamped media."""

    def generate(prompts: Sequence[Prompt], seed: int) -> Tensor:
        noise, rng = noise_for(family, prompts, seed)
        return family.decode(sampling(student, family.encode(prompts), family.unconditional(prompts), noise, family.path, rng))

    return generate


def noise_for(family: Family, prompts: Sequence[Prompt], seed: int) -> tuple[Tensor, torch.Generator]:
    """Starting noise, the same for every model, and the generator that goes on from it."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(len(prompts), *family.latent_shape, generator=rng), rng


def baseline(family: Family, classifiers: dict[str, Classifier], eval_set: EvalSet, steps: int, guidance: float) -> Row:
    """The teacher at any number of steps, guided or not; kept in the user's cache, because it never changes."""
    file = cache_folder() / f"{fingerprint(eval_set, family)}-teacher-{steps}-{guidance:g}.json"
    if file.is_file():
        return Row.of_json(json.loads(file.read_text(encoding="utf-8")))
    teacher = Role("teacher", Backbone(family, family.pretrained))

    def generate(prompts: Sequence[Prompt], seed: int) -> Tensor:
        noise, _ = noise_for(family, prompts, seed)
        x = sample_ode(
            teacher, family.encode(prompts), family.unconditional(prompts), noise, steps=steps, path=family.path, shift=family.shift, guidance=guidance
        )
        return family.decode(x)

    kind: Literal["teacher", "naive"] = "teacher" if steps >= 20 else "naive"
    name = f"teacher, {steps} step{'s' * (steps > 1)}{', guided' if guidance != 1 else ''}"
    row = evaluate(name, kind, generate, eval_set, classifiers, steps=steps, guidance=guidance)
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time the next time, not the metrics
        write_json(file, row.json())
    return row


def cache_folder() -> Path:
    """Where rows that never change are kept: $INSTEP_CACHE, or the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "instep"
    return Path(os.environ.get("INSTEP_CACHE") or default)


def fingerprint(eval_set: EvalSet, family: Family) -> str:
    """Of the model's weights, the classifiers, the measuring code and the protocol: what a cached row depends on."""
    digest = hashlib.sha256(f"{eval_set.name}{eval_set.seed}{'image_to_video' * eval_set.image_to_video}{eval_set.negative or ''}".encode())
    for part in (family.pipe.transformer, family.pipe.vae, family.pipe.text_encoder):
        for name, p in part.state_dict().items():
            digest.update(name.encode() + p.detach().cpu().numpy().tobytes())
    for path in sorted((bundled(MOVING_DIGITS) / "classifiers").rglob("*.safetensors")):
        digest.update(path.read_bytes())
    from instep.metrics import compare
    from instep.metrics import figures as metrics

    for module in (compare, metrics):
        digest.update(Path(str(module.__file__)).read_bytes())
    return digest.hexdigest()[:16]


COLUMNS = {
    "heldout_both": "both (held-out)",
    "train_both": "both (training)",
    "fd": "FD",
    "fd_open": "FD open",
    "modes_motion": "motions of 9",
    "modes_digit": "digits of 10",
    "mean_brightness": "mean brightness",
    "wobble": "wobble",
    "first_frame": "first frame",
}


def print_rows(rows: Sequence[Row]) -> None:
    """The table in the terminal: metric and standard error, sorted by network evaluations."""
    from rich.console import Console
    from rich.table import Table

    columns = {key: head for key, head in COLUMNS.items() if all(key in row.values for row in rows)}
    table = Table("model", "NFE", *columns.values())
    for row in sorted(rows, key=lambda row: (row.kind != "real", row.nfe, row.kind != "student")):
        cells = [_cell(row, key) for key in columns]
        table.add_row(row.name, str(row.nfe or "-"), *cells, style="bold" if row.kind == "student" else None)
    Console(width=None if os.environ.get("COLUMNS") else 150).print(table)


def _cell(row: Row, key: str) -> str:
    value: Any = row.values[key]
    digits = 2 if abs(value.value) >= 1 else 3
    return f"{value.value:.{digits}f} ± {value.se:.{digits}f}"
