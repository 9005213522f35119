"""The planner against what a real run on this machine computes and keeps."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from every_recipe import DISTINCT, RECIPES, SIZE, family, small
from every_recipe import REWARD as BRIGHTNESS
from fast import slow_but
from tiny import tiny_cogvideox_pipeline, tiny_sd3_pipeline, tiny_wan22_pipeline, tiny_wan_i2v_pipeline, tiny_wan_pipeline
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from instep.bundled import NAMES
from instep.cli.main import main
from instep.cli.parse import recipe_args
from instep.cli.plan import numbers
from instep.cli.train import TrainArgs
from instep.core.size import Size
from instep.methods.recipe import Recipe, Stage
from instep.models.families import family_of
from instep.models.family import Family
from instep.models.outline import PUBLISHED, outline
from instep.planning import meta
from instep.planning import trace as tracing
from instep.planning.plan import HEADROOM, RANK, Machine, Plan, RewardCost, iterations, plan
from instep.planning.tally import Tally
from instep.planning.throughput import measure_throughput, stated
from instep.planning.trace import Model, Trace, meta_state, trace_stage
from instep.recipes.common import Common
from instep.recipes.dmd import dmd2
from instep.rewards.decoded import make_reward_fn, make_reward_grad_fn
from instep.training import rollouts
from instep.training.build import make_state
from instep.training.execution import Execution
from instep.training.state import TrainState
from instep.training.step import iteration
from instep.training.term_gradients import measured_share

torch.set_num_threads(1)
FORMULAS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(g, q, k, v),
}
H100 = Machine(80e9, stated("H100"))


def small_wan() -> Any:
    """Eight blocks of width 64."""
    from diffusers import WanTransformer3DModel

    pipe = tiny_wan_pipeline()
    config = {**pipe.transformer.config, "num_attention_heads": 2, "attention_head_dim": 32, "ffn_dim": 256, "num_layers": 8, "rope_max_seq_len": 64}
    with torch.random.fork_rng(devices=[]):
        pipe.transformer = WanTransformer3DModel.from_config(config).eval()
    return pipe


def on_meta(pipe: Any, size: Size, execution: Execution) -> Family:
    return replace(execution, device="meta").place(family_of(pipe, size))


def planned(recipe: Recipe, pipe: Any, size: Size, execution: Execution, stage: Stage) -> Trace:
    return Model(recipe, on_meta(pipe, size, execution), replace(execution, device="meta")).trace(stage)


@contextmanager
def even_exits() -> Iterator[None]:
    before = rollouts.draw_exits
    rollouts.draw_exits = meta.exits_from(0)
    try:
        yield
    finally:
        rollouts.draw_exits = before


def real_state(recipe: Recipe, placed: Family, execution: Execution) -> TrainState:
    return make_state(recipe, placed, 0, make_reward_fn(placed, BRIGHTNESS), make_reward_grad_fn(placed, BRIGHTNESS), execution=execution)


def measured(recipe: Recipe, pipe: Any, size: Size, execution: Execution, stage: Stage, terms: bool = False) -> tuple[float, float]:
    """FLOPs of a real iteration by torch's own counter, and the most bytes of tensors that are alive in one; AdamW has its moments.

    With `terms` it measures the gradient of each term.
    """
    placed = execution.place(family_of(pipe, size))
    state, batches = real_state(recipe, placed, execution), meta.batches_of(placed, stage)
    with even_exits():
        with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
            iteration(state, stage, batches, 0.0, measure=terms)
        tally = Tally()
        meta.register(tally, state, placed)
        for tensor in (tensor for batch in batches for tensor in meta.tensors_in(batch)):
            tally.assign(tensor, "samples and conditions")
        with tally:
            iteration(state, stage, batches, 0.0, measure=terms)
    assert sum(tally.flops.values()) == pytest.approx(counter.get_total_flops(), rel=1e-9)
    return counter.get_total_flops(), max(total for total, _ in tally.moments.values())


@dataclass(frozen=True)
class Case:
    """`recipe`: one of `small`, which gives dmd2 a discriminator; None: dmd2 without it."""

    pipe: Callable[[], Any]
    common: dict[str, Any] = field(default_factory=dict)
    execution: dict[str, Any] = field(default_factory=dict)
    recipe: str | None = None
    size: Size = SIZE

    @property
    def made(self) -> Recipe:
        shared = {"batch": 4, **self.common}
        return small(self.recipe, **shared) if self.recipe else dmd2(Common(**{"steps": 2, "critic_updates": 1, **shared}), iterations=1)


CASES = {
    "tiny Wan": Case(tiny_wan_pipeline, execution={"checkpointing": "off"}),
    "tiny Wan, LoRA, checkpointing": Case(tiny_wan_pipeline, {"lora_rank": 4}, {"checkpointing": "on"}),
    "tiny Wan, LoRA, checkpointing, micro-batches of 1, discriminator": Case(
        tiny_wan_pipeline, {"lora_rank": 4}, {"checkpointing": "on", "micro_batch": 1}, "dmd2"
    ),
    "small Wan, three micro-batches, three updates": Case(small_wan, {"accumulate": 3, "critic_updates": 3, "batch": 2}),
    "small Wan, bfloat16, checkpointing": Case(small_wan, execution={"checkpointing": "on", "dtype": "bfloat16"}),
    "small Wan, bfloat16, checkpointing, micro-batches of 2": Case(
        small_wan, {"batch": 6, "steps": 1}, {"micro_batch": 2, "dtype": "bfloat16", "checkpointing": "on"}
    ),
    "groups with a decoded reward": Case(tiny_wan_pipeline, {"batch": 8}, {"micro_batch": 2}, "dm-align-group"),
    "the gradient of a decoded reward": Case(tiny_wan_pipeline, {"batch": 8}, {"micro_batch": 2}, "refl"),
    "a policy": Case(tiny_wan_pipeline, recipe="flow-grpo"),
    "SD3": Case(tiny_sd3_pipeline, execution={"checkpointing": "on"}, size=Size(16, 16, 1)),
    "CogVideoX": Case(lambda: tiny_cogvideox_pipeline(layers=7), {"lora_rank": 4}, size=Size(32, 32, 9)),
}

SLOW = (
    "small Wan, bfloat16, checkpointing",
    "small Wan, three micro-batches, three updates",
    "small Wan, bfloat16, checkpointing, micro-batches of 2",
    "tiny Wan, LoRA, checkpointing, micro-batches of 1, discriminator",
    "the gradient of a decoded reward",
    "groups with a decoded reward",
)


@pytest.mark.parametrize("name", slow_but([name for name in CASES if name not in SLOW], CASES))
def test_the_plan_is_what_a_real_iteration_computes_and_keeps(name):
    case = CASES[name]
    recipe, execution = case.made, Execution(device="cpu", **case.execution)
    stage = [stage for stage in recipe.stages if stage.steps][-1]
    flops, most = measured(recipe, case.pipe(), case.size, execution, stage)
    found = planned(recipe, case.pipe(), case.size, execution, stage)
    ours = sum(found.memory().values())
    print(f"{name}: FLOPs {found.total_flops / flops - 1:+.2%}, bytes {ours / most - 1:+.2%} of {most / 1e6:.1f} MB")
    assert found.total_flops == pytest.approx(flops, rel=1e-3)
    assert ours == pytest.approx(most, rel=0.05)


def test_gradients_of_single_terms_are_planned_as_often_as_they_are_measured():
    """With --terms-every 4, in 2 of the 9 iterations; memory is that of an iteration that measures."""
    recipe, execution = dmd2(Common(steps=1, batch=1, critic_updates=1, accumulate=2), gan=0.01, iterations=9), Execution(device="cpu", checkpointing="on")
    stage = recipe.stages[-1]
    (without, _), (with_terms, most) = (measured(recipe, tiny_wan_pipeline(layers=1), SIZE, execution, stage, terms) for terms in (False, True))
    found = Model(recipe, on_meta(tiny_wan_pipeline(layers=1), SIZE, execution), replace(execution, device="meta"), terms_every=4).trace(stage)
    assert with_terms > 1.1 * without and found.total_flops == pytest.approx(without + 2 / 9 * (with_terms - without), rel=1e-3)
    assert sum(found.memory().values()) == pytest.approx(most, rel=0.05)


def test_how_often_the_gradients_of_single_terms_are_measured():
    recipe = small("dmdr", batch=4)
    warm, joint = (replace(stage, steps=20) for stage in recipe.stages)
    recipe = replace(recipe, stages=(warm, joint))
    assert measured_share(recipe, warm, 0) == 0 and measured_share(recipe, warm, 8) == 2 / 20
    # shares: in 0, 1, 2, 4 and every fifth iteration; every eighth of the run, from 7 on, is 23, 31 and 39: 3, 11 and 19 of this stage
    assert measured_share(recipe, joint, 0) == 7 / 20 and measured_share(recipe, joint, 8) == 10 / 20


@pytest.mark.parametrize("name", slow_but(DISTINCT, RECIPES))
def test_every_stage_of_every_recipe_costs_what_is_planned(name):
    """FLOPs, on one block of Wan; every recipe has its own way through an iteration."""
    recipe, execution = small(name, batch=4), Execution(device="cpu")
    state = real_state(recipe, execution.place(family_of(tiny_wan_pipeline(layers=1), SIZE)), execution)
    model = Model(recipe, on_meta(tiny_wan_pipeline(layers=1), SIZE, execution), replace(execution, device="meta"))
    for stage in recipe.stages:
        batches = meta.batches_of(family_of(tiny_wan_pipeline(layers=1), SIZE), stage)
        with even_exits(), Tally() as tally:
            iteration(state, stage, batches, 0.0)
        assert model.trace(stage).total_flops == pytest.approx(sum(tally.flops.values()), rel=1e-3), stage.name


@pytest.mark.slow
def test_a_few_equal_blocks_and_slices_stand_for_all(monkeypatch):
    """The short ways against tracing all of it: the same FLOPs, and the same bytes within the outputs of slices."""
    recipe = dmd2(Common(steps=1, batch=3, lora_rank=4, accumulate=3, critic_updates=1), iterations=1)
    execution = Execution(device="cpu", checkpointing="on", micro_batch=1)
    stage = recipe.stages[0]
    short = planned(recipe, small_wan(), SIZE, execution, stage)
    plain = meta.core_rows.by_rows
    monkeypatch.setattr(tracing, "STEP", 100)
    monkeypatch.setattr(meta, "few_of_each_size", lambda tally: plain)
    monkeypatch.setattr(tracing, "_shortened", lambda stage: stage)
    whole = planned(recipe, small_wan(), SIZE, execution, stage)
    assert short.total_flops == pytest.approx(whole.total_flops, rel=1e-9)
    assert sum(short.memory().values()) == pytest.approx(sum(whole.memory().values()), rel=0.02)


def test_recomputation_is_counted_apart():
    """Of the backward of a checkpointed block all of its forward; without checkpoints attention's scores alone."""
    recipe = dmd2(Common(steps=1, batch=2, critic_updates=1), iterations=1)
    on, off = (planned(recipe, tiny_wan_pipeline(), SIZE, Execution(device="cpu", checkpointing=how), recipe.stages[0]) for how in ("on", "off"))
    assert on.model_flops == pytest.approx(off.model_flops) and on.total_flops > 1.15 * off.total_flops > 1.15 * off.model_flops
    assert {label for label, _ in on.flops} == {"student", "fake", "teacher"}
    student = {phase: count for (label, phase), count in off.flops.items() if label == "student"}
    assert student["backward"] < 2 * student["forward"], "the first layers need no gradient of their input"


def test_states_are_exact():
    """Weights, float32 weights, gradients, moments and average, byte for byte; offloaded they are host memory."""
    execution = Execution(device="cpu", dtype="bfloat16")
    recipe = dmd2(Common(steps=1, batch=2, critic_updates=1), iterations=1)
    placed = execution.place(family())
    state = real_state(recipe, placed, execution)
    memory = planned(recipe, tiny_wan_pipeline(), SIZE, execution, recipe.stages[0]).memory()
    for name, trained in state.trained.items():
        wide = sum(p.nbytes for p in trained.masters.values())
        copied = sum(p.nbytes for key, p in trained.masters.items() if p is not trained.parameters[key])
        assert memory[f"weights of {name}"] == sum(p.nbytes for p in trained.parameters.values())
        assert memory[f"moments of {name}"] == 2 * wide and memory[f"float32 weights of {name}"] == copied
    assert memory["average of student"] == sum(p.nbytes for p in (state.trained["student"].ema or {}).values())
    offloaded = plan(recipe, family().placed("meta"), Execution(dtype="bfloat16", offload=True), H100)
    (stage,) = offloaded.stages
    assert {"moments of student", "frozen weights", "average of student", "weights of fake"} <= stage.host.keys()
    assert "network in use" in stage.memory and not any(kind.startswith(("moments", "weights", "average")) for kind in stage.memory)


@pytest.mark.parametrize(("name", "total"), [("1.3B", 1_418_996_800), ("14B", 14_288_491_584)])
def test_real_wan_configurations_by_hand(name, total):
    config = PUBLISHED[name][1]["transformer"][1]
    d, f, n = config["num_attention_heads"] * 128, config["ffn_dim"], config["num_layers"]
    attention = 2 * (4 * d * d + 4 * d + 2 * d)  # projections, biases, query and key norms; self and cross
    block = attention + 2 * d * f + f + d + 2 * d + 6 * d  # ffn, the norm before cross-attention, modulation
    text, clock = 4096 * d + d + d * d + d, 256 * d + d + d * d + d + 6 * d * d + 6 * d
    outside = 16 * 4 * d + d + text + clock + d * 64 + 64 + 2 * d
    found = outline(name)
    assert sum(p.numel() for p in found.pretrained.parameters()) == n * block + outside == total
    assert found.latent_shape == (16, 21, 60, 104) and found.device.type == "meta"
    assert sum(p.numel() for encoder in found.text_modules() for p in encoder.parameters()) == 5_680_910_336, "UMT5-XXL"


def test_a_full_size_pass_by_hand():
    """Linear layers: 2 a weight and token; attention: 4 T^2 width."""
    recipe = dmd2(Common(steps=1, batch=1, critic_updates=1, lora_rank=32), iterations=1)
    found = Model(recipe, Execution(device="meta").place(outline("1.3B")), Execution(device="meta")).trace(recipe.stages[0])
    d, f, t, s = 1536, 8960, 21 * 30 * 52, 512
    block = 2 * t * (6 * d * d + 2 * d * f) + 2 * s * 2 * d * d + 4 * t * d * (t + s)
    assert found.flops["teacher", "forward"] == pytest.approx(2 * 30 * block, rel=0.005), "with the prompt and without"


@pytest.mark.parametrize("make", [tiny_wan_pipeline, tiny_wan22_pipeline, tiny_wan_i2v_pipeline, tiny_sd3_pipeline, tiny_cogvideox_pipeline])
def test_a_folder_is_planned_from_its_configurations_alone(make, tmp_path, capsys):
    """No weights: the folder holds what save_pretrained writes but for them. It costs what the pipeline itself does."""
    size = {tiny_sd3_pipeline: Size(16, 16, 1), tiny_cogvideox_pipeline: Size(32, 32, 9)}.get(make, SIZE)
    make().save_pretrained(tmp_path / "model")
    for file in (tmp_path / "model").rglob("*.safetensors"):
        file.unlink()
    recipe, execution = dmd2(Common(steps=2, batch=2, critic_updates=1), iterations=1), Execution(device="meta")
    found = outline(tmp_path / "model", size)
    traces = [Model(recipe, execution.place(each), execution).trace(recipe.stages[0]) for each in (found, family_of(make(), size))]
    assert traces[0].flops == traces[1].flops
    # buffers apart, which a copy of a network on the meta device may share
    assert sum(traces[0].memory().values()) == pytest.approx(sum(traces[1].memory().values()), rel=0.02)
    assert type(found) is type(family_of(make(), size)) and found.boundary == family_of(make(), size).boundary


def test_models_that_cannot_be_planned_get_one_line(tmp_path, capsys):
    def answer(model) -> str:
        assert main(["plan", "dmd2", "--model", str(model), "--on", "H100"]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        return line

    assert "'15B' is not known (15B/model_index.json is missing); planned are a bundled model" in answer("15B")
    index = tmp_path / "model_index.json"
    index.write_text(json.dumps({"_class_name": "LTXPipeline", "transformer": ["diffusers", "LTXVideoTransformer3DModel"]}))
    assert "it is a LTXPipeline, which no family knows yet" in answer(tmp_path)
    index.write_text(json.dumps({"_class_name": "WanPipeline", "transformer": ["diffusers", "WanTransformer3DModel"]}))
    assert "config.json is missing" in answer(tmp_path)
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text("{}")
    index.write_text(json.dumps({"_class_name": "WanPipeline", "transformer": ["diffusers", "WanTransformer9D"]}))
    assert "_class_name: 'WanTransformer9D' is no part of the installed diffusers" in answer(tmp_path)


# the plan


def table_of(found: Plan) -> str:
    from rich.console import Console

    from instep.cli.plan import beside_table, stage_table

    console = Console(width=200, record=True, file=io.StringIO())
    for one in found.stages:
        console.print(stage_table(one, found.machine))
    console.print(beside_table(found))
    return console.export_text()


def tiny_plan(capacity: float, execution: Execution = Execution(), layers: int = 2, **common: Any) -> Plan:
    def made(**options: Any) -> Recipe:
        return dmd2(Common(**{"steps": 2, "batch": 8, "critic_updates": 1, **common, **options}), iterations=10)

    placed = on_meta(tiny_wan_pipeline(layers=layers), SIZE, execution)
    return plan(made(), placed, execution, Machine(capacity, 1e12, "stated", 1), adapted=lambda: made(lora_rank=RANK))


def test_a_plan_says_whether_it_fits_and_what_would():
    fine = tiny_plan(1e12, layers=1)
    (stage,) = fine.stages
    assert fine.verdict().startswith("fits in 1000 GB: yes, ") and fine.advice == ()
    assert stage.seconds == stage.trace.total_flops / 1e12 and fine.seconds > 10 * stage.seconds
    names = {one.name: one for one in fine.beside}
    assert names.keys() == {"encoding a prompt", "probe", "probe of the teacher", "export"} and names["probe"].times == 1
    assert names["probe of the teacher"].flops > names["probe"].flops > 0
    text = table_of(fine)
    assert "moments of student" in text and "recomputation" in text and "probe of the teacher" in text
    bad = tiny_plan(fine.bytes * 0.8, layers=1)
    assert bad.verdict().startswith("fits in ") and ": no, " in bad.verdict() and bad.advice
    assert "none of the options of training" in tiny_plan(1e3, layers=1).verdict()


@pytest.mark.slow
def test_advice_is_taken_by_train_and_makes_it_fit(monkeypatch):
    """Each is an option of `instep train`; with it, the plan fits."""
    monkeypatch.setattr("instep.planning.plan.asides", lambda *_: ())
    whole = tiny_plan(1e12)
    seen = []
    for share in (0.95, 0.22):
        bad = tiny_plan(share * whole.bytes)
        seen.append(" ".join(bad.advice))
        for advice in bad.advice:
            options = advice.removeprefix("with ").partition(" (")[0].split()
            recipe, args = recipe_args("dmd2", ["--steps", "2", "--batch", "8", "--critic-updates", "1", *options], "train", TrainArgs)
            again = plan(recipe, on_meta(tiny_wan_pipeline(), SIZE, args.execution), args.execution, bad.machine)
            assert max(one.bytes for one in again.stages) <= (1 - HEADROOM) * bad.machine.capacity, advice
    assert all(option in seen[0] for option in ("--checkpointing on", "--micro-batch 4", "--dtype bfloat16", "--offload"))
    assert seen[1].startswith("with --checkpointing on --micro-batch 1 --dtype bfloat16")


def test_a_reward_is_assumed_and_decoding_is_counted():
    recipe = small("dm-align-group", batch=4)
    found = plan(recipe, family().placed("meta"), Execution(), H100, RewardCost(2e9, 0.5))
    align = found.stages[-1]
    assert align.trace.scored == 4 and align.memory["reward model (assumed)"] == 2e9
    assert align.seconds == pytest.approx(align.trace.total_flops / H100.throughput + 4 * 0.5) and ("decoder", "forward") in align.trace.flops


def test_states_are_sharded_and_two_blocks_are_whole():
    """Of 4 devices with 2 of 8 samples each: what one device has of 2 samples, with a quarter of every network's state."""
    few, many = (dmd2(Common(steps=1, batch=n, critic_updates=1), iterations=1) for n in (2, 8))
    (one,), (four,), (whole,) = (
        iterations(recipe, family().placed("meta"), Execution(shard=shard), replace(H100, gpus=n))
        for recipe, shard, n in ((few, "off", 1), (many, "on", 4), (many, "off", 4))
    )
    assert four.memory["moments of student"] == one.memory["moments of student"] / 4 and "two whole blocks of weights" in four.memory
    assert four.memory["activations of student"] == one.memory["activations of student"]
    assert whole.memory == one.memory and one.sent == 0
    # a step of each of the two networks, averaged whole: three quarters twice
    gradients = sum(p.nbytes for p in family().pretrained.parameters())
    assert whole.sent == pytest.approx(2 * 0.75 * 2 * gradients, rel=0.02)
    assert four.sent > 0.75 * 4 * gradients, "the weights of each pass, and the gradients once"
    lora = [dmd2(Common(steps=1, batch=n, critic_updates=1, lora_rank=2), iterations=1) for n in (2, 8)]
    (alone,) = iterations(lora[0], family().placed("meta"), Execution(), H100)
    (adapters,) = iterations(lora[1], family().placed("meta"), Execution(shard="on"), replace(H100, gpus=4))
    for kind, part in (("moments of student", 1), ("frozen weights", 4)):
        assert adapters.memory[kind] == alone.memory[kind] / part


def test_several_numbers_of_devices_are_planned(capsys, monkeypatch):
    monkeypatch.setattr("instep.planning.plan.asides", lambda *_: ())
    assert main(["plan", "dmd2", "--model", NAMES[0], "--batch", "8", "--on", "A100", "--gpus", "2,8", "--shard", "on", "--terms-every", "0"]) == 0
    printed = capsys.readouterr().out
    assert "on each of 2 devices" in printed and "on each of 8 devices" in printed and "sent in an iteration" in printed and "states sharded over 8" in printed
    with pytest.raises(ValueError, match="gpus: '8,x' is not allowed"):
        numbers("8,x")
    with pytest.raises(ValueError, match="8 samples in groups of 1 are 8 groups .* 3 processes"):
        plan(dmd2(Common(steps=1, batch=8), iterations=1), family().placed("meta"), Execution(), replace(H100, gpus=3))


@pytest.mark.parametrize("model", slow_but([NAMES[0], "moving-words"], NAMES))
def test_the_command_plans_every_bundled_model(model, capsys):
    assert main(["plan", "dmd2", "--model", model, "--batch", "8", "--on", "A100"]) == 0
    printed = capsys.readouterr().out
    assert "fits in 80 GB: yes" in printed and "the whole run: about" in printed


@pytest.mark.slow
def test_every_recipe_is_planned_for_the_bundled_model(capsys, monkeypatch):
    from instep.cli import plan as command

    monkeypatch.setattr("instep.planning.plan.asides", lambda *_: ())
    bundled = command.model_of(command.PlanArgs(), command.PlanArgs().model)
    monkeypatch.setattr(command, "model_of", lambda args, name: bundled)
    for name in RECIPES:
        assert main(["plan", name, "--on", "H100", "--terms-every", "0", *([] if name == "apo" else ["--steps", "2"])]) == 0, name
        assert "fits in 80 GB: yes" in capsys.readouterr().out


def test_two_bands_and_uneven_exits_are_averaged():
    """Two experts are trained alike often; exits that groups do not cover evenly are traced one by one."""
    execution = Execution(device="meta")
    recipe = dmd2(Common(steps=4, batch=1, critic_updates=1, guidance=1.0), iterations=1)
    placed = on_meta(tiny_wan_pipeline(), SIZE, execution)
    state = meta_state(recipe, placed, execution)
    found = trace_stage(state, recipe.stages[0], placed)
    one = found.flops["teacher", "forward"]
    assert found.flops["student", "forward"] == pytest.approx(2.5 * one, rel=1e-9), "four levels: 1.5 evaluations before the exit on average"
    two = on_meta(tiny_wan22_pipeline(), SIZE, execution)
    both = trace_stage(meta_state(recipe, two, execution), recipe.stages[0], two)
    assert both.flops["student", "forward"] == pytest.approx(2.5 * one, rel=1e-9)


def test_throughput_is_measured():
    speed = measure_throughput(64, 100, 2, torch.float32, seconds=0.2)
    assert 1e7 < speed < 1e13


def test_errors_name_the_field():
    with pytest.raises(ValueError, match="capacity: 0 is not possible; allowed: positive numbers"):
        Machine(0, 1.0)
    with pytest.raises(ValueError, match="gpus: 0 is not possible"):
        Machine(1.0, 1.0, gpus=0)
    with pytest.raises(ValueError, match="reward: -1 bytes"):
        RewardCost(-1)
    with pytest.raises(ValueError, match="TPU"):
        stated("TPU")
