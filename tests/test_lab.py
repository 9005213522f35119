"""The laboratory: what methods come to rest at (particles), what small networks reach, and its commands."""

from __future__ import annotations

import json
import math
from contextlib import suppress

import pytest
import torch

from instep.cli import main as cli_main
from instep.diffusion.levels import Uniform
from instep.lab.metrics import measure
from instep.lab.mixture import labels
from instep.lab.networks import ExactFake, Particles
from instep.lab.run import common, ensemble_state, train, train_particles
from instep.lab.spec import build
from instep.lab.world import World
from instep.methods.matching import DistributionMatching
from instep.methods.recipe import RolloutConfig, Stage
from instep.methods.role_config import AdamWConfig
from instep.methods.term import Batch
from instep.recipes.amd import amd, naive_adaptive
from instep.recipes.dmd import dmd2
from instep.recipes.refl import refl
from instep.training.state import TrainedParams, TrainState
from instep.training.step import iteration

HALF = World.named("ring8", members=1, reward="half")


def rest(recipe, world=HALF, seed=0) -> dict[str, float]:
    return train_particles("x", recipe, world, seed=seed, n=384, steps=350).metrics[0]


@pytest.fixture(scope="module")
def plain() -> dict[str, float]:
    return rest(dmd2(common()))


def test_particles_recover_the_mixture(plain):
    assert plain["quality"] > 0.95 and plain["tv"] < 0.08 and abs(plain["share"] - 0.5) < 0.05
    assert 0.8 < plain["spread"] < 1.15


def test_score_adaptation_alone_does_not_tilt(plain):
    """Eq. 10 without Eq. 14 and without guidance: what is left vanishes where the fake agrees, whatever it is weighed by."""
    metrics = rest(amd(common(), tilt=0.0, sensitivity=0.7))
    assert abs(metrics["share"] - 0.5) < 0.05 and metrics["quality"] > 0.93


def test_the_critics_weight_tilts(plain):
    """Eq. 14 alone takes the student to the rewarded modes: self-consistently, share / (1 - share) = exp(a_high - a_low)."""
    metrics = rest(amd(common(), tilt=1.0, sensitivity=0.0))
    share = 0.8
    for _ in range(50):  # binary rewards: a_high = (1 - s) / sd, a_low = -s / sd, both clipped to 1
        sd = math.sqrt(share * (1 - share))
        odds = math.exp(min((1 - share) / sd, 1) + min(share / sd, 1))
        share = odds / (1 + odds)
    assert abs(share - 0.814) < 0.002
    assert abs(metrics["share"] - share) < 0.05 and metrics["quality"] > 0.93


def test_naive_adaptation_leaves_the_manifold(plain):
    metrics = rest(naive_adaptive(common(), sensitivity=0.5))
    assert metrics["quality"] < plain["quality"] - 0.25


@pytest.mark.parametrize("strength", [0.7, 1.5])
def test_a_fixed_weight_gives_p_over_w(strength):
    """A critic weighed by a fixed W(x) = exp(-c) on rewarded modes: q ~ p / W, so their share is e^c / (1 + e^c)."""
    rng = torch.Generator().manual_seed(1)
    particles = Particles(torch.randn(384, 2, generator=rng))
    mixture, rewarded = HALF.mixture, HALF.rewarded
    log_weight = lambda x: -strength * rewarded[torch.cdist(x, mixture.means).argmin(1)].float()  # noqa: E731
    fake = ExactFake(particles, HALF.path, log_weight=log_weight)
    optim = AdamWConfig(6e-2, betas=(0.5, 0.99), clip=1e9, decay=0.6)
    roles = {"student": particles, "fake": fake, "teacher": HALF.teacher}
    state = TrainState(roles, {"student": TrainedParams(particles.trainable(), optim)}, HALF.path, (2,), rng)
    stage = Stage("rest", 400, 384, (DistributionMatching(levels=Uniform()),), (), RolloutConfig((1.0,)))
    names = ("",) * 384
    for step in range(stage.steps):
        iteration(state, stage, [Batch(names, labels(names), labels(names))], step / stage.steps)
    metrics = measure(particles.x.detach(), labels(names).label, mixture, rng, rewarded)
    assert abs(metrics["share"] - 1 / (1 + math.exp(-strength))) < 0.05 and metrics["quality"] > 0.93


def test_particles_refuse_what_needs_a_network():
    with pytest.raises(ValueError, match="gan needs a network"):
        rest(dmd2(common(), gan=0.1))


def learned(recipe, start, world=None) -> list[dict[str, float]]:
    world = world or World.named("ring8", members=2, reward="half")
    return list(train("x", recipe, world, ensemble_state(recipe, world, start, 0)).metrics)


def mean(rows, key) -> float:
    return sum(row[key] for row in rows) / len(rows)


@pytest.fixture(scope="module")
def control(start):
    return learned(dmd2(common(), iterations=300), start)


def test_one_step_matching_through_networks(control):
    assert mean(control, "quality") > 0.55 and mean(control, "tv") < 0.1 and abs(mean(control, "share") - 0.5) < 0.08


@pytest.mark.slow
def test_amd_tilts_through_networks_and_keeps_quality(control, start):
    tilted = learned(amd(common(), iterations=500), start)
    assert 0.7 < mean(tilted, "share") < 0.95
    assert mean(tilted, "quality") > mean(control, "quality") - 0.15


@pytest.mark.slow
def test_naive_adaptation_collapses_through_networks(control, start):
    assert mean(learned(naive_adaptive(common(), iterations=500), start), "quality") < mean(control, "quality") - 0.2


@pytest.mark.parametrize(
    "spec",
    [
        *("dmd", "decoupled-dmd:guidance=1.5", "magic", "refl:weight=0.1", "dm-align-group:weight=0.05"),
        *(pytest.param(spec, marks=pytest.mark.slow) for spec in ("dmd2:gan=0.03,iterations=120", "dmd2:steps=4,iterations=120")),
    ],
)
def test_every_recipe_learns_and_is_finite(spec, start):
    """From a student that is far from the mixture's quality in one step, to one that is nearer."""
    world = World.named("ring8", members=2, reward="half")
    recipe = build(spec, common(), 50)
    before = ensemble_state(recipe, world, start, 0)
    from instep.lab.run import snapshot

    first = snapshot(before, recipe, world).metrics
    after = train(spec, recipe, world, before).metrics
    assert all(math.isfinite(value) for row in after for value in row.values())
    assert mean(after, "energy") < 0.7 * mean(first, "energy") and mean(after, "quality") > mean(first, "quality") + 0.05


def test_a_reward_alone_collapses_and_matching_holds_it(start, control):
    alone = learned(refl(common(), iterations=100, weight=1.0, matching=0.0), start, World.named("ring8", members=2, reward="right"))
    assert mean(alone, "reached") < 0.6 * mean(control, "reached")


def test_specs_are_read_and_refused():
    recipe = build("amd:tilt=0,sensitivity=0.7,steps=2", common(), 90)
    assert recipe.steps == 90 and len(recipe.levels) == 2 and recipe.stages[-1].terms[0].operator.sensitivity == 0.7
    assert [stage.steps for stage in build("dm-align-group", common(), 90).stages] == [60, 30]
    assert [stage.steps for stage in build("dmdr", common(), 90).stages] == [45, 45]
    with pytest.raises(ValueError, match="'tlit=0' is not key=value with a key of amd; allowed keys: distil, iterations, group"):
        build("amd:tlit=0", common(), 90)
    with pytest.raises(ValueError, match="recipe: 'amdd' is not known"):
        build("amdd", common(), 90)
    assert build("dmdr:tilt=none", common(), 90).stages[0].needs == frozenset(), "none is a word where the option takes words"
    with pytest.raises(ValueError, match="'lora_rank=4' is not key=value with a key of dmd2"):
        build("dmd2:lora_rank=4", common(), 90)
    with pytest.raises(ValueError, match="steps: 1 is not allowed in stage 'joint': a 1-step student has no stochastic step"):
        build("dmdr:rl=grpo", common(), 90)
    assert build("dmd2:steps=4", common(), 90).roles["student"].optim == build("dmd2", common(4), 90).roles["student"].optim
    for wrong in ("amd:tilt=2 2", "amd:tilt=high", "dmd2:steps=four", "dmd2:reuse=1", "dmd2:steps=1.5"):
        with pytest.raises(ValueError, match=r"is not allowed for \w+; it takes a value like"):
            build(wrong, common(), 90)
    assert build("dm-align-pair:within=None", common(), 90).stages[-1].terms[1].within is None, "an option that may be None, with a number as its default"
    for wrong, allowed in (("dm-align-pair:within=far", "a value like 1.0 or None"), ("dm-align-pair:weight=None", r"a value like 0.5$")):
        with pytest.raises(ValueError, match=rf"is not allowed for \w+; it takes {allowed}"):
            build(wrong, common(), 90)
    assert not build("dmd2:reuse=false", common(), 90).stages[0].critics[0].reuse, "a false that is written small is false too"


def test_preferred_samples_are_rewarded_ones():
    world = World.named("ring8", members=2, reward="half")
    stage = build("dm-align-pair", common(), 9).stages[-1]
    x = world.batch(stage, 1.0, torch.Generator().manual_seed(0)).real
    assert world.rewarded[torch.cdist(x, world.mixture.means).argmin(1)].all()


def test_what_is_done_stays_when_the_next_recipe_is_interrupted(tmp_path, monkeypatch):
    monkeypatch.setattr("instep.cli.lab.START_STEPS", 50)
    import instep.lab.run as module

    real = module.train

    def second_fails(name, *args, **options):
        if name == "amd":
            raise KeyboardInterrupt
        return real(name, *args, **options)

    monkeypatch.setattr(module, "train", second_fails)
    with suppress(KeyboardInterrupt):
        cli_main.main(["lab", "dmd2", "amd", "--reward", "half", "--iterations", "5", "--members", "2", "--no-figures", "--out", str(tmp_path / "lab")])
    assert [run["name"] for run in json.loads((tmp_path / "lab" / "lab.json").read_text())["runs"]] == ["dmd2"]


def test_a_recipe_without_matching_has_no_force_to_draw(start):
    from instep.lab.run import force_field

    world = World.named("ring8", members=2, reward="right")
    recipe = build("rl-after:rl=refl,distil=1", common(), 2)
    run = train("x", recipe, world, ensemble_state(recipe, world, start, 0))
    assert force_field(run, torch.zeros(3, 2)).isfinite().all()


def test_the_command_writes_table_and_figures(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("instep.cli.lab.START_STEPS", 50)
    out = tmp_path / "lab"
    assert cli_main.main(["lab", "dmd2", "amd", "--reward", "half", "--iterations", "3", "--members", "2", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "exact" in shown and "amd" in shown
    assert {"lab.json", "table.md", "figure.png", "training.webp"} <= {file.name for file in out.iterdir()}
    saved = json.loads((out / "lab.json").read_text())
    assert [run["name"] for run in saved["runs"]] == ["dmd2", "amd"] and len(saved["runs"][0]["curve"][-1]["figures"]) == 2
    assert cli_main.main(["lab", "dmd2", "--out", str(out)]) == 2
    assert "exists; choose another name" in capsys.readouterr().err
    assert cli_main.main(["lab", "amd", "--out", str(tmp_path / "b")]) == 2
    assert "reward: amd needs one; add --reward half" in capsys.readouterr().err
    assert cli_main.main(["lab", "--out", str(tmp_path / "b")]) == 2
    assert "recipe: none was given" in capsys.readouterr().err
