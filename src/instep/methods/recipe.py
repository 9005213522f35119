"""A recipe: its stages, and each stage's forces, objectives and critics; its roles are in `role_config.py`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from instep.core.numbers import check_number
from instep.diffusion.guidance_scales import GuidanceScales
from instep.diffusion.levels import check_levels
from instep.diffusion.rollout import Where
from instep.diffusion.sampling import Sampling
from instep.diffusion.transitions import Deterministic, Renoise, Transition
from instep.methods.guidance_distillation import GuidanceDistillation
from instep.methods.matching import DistributionMatching
from instep.methods.role_config import AdamWConfig, LatentRewardConfig, RoleConfig
from instep.methods.term import Critic, Force, Need, Objective, Term


@dataclass(frozen=True)
class RolloutConfig:
    """The student's own rollout. `through`: the number of its last steps that the graph of a final sample reaches.

    A few-step student goes from level to level by `Renoise` and without guidance; a many-step one, whose sampler is made stochastic for a
    policy gradient, by another `transition`, and with the `guidance` it is used with. `shared_noise`: the correlation of the initial noise within a group,
    0 to 1; what begins alike ends alike, so rewards compare samples that show the same in other quality (1: DanceGRPO's groups).
    """

    levels: tuple[float, ...]
    through: int = 1
    transition: Transition = Renoise()
    guidance: float = 1.0
    shared_noise: float = 0.0

    def __post_init__(self) -> None:
        check_levels(self.levels)
        check_number("shared_noise", self.shared_noise, least=0, most=1)
        if self.shared_noise == 1 and (len(self.levels) == 1 or isinstance(self.transition, Deterministic)):
            raise ValueError(
                "shared_noise: 1 is not allowed for a student of one step, or without noise between steps: all samples of a group would be the same; "
                "give less, or more steps"
            )
        if not 1 <= self.through <= len(self.levels):
            raise ValueError(
                f"through: {self.through} is not allowed; the last steps that the gradient reaches, between 1 and the {len(self.levels)} there are"
            )


# what the advantages of a group are divided by
Spread = Literal["group", "run", "none"]


@dataclass(frozen=True)
class Advantage:
    """How rewards become advantages: centred in each group, divided by `spread`, and clipped to +-`clip` if there is one (AMD Eq. 12: 1).

    `spread`: each group's own deviation of rewards (GRPO); a running one over the whole `run`, with which a group of similar samples has small
    advantages instead of the usual size; or `none`: advantages in the reward's own unit (Dr. GRPO, Liu et al. 2025, which divides by no deviation).
    """

    spread: Spread = "group"
    clip: float | None = None

    def __post_init__(self) -> None:
        if self.spread not in get_args(Spread):
            raise ValueError(f"spread: {self.spread!r} is not known; allowed: {', '.join(get_args(Spread))}")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip: {self.clip} is not allowed; a positive bound on the advantage, or None for no bound")


@dataclass(frozen=True)
class Stage:
    """`steps` student steps of one kind. `batch` samples a micro-batch, in groups of `group` a prompt; `accumulate` micro-batches a step.

    `guided`: a many-step student is sampled with the recipe's guidance in this stage; False where the network itself has learned it. `fresh`: where the
    stage takes its reference, the student's optimiser state is reset: gradients of another kind and size would otherwise set its step size for long.
    `guidance_scales`: the scales that the student is conditioned on in this stage, in training and in sampling. `optim`: the student's optimiser settings in
    this stage; None: its role's. `reward_on`: which sample is scored: the final one, or the estimate at the exit, for which nothing past the exit is computed.
    """

    name: str
    steps: int
    batch: int
    terms: tuple[Term, ...]
    critics: tuple[Critic, ...] = ()
    rollout: RolloutConfig | None = None
    group: int = 1
    accumulate: int = 1
    inner_epochs: int = 1
    advantage: Advantage = Advantage()
    guided: bool = True
    fresh: bool = False
    guidance_scales: GuidanceScales | None = None
    optim: AdamWConfig | None = None
    reward_on: Where = "final"

    def __post_init__(self) -> None:
        _check_parts(self)
        _check_reward_on(self)
        names = [term.name for term in self.terms]
        if len(set(names)) < len(names):
            raise ValueError(f"stage {self.name!r}: two terms share a name in {names}; give each its own name=, the log needs it")
        for field, least in (("steps", 0), ("batch", 1), ("group", 1), ("accumulate", 1), ("inner_epochs", 1)):
            if getattr(self, field) < least:
                raise ValueError(f"{field}: {getattr(self, field)} is not allowed in stage {self.name!r}; {least} or more")
        if self.batch % self.group:
            raise ValueError(f"stage {self.name!r}: batch {self.batch} is not a multiple of group {self.group}; every prompt needs its whole group")
        if "reward" in self.needs and self.group < 2:
            raise ValueError(f"stage {self.name!r}: group {self.group} gives no advantage; compare at least 2 samples a prompt")
        if "trajectory" in self.needs and self.rollout is not None and isinstance(self.rollout.transition, Deterministic):
            raise ValueError(f"transition: deterministic steps are no policy, and stage {self.name!r} has a policy gradient; choose FlowSDE, DanceSDE or CPS")
        if self.rollout is not None and self.rollout.guidance != 1 and ("exit" in self.live or (self.live and self.inner_epochs > 1)):
            raise ValueError(
                f"guidance: {self.rollout.guidance} is not allowed for the rollout of stage {self.name!r}; of a guided student forces act on the final sample "
                "alone, in one inner epoch"
            )
        if self.guidance_scales is not None and (self.guided or (self.rollout is not None and self.rollout.guidance != 1)):
            raise ValueError(
                f"guidance_scales: {self.guidance_scales} in stage {self.name!r}: a student conditioned on them is sampled without guidance; set guided=False"
            )
        if "trajectory" in self.needs and self.rollout is not None and len(self.rollout.levels) < 2:
            raise ValueError(
                f"steps: 1 is not allowed in stage {self.name!r}: a 1-step student has no stochastic step (its only one is deterministic), so there is no "
                "policy; use 2 or more steps, or a branch that climbs the reward's gradient (refl)"
            )
        shares = [term.name for term in self.terms if term.unit == "share"]
        if shares and self.matching is None:
            raise ValueError(
                f"unit: share is not allowed for {shares[0]!r} in stage {self.name!r}, which has no matching force to take a share of; give the stage one "
                "with a positive weight, or the term unit='raw'"
            )
        if any(isinstance(term, Force) for term in self.terms) and self.rollout is None:
            raise ValueError(f"stage {self.name!r}: it has forces but rollout is None; forces act on rolled-out samples")
        if "final" in self.needs and self.rollout is None:
            raise ValueError(f"stage {self.name!r}: it compares with samples of the student but rollout is None; give the stage a RolloutConfig")

    @property
    def forces(self) -> tuple[Force, ...]:
        return tuple(term for term in self.terms if isinstance(term, Force))

    @property
    def objectives(self) -> tuple[Objective, ...]:
        return tuple(term for term in self.terms if isinstance(term, Objective))

    @property
    def matching(self) -> DistributionMatching | None:
        """The matching force whose gradient shares are parts of: the first one of positive weight."""
        return next((term for term in self.terms if isinstance(term, DistributionMatching) and term.unit == "raw" and term.weight > 0), None)

    @property
    def rewarded(self) -> tuple[Term, ...]:
        """The terms that pull towards a reward: by its value, its gradient or pairs ranked by it. Matching that is tilted by a reward is none of them."""
        return tuple(term for term in self.terms if term.needs & {"reward", "gradient", "latent_reward"} and not isinstance(term, DistributionMatching))

    @property
    def live(self) -> frozenset[Where]:
        """Points that carry the student's graph: those a force acts on."""
        return frozenset(force.on for force in self.forces)

    @property
    def needs(self) -> frozenset[Need]:
        """Everything that its terms and critics need."""
        parts: tuple[Term | Critic, ...] = (*self.terms, *self.critics)
        return frozenset().union(*(part.needs for part in parts))

    @property
    def preferred_count(self) -> int:
        """Preferred samples of each prompt in a batch, as many as any term chooses from."""
        return max((term.preferred_count for term in self.terms), default=0)

    @property
    def uses_guidance(self) -> bool:
        """Whether guidance is applied here, in sampling or in a target; for a student with guidance in its weights it would be applied twice."""
        return self.guided or any(isinstance(term, GuidanceDistillation) for term in self.terms)

    @property
    def to_the_end(self) -> bool:
        """Whether the rollout is completed past the exits, because a term acts on the final sample or a reward scores it."""
        return bool(self.needs & {"trajectory", "final"}) or self.scores_the_end or "final" in self.live

    @property
    def scores_the_end(self) -> bool:
        """Whether a reward scores its final samples."""
        return "reward" in self.needs and self.reward_on == "final"


Experts = Literal["both", "high", "low"]


@dataclass(frozen=True)
class Recipe:
    """A whole run. `levels` are those of the exported student; `sampler` is few-step, or ode for a recipe that leaves the student a many-step
    model, sampled with `guidance` as its teacher is. `latent_reward`: its latent reward model, if it has one.
    `guidance_2`: of the second expert of a model that has two; `experts`: which of them student and fake train.
    `source`: of a user's own recipe, the function that made it and the hash of its file; None of a bundled one."""

    name: str
    levels: tuple[float, ...]
    roles: Mapping[str, RoleConfig]
    stages: tuple[Stage, ...]
    guidance: float = 1.0
    sampler: Literal["few-step", "ode"] = "few-step"
    latent_reward: LatentRewardConfig | None = None
    source: str | None = None
    guidance_2: float | None = None
    experts: Experts = "both"

    def __post_init__(self) -> None:
        check_levels(self.levels)
        check_finite(self)
        for name, value in (("guidance", self.guidance), ("guidance_2", self.guidance_2)):
            if value is not None:
                check_number(name, value, 0, what="it is a finite scale, 0 or more; 1 is none")
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(f"recipe {self.name!r}: two stages share a name in {names}; references, checkpoints and the log tell them apart by it")
        if "latent_reward" in self.needs and self.latent_reward is None:
            raise ValueError(
                f"recipe {self.name!r}: a stage needs a latent reward model and latent_reward is None; give the recipe latent_reward=LatentRewardConfig()"
            )
        if "average" in self.needs and self.roles["student"].ema is None:
            raise ValueError(f"ema: None is not allowed for {self.name!r}: it aims at the student's average; give a decay below 1, for example 0.95")
        for stage in self.stages:
            if stage.guidance_scales is not None:
                if (guidance_range := self.roles["student"].guidance_range) is None:
                    raise ValueError(
                        f"guidance_scales: stage {stage.name!r} conditions the student on {stage.guidance_scales}, which takes none; give its role "
                        "guidance_range=GuidanceRange(...)"
                    )
                guidance_range.check(stage.guidance_scales)
        if not any(stage.steps for stage in self.stages):
            raise ValueError(f"recipe {self.name!r}: no stage has steps; give at least one of them a positive number")

    @property
    def sampling(self) -> Sampling:
        """How its student is sampled at the end."""
        return self.sampling_at(self.steps)

    def sampling_at(self, step: int) -> Sampling:
        """How the student is sampled at the run's step: without guidance from the stage that distils it, but conditioned on its scales if it takes them."""
        stage, _ = self.at(max(0, min(step, self.steps) - 1))
        return Sampling(self.levels, self.sampler, self.guidance if self.sampler == "ode" and stage.guided else 1.0, stage.guidance_scales)

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    @property
    def needs(self) -> frozenset[Need]:
        """Everything that its stages need."""
        return frozenset().union(*(stage.needs for stage in self.stages if stage.steps))

    def at(self, step: int) -> tuple[Stage, float]:
        """The stage of the run's step (0-based) and the fraction of it that is done."""
        for stage in self.stages:
            if step < stage.steps:
                return stage, step / stage.steps
            step -= stage.steps
        raise IndexError(step)

    def stage_ends(self) -> tuple[int, ...]:
        """Step counts at which a stage is complete."""
        ends, total = [], 0
        for stage in self.stages:
            total += stage.steps
            ends.append(total)
        return tuple(ends)


def _check_parts(stage: Stage) -> None:
    """Makes tuples of lists of terms and critics. Raises ValueError for other types, and for a force at a point that no rollout has."""
    allowed: tuple[tuple[str, Any, type | tuple[type, ...]], ...] = (("terms", stage.terms, (Force, Objective)), ("critics", stage.critics, Critic))
    for field, parts, kinds in allowed:
        if isinstance(parts, list):
            parts = tuple(parts)
            object.__setattr__(stage, field, parts)
        if not isinstance(parts, tuple):
            raise ValueError(f"{field}: {type(parts).__name__} is not allowed in stage {stage.name!r}; it is a tuple of {field}")
        for part in parts:
            if not isinstance(part, kinds):
                shown = f"the class {part.__name__}" if isinstance(part, type) else repr(part)
                raise ValueError(f"{field}: {shown} is not allowed in stage {stage.name!r}; {'a Force or an Objective' if field == 'terms' else 'a Critic'} is")
            if (on := getattr(part, "on", "exit")) not in get_args(Where):
                name = getattr(part, "name", type(part).__name__)
                raise ValueError(f"on: {on!r} of {name!r} in stage {stage.name!r} is not allowed; allowed: {', '.join(get_args(Where))}")


def _check_reward_on(stage: Stage) -> None:
    """Raises ValueError if rewards of the exits are asked for beside a term or a critic that compares other samples by them."""
    if stage.reward_on not in get_args(Where):
        raise ValueError(f"reward_on: {stage.reward_on!r} is not known; allowed: {', '.join(get_args(Where))}")
    if stage.reward_on == "exit":
        parts: tuple[Term | Critic, ...] = (*stage.terms, *stage.critics)
        for part in parts:
            if "reward" in part.needs and getattr(part, "on", "final") != "exit":
                name = getattr(part, "name", type(part).__name__)
                raise ValueError(f"reward_on: exit is not allowed in stage {stage.name!r}, where {name!r} compares final samples; use final")


def check_finite(value: Any, field: str = "recipe") -> None:
    """Raises ValueError that names the field of a recipe, or of any part of it, whose number is not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{field}: {value} is not allowed; it is a finite number")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        for f in dataclasses.fields(value):
            check_finite(getattr(value, f.name), f.name)
    elif isinstance(value, Mapping):
        for key, part in value.items():
            check_finite(part, str(key))
    elif isinstance(value, tuple | list | frozenset):
        for part in value:
            check_finite(part, field)


def describe(value: Any) -> Any:
    """A recipe, or any part of it, as plain JSON values; components are stored with their class names."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        named = {f.name: describe(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"class": type(value).__name__, **named}
    if isinstance(value, Mapping):
        return {key: describe(v) for key, v in value.items()}
    if isinstance(value, tuple | list | frozenset):
        return [describe(v) for v in value]
    return value
