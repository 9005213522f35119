"""Kind 8: what would be a traceback; and kind 2: weights and scores that are not finite."""

from __future__ import annotations

import contextlib
import io
import json
import re
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

from faults.files import RUN, line, text
from faults.sandbox import Fault, Outcome, call, command, holds, swapped
from instep.cli import main as module
from instep.core.json_lines import read_rows
from instep.core.unusable import Unusable
from instep.export.rules import check_finite
from instep.report import write_report
from instep.training.finite import SkippedSteps, check_state, of_finite_samples
from instep.training.loop import Loop
from instep.training.step import checked_force


def ends(error: BaseException, status: int, pattern: str, folder: Path) -> Outcome:
    """A command in which `error` is raised; a traceback is saved in the sandbox."""

    def fails(args: object) -> int:
        raise error

    with swapped(module, "_recipes", fails), swapped(tempfile, "tempdir", str(folder)):
        return command(["recipes"], pattern, folder, status=status, writes=("instep-traceback-",))


def saved(folder: Path) -> Outcome:
    """The saved traceback holds the command and the error."""
    err = io.StringIO()

    def fails(args: object) -> int:
        raise ZeroDivisionError("division by zero")

    with swapped(module, "_recipes", fails), contextlib.redirect_stderr(err):
        module.main(["recipes", "--model", "m"])
    file = Path(re.search(r"its traceback is in (\S+\.txt)", err.getvalue())[1])  # type: ignore[index]
    content = file.read_text()
    file.unlink()
    return holds(
        lambda: content.startswith("instep recipes --model m") and "ZeroDivisionError: division by zero" in content,
        "command and traceback are in it",
        "it lacks them",
    )


def cached(content: str, folder: Path) -> Outcome:
    """A damaged teacher_probe.json is made anew."""
    (folder / "teacher_probe.json").write_text(content)
    there = SimpleNamespace(
        out=folder,
        recipe=SimpleNamespace(guidance=1.0, guidance_2=None),
        family=SimpleNamespace(boundary=None),
        known_teacher=lambda probe, guidance: {"diversity": 1.0},
        probe=None,
    )
    found = Loop._teacher_metrics(there)  # type: ignore[arg-type]
    return holds(lambda: found == {"diversity": 1.0} == json.loads((folder / "teacher_probe.json").read_text()), "made anew", f"read as {found}")


def torn(content: bytes, folder: Path) -> Outcome:
    (folder / "log.jsonl").write_bytes(b'{"step": 1}\n' + content)
    return holds(lambda: read_rows(folder / "log.jsonl") == [{"step": 1}], "the whole rows are read", "rows are lost or an error came")


def reported(name: str, folder: Path) -> Outcome:
    """A page of a run one of whose files is garbage names that file."""
    RUN(folder)
    (folder / "run" / name).write_bytes(b"\x00garbage{")
    write_report([folder / "run"], folder / "page.html")
    return holds(lambda: "<main>" in (folder / "page.html").read_text(), "a page is written", "no page")


class Wrong:
    """A user's force, called with a view of samples of shape [2, 4]."""

    name, on = "mine", "exit"

    def __init__(self, value: object) -> None:
        self.value = value

    def __call__(self, view: object) -> object:
        return self.value


def force(value: object, pattern: str, folder: Path) -> Outcome:
    def require(fine: torch.Tensor, error: Callable[[], Exception]) -> None:
        if not bool(fine):
            raise error()

    view = SimpleNamespace(samples=SimpleNamespace(point=lambda on: SimpleNamespace(x=torch.zeros(2, 4))), progress=0, epoch=0, require=require)
    return call(lambda: checked_force(Wrong(value), view), pattern, folder)  # type: ignore[arg-type]


def broken() -> torch.nn.Module:
    layer = torch.nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight[0, 0] = float("nan")
    return layer


def skipped(folder: Path) -> Outcome:
    found = SkippedSteps()
    for step in range(1, 11):
        found.row(step, {"grad/student/skipped": 1.0})
    return holds(lambda: "the gradient of the student was not finite in 10 iterations in a row" in str(found.too_many()), "the run ends", "it goes on")


FAULTS = (
    Fault(8, "Ctrl-C within a command", "status 130 and one line", partial(ends, KeyboardInterrupt(), 130, "^interrupted: ")),
    Fault(
        8,
        "an error that no command foresees",
        "status 70, one line, the traceback in a file",
        partial(ends, ZeroDivisionError("x"), 70, "ZeroDivisionError: x; this is unexpected: its traceback is in"),
    ),
    Fault(8, "the saved traceback", "it holds the command and the error", saved),
    Fault(8, "an error of two lines", "one line", partial(ends, ValueError("a\nb"), 2, "error: a b$")),
    Fault(8, "an OSError within a command", "one line", partial(ends, OSError(13, "Permission denied", "x"), 2, "Permission denied")),
    Fault(8, "an unusable result", "status 1 and one line", partial(ends, Unusable("run: not finite"), 1, "error: run: not finite")),
    Fault(8, "instep sample of a folder that is none", "one line", partial(line, (), "sample nowhere", "dir: 'nowhere' is neither a finished run")),
    Fault(
        8,
        "instep sample of an unknown pipeline",
        "one line, before anything is loaded",
        partial(line, (text("m/model_index.json", '{"_class_name": "X"}'),), "sample m", "model: it is a X, which no family knows"),
    ),
    *(Fault(8, f"teacher_probe.json holds {content!r}", "it is a cache and made anew", partial(cached, content)) for content in ("", "{", "[1]")),
    *(Fault(8, f"log.jsonl ends in {content!r}", "the whole rows are read", partial(torn, content)) for content in (b'{"st', b"\x00\xff\n", b"")),
    *(
        Fault(8, f"instep report of a run whose {name} is garbage", "a page is written", partial(reported, name))
        for name in ("log.jsonl", "health.jsonl", "metrics.json", "samples.safetensors")
    ),
    Fault(2, "a user's force returns None", "the force is named", partial(force, None, "force 'mine' .Wrong. returned None")),
    Fault(
        2,
        "a user's force returns another shape",
        "the force is named",
        partial(force, torch.zeros(2), r"force 'mine' .Wrong. returned a tensor of shape \(2,\)"),
    ),
    Fault(
        2,
        "a user's force returns NaN",
        "the force is named, not the learning rate",
        partial(force, torch.full((2, 4), float("nan")), "force 'mine' .Wrong. returned values that are not finite"),
    ),
    Fault(
        2,
        "NaN in the base model",
        "refused before the first step; the weight is named",
        lambda f: call(lambda: check_finite({"transformer": broken()}), "its weights transformer.weight hold values that are not finite", f),
    ),
    Fault(
        2,
        "NaN in a checkpoint's contents",
        "nothing is saved; the value is named",
        lambda f: call(lambda: check_state({"roles": {"student": {"w": torch.tensor([float("nan")])}}}), "roles/student/w hold values", f, Unusable),
    ),
    Fault(
        2,
        "samples that are not finite",
        "they are blamed, not the reward",
        lambda f: call(
            lambda: of_finite_samples(lambda x, p: x)(torch.tensor([float("inf")]), ["a"]), "the student's samples hold values that are not finite", f, Unusable
        ),
    ),  # type: ignore[misc]
    Fault(2, "ten iterations in a row without a finite gradient", "the run ends", skipped),
)
