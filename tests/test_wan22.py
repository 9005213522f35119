"""Wan 2.2 A14B: two experts by noise level, on a tiny random pipeline against stock diffusers."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from fast import slow_but
from test_run import interrupted_before, same
from tiny import FRAMES, HEIGHT, WIDTH, tiny_wan22_pipeline, tiny_wan_pipeline
from torch import Tensor

from instep.core.size import Size
from instep.data.prompt import Prompt
from instep.diffusion.bands import WHOLE, bands_of, draw_in_band, in_band
from instep.diffusion.guidance import by_level, predict_guided
from instep.diffusion.levels import Uniform
from instep.models.backbone import Backbone
from instep.models.families import family_of
from instep.models.role import Role
from instep.models.wan import WanFamily
from instep.models.wan22 import Wan22Family
from instep.recipes.common import Common
from instep.recipes.dm_align import dm_align_group
from instep.recipes.dmd import dmd2
from instep.rewards.base import FunctionReward
from instep.training import loop as loop_module
from instep.training.options import RunOptions
from instep.training.run import train

torch.set_num_threads(1)

SIZE = Size(HEIGHT, WIDTH, FRAMES)
PROMPTS = [Prompt("a seven moving left fast"), Prompt("a digit", negative="blurry"), Prompt("an eight"), Prompt("a two standing still")]
# 4 steps with shift 5: 1, 0.9375 lie in the upper band, 0.8333, 0.625 in the lower one
COMMON = Common(steps=4, shift=5.0, batch=4, critic_updates=1, guidance=4.0, guidance_2=3.0)
QUICK = RunOptions(save_every=1, probe_every=50)
REWARD = FunctionReward(lambda media, prompts: media.mean((1, 2, 3, 4)), name="brightness")


def family() -> Wan22Family:
    found = family_of(tiny_wan22_pipeline(), SIZE, "tiny22")
    assert isinstance(found, Wan22Family)
    return found


def noised(t: list[float], seed: int = 0) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(len(t), 16, 3, HEIGHT // 8, WIDTH // 8, generator=rng), torch.tensor(t)


# ---------------------------------------------------------------------------------------------------------------- maths


def test_bands_hold_every_level_once():
    t = torch.tensor([0.0, 0.5, 0.874999, 0.875, 0.9, 1.0])
    upper, lower = (in_band(t, band) for band in bands_of(0.875))
    assert torch.equal(upper, t >= 0.875) and torch.equal(lower, ~upper) and bands_of(None) == (WHOLE,)


def test_levels_of_a_band_follow_the_samplers_law_within_it():
    rng = torch.Generator().manual_seed(0)
    low = draw_in_band(lambda own: Uniform(0.02, 0.98)(20_000, progress=0.0, t_exit=None, rng=own), (0.0, 0.875), rng)
    assert bool((low < 0.875).all()) and float(low.mean()) == pytest.approx((0.02 + 0.875) / 2, abs=0.005)
    never = draw_in_band(lambda own: torch.full((4,), 0.1), (0.875, 1.0), rng)
    assert bool(in_band(never, (0.875, 1.0)).all()), "a sampler that never falls into the band is mapped into it"
    once = torch.Generator().manual_seed(1)
    plain = draw_in_band(lambda own: torch.rand(3, generator=own), WHOLE, once)
    assert torch.equal(plain, torch.rand(3, generator=torch.Generator().manual_seed(1))), "one network: one draw, as before"


# -------------------------------------------------------------------------------------------------------------- teacher


@pytest.mark.parametrize("levels", [[0.95, 0.95], [0.3, 0.3], [0.9, 0.4]])
def test_the_teacher_is_the_right_expert_at_every_level(levels):
    fam, pipe = family(), tiny_wan22_pipeline()
    teacher = Role("teacher", Backbone(fam, fam.pretrained))
    x, t = noised(levels)
    alone = [Role("teacher", Backbone(one, one.pretrained)) for one in (WanFamily(tiny_wan_pipeline(0), SIZE), WanFamily(tiny_wan_pipeline(100), SIZE))]
    with torch.no_grad():
        got = teacher(x, t, fam.encode(PROMPTS[:2])).x0
        both = [role(x, t, fam.encode(PROMPTS[:2])).x0 for role in alone]
    expected = torch.where((t >= pipe.config.boundary_ratio).reshape(-1, 1, 1, 1, 1), both[0], both[1])
    assert (got - expected).abs().max() == 0
    assert (both[0] - both[1]).abs().max() > 1e-2, "the experts differ"


@pytest.mark.parametrize("level", [0.95, 0.9, 0.3])
@pytest.mark.parametrize("negative", [None, "blurry"])
def test_the_guided_teacher_takes_the_stock_pipelines_step(level, negative):
    """One Euler step of the stock pipeline from `level`, with both guidance scales, against ours."""
    fam, pipe = family(), tiny_wan22_pipeline()
    pipe.set_progress_bar_config(disable=True)
    prompt = Prompt("a seven moving left fast", negative=negative)
    x, t = noised([level])
    seen: list[Tensor] = []
    pipe.scheduler.set_timesteps(1)
    pipe.scheduler.step = lambda v, time, x, return_dict=False: (seen.append(v.clone()), (x,))[1]
    pipe.scheduler.set_timesteps = lambda *args, **kwargs: None
    pipe.scheduler.timesteps = torch.tensor([level * 1000])
    pipe(prompt.text, negative_prompt=negative, latents=x, height=HEIGHT, width=WIDTH, num_frames=FRAMES, num_inference_steps=1, guidance_scale=4.0,
         guidance_scale_2=3.0, output_type="latent")  # fmt: skip
    teacher = Role("teacher", Backbone(fam, fam.pretrained))
    with torch.no_grad():
        ours = predict_guided(teacher, x, t, fam.encode([prompt]), fam.unconditional([prompt]), by_level(4.0, 3.0, fam.boundary)).x0
    stock = x - level * seen[0]
    assert (ours - stock).abs().max() <= 1e-5 * stock.abs().max()


# ----------------------------------------------------------------------------------------------------------------- runs


def weights(network) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in network.state_dict().items() if ".lora_" not in key}


@pytest.mark.parametrize(("experts", "rank"), slow_but([("both", 4), ("high", None), ("low", 4)], product(("both", "high", "low"), (None, 4))))
def test_only_the_chosen_experts_train(tmp_path, experts, rank):
    fam = family()
    before = weights(fam.pretrained)
    run = train(
        dmd2(Common(**{**vars(COMMON), "experts": experts, "lora_rank": rank}), iterations=4), fam, out=tmp_path / "run", prompts=PROMPTS, options=QUICK
    )
    owned = run.state.roles["student"].named_parameters()
    parts = {key.split(".")[0] for key in owned}
    assert parts == {"both": {"transformer", "transformer_2"}, "high": {"transformer"}, "low": {"transformer_2"}}[experts]
    if rank is None:
        for name, part in fam.parts(run.state.roles["student"].backbone.module).items():
            moved = any(not torch.equal(value, before[f"{name}.{key}"]) for key, value in part.state_dict().items())
            assert moved == (name in parts), name
    for key, value in weights(fam.pretrained).items():
        assert torch.equal(value, before[key.replace(".base_layer.", ".")]), f"{key} of the teacher moved"
    files = {path.name for path in Path(run.student).iterdir()}
    expected = (
        set() if rank is None else {"both": {"lora.safetensors", "lora_2.safetensors"}, "high": {"lora.safetensors"}, "low": {"lora_2.safetensors"}}[experts]
    )
    assert {name for name in files if name.startswith("lora")} == expected


def test_a_micro_batch_calls_one_expert_with_a_graph(tmp_path, monkeypatch):
    iterations: list[set[str]] = []

    class Watched(Wan22Family):
        def forward(self, module, x_t, t, cond):
            raw = super().forward(module, x_t, t, cond)
            if raw.requires_grad and torch.is_grad_enabled():
                iterations[-1] |= {"high" if bool(level >= 0.875) else "low" for level in t}
            return raw

    real = loop_module.iteration
    monkeypatch.setattr(loop_module, "iteration", lambda *args: (iterations.append(set()), real(*args))[1])
    watched = Watched(tiny_wan22_pipeline(), SIZE, "tiny22")
    train(dmd2(COMMON, iterations=6), watched, out=tmp_path / "run", prompts=PROMPTS, options=RunOptions(save_every=50, probe_every=50))
    # the student's update and the fake's work on the same band; over the run both bands are drawn
    assert len(iterations) == 6 and all(len(seen) == 1 for seen in iterations) and {"high", "low"} == set().union(*iterations)


def recipes(name: str, rank: int | None):
    common = Common(**{**vars(COMMON), "lora_rank": rank})
    return dmd2(common, iterations=3) if name == "dmd2" else dm_align_group(common, distil=1, iterations=2, group=2)


@pytest.mark.parametrize(
    ("name", "rank"),
    slow_but([("dm-align-group", 4)], product(("dm-align-group", "dmd2"), (4, None))),
)
def test_killed_and_resumed_it_ends_the_same_and_stock_diffusers_samples_alike(tmp_path, name, rank):
    parts = {"prompts": PROMPTS, "reward": REWARD, "options": QUICK}
    whole = train(recipes(name, rank), family(), out=tmp_path / "whole", **parts)
    with interrupted_before(2):
        train(recipes(name, rank), family(), out=tmp_path / "cut", **parts)
    same(whole.out, train(recipes(name, rank), family(), out=tmp_path / "cut", **parts).out)

    from diffusers import WanPipeline

    from instep.export.verify import verify_export

    pipe = WanPipeline.from_pretrained(whole.student, local_files_only=True)
    assert pipe.config.boundary_ratio == 0.875 and pipe.transformer_2 is not None
    levels = whole.recipe.levels
    scale = float(family().stock_sample(_quiet(pipe), PROMPTS[:1], steps=4, guidance=1.0, output="latent").abs().max())
    assert verify_export(whole.student, levels, prompts=PROMPTS[:2], size=SIZE) <= 1.5e-6 * scale  # measured: 0.65e-6 to 1.07e-6
    assert verify_export(whole.student, [*levels[:3], 0.4], prompts=PROMPTS[:2], size=SIZE) > 1e-3, "other levels are other videos"
    if rank is not None:
        base = tiny_wan22_pipeline()
        base = WanPipeline(**{**base.components, "scheduler": pipe.scheduler}, boundary_ratio=0.875)
        base.load_lora_weights(str(whole.student), weight_name="lora.safetensors", adapter_name="high")
        base.load_lora_weights(str(whole.student), weight_name="lora_2.safetensors", adapter_name="low", load_into_transformer_2=True)
        merged, adapted = (_stock(one) for one in (pipe, base))
        assert (merged - adapted).abs().max() <= 1e-5 * scale
        base.unload_lora_weights()
        assert (_stock(base) - merged).abs().max() > 1e-5 * scale, "the LoRA does something"


def _quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _stock(pipe) -> Tensor:
    torch.manual_seed(5)
    return family().stock_sample(_quiet(pipe), PROMPTS[:1], steps=4, guidance=1.0, output="latent")


def test_what_does_not_fit_is_refused_before_the_first_step(tmp_path):
    one = WanFamily(tiny_wan_pipeline(), SIZE, name="tiny")
    for options, words in (({"experts": "low", "guidance_2": None}, "experts: low"), ({"experts": "both", "guidance_2": 3.0}, "guidance_2: 3.0")):
        with pytest.raises(ValueError, match=f"{words} is not allowed; tiny has one network"):
            train(dmd2(Common(**{**vars(COMMON), **options}), iterations=1), one, out=tmp_path / "a", prompts=PROMPTS, options=QUICK)
    with pytest.raises(ValueError, match="experts: low is not allowed; the student's levels .1.0. all lie in the other expert's band"):
        train(dmd2(Common(**{**vars(COMMON), "experts": "low", "steps": 1}), iterations=1), family(), out=tmp_path / "b", prompts=PROMPTS, options=QUICK)
    with pytest.raises(ValueError, match="experts: high is not allowed; dm-align-group has forces at the final sample"):
        train(
            dm_align_group(Common(**{**vars(COMMON), "experts": "high"}), iterations=1, group=2, reach="last"),
            family(),
            out=tmp_path / "c",
            prompts=PROMPTS,
            reward=REWARD,
        )
    with pytest.raises(ValueError, match="boundary_ratio: None is not allowed for two experts"):
        family_of(tiny_wan22_pipeline(boundary=None), SIZE)
    assert not list(tmp_path.iterdir())


def test_a_student_of_one_band_exports_both_experts(tmp_path):
    fam = family()
    before = weights(fam.pretrained)
    run = train(dmd2(Common(**{**vars(COMMON), "steps": 1}), iterations=2), fam, out=tmp_path / "run", prompts=PROMPTS, options=QUICK)
    student = run.state.roles["student"].backbone.module
    assert all(torch.equal(value, before[f"transformer_2.{key}"]) for key, value in student.transformer_2.state_dict().items())
    assert any(not torch.equal(value, before[f"transformer.{key}"]) for key, value in student.transformer.state_dict().items())
    assert (Path(run.student) / "transformer_2").is_dir()
