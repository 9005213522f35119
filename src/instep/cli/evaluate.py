"""`instep eval` and `instep report`: metrics of runs beside the teacher, naive sampling and real videos."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor

from instep.bundled import DEFAULT, NAMES, WORLDS, base_model, find, load
from instep.bundled.baselines import Baselines, noise_for
from instep.bundled.controls import shipped_control
from instep.bundled.world import Evaluation
from instep.cli import default_threads
from instep.cli.export import newest_step, read_run, sampling_of, student_of
from instep.core.files import write_json
from instep.core.numbers import check_number, check_whole
from instep.core.outputs import check_output
from instep.data.prompt import Prompt
from instep.diffusion.prediction import Denoiser
from instep.diffusion.sampling import Sampling
from instep.metrics.columns import Column
from instep.metrics.compare import Generate, Kind, Row
from instep.models.family import Family
from instep.training import checkpoint, stop
from instep.training.health import flags

Protocol = Literal["quick", "full"]
TEACHER_STEPS = (50, 4, 2, 1)
TEACHER_HELP = f"The bundled model of these rows, one that is measured ({', '.join(NAMES)})."


@dataclass(frozen=True)
class EvalArgs:
    """Measure runs. On bundled video models by each model's own protocol, into metrics.json in each folder. With --prompts any run, student or pipeline, on
    prompts of your own, by rewards, distances to given data, diversity and steadiness."""

    dirs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Folders of runs; none: the teacher and naive sampling alone. With --prompts also exported students and pipelines, or names of bundled models."""
    prompts: Path | None = None
    """Text file with one prompt a line, or JSON lines, to measure any model on."""
    reward: str | None = None
    """With --prompts: rewards as in `instep train`, for example "hpsv2, clipscore, videoalign:mq"; each is reported by itself, and
    for each model after the first how often it wins against the first, on the same prompts and seeds."""
    real: Path | None = None
    """With --prompts and --features: images or videos to compare with, as in `instep train`: Frechet distance, precision, recall."""
    real_fps: float = 16.0
    """Frames a second at which they are read."""
    features: str | None = None
    """With --prompts: clip, dinov2, or the folder of such a network, in whose features distances, diversity and consistency in time are measured."""
    classifier: str | None = None
    """With --prompts: dinov2 (of ImageNet), or the folder of an image classifier of transformers, for the Inception score."""
    copies: int = 4
    """With --prompts: samples a prompt."""
    steps: int | None = None
    """With --prompts: sampling steps; default: the student's own, and for a pipeline those that its model card gives."""
    guidance: float | None = None
    """With --prompts: classifier-free guidance; default 1 for a student, and for a pipeline that of its model card."""
    size: tuple[int, int, int] | None = None
    """With --prompts: height, width, frames; default: the size that the student was trained at."""
    device: str = "cpu"
    """With --prompts: where to sample and score, for example cuda."""
    out: Path = Path("evaluation.json")
    """With --prompts: file of rows, columns and protocol."""
    protocol: Protocol = "quick"
    """quick: 242 videos a model (240 of words); full: 612."""
    seed: int = 0
    """Seed of the noise."""
    teacher_steps: tuple[int, ...] = ()
    """More rows of the teacher, guided and not, at these numbers of steps."""
    teacher: Annotated[str, tyro.conf.arg(help=TEACHER_HELP)] = DEFAULT

    def __post_init__(self) -> None:
        check_whole("copies", self.copies, 1)
        check_whole("seed", self.seed, 0)
        check_number("real_fps", self.real_fps, 0, open_below=True)
        for steps in (*self.teacher_steps, *(() if self.steps is None else (self.steps,))):
            check_whole("steps", steps, 1)
        if self.guidance is not None:
            check_number("guidance", self.guidance, 0, what="it is a finite scale, 0 or more; 1 is none")
        if self.prompts is None and (given := next((name for name in ("reward", "real", "features", "classifier") if getattr(self, name) is not None), None)):
            raise ValueError(f"{given}: it measures samples of your own prompts; give them with --prompts FILE")


@dataclass(frozen=True)
class ReportArgs:
    """One self-contained HTML page of one or several runs."""

    dirs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of runs: first the run of interest, then its controls; runs that differ from it only in the seed are averaged with it."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("report.html")
    """The page."""
    overwrite: bool = False
    """Replace an earlier report. Any other file stays, and is named."""


def eval_command(args: EvalArgs) -> int:
    torch.set_num_threads(default_threads())
    for folder in args.dirs:
        print_rows(measure_run(folder, args.protocol, args.seed))
    if args.teacher_steps or not args.dirs:
        evaluation = evaluation_of(args.teacher)
        family = load(args.teacher)
        baselines = Baselines(family, evaluation, evaluation.prompts(args.protocol, args.seed), find(args.teacher).folder)
        pairs = [(n, w) for n in args.teacher_steps or TEACHER_STEPS for w in (family.preset.guidance, 1.0)]
        print_rows(Measured([baselines.real(), *(baselines.teacher(n, w) for n, w in pairs)], evaluation.columns, evaluation.notice))
    return 0


def measured_worlds() -> tuple[str, ...]:
    """Returns the bundled models that have an evaluation protocol."""
    return tuple(name for name in WORLDS if find(name).evaluation is not None)


def evaluation_of(name: str) -> Evaluation:
    """Returns the protocol of a bundled model. Raises ValueError for a name without one."""
    if name not in measured_worlds():
        raise ValueError(f"teacher: {name!r} is not measured; allowed: {', '.join(measured_worlds())}")
    evaluation = find(name).evaluation
    assert evaluation is not None
    return evaluation


def report_command(args: ReportArgs) -> int:
    from instep.report import is_report, write_report

    check_output("out", args.out, overwrite=args.overwrite, ours=is_report)
    for folder in args.dirs:
        read_run(folder)
    write_report(list(args.dirs), args.out)
    print(f"wrote {args.out}")
    return 0


@dataclass(frozen=True)
class Measured:
    """Rows, real videos first, the names of their metrics, and what a reader of them must know."""

    rows: list[Row]
    columns: tuple[Column, ...]
    notice: str | None = None


def measure_run(folder: Path, protocol: Protocol = "quick", seed: int = 0) -> Measured:
    """Rows of a run's student, its control, its baselines at equal NFE, the 50-step teacher and real-vs-real; also written to metrics.json.

    The control is distillation alone for as many updates, if it ships. If it does not, the student as it was after each earlier stage stands in for it.

    In that file `control` is the name of the row of distillation alone for as many updates (null: none ships), and `notice` what a reader of the metrics must
    know. `flags` holds the health flags that were open at the end, `health` all that were raised, with their first and last steps, `hacking` whether that flag
    was ever raised, and `stopped` where and why the run stopped itself (null: it did not).
    """
    record = read_run(folder)
    model, known = model_of(record, folder)
    # a student's adapter is attached to its family's network, so the teacher's rows need a separate network
    family, evaluation = load(model), evaluation_of(known)
    eval_set = evaluation.prompts(protocol, seed, record.get("negative_prompt"))
    sampling, guidance = sampling_of(record, newest_step(folder)), float(record["config"]["guidance"])

    def row_of(name: str, kind: Kind, student: Denoiser, family: Family, sampling: Sampling) -> Row:
        steps = len(sampling.levels)
        return evaluation.row(name, kind, sampler_of(student, family, sampling), eval_set, steps=steps, guidance=sampling.guidance)

    row = row_of(f"student ({record['recipe']})", "student", student_of(folder, record, family), family, sampling)
    baselines = Baselines(load(model), evaluation, eval_set, find(known).folder)
    control = shipped_control(baselines, record)
    q, before = len(sampling.levels), []
    for stage, step in [] if control else stage_ends(record)[:-1]:
        if checkpoint.at(folder / "checkpoints", step) is not None:
            earlier = student_of(folder, record, other := load(model), step=step)
            before.append(row_of(f"student after stage {stage!r}", "control", earlier, other, sampling_of(record, step)))
    pairs = [(50, guidance), (q, guidance), (q, 1.0), *([(q // 2, guidance)] if q > 1 else [])]
    rows = [row, *([control] if control else []), *before, baselines.decoded(), *(baselines.teacher(n, w) for n, w in dict.fromkeys(pairs))]
    real, health = baselines.real(), flags(folder)
    write_json(
        folder / "metrics.json",
        {
            "protocol": evaluation.protocol(eval_set),
            "columns": [column.json() for column in evaluation.columns],
            "rows": [r.json() for r in rows],
            "real_vs_real": real.json(),
            "control": control.name if control else None,
            "notice": evaluation.notice,
            "flags": [raised.flag for raised in health if raised.cleared is None],
            "health": [{"flag": r.flag, "level": r.level, "step": r.step, "cleared": r.cleared} for r in health],
            "hacking": any(raised.flag == "hacking" for raised in health),
            "stopped": asdict(stopped) if (stopped := stop.read(folder)) else None,
            "classifiers": evaluation.accuracies,
        },
    )
    return Measured([real, *rows], evaluation.columns, evaluation.notice)


def model_of(record: dict[str, Any], folder: Path) -> tuple[str, str]:
    """Returns the argument of `load` for the model of the run in `folder`, and the bundled model that it is or was tuned from; ValueError if there is none."""
    measured = measured_worlds()
    if record["model"] in measured:
        return record["model"], record["model"]
    known = base_model(Path(record["model_path"]))
    if known not in measured:
        raise ValueError(f"dir: {folder} was trained on {record['model']!r}; only {' and '.join(measured)} and exports of runs on them have classifiers")
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


def print_rows(measured: Measured) -> None:
    """Prints the table in the terminal: metric and standard error, sorted by network evaluations."""
    from rich.console import Console
    from rich.table import Table

    rows = measured.rows
    columns = {column.key: column.short for column in measured.columns if column.short and all(column.key in row.values for row in rows)}
    table = Table("model", "NFE", *columns.values())
    for row in sorted(rows, key=lambda row: (row.kind != "real", row.nfe, row.kind != "student")):
        cells = [_cell(row, key) for key in columns]
        table.add_row(row.name, str(row.nfe or "-"), *cells, style="bold" if row.kind == "student" else None)
    Console(width=None if os.environ.get("COLUMNS") else 150).print(table)
    if measured.notice:
        print(measured.notice)


def _cell(row: Row, key: str) -> str:
    value: Any = row.values[key]
    digits = 2 if abs(value.value) >= 1 else 3
    return f"{value.value:.{digits}f} ± {value.se:.{digits}f}"
