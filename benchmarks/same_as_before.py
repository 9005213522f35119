"""Whether every recipe still does what it did at an earlier commit, bit for bit: losses, gradients, weights, averages, moments of the optimisers.

    python benchmarks/same_as_before.py --before COMMIT                    # every case; exit status 1 if anything differs
    python benchmarks/same_as_before.py --before COMMIT --only lab dmdr    # cases whose name contains one of these
    python benchmarks/same_as_before.py --before COMMIT --cache ~/before   # what COMMIT does is kept there: the next time only this tree runs
    python benchmarks/same_as_before.py --list

For changes that are meant to move and rename code and nothing else. Both trees are asked through the command line alone, so that where their modules lie does
not matter: each case is one or several commands, run by the same interpreter on one thread with the tree's `src` as PYTHONPATH, first in a copy of COMMIT
(`git archive`; the repository is only read), then here. Compared are, without any tolerance:

- scalars: every value of every row of log.jsonl but times, the health findings, the figures of the laboratory, the numbers in checkpoints and in the
  configuration of exported models, and what `instep recipes` and `instep plan` print;
- updates: at each step of each optimiser of torch in the process its gradients, its parameters and its own state, as hashes (of the thousands of steps in which
  the laboratory makes the network it starts from, the first 100 and then every 25th). They are taken by a hook of torch, from outside; so runs of the
  laboratory, which keep no weights, are compared as closely as others;
- tensors: of the last checkpoint (weights, averages, moments, states of generators), the exported student, samples and views, by name where both sides have
  it, else as the multiset of what is left of a role: (dtype, shape, SHA-256). Files of sampled pictures count as tensors.

What was renamed in between is said in the three tables below, as it was and as it is.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import inspect
import itertools
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# What was renamed since COMMIT: {"as it was": "as it is"}. A key stands for itself as a whole word (letters, digits, _ and - belong to words). What
# still has its
# old name is found by it.
#
# In command lines, also in overrides of the laboratory.
RENAMED_ARGUMENTS: dict[str, str] = {
    "--no-pictures": "--no-figures",
    "--absorb": "--distill-guidance", "absorb=": "distill_guidance=",
    "--aware": "--post-distillation", "aware=": "post_distillation=",
    "--predicts": "--prediction-type", "predicts=": "prediction_type=",
    "--checkpointing": "--checkpointing on", "--no-checkpointing": "--checkpointing off",
}  # fmt: skip
# In names of scalars, stages and health flags.
RENAMED_SCALARS: dict[str, str] = {
    "ink": "mean_brightness", "ink_teacher": "mean_brightness_teacher",
    "scorer": "latent_reward",
    "anchored": "reference_stage",
    "bend": "adapt-teacher", "absorb": "distill-guidance", "aware": "post-distillation",
}  # fmt: skip
# In names of tensors, of numbers in checkpoints and of files.
RENAMED_TENSORS: dict[str, str] = {"scorer": "latent_reward"}

# scalars that are never the same twice
TIMES = ("cpu_s", "wall_s", "seconds")
# of exported models and stopped runs: a path, and sentences
WORDS = ("_name_or_path", "text", "why")
# global generators, which nothing seeds: a result that depended on one would differ from itself
UNSEEDED = ("rng/torch", "rng/numpy", "rng/python")
# updates of an optimiser that are all recorded; after these every so many
ALL, EVERY = 100, 25
# changes with what a kept result holds
FORMAT = 2
TIMEOUT = 900


@dataclass(frozen=True)
class Case:
    """Commands of `instep`, one after the other; {out} is the case's own folder, {inputs} holds prompts, pairs and rewards that both sides read.

    `forget FOLDER` among them removes the newest checkpoint of a run and its export, as an interruption would have. `printed`: what is compared of the text
    that they print.
    """

    name: str
    commands: tuple[str, ...]
    printed: str = ""


SMALL = "--seed 3 --threads 1 --save-every 100 --probe-every 100 --no-evaluate"
FEW = f"--prompts {{inputs}}/prompts.txt --steps 2 --critic-updates 2 --batch 4 {SMALL}"
MANY = f"--prompts {{inputs}}/prompts.txt --steps 3 --batch 4 {SMALL}"
PICTURED = FEW.replace("prompts.txt", "pictured.txt")
SAVED, RESUMED = SMALL.replace("--save-every 100", "--save-every 1"), "dollar --model digits --kind image --fit 1 --iterations 2"
PAIRS = "--pairs {inputs}/pairs.jsonl"
GROUP = "--group 2"


def train(name: str, line: str, options: str = FEW, *after: str) -> Case:
    """A run of the recipe in `line`, and what is done with it."""
    return Case(name, (f"train {line} --out {{out}}/run {options}", *after))


def laboratory(name: str, specs: str, options: str) -> Case:
    """Recipes in the laboratory."""
    return Case(name, (f"lab {specs} --out {{out}}/lab --seed 3 --no-pictures {options}",))


FEW_STEP_SPECS = (
    "dmd dmd2 dmd2:gan=0.03 decoupled-dmd magic dm-align-pair dm-align-group amd refl dmdr dollar:fit=2,kind=image rl-after sft-after naive-adaptive"
)
MANY_STEP_SPECS = "flow-grpo:steps=4 dance-grpo:steps=4 flow-dpo:steps=4 apo:steps=4,online=2,half_online=2,offline=2,absorb=2,aware=2"

CASES = (
    # the laboratory
    laboratory("lab all", f"{FEW_STEP_SPECS} {MANY_STEP_SPECS}", "--reward half --guidance 1.5 --steps 2 --iterations 4 --members 2"),
    laboratory(
        "lab vp",
        "dmd2 decoupled-dmd amd:tilt=2 refl:weight=0.1 dmdr:rl=dpo,beside=advantage dollar:fit=0,kind=image,predicts=x0 flow-grpo:steps=4,sde=ddpm,kl=0.1",
        "--path vp --geometry moons --reward right --iterations 4 --members 1",
    ),
    laboratory(
        "lab learned teacher",
        "dmd2:reuse=False,accumulate=2 dmd2:condition_on_exit=False magic dmdr:tilt=weight,rl=grpo,inner_epochs=2 dmdr:tilt=zscore,rl=ddpo,beside=dm "
        "dmdr:tilt=none,dyna_rs=False,dyna_dg=0 dm-align-group:sign=pull,spread=group,reach=trajectory",
        "--start far --teacher learned --geometry grid9 --reward half --guidance 1.5 --steps 2 --iterations 4 --members 1",
    ),
    laboratory(
        "lab particles",
        "dmd2 decoupled-dmd amd amd:tilt=0 naive-adaptive refl:weight=0.1",
        "--student particles --geometry rings --reward half --iterations 5",
    ),
    # videos: full copies
    train("dmd", "dmd --iterations 2 --teacher-samples 4"),
    train("dmd2", "dmd2 --distil 1 --iterations 2", FEW.replace("--probe-every 100", "--probe-every 1")),
    train(
        "dmd2 sampled",
        "dmd2 --iterations 1 --ema None",
        FEW,
        "sample {out}/run --prompts 'a two moving up slowly' --copies 2 --each {out}/sampled --out {out}/sampled.webp",
        "export {out}/run --to {out}/raw --raw --dtype float16",
    ),
    train("dmd2 gan", f"dmd2 --gan 0.01 --no-reuse --iterations 2 {PAIRS}"),
    train("decoupled-dmd", "decoupled-dmd --iterations 2"),
    train("magic", "magic --iterations 2"),
    train("dm-align-pair", f"dm-align-pair --distil 1 --iterations 2 {PAIRS}"),
    train("dm-align-group", f"dm-align-group --distil 1 --iterations 2 {GROUP} --top-n 1"),
    train("amd", f"amd --distil 1 --iterations 2 {GROUP}"),
    train("naive-adaptive", f"naive-adaptive --iterations 2 --tilt 0.5 {GROUP}"),
    train("refl", "refl --iterations 2"),
    train("dmdr", f"dmdr --warm 2 --iterations 2 {GROUP}"),
    train("dmdr grpo", f"dmdr --warm 1 --iterations 2 --tilt weight --rl grpo --kl 0.1 --inner-epochs 2 --beside advantage {GROUP}"),
    train("dollar", f"dollar --fit 1 --iterations 2 {PAIRS}"),
    train("dollar average", f"dollar --fit 0 --iterations 2 --cd-steps 1 --distance huber --target average --frames average {PAIRS}"),
    train("dollar x0", f"dollar --fit 0 --iterations 2 --predicts x0 --target teacher --kind video {PAIRS}"),
    train("rl-after", f"rl-after --distil 1 --iterations 2 --rl grpo --kl 0.1 {GROUP}"),
    train("sft-after", f"sft-after --distil 1 --iterations 2 {PAIRS}"),
    train("flow-grpo", f"flow-grpo --iterations 2 --kl 0.1 --inner-epochs 2 {GROUP}", MANY),
    train("dance-grpo", f"dance-grpo --iterations 2 {GROUP}", MANY),
    train("flow-dpo", f"flow-dpo --iterations 2 {GROUP}", MANY),
    train("apo", f"apo --online 1 --half-online 1 --offline 1 --absorb 2 --aware 1 {PAIRS}", MANY),
    # videos: adapters on one network
    train("dmd2 lora", "dmd2 --lora-rank 4 --checkpointing --iterations 3"),
    train("dmd2 gan lora", "dmd2 --gan 0.01 --lora-rank 4 --accumulate 2 --iterations 1", FEW.replace("--batch 4", "--batch 2")),
    train("magic lora", "magic --lora-rank 4 --iterations 2"),
    train(
        "dm-align-group lora",
        f"dm-align-group --lora-rank 4 --checkpointing --distil 1 --iterations 2 --top-n 1 --sign pull --spread group --reach trajectory {GROUP}",
    ),
    train("dmdr lora", f"dmdr --lora-rank 4 --warm 2 --iterations 2 --rl dpo {GROUP}"),
    train("dollar lora", f"dollar --lora-rank 4 --checkpointing --fit 1 --iterations 2 --target average {PAIRS}"),
    train("flow-grpo lora", f"flow-grpo --lora-rank 4 --checkpointing --iterations 2 --sde cps --fraction 0.5 {GROUP}", MANY),
    train(
        "apo told lora",
        f"apo --lora-rank 4 --online 0 --half-online 0 --offline 1 --absorb 2 --aware 1 --skip 0.5 --skip-blocks 2 --draw 1 4 --draw-skip 0 1 {PAIRS}",
        MANY,
        "export {out}/run --to {out}/other --guidance 2",
    ),
    # a run's life: defaults, other rewards, what begins from another run, what is interrupted, what stops itself
    train("defaults", "dm-align-group --distil 1 --iterations 1", SMALL),
    train(
        "several rewards",
        f"dmdr --warm 1 --iterations 2 --tilt none --rl dpo --no-condition-on-exit --reward compressible,0.5*rewards:brightness,0.1*dynamic-degree {GROUP}",
    ),
    Case(
        "learned reward",
        (
            "pairs fit {inputs}/pairs.jsonl {out}/liked --steps 20 --hidden 4",
            f"train refl --iterations 2 --reward preferences:{{out}}/liked --out {{out}}/run {FEW}",
        ),
    ),
    train(
        "start from",
        "dmd2 --model digits --iterations 1",
        SMALL,
        f"train rl-after --model digits --distil 0 --iterations 1 --start-from {{out}}/run --out {{out}}/second {SMALL}",
        "train apo --model digits --few-step --steps 4 --online 1 --half-online 1 --offline 1 --absorb 0 --aware 0 --start-from {out}/run --out {out}/third "
        + SMALL,
    ),
    train("resumed", RESUMED, SAVED, "forget {out}/run", f"train {RESUMED} --out {{out}}/run {SAVED}"),
    train(
        "stopped",
        f"rl-after --distil 1 --iterations 4 --student.lr 0.01 --stop-on collapse broken {GROUP}",
        FEW.replace("--probe-every 100", "--probe-every 1"),
    ),
    # class-conditional images, with everything of their own
    *(
        train(f"digits {name}", f"{line} --model digits", SMALL)
        for name, line in {
            "dmd": "dmd --iterations 2 --teacher-samples 32",
            "dmd2 gan": "dmd2 --distil 1 --iterations 2 --gan 0.01",
            "decoupled-dmd lora": "decoupled-dmd --iterations 2 --lora-rank 4 --checkpointing",
            "magic": "magic --iterations 2",
            "dm-align-pair": "dm-align-pair --distil 1 --iterations 2",
            "dm-align-group lora": "dm-align-group --distil 1 --iterations 2 --lora-rank 4",
            "amd": "amd --distil 1 --iterations 2",
            "refl": "refl --iterations 2",
            "dmdr": "dmdr --warm 2 --iterations 2 --tilt zscore --no-dyna-rs --dyna-dg 0 --rl ddpo --beside dm",
            "dollar": "dollar --fit 1 --iterations 2 --kind image",
            "rl-after": "rl-after --distil 1 --iterations 2",
            "sft-after": "sft-after --distil 1 --iterations 2",
        }.items()
    ),
    # videos that begin with a picture
    train("i2v dm-align-group", f"dm-align-group --model moving-digits-i2v --distil 1 --iterations 2 --top-n 1 {GROUP}", PICTURED),
    train("i2v dmd2 gan lora", f"dmd2 --model moving-digits-i2v --lora-rank 4 --checkpointing --gan 0.01 --iterations 2 {PAIRS}", PICTURED),
    train(
        "i2v apo",
        f"apo --model moving-digits-i2v --online 0 --half-online 1 --offline 0 --absorb 1 --aware 1 {PAIRS}",
        MANY.replace("prompts.txt", "pictured.txt"),
    ),
    # what recipes are by default, and what they would cost
    Case("recipes", ("recipes",), printed=r"^│ ([\w-]+) |\((\d+)\)"),
    Case(
        "plan",
        tuple(
            f"plan {line} --model 1.3B --on H100 --memory 80"
            for line in ("dmd2 --gan 0.01", "dollar --lora-rank 32", "apo --draw 1 4 --gpus 8 --checkpointing off")
        ),
        printed=r"│ +([\d.]+ (?:GB|MB)) │|: (\d+) iterations|: (\S+) FLOPs",
    ),
)


# the files that both sides read


def write_inputs(folder: Path) -> None:
    """Prompts, labelled pairs of moving pictures, and a reward; the same at every call."""
    import numpy as np
    from PIL import Image

    prompts = ["a seven moving left fast", "a digit standing still", "an eight", "a two moving up slowly", "a digit moving right", "a one moving down fast"]
    folder.mkdir(parents=True)
    (folder / "prompts.txt").write_text("\n".join(prompts[:4]) + "\n", encoding="utf-8")
    (folder / "pictured.txt").write_text("".join(f"{prompt} [image: train/{i}]\n" for i, prompt in enumerate(prompts[:4])), encoding="utf-8")
    (folder / "rewards.py").write_text("def brightness(media, prompts):\n    return media.mean((1, 2, 3, 4))\n", encoding="utf-8")
    rng, rows = np.random.default_rng(5), []
    for i in range(12):
        names = {}
        for kind in ("chosen", "rejected"):
            corner, step = rng.integers(6, 18, 2), rng.integers(1, 3, 2)
            frames = np.zeros((9, 48, 48, 3), np.uint8)
            for f in range(9):
                top, left = corner + f * step
                frames[f, top : top + 14, left : left + 8] = rng.integers(150, 255, (14, 8, 1))
            names[kind] = f"{i:02d}-{kind}.png"
            first, *others = map(Image.fromarray, frames)
            first.save(folder / names[kind], save_all=True, append_images=others, duration=100)
        rows.append({"prompt": prompts[i % len(prompts)], **names})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# one command in a process of its own, watched


def watch(record: Path, module: str, args: list[str]) -> None:
    """Runs `module` as the main program and writes what its optimisers did, the seconds it took and where its package lies."""
    import runpy
    from weakref import WeakKeyDictionary

    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    torch.set_num_threads(1)
    updates: list[list[Any]] = []
    known: WeakKeyDictionary[Any, list[int]] = WeakKeyDictionary()  # its number, its steps
    numbers = itertools.count()

    def digest(x: Any) -> str:
        flat = x.detach().contiguous().cpu().reshape(-1)
        return hashlib.sha256(f"{x.dtype}{tuple(x.shape)}".encode() + flat.view(torch.uint8).numpy().tobytes()).hexdigest()

    def together(tensors: Iterable[Any]) -> str:
        # sorted: in which order parameters are listed is no part of what is computed
        return hashlib.sha256("".join(sorted(map(digest, tensors))).encode()).hexdigest()[:16]

    def stepped(optimizer: Any, *_: Any) -> None:
        if optimizer not in known:
            known[optimizer] = [next(numbers), 0]
        number, step = known[optimizer]
        known[optimizer][1] += 1
        if step >= ALL and step % EVERY:
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        state = [v for p in parameters for v in optimizer.state.get(p, {}).values() if isinstance(v, torch.Tensor)]
        gradients = together(p.grad for p in parameters if p.grad is not None)
        updates.append([number, step, len(parameters), gradients, together(parameters), together(state)])

    register_optimizer_step_post_hook(stepped)
    sys.argv = [module, *args]
    status: Any = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        status = stop.code
    finally:
        package = str(Path(str(sys.modules["instep"].__file__)).resolve()) if "instep" in sys.modules else None
        record.write_text(json.dumps({"updates": updates, "cpu_s": time.process_time(), "package": package}), encoding="utf-8")
    sys.exit(status)


# a tree, and what a case does there


class Failed(Exception):
    """A command that did not do its work."""


@dataclass
class Tree:
    """A checkout, asked through its command line."""

    folder: Path
    inputs: Path
    module: str = field(init=False)

    def __post_init__(self) -> None:
        self.folder, self.inputs = self.folder.resolve(), self.inputs.resolve()
        asked = [(name, self._call(["-m", name, "--version"])) for name in ("instep", "instep.cli")]
        found = [name for name, answer in asked if answer.returncode == 0]
        if not found:
            raise Failed(f"{self.folder}: neither `python -m instep` nor `python -m instep.cli` answers: {last_line(asked[-1][1].stderr)}")
        self.module = found[0]

    def _call(self, args: list[str], cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        here = {"PYTHONPATH": str(self.folder / "src"), "PYTHONHASHSEED": "0", "INSTEP_QUIET": "1", "COLUMNS": "400", "HF_HUB_OFFLINE": "1"}
        # nothing that one side leaves in the user's cache may be found by the other
        kept = {"INSTEP_CACHE": str(cwd / "cache")} if cwd else {}
        # -P: no module beside this script or in the working directory takes another's place
        return subprocess.run(
            [sys.executable, "-P", *args], cwd=cwd, env={**os.environ, **threads, **here, **kept}, stdin=subprocess.DEVNULL, capture_output=True,
            encoding="utf-8", errors="replace", timeout=TIMEOUT,
        )  # fmt: skip

    def run(self, case: Case) -> dict[str, Any]:
        """Everything that is compared of a case, and its seconds of CPU time."""
        with tempfile.TemporaryDirectory(prefix="instep-case-") as name:
            cwd = Path(name)
            out, record = cwd / "out", cwd / "record.json"
            out.mkdir()
            shutil.copy(self.inputs / "rewards.py", cwd)
            updates: list[list[Any]] = []
            printed: dict[str, str] = {}
            seconds = 0.0
            for i, command in enumerate(case.commands):
                args = shlex.split(command)
                if args[0] == "forget":
                    forget(Path(args[1].format(out=out)))
                    continue
                answer = self._command(args, cwd, record, out)
                if answer.returncode:
                    raise Failed(f"{last_line(answer.stderr)} ({answer.returncode} from `instep {command}`)")
                seen = json.loads(record.read_text(encoding="utf-8"))
                if not Path(seen["package"]).is_relative_to(self.folder / "src"):
                    raise Failed(f"`instep {command}` ran {seen['package']}, not the package below {self.folder / 'src'}")
                updates += seen["updates"]
                seconds += seen["cpu_s"]
                if case.printed:
                    parts = re.finditer(case.printed, answer.stdout, re.MULTILINE)
                    printed |= {f"printed {i}/{n}": next(filter(None, part.groups())) for n, part in enumerate(parts)}
            found = collect(out)
        found["scalars"] |= printed
        return {**found, "updates": updates, "cpu_s": round(seconds, 1)}

    def _command(self, args: list[str], cwd: Path, record: Path, out: Path) -> subprocess.CompletedProcess[str]:
        """The command by its new names; a tree that refuses them may know it by old ones."""
        answers = []
        for spelled in spellings(args):
            placed = [arg.format(out=out, inputs=self.inputs) for arg in spelled]
            answers.append(self._call([str(Path(__file__).resolve()), "--watch", str(record), self.module, *placed], cwd))
            if answers[-1].returncode != 2:
                return answers[-1]
        return answers[0]


def spellings(args: list[str]) -> Iterator[list[str]]:
    """The arguments with everything renamed, then with less and less of it."""
    used = [old for old in RENAMED_ARGUMENTS if any(renamed(arg, {old: "\0"}) != arg for arg in args)]
    for chosen in sorted(itertools.product((True, False), repeat=len(used)), key=sum, reverse=True):
        names = {old: RENAMED_ARGUMENTS[old] for old, new in zip(used, chosen, strict=True) if new}
        yield [word for arg in args for word in (names[arg].split() if arg in names else [renamed(arg, names)])]


def renamed(text: str, names: Mapping[str, str]) -> str:
    """The text with whole words renamed."""
    for old, new in names.items():
        before, after = (r"(?<![\w-])" if old[:1].isalnum() else "", r"(?![\w-])" if old[-1:].isalnum() else "")
        text = re.sub(before + re.escape(old) + after, lambda _, new=new: new, text)
    return text


def forget(run: Path) -> None:
    """Removes the newest checkpoint of a run and its export."""
    newest = max(steps_of(run / "checkpoints"), key=step_of)
    shutil.rmtree(newest)
    shutil.rmtree(run / "student", ignore_errors=True)


def steps_of(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if re.fullmatch(r"step-\d+", path.name)]


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it said nothing")


# what a case left behind


def collect(out: Path) -> dict[str, Any]:
    """Scalars and tensors of all runs below a folder, each by a name that does not depend on where the folder lies."""
    scalars: dict[str, str] = {}
    tensors: dict[str, str] = {}
    rows = 0
    for file in sorted(path for path in out.rglob("*") if path.is_file()):
        name, parent = file.relative_to(out).as_posix(), file.parent.relative_to(out).as_posix()
        if file.name == "log.jsonl":
            for i, line in enumerate(file.read_text(encoding="utf-8").splitlines()):
                rows += 1
                scalars |= {f"{parent}/row {i}/{key}": repr(value) for key, value in json.loads(line).items() if key not in TIMES}
        elif file.name == "health.jsonl":
            findings = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
            scalars |= {f"{parent}/findings": repr(len(findings))}
            scalars |= {f"{parent}/finding {i}": f"{row['level']} {row['flag']} at step {row['step']}" for i, row in enumerate(findings)}
        elif file.name == "lab.json":
            record = json.loads(file.read_text(encoding="utf-8"))
            for i, run in enumerate(record["runs"]):
                rows += 1
                recipe = run["name"].partition(":")[0]
                scalars |= {f"{parent}/{i} {recipe}/{key}": value for key, value in leaves(run["curve"])}
            scalars |= {f"{parent}/floor/{key}": value for key, value in leaves(record.get("floor") or record["exact_samples"])}
        elif "checkpoints" in file.parts:
            # an earlier checkpoint is how a run came to its last one, whose log and updates are compared
            if file.parent != max(steps_of(file.parent.parent), key=step_of):
                continue
            name = file.parent.parent.relative_to(out).as_posix()
            if file.suffix == ".safetensors":
                tensors |= {f"{name}/{key}": value for key, value in tensors_of(file) if not key.startswith(UNSEEDED)}
            elif file.suffix == ".json":
                values = json.loads(file.read_text(encoding="utf-8")).get("values", {})
                scalars |= {f"{name}/{key}": value for key, value in leaves(values) if not key.startswith(UNSEEDED)}
        elif file.suffix == ".safetensors":
            # encoded texts lie in files whose names are drawn, and each has a name of its own
            where = parent if file.parent.name == "prompts" else name
            tensors |= {f"{where}/{key}": value for key, value in tensors_of(file)}
        elif file.name.endswith("config.json") or file.name in ("model_index.json", "stopped.json"):
            scalars |= {f"{name}/{key}": value for key, value in leaves(json.loads(file.read_text(encoding="utf-8"))) if key.split("/")[-1] not in WORDS}
        elif file.suffix in (".webp", ".png"):
            tensors[name] = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    return {"rows": rows, "scalars": scalars, "tensors": tensors}


def leaves(value: Any, at: str = "") -> Iterator[tuple[str, str]]:
    """Every value of nested JSON by its path; where a tensor stands there is none."""
    if isinstance(value, dict):
        for key, part in value.items():
            if key not in TIMES and key != "__tensor__":
                yield from leaves(part, f"{at}/{key}" if at else key)
    elif isinstance(value, list):
        for i, part in enumerate(value):
            yield from leaves(part, f"{at}/{i}" if at else str(i))
    else:
        yield at, repr(value)


def tensors_of(file: Path) -> Iterator[tuple[str, str]]:
    """Name, and dtype, shape and hash of each tensor in a safetensors file."""
    with open(file, "rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        begin = stream.tell()
        for name, tensor in header.items():
            if name != "__metadata__":
                first, end = tensor["data_offsets"]
                stream.seek(begin + first)
                content = hashlib.sha256(stream.read(end - first)).hexdigest()[:16]
                yield re.sub("[\x00-\x1f]", "/", name), f"{tensor['dtype']} {tensor['shape']} {content}"


# two sides of a case


@dataclass(frozen=True)
class Verdict:
    """What became of a case. `differences`: those of scalars, of updates and of tensors, each in the order of the run."""

    case: str
    rows: int = 0
    updates: int = 0
    scalars: int = 0
    tensors: int = 0
    moved: int = 0
    cpu_s: tuple[float, float] = (0.0, 0.0)
    differences: tuple[list[str], ...] = ()
    failed: bool = False

    @property
    def word(self) -> str:
        return "failed" if self.failed else "DIFFERENT" if self.differences else "same"


def compare(case: Case, before: Mapping[str, Any], after: Mapping[str, Any]) -> Verdict:
    """All of it, bit for bit."""
    scalars, _ = differences(before["scalars"], after["scalars"], RENAMED_SCALARS | RENAMED_TENSORS, part_of=None, values=RENAMED_SCALARS)
    tensors, moved = differences(before["tensors"], after["tensors"], RENAMED_TENSORS, part_of=role_of)
    return Verdict(
        case.name, before["rows"], len(before["updates"]), len(before["scalars"]), len(before["tensors"]), moved, (before["cpu_s"], after["cpu_s"]),
        tuple(found for found in (scalars, update_differences(before["updates"], after["updates"]), tensors) if found),
    )  # fmt: skip


def update_differences(before: list[list[Any]], after: list[list[Any]]) -> list[str]:
    """Steps of optimisers that differ, in words."""
    what = ("which optimiser", "which step", "how many parameters", "gradients", "parameters", "optimiser state")
    found = [] if len(before) == len(after) else [f"{len(before)} updates became {len(after)}"]
    for i, (old, new) in enumerate(zip(before, after, strict=False)):
        if old != new:
            kind = next(name for name, a, b in zip(what, old, new, strict=True) if a != b)
            found.append(f"update {i + 1} of {len(before)} (optimiser {old[0]}, its step {old[1]}, {old[2]} parameters): {kind}")
    return found


def role_of(name: str) -> str:
    """Within what a tensor may have got another name: a role in a part of a checkpoint, or a file."""
    if "/checkpoints/" in f"/{name}":
        head, _, rest = f"/{name}".partition("/checkpoints/")
        return f"{head}/checkpoints/{'/'.join(rest.split('/')[:2])}"
    return name.partition(".safetensors/")[0]


def differences(
    before: Mapping[str, str], after: Mapping[str, str], names: Mapping[str, str], *, part_of: Callable[[str], str] | None,
    values: Mapping[str, str] | None = None,
) -> tuple[list[str], int]:  # fmt: skip
    """What differs, in words and in the order of `before`, and how much has another name.

    A name that both sides have means the same on both, else what it is called after renaming. With `part_of` the rest of each part is compared as a multiset of
    contents; without it every name has to be there. `values`: of values that are names themselves (a stage, a flag), what they are called now.
    """
    found: list[str] = []
    lost: dict[str, str] = {}
    met = set()
    for old, value in before.items():
        new = old if old in after else renamed(old, names)
        if new not in after or new in met:
            lost[new] = value
            continue
        met.add(new)
        if after[new] not in (value, renamed(value, values or {})):
            found.append(f"{new}: {value} became {after[new]}")
    gained = {name: value for name, value in after.items() if name not in met}
    if part_of is not None:
        parts = [Counter((part_of(name), value) for name, value in side.items()) for side in (lost, gained)]
        common = parts[0] & parts[1]
        for side in (lost, gained):
            again = Counter(common)
            for name, value in list(side.items()):
                if again[part_of(name), value]:
                    again[part_of(name), value] -= 1
                    del side[name]
        moved = common.total()
    else:
        moved = 0
    found += [f"{name}: {value} is gone" for name, value in lost.items()]
    found += [f"{name}: {value} is new" for name, value in gained.items()]
    return found, moved


# the whole


class Kept:
    """Results of the tree before, by commit, case and machine; in a folder if there is one."""

    def __init__(self, folder: Path | None, commit: str, make: Callable[[], Tree]) -> None:
        self.folder, self.commit, self.make = folder, commit, make
        libraries = ("torch", "diffusers", "transformers", "peft", "numpy", "safetensors", "pillow", "scikit-learn")
        self.about = [FORMAT, commit, sys.version, processor(), *(f"{name} {version(name)}" for name in libraries)]
        self.about.append(inspect.getsource(write_inputs))

    def file(self, case: Case) -> Path | None:
        if self.folder is None:
            return None
        key = hashlib.sha256(json.dumps([*self.about, case.commands, case.printed]).encode()).hexdigest()[:16]
        return self.folder / f"{self.commit[:12]}-{case.name.replace(' ', '_')}-{key}.json"

    def result(self, case: Case) -> dict[str, Any]:
        """From the folder, or by running the case."""
        file = self.file(case)
        if file is not None and file.is_file():
            return json.loads(file.read_text(encoding="utf-8"))
        found = json.loads(json.dumps(self.make().run(case)))
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            whole = file.with_suffix(f".{os.getpid()}.tmp")
            whole.write_text(json.dumps(found), encoding="utf-8")
            os.replace(whole, file)
        return found


def version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def processor() -> str:
    """What rounding may depend on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return "; ".join([platform.machine(), *dict.fromkeys(line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "flags")))])


def git(*args: str) -> bytes:
    answer = subprocess.run(["git", "-C", str(Path(__file__).resolve().parents[1]), *args], capture_output=True)
    if answer.returncode:
        raise Failed(f"git {args[0]}: {last_line(answer.stderr.decode(errors='replace'))}")
    return answer.stdout


def unpack(commit: str, to: Path) -> Path:
    """The package as it was at `commit`; the repository and its worktrees are left as they are."""
    archive = to.with_suffix(".tar")
    archive.write_bytes(git("archive", "--format=tar", commit, "src"))
    with tarfile.open(archive) as file:
        file.extractall(to, filter="data")
    archive.unlink()
    return to


def head() -> str:
    return f"{'case':<22}{'rows':>5}{'updates':>8}{'scalars':>8}{'tensors':>8}{'moved':>6}{'CPU s':>14}  verdict"


def row(verdict: Verdict) -> str:
    seconds = f"{verdict.cpu_s[0]:.0f} / {verdict.cpu_s[1]:.0f}"
    line = f"{verdict.case:<22}{verdict.rows:>5}{verdict.updates:>8}{verdict.scalars:>8}{verdict.tensors:>8}{verdict.moved:>6}{seconds:>14}  {verdict.word}"
    return "\n".join([line, *(f"    {found[0][:300]}" + (f" (and {len(found) - 1} more)" if len(found) > 1 else "") for found in verdict.differences)])


def main() -> int:
    if sys.argv[1:2] == ["--watch"]:
        watch(Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", metavar="COMMIT", help="what this tree is compared with")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="cases whose name contains one of these")
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="folder that keeps what COMMIT does")
    parser.add_argument("--tree", type=Path, metavar="DIR", default=Path(__file__).resolve().parents[1], help="another checkout in place of this one")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the table as JSON, with every difference")
    parser.add_argument("--list", action="store_true", help="print the cases and their commands")
    options = parser.parse_args()
    cases = [case for case in CASES if not options.only or any(part in case.name for part in options.only)]
    if options.list:
        print("\n".join(f"{case.name}\n" + "\n".join(f"    instep {command}" for command in case.commands) for case in cases))
        return 0
    if options.before is None or not cases:
        parser.error("--before COMMIT is needed" if options.before is None else f"--only {' '.join(options.only)}: there is no such case; --list shows them")
    try:
        return check(cases, options)
    except Failed as failed:
        print(f"error: {str(failed)}", file=sys.stderr)
        return 2


def check(cases: list[Case], options: argparse.Namespace) -> int:
    """Runs and compares the cases; 1 if any differs."""
    commit = git("rev-parse", "--verify", f"{options.before}^{{commit}}").decode().strip()
    with tempfile.TemporaryDirectory(prefix="instep-before-") as name:
        work = Path(name)
        write_inputs(work / "inputs")
        now = Tree(options.tree, work / "inputs")
        old: list[Tree] = []

        def before() -> Tree:
            if not old:
                old.append(Tree(unpack(commit, work / "before"), work / "inputs"))
            return old[0]

        kept = Kept(options.cache, commit, before)
        if any((file := kept.file(case)) is None or not file.is_file() for case in cases):
            before()  # here, where no other thread makes it too

        def one(case: Case) -> Verdict:
            try:
                return compare(case, kept.result(case), json.loads(json.dumps(now.run(case))))
            except Failed as failed:
                return Verdict(case.name, differences=([str(failed)],), failed=True)
            except subprocess.TimeoutExpired:
                return Verdict(case.name, differences=([f"a command took more than {TIMEOUT} s"],), failed=True)

        verdicts: list[Verdict] = []
        print(f"before: {commit[:12]}, after: {now.folder}\n{head()}", flush=True)
        with ThreadPoolExecutor(options.jobs) as pool:
            for verdict in pool.map(one, cases):
                verdicts.append(verdict)
                print(row(verdict), flush=True)
    wrong = [verdict for verdict in verdicts if verdict.word != "same"]
    print(f"{len(verdicts) - len(wrong)} of {len(verdicts)} cases are the same, bit for bit")
    if options.out:
        table = [{**vars(verdict), "verdict": verdict.word} for verdict in verdicts]
        options.out.write_text(json.dumps({"before": commit, "renamed": renames(), "cases": table}, indent=1) + "\n", encoding="utf-8")
    return 1 if wrong else 0


def renames() -> dict[str, dict[str, str]]:
    return {"arguments": RENAMED_ARGUMENTS, "scalars": RENAMED_SCALARS, "tensors": RENAMED_TENSORS}


if __name__ == "__main__":
    sys.exit(main())
