"""From human evaluation to a better model and back: samples -> the human-evaluation page -> pairs -> Diffusion-APO's offline stage -> win rate.

    python benchmarks/round_trip.py --work runs/round-trip      # some minutes; what is there is not repeated

No person took part. A script stands in for one: it speaks to the server of `instep human-eval` over HTTP as the page does, sees what the page shows and
nothing else, and prefers what the training classifier scores higher for the prompt, or says equal within a margin. The held-out classifier, which had no part
in that, compares the tuned model with the one it began as, on other prompts and other noise. Two controls train on the same pairs: every other one
exchanged, so that the labels say nothing, and all of them.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import re
import subprocess
import sys
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.request import HTTPCookieProcessor, Request, build_opener

import torch
from torch import Tensor

from instep.bundled import MOVING_DIGITS, load
from instep.bundled.baselines import noise_for
from instep.bundled.classifiers import ClassifierName, load_classifier
from instep.bundled.digits import full_prompts, open_prompts
from instep.bundled.worlds import VIDEO
from instep.cli.export import read_run, sampling_of, student_of
from instep.cli.main import main as instep
from instep.core.files import write_json
from instep.data.media import repeats
from instep.data.pairs import read_pairs, write_pairs
from instep.human_eval.store import Store
from instep.models.backbone import Backbone
from instep.models.role import Role

RESULTS = Path(__file__).parent / "results" / "round_trip.json"
# of log p: two samples whose scores are closer are equal to the annotator
MARGIN = 0.05
# the model is sampled as it is shown and tuned: ten steps, no guidance (with it nearly all of its samples are right, and there is little to prefer)
STEPS, GUIDANCE = 10, 1.0
# updates: the recipe's default
SHOWN, COPIES, UPDATES = 96, 6, 20
NOISE = 9876
CLASSIFIERS: tuple[ClassifierName, ...] = ("heldout", "monitor", "training")


@dataclass(frozen=True)
class Seen:
    """What the page shows of an item: the prompt and two videos [3, F, H, W] in [0, 1]."""

    prompt: str
    left: Tensor
    right: Tensor


class Page:
    """A running `instep human-eval`, asked as its page asks it."""

    def __init__(self, *args: object) -> None:
        command = [sys.executable, "-m", "instep", "human-eval", *map(str, args), "--port", "0"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        said = ""
        while said.count("http://") < 2:
            line = self.process.stdout.readline()
            if not line:
                raise RuntimeError(f"the server did not start: {said}")
            said += line
        link = re.findall(r"http://\S+", said)[0]
        self.address = link.split("/?")[0]
        self.opener = build_opener(HTTPCookieProcessor())
        self.opener.open(link).close()  # the cookie

    def ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        sent = Request(self.address + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with self.opener.open(sent) as answer:
            return json.load(answer)

    def video(self, shown: dict[str, Any]) -> Tensor:
        """A sample's frames, cut out of the sheet that the page plays: [3, F, H, W] in [0, 1], each as long as it lasts."""
        import numpy as np
        from PIL import Image

        with self.opener.open(f"{self.address}/media/{shown['id']}") as answer:
            sheet = torch.from_numpy(np.array(Image.open(io.BytesIO(answer.read())).convert("RGB")))
        h, w, across = shown["height"], shown["width"], shown["columns"]
        places = [divmod(i, across) for i in range(len(shown["durations"]))]
        frames = [sheet[row * h : (row + 1) * h, column * w : (column + 1) * w] for row, column in places]
        again = torch.tensor(repeats(shown["durations"], VIDEO.frames))
        return torch.stack(frames).repeat_interleave(again, 0)[: VIDEO.frames].permute(3, 0, 1, 2).float() / 255

    def answer(self, name: str, prefers: Callable[[Seen], str]) -> None:
        """Answers every item of an annotator of that name."""
        state = self.ask("/api/join", {"name": name})
        while (item := state["item"]) is not None:
            answer = prefers(Seen(item["prompt"], self.video(item["left"]), self.video(item["right"])))
            answers = {question["key"]: answer for question in state["questions"]}
            state = self.ask("/api/answer", {"name": name, "item": item["id"], "request": str(uuid.uuid4()), "answers": answers})

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(20)


def scripted(seen: Seen) -> str:
    """The stand-in for a person: the side that the training classifier scores higher for the prompt."""
    left, right = load_classifier("training").score(torch.stack([seen.left, seen.right]), [seen.prompt] * 2).tolist()
    return "equal" if abs(left - right) < MARGIN else "left" if left > right else "right"


def run(*args: object) -> None:
    """A command of instep, as on the command line."""
    if status := instep([str(arg) for arg in args]):
        raise RuntimeError(f"instep {args[0]} ended with {status}")


def tune(pairs: Path, out: Path, updates: int, seed: int) -> None:
    """The offline stage alone."""
    none = [part for stage in ("online", "half-online", "distill-guidance", "post-distillation") for part in (f"--{stage}", 0)]
    run(
        "train",
        "apo",
        *none,
        "--offline",
        updates,
        "--pairs",
        pairs,
        "--steps",
        STEPS,
        "--guidance",
        GUIDANCE,
        "--out",
        out,
        "--no-evaluate",
        "--seed",
        seed,
        "--threads",
        1,
        "--probe-every",
        updates,
        "--save-every",
        updates,
    )


def exchanged(pairs: Path, out: Path, every: int) -> None:
    """The pairs that say something, with chosen and rejected of every `every`th exchanged."""
    decided = [pair for pair in read_pairs(pairs) if not pair.tie]
    write_pairs(out, [pair if i % every else replace(pair, chosen=pair.rejected, rejected=pair.chosen) for i, pair in enumerate(decided)])


@torch.no_grad()
def samples(folder: Path, names: tuple[str, ...], tuned: bool) -> Tensor:
    """Media [B, 3, F, H, W] of the run's student (its average), or of the model it began as, from the same noise."""
    family, record = load(MOVING_DIGITS), read_run(folder)
    role = student_of(folder, record, family) if tuned else Role("teacher", Backbone(family, family.pretrained))
    noise, rng = noise_for(family, names, NOISE)
    parts = []
    for rows in torch.arange(len(names)).split(32):
        part = [names[i] for i in rows]
        x = sampling_of(record)(role, family.encode(part), family.unconditional(part), noise[rows], family.path, rng)
        parts.append(family.decode(x).clamp(0, 1))
    return torch.cat(parts)


def against(start: Tensor, tuned: Tensor, names: tuple[str, ...], name: ClassifierName) -> dict[str, float]:
    """Win rate (ties half) of `tuned`, sample by sample of the same noise; its standard error is over prompts, whose samples are not independent."""
    classifier = load_classifier(name)
    a, b = (classifier.score(x, names) for x in (tuned, start))
    wins = (0.5 + 0.5 * (a - b).sign()).reshape(-1, COPIES).mean(1).double()
    return {
        "win": float(wins.mean()),
        "win_se": float(wins.std() / len(wins) ** 0.5),
        "score_start": float(b.mean()),
        "score_tuned": float(a.mean()),
        "both_start": float(classifier.correct(start, names).both.float().mean()),
        "both_tuned": float(classifier.correct(tuned, names).both.float().mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/round-trip"), help="a folder for samples, store, pairs and runs")
    parser.add_argument("--shown", type=int, default=SHOWN, help="prompts that are shown; the others are for the held-out classifier")
    parser.add_argument("--updates", type=int, default=UPDATES)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    # "a digit" asks for nothing that a classifier could miss
    prompts = [name for name in dict.fromkeys(full_prompts() + open_prompts()) if name != "a digit"]
    random.Random(args.seed).shuffle(prompts)
    shown, others = prompts[: args.shown], prompts[args.shown :]

    for folder, seed in (("first", 11), ("second", 12)):
        if not (args.work / folder / "samples.json").is_file():
            run(
                "sample",
                MOVING_DIGITS,
                "--each",
                args.work / folder,
                "--out",
                args.work / f"{folder}.webp",
                "--steps",
                STEPS,
                "--guidance",
                GUIDANCE,
                "--copies",
                1,
                "--seed",
                seed,
                "--prompts",
                *shown,
            )
    store, pairs = args.work / "human_eval.sqlite", args.work / "pairs.jsonl"
    page = Page(args.work / "first", args.work / "second", "--match", "prompt", "--questions", "overall", "--out", store)
    try:
        page.answer("a script, no person", scripted)
    finally:
        page.stop()
    if not pairs.is_file():
        run("pairs", "export", store, pairs, "--questions", "overall")
    answers = Counter(vote.value for vote in Store(store).votes())
    decided = sum(not pair.tie for pair in read_pairs(pairs))
    files = {"scripted": pairs, "half exchanged": args.work / "half.jsonl", "all exchanged": args.work / "all.jsonl"}
    for every, label in ((2, "half exchanged"), (1, "all exchanged")):
        exchanged(pairs, files[label], every)

    names = tuple(name for name in others for _ in range(COPIES))
    media = {}
    for label, file in files.items():
        tune(file, args.work / file.stem, args.updates, args.seed)
        if not media:
            media["start"] = samples(args.work / file.stem, names, tuned=False)
        media[label] = samples(args.work / file.stem, names, tuned=True)
    found = {label: {name: against(media["start"], media[label], names, name) for name in CLASSIFIERS} for label in files}
    # the same pairs and updates, and nothing but the labels between them
    labels = {name: against(media["half exchanged"], media["scripted"], names, name) for name in CLASSIFIERS}
    motion = {label: float((x[:, :, 1:] - x[:, :, :-1]).abs().mean()) for label, x in media.items()}
    write_json(
        RESULTS,
        {
            "what": "answered by a script through the page's server, no person; exported, tuned by Diffusion-APO's offline stage, compared with the model "
            "before by the held-out classifier, on other prompts and other noise; controls: the same pairs with chosen and rejected of half, or all, exchanged",
            "annotator": "a script",
            "prompts_shown": len(shown),
            "answers": dict(answers),
            "pairs_decided": decided,
            "margin": MARGIN,
            "steps": STEPS,
            "guidance": GUIDANCE,
            "updates": args.updates,
            "prompts_compared": len(others),
            "copies": COPIES,
            "seed": args.seed,
            "against_start": found,
            "scripted_against_half_exchanged": labels,
            "motion": motion,
        },
    )
    for label, rows in (*found.items(), ("scripted against half exchanged", labels)):
        print(f"{label}: " + ", ".join(f"{name} {row['win']:.3f} ± {row['win_se']:.3f}" for name, row in rows.items()), flush=True)


if __name__ == "__main__":
    main()
