"""A run: `train` checks its inputs, builds what the loop works on, and exports the student."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from instep.core.files import recover
from instep.core.lock import run_lock
from instep.core.ranks import Ranks, joined
from instep.data.prompt import Prompt, with_negative
from instep.data.samples import PairSamples, RealSamples
from instep.methods.recipe import Recipe
from instep.models.borrow import visiting
from instep.models.context import check_context
from instep.models.family import Family
from instep.models.preset import ModelSettings
from instep.recipes import as_recipe
from instep.rewards.base import Reward, as_reward
from instep.rewards.decoded import make_reward_fn, make_reward_grad_fn, weights_of
from instep.rewards.ranker import relative
from instep.training import hold, stop
from instep.training.batches import BatchSource
from instep.training.build import averaged, make_state
from instep.training.checks import check_inputs, check_ranks, shift_note
from instep.training.finish import check_student, export_role, fits_stock
from instep.training.finite import of_finite_samples
from instep.training.gathered import whole_student
from instep.training.inputs import as_family, as_prompt_list, as_taught, every_prompt
from instep.training.log import Tracker
from instep.training.loop import Loop
from instep.training.manifest import write_manifest
from instep.training.options import RunOptions
from instep.training.probe import PROBE_PROMPTS, KnownTeacher, Monitor, Probe, few_of
from instep.training.reward_networks import modules_in
from instep.training.state import TrainState
from instep.training.teacher_samples import teacher_samples
from instep.training.views import samples, save_samples

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from instep.models.role import Role

# steps of the teacher's own sampler where a recipe needs samples of it
TEACHER_STEPS = 50
# folder of encoded prompts within a run's
PROMPTS = "prompts"


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, roles and recipe; `student` is the exported pipeline's folder, or None if no stock pipeline can sample the student.
    `stopped` records where and why the run stopped itself, or is None. The roles of a sharded run are divided: each of them is called by all processes."""

    out: Path
    recipe: Recipe
    family: Family
    state: TrainState
    student: Path | None
    stopped: stop.Stopped | None = None


def train(
    recipe: Recipe | Callable[..., Recipe],
    family: Family | DiffusionPipeline | Path | str,
    *,
    out: Path | str,
    prompts: Iterable[Prompt | str] | Path,
    negative_prompt: str | None = None,
    reward: Reward | Callable[[Tensor, Sequence[str]], Any] | None = None,
    monitor: Monitor | None = None,
    real: RealSamples | None = None,
    pairs: PairSamples | None = None,
    start_from: Path | str | None = None,
    options: RunOptions | None = None,
    tracker: Tracker | None = None,
    known_teacher: KnownTeacher | None = None,
    command: str = "",
    teacher: Family | DiffusionPipeline | Path | str | None = None,
) -> Run:
    """Trains `recipe` on `family` and exports the student; the same call resumes an interrupted run.

    A recipe function is called with its defaults, where those that recipes share are the model's published settings (`family.preset`); a `Recipe` is taken as
    it is. A diffusers pipeline is wrapped in its family, one text is one prompt, a path is a file of prompts.
    `prompts` are texts or `Prompt` values; `negative_prompt` is used by the teacher's guidance for prompts without one of their own.
    `reward` scores media [B, 3, F, H, W] in [0, 1] for their prompts; `real` are real samples (preferred ones for
    pair recipes; a discriminator without any uses samples of the teacher, which are made once and kept with the run);
    `pairs` are labelled pairs, whose chosen samples are also used as real and preferred ones if there are no others;
    Every text is encoded once, before the first step, into `prompts` in the run's folder (or `options.prompt_cache`), and read from there.
    `start_from` is another run whose roles this one begins with; `tracker` is called with (step, scalars) for every row of the log, beside
    log.jsonl and TensorBoard; `teacher` is another model, which may be of another size, whose network is the teacher's (student and fake begin with the
    family's; latents, texts and noise levels have to be the same); `known_teacher` gives the teacher's probe metrics if they were measured before. Raises
    ValueError before training if an input does not fit or another process uses `out`, and `Interrupted` after Ctrl-C, SIGTERM or SIGUSR1, with everything
    saved. A run that stopped itself (`stop_on`) ends normally with the student of the checkpoint it went back to; the same call does not resume it. Raises
    Unusable for a run whose weights or samples are no longer finite: it keeps its newest good checkpoint and exports nothing.

    In several processes (torchrun) each calls this with the same arguments, has the whole state, and takes its share of every batch; the first one writes.
    """
    out, options = Path(out), options or RunOptions()
    with joined(options.waits, options.execution.context_parallel) as ranks, _quiet(ranks):
        options.execution.check()
        options.execution.check_shared(ranks)
        prompts = with_negative(as_prompt_list(prompts), negative_prompt)
        lent = as_family(family, options.execution.loading_dtype())
        taught = as_taught(teacher, lent, options.execution.loading_dtype())
        recipe = as_recipe(recipe, settings=ModelSettings(lent.preset, lent.shift))
        check_ranks(recipe, ranks.parts)
        for model in (lent, taught):
            if model is not None:
                check_context(model, ranks.context)
        scored = as_reward(reward) if reward is not None else None
        if real is None and pairs is not None and recipe.needs & {"real", "preferred"}:
            real = pairs.preferred
        real = real and replace(real, prompts=with_negative(real.prompts, negative_prompt))
        pairs = pairs and replace(pairs, prompts=with_negative(pairs.prompts, negative_prompt))
        device = options.execution.device_of(lent)
        if device.type != lent.device.type:
            print(f"{lent.name} is on the {lent.device.type} and trains on {device}; it stays as it is, and device={lent.device.type} trains it there")
        with visiting(modules_in(scored, monitor), device):
            sharded = options.execution.shards(recipe, lent, ranks)
            placed = options.execution.place(lent, sharded)
            check_inputs(recipe, placed, scored, real, prompts, pairs, start_from, export_to=out / "student", teacher=taught)
            if options.hold:
                hold.check(options.hold, recipe, probe_of(placed, prompts, scored, monitor, negative_prompt).figures())
        with ExitStack() as held, visiting(modules_in(scored, monitor), device):
            ranks.of_first(lambda: held.enter_context(run_lock(out)))
            ranks.of_first(
                lambda: write_manifest(
                    out,
                    recipe,
                    lent,
                    options,
                    prompts,
                    start_from,
                    command,
                    reward=scored,
                    real=real,
                    pairs=pairs,
                    negative_prompt=negative_prompt,
                    teacher=taught,
                )
            )
            if note := shift_note(recipe, lent):
                print(note)
            if not guides(recipe) and any(prompt.negative for prompt in prompts):
                print(f"negative prompts have no effect in this run: {recipe.name} has guidance 1, which ignores them")
            # before the network comes to the device: the text encoders may be the larger part of a pipeline
            texts = every_prompt(prompts, real, pairs, monitor, negative_prompt)
            with ranks.one_by_one():
                lent.encode_all(texts, Path(options.prompt_cache or out / PROMPTS), device)
            family = options.execution.place(lent, sharded)
            state = make_state(
                recipe,
                family,
                options.seed,
                of_finite_samples(make_reward_fn(family, scored)),
                of_finite_samples(make_reward_grad_fn(family, scored)),
                execution=options.execution,
                weights=weights_of(scored),
                ranks=ranks,
                teacher=taught and replace(options.execution, device=str(device)).place(taught, sharded, decodes=False),
            )
            check_student(cast("Role", state.roles["student"]))
            stored = None
            if "stored" in recipe.needs or ("real" in recipe.needs and real is None):
                with ranks.one_by_one():
                    stored = teacher_samples(
                        out,
                        family,
                        state.roles["teacher"],
                        prompts,
                        n=options.teacher_samples,
                        steps=TEACHER_STEPS,
                        guidance=recipe.guidance,
                        guidance_2=recipe.guidance_2,
                        shift=(taught or family).shift,
                        seed=options.seed,
                    )
                if real is None and "real" in recipe.needs:
                    real = RealSamples(stored.prompts, stored.latents)
                    print(f"no real samples were given: {len(stored.prompts)} samples of the teacher are used as real ones, so its errors count as real")
            elif real is not None and recipe.needs & {"real", "preferred"}:
                print(f"stages with real samples take the prompts of these ({len(real.prompts)}); the other stages and the probe those given ({len(prompts)})")
            source = BatchSource(family, prompts, real, options.seed, stored, pairs, ranks)
            probe = probe_of(family, prompts, scored, monitor, negative_prompt)
            loop = Loop(recipe, family, out, options, state, source, probe, tracker, known_teacher if taught is None else None)
            with options.execution.attending():
                loop.restore(start_from)
                loop.run()
            student = cast("Role", state.roles["student"])  # a run on a family has no other kind
            if not fits_stock(student):
                print(f"not exported: the student predicts {student.prediction_type}, which no stock pipeline of {family.name} samples; it stays in {out}")
                return Run(out, recipe, family, state, None, loop.stopped)

            fill = whole_student(state, recipe, lent, options.execution)

            def export() -> None:
                recover(out / "student")
                with averaged(state.trained["student"]):
                    exported = fill()
                    export_role(
                        exported,
                        exported.backbone.family,
                        recipe.sampling_at(state.step),
                        out / "student",
                        recipe=recipe.name,
                        seed=options.seed,
                        prompts=len(set(prompts)),
                        example=prompts[0],
                        command=command,
                        teacher=None if taught is None else taught.name,
                        overwrite=True,
                    )

            ranks.of_first(export)
            return Run(out, recipe, family, state, out / "student", loop.stopped)


@contextmanager
def _quiet(ranks: Ranks) -> Iterator[None]:
    """Nothing on the standard output, but for the first rank."""
    if ranks.first:
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield


def probe_of(family: Family, prompts: Sequence[Prompt], reward: Reward | None, monitor: Monitor | None, negative: str | None) -> Probe:
    """The probe of a run; a reward that compares samples scores none of its own."""
    scored = None if reward is None or relative(reward) else reward
    return Probe(family, few_of(prompts, PROBE_PROMPTS), reward=scored, monitor=monitor, negative=negative)


def guides(recipe: Recipe) -> bool:
    """Whether a run of the recipe uses guidance: for its teacher or student, or as guidance scales that the student learns."""
    return recipe.guidance != 1 or any(stage.guidance_scales is not None for stage in recipe.stages if stage.steps)


def final_samples(run: Run, prompts: Sequence[Prompt], seed: int = 4321) -> None:
    """Saves samples of teacher, naive teacher and student for the same prompts and noise, for the report."""
    with averaged(run.state.trained["student"]):
        save_samples(run.out, samples(run.state, run.recipe, run.family, prompts, seed), prompts, seed)
