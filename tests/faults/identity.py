"""Kind 3: a folder holds one run, and whatever changes its result makes another one. The record is written and read as `train` does, without a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from tiny import tiny_wan_pipeline

from faults.sandbox import Fault, Outcome, call, holds, swapped
from instep.core.size import Size
from instep.data.prompt import Prompt, as_prompts
from instep.data.samples import PairSamples, RealSamples
from instep.methods.recipe import Recipe
from instep.methods.role_config import AdamWConfig
from instep.models.family import Family
from instep.models.wan import WanFamily
from instep.recipes import as_recipe
from instep.recipes.common import Common
from instep.recipes.dmd import dmd2
from instep.rewards.base import FunctionReward
from instep.training import manifest
from instep.training.execution import Execution
from instep.training.hold import parse as parse_hold
from instep.training.manifest import write_manifest
from instep.training.options import RunOptions

PROMPTS = as_prompts(["a cat", "a dog"])
SMALL = Common(steps=2, batch=2)


@cache
def family(size: tuple[int, int, int] = (48, 48, 9), model: int = 0, vae: int = 0) -> Family:
    pipe = tiny_wan_pipeline(model)
    if vae:
        with torch.no_grad():
            next(pipe.vae.parameters()).add_(1.0)
    return WanFamily(pipe, Size(*size), name="tiny")


def begin(folder: Path, **changed: Any) -> None:
    """Writes or checks the record of a run in `folder`, with some of its inputs changed."""
    given: dict[str, Any] = {
        "recipe": dmd2(SMALL, iterations=2),
        "family": family(),
        "options": RunOptions(),
        "prompts": PROMPTS,
        "reward": FunctionReward(scored("+"), "mine"),
        "real": None,
        "pairs": None,
        "teacher": None,
        "negative_prompt": None,
        "start_from": None,
        **changed,
    }
    recipe: Recipe = given["recipe"]
    write_manifest(
        folder / "run",
        recipe,
        given["family"],
        given["options"],
        given["prompts"],
        given["start_from"],
        "instep train",
        reward=given["reward"],
        real=given["real"],
        pairs=given["pairs"],
        teacher=given["teacher"],
        negative_prompt=given["negative_prompt"],
    )


def scored(sign: str, name: str = "score") -> Callable[..., Any]:
    """A user's function from a file of its own, which has two of different names."""
    place = Path.cwd() / f"reward{'' if sign == '+' else '2'}.py"
    place.write_text("".join(f"def {each}(media, prompts):\n    return {sign}media.mean((1, 2, 3, 4))\n\n\n" for each in ("score", "other")))
    return ran(place)[name]


def ran(place: Path) -> dict[str, Any]:
    """The names that a user's file defines."""
    space: dict[str, Any] = {"__name__": place.stem}
    exec(compile(place.read_text(), str(place), "exec"), space)
    return space


def own_recipe(comment: str) -> Recipe:
    """A user's recipe, whose file differs in a comment alone."""
    place = Path.cwd() / "my_recipe.py"
    place.write_text(f"from instep.recipes.dmd import dmd2\n\n\ndef mine(common):\n    return dmd2(common, iterations=2)  # {comment}\n")
    function = ran(place)["mine"]
    return as_recipe(function(SMALL), function, "my_recipe:mine")


def framed(shade: int) -> Sequence[Prompt]:
    """A prompt with a first frame in a file whose name stays."""
    from PIL import Image

    Image.new("RGB", (8, 8), (shade, 0, 0)).save("first.png")
    return [Prompt("a cat", image=Path("first.png"))]


def changed(what: Callable[[], dict[str, Any]], pattern: str, first: Callable[[], dict[str, Any]], folder: Path) -> Outcome:
    begin(folder, **first())
    (folder / "run" / "log.jsonl").write_text("")
    now = what()
    return call(lambda: begin(folder, **now), f"holds another run.*{pattern}", folder)


def same(folder: Path) -> Outcome:
    begin(folder)
    (folder / "run" / "log.jsonl").write_text("")
    begin(folder)
    return holds(lambda: True, "goes on", "")


def older(folder: Path) -> Outcome:
    """A run whose files another version wrote, in a format that this one does not go on with."""
    begin(folder)
    (folder / "run" / "log.jsonl").write_text("")
    with swapped(manifest, "FORMAT", manifest.FORMAT + 1):
        return call(lambda: begin(folder), r"holds another run.*format 1 there, 2 now.*go on with instep \d", folder)


PAIRS = PairSamples(PROMPTS, torch.zeros(2, 16, 3, 6, 6), torch.ones(2, 16, 3, 6, 6))
NOISE = RealSamples(PROMPTS, torch.zeros(2, 16, 3, 6, 6))
CHANGES: tuple[tuple[str, Callable[[], dict[str, Any]], str], ...] = (
    (
        "another function of the reward's file",
        lambda: {"reward": FunctionReward(scored("+", "other"), "mine")},
        r"reward_source\[0\] \"reward:score \w+\" there, \"reward:other \w+\" now",
    ),
    ("labelled pairs", lambda: {"pairs": PAIRS}, "pairs null there"),
    ("the teacher", lambda: {"teacher": family(model=1)}, "teacher"),
    ("size", lambda: {"family": family((48, 32, 9))}, "size.width 48 there, 32 now"),
    ("the reward's code under the same name", lambda: {"reward": FunctionReward(scored("-"), "mine")}, "reward_source"),
    ("the reward", lambda: {"reward": None}, "reward"),
    ("the VAE's weights", lambda: {"family": family(vae=1)}, "other_weights.vae"),
    ("the network's weights", lambda: {"family": family(model=1)}, "weights"),
    ("the seed", lambda: {"options": RunOptions(seed=1)}, "seed 0 there, 1 now"),
    ("the prompts", lambda: {"prompts": PROMPTS[:1]}, "prompts"),
    ("the negative prompt", lambda: {"negative_prompt": "blurry"}, 'negative_prompt null there, "blurry" now'),
    ("the number of iterations", lambda: {"recipe": dmd2(SMALL, iterations=3)}, r"config.stages\[0\].steps 2 there, 3 now.*to lengthen it.*--start-from"),
    (
        "the learning rate",
        lambda: {"recipe": dmd2(replace(SMALL, student=AdamWConfig(1.0)), iterations=2)},
        "config.roles.student.optim.lr 0.0002 there, 1.0 now",
    ),
    ("the batch", lambda: {"recipe": dmd2(replace(SMALL, batch=4), iterations=2)}, r"config.stages\[0\].batch 2 there, 4 now"),
    ("the number of steps", lambda: {"recipe": dmd2(replace(SMALL, steps=1), iterations=2)}, "levels"),
    ("the dtype", lambda: {"options": RunOptions(execution=Execution(dtype="bfloat16"))}, "its dtype: float32 there, bfloat16 now.*--dtype float32"),
    ("real samples", lambda: {"real": NOISE}, "real"),
    ("held figures", lambda: {"options": RunOptions(hold=parse_hold("diversity=0.9"))}, "hold"),
    ("the run it starts from", lambda: {"start_from": "elsewhere"}, "start_from"),
)

# what was there first, what comes then
FILES: tuple[tuple[str, Callable[[], dict[str, Any]], Callable[[], dict[str, Any]], str], ...] = (
    ("the file of a user's recipe", lambda: {"recipe": own_recipe("a")}, lambda: {"recipe": own_recipe("b")}, "recipe_source .*my_recipe:mine"),
    ("the picture in a first frame's file", lambda: {"prompts": framed(0)}, lambda: {"prompts": framed(255)}, "first_frames"),
    ("the numbers of real samples", lambda: {"real": NOISE}, lambda: {"real": RealSamples(PROMPTS, NOISE.latents + 1)}, "real"),
)

FAULTS = (
    *(
        Fault(3, f"a run goes on with another value: {what}", "refused: field, old value, new value, how to go on", partial(changed, do, found, dict))
        for what, do, found in CHANGES
    ),
    *(
        Fault(3, f"a run goes on with another content: {what}", "refused: field, old value, new value, how to go on", partial(changed, then, found, first))
        for what, first, then, found in FILES
    ),
    Fault(3, "a run goes on that an older version wrote in another format", "refused: both formats, and the version that goes on with it", older),
    Fault(3, "a run goes on with nothing changed", "it goes on", same),
)
