"""Diffusion-APO: preferences at the levels that sampling visits, over five stages (Zhu et al. 2026, Section 3.3)."""

from __future__ import annotations

from instep.diffusion.guidance_scales import GuidanceRange
from instep.diffusion.level_windows import SHIFTS, HighLow, Repeated
from instep.diffusion.levels import LevelSampler, OneOf, Uniform
from instep.diffusion.transitions import Deterministic
from instep.methods.guidance_distillation import GuidanceDistillation
from instep.methods.preference import PairSource, Preference
from instep.methods.recipe import Recipe, RolloutConfig, Stage
from instep.methods.role_config import AdamWConfig
from instep.methods.term import Objective
from instep.recipes.many_step import ManySteps


def apo(
    common: ManySteps = ManySteps(),
    *,
    online: int = 20,
    half_online: int = 20,
    offline: int = 20,
    distill_guidance: int = 600,
    distill_guidance_optim: AdamWConfig = AdamWConfig(3e-4, betas=(0.9, 0.999), decay=0.5),
    post_distillation: int = 15,
    beta: float = 500.0,
    high: int = 4,
    low: int = 1,
    random_shift: bool = True,
    offset: float = 5.0,
    uniform: int = 0,
    positive: float = 0.6,
    skip: float = 0.0,
    skip_blocks: tuple[int, ...] = (),
    draw: tuple[float, float] | None = None,
    draw_skip: tuple[float, float] | None = None,
    few_step: bool = False,
) -> Recipe:
    """Align a model with preferences at the levels its sampler visits, in five stages: Diffusion-APO; no distillation of steps.

    Each stage compares the student with its state at the beginning of the stage; 0 steps leave a stage out. The many-step model is the student: it is
    sampled with guidance until the fourth stage has distilled the guidance into its weights, and without afterwards. Labelled pairs come from --pairs; the
    bundled models have their own.

    Args:
        common: options of recipes that train the many-step model.
        online: updates on pairs of the model's own samples, ranked by the reward.
        half_online: updates on a labelled sample against one of the model's own.
        offline: updates on labelled pairs.
        distill_guidance: updates of guidance distillation: one pass learns the guided prediction of two (with skip-layer guidance, three).
        distill_guidance_optim: AdamW of the model in that stage; that stage regresses on a target and needs larger steps than preferences do.
        post_distillation: updates on labelled pairs after guidance distillation, of the model that needs no guidance.
        beta: temperature.
        high: levels of a window from [0.8, 1]; gradients of a window are summed.
        low: levels of a window from [0, 0.8).
        random_shift: draw the timestep shift of the visited levels from 3, 4, 5, 6; else the model's own.
        offset: deviation of the Gaussian offset from visited levels, in training steps of 1,000; 0 leaves it out.
        uniform: number of levels drawn uniformly in place of the window; 1 is the baseline, Diffusion-DPO.
        positive: share of labelled samples in the second stage that are chosen ones; 1 needs no rejected ones.
        skip: scale of skip-layer guidance in the fourth stage.
        skip_blocks: blocks of the network that its weaker pass leaves out, from 0.
        draw: lowest and highest guidance of the fourth stage. A scale is drawn for every sample and the student is conditioned on it, so one model
            serves the whole range; it is sampled, aligned further and exported at `guidance` (`instep export --guidance` folds in another scale).
            None: `guidance` alone.
        draw_skip: the same for `skip`.
        few_step: the student is a few-step model (--start-from its run, with its --steps and --shift), sampled and compared at its own levels.
    """
    if few_step and distill_guidance:
        raise ValueError(f"distill_guidance: {distill_guidance} is not allowed with few_step; a few-step student has no guidance to distil, give it 0")
    guidance_range = None
    if draw is not None or draw_skip is not None:
        if few_step or not (distill_guidance or post_distillation):
            raise ValueError(
                "draw: guidance scales are drawn in the stage distill-guidance, which this run does not have; give it steps, or leave draw(_skip) out"
            )
        guidance_range = GuidanceRange(draw or (common.guidance, common.guidance), draw_skip or (skip, skip))
        guidance_range.check((common.guidance, skip))
    if post_distillation and not (few_step or distill_guidance) and online + half_online + offline:
        raise ValueError(
            f"post_distillation: {post_distillation} is not allowed here: that stage trains a model that needs no guidance, and with distill_guidance 0 none "
            "has put it into the weights; give distill_guidance steps, or leave both out"
        )
    levels: LevelSampler = HighLow(common.steps, SHIFTS if random_shift else (common.shift,), offset, high, low)
    if few_step or uniform:
        levels = Repeated(OneOf(common.levels) if few_step else Uniform(low=0.001, high=1.0), max(uniform, 1))

    def stage(
        name: str,
        steps: int,
        term: Objective,
        *,
        guidance_in_weights: bool = False,
        group: int = 1,
        rolls: bool = False,
        optim: AdamWConfig | None = None,
    ) -> Stage:
        # a pair is two samples, whatever their source
        batch = common.batch if group > 1 else max(1, common.batch // 2)
        rollout = RolloutConfig(common.levels) if few_step else RolloutConfig(common.levels, transition=Deterministic(), guidance=common.guidance)
        return Stage(
            name,
            steps,
            batch,
            (term,),
            (),
            rollout if rolls else None,
            group=group,
            accumulate=common.accumulate,
            guided=not guidance_in_weights,
            fresh=True,
            guidance_scales=(common.guidance, skip) if guidance_in_weights and guidance_range else None,
            optim=optim,
        )

    def prefer(pairs: PairSource) -> Preference:
        return Preference(beta=beta, levels=levels, pairs=pairs, positive=positive)

    distilled: tuple[Stage, ...] = ()
    if distill_guidance:
        noised = Uniform(low=0.001, high=1.0, shift=common.shift)
        target = GuidanceDistillation(guidance=common.guidance, skip_scale=skip, blocks=skip_blocks, levels=noised, draw=guidance_range)
        distilled = (stage("distill-guidance", distill_guidance, target, guidance_in_weights=True, optim=distill_guidance_optim),)
    return common.stages(
        "apo",
        stage("online", online, prefer("online"), group=2, rolls=True),
        stage("half-online", half_online, prefer("half-online"), rolls=True),
        stage("offline", offline, prefer("offline")),
        *distilled,
        stage("post-distillation", post_distillation, prefer("offline"), guidance_in_weights=True),
        sampler="few-step" if few_step else "ode",
        guidance_range=guidance_range,
    )
