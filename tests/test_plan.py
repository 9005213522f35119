"""The planner's counts against hand numbers and against a real network."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
import torch
from tiny import tiny_wan22_pipeline, tiny_wan_pipeline
from torch import nn

from instep.cli.main import main
from instep.core.size import Size
from instep.models.families import family_of
from instep.models.outline import PUBLISHED, meta_network, outline
from instep.models.wan import WanFamily
from instep.planning.plan import activations, flops, memory, pass_flops, passes, plan
from instep.planning.throughput import measure_throughput, stated
from instep.planning.workload import Workload, recipe_workload, workload

torch.set_num_threads(1)

MID = {
    "num_attention_heads": 4,
    "attention_head_dim": 64,
    "ffn_dim": 1024,
    "num_layers": 8,
    "text_dim": 64,
    "freq_dim": 64,
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": (1, 2, 2),
    "rope_max_seq_len": 64,
}
SIZE = Size(128, 128, 13)  # latents [16, 4, 16, 16], 256 tokens
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]


def mid(layers: int = 8) -> nn.Module:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(**{**MID, "num_layers": layers})


def shapes(config: dict = MID) -> nn.Module:
    return meta_network("WanTransformer3DModel", config)


def of(module: nn.Module, size: Size = SIZE) -> Workload:
    return workload({"transformer": module}, WanFamily.dimensions_of(module, size, {}))


def published(name: str) -> Workload:
    found = outline(name)
    return workload(found.parts, found.dimensions(Size()))


def lines(w: Workload) -> dict[str, float]:
    return {item.name: item.value for item in memory(w)}


def forward(module: nn.Module, batch: int = 2, text: int = 32) -> torch.Tensor:
    device = next(module.parameters()).device
    x, t, c = torch.randn(batch, 16, 4, 16, 16), torch.rand(batch) * 1000, torch.randn(batch, text, 64)
    return module(x.to(device), t.to(device), c.to(device), return_dict=False)[0]


def with_lora(module: nn.Module, rank: int) -> nn.Module:
    from peft import LoraConfig, inject_adapter_in_model

    module.requires_grad_(False)
    return inject_adapter_in_model(LoraConfig(r=rank, target_modules=TARGETS), module, adapter_name="student")


# --------------------------------------------------------------------------------------------------------------- counts


@pytest.mark.parametrize(("name", "total"), [("1.3B", 1_418_996_800), ("14B", 14_288_491_584)])
def test_real_wan_configurations_by_hand(name, total):
    config = PUBLISHED[name][1]["transformer"][1]
    d, f, n = config["num_attention_heads"] * 128, config["ffn_dim"], config["num_layers"]
    attention = 2 * (4 * d * d + 4 * d + 2 * d)  # projections, biases, query and key norms; self and cross
    block = attention + 2 * d * f + f + d + 2 * d + 6 * d  # ffn, the norm before cross-attention, modulation
    text, clock = 4096 * d + d + d * d + d, 256 * d + d + d * d + d + 6 * d * d + 6 * d
    outside = 16 * 4 * d + d + text + clock + d * 64 + 64 + 2 * d
    w = published(name)
    assert w.params == n * block + outside == total
    assert (w.width, w.tokens) == (d, 21 * 30 * 52)


def test_tokens_of_a_video():
    module = shapes()
    assert WanFamily.dimensions_of(module, Size(48, 48, 9), {}).tokens == 3 * 3 * 3
    assert WanFamily.dimensions_of(module, Size(704, 1280, 121), {"scale_factor_spatial": 16}).tokens == 31 * 22 * 40


def test_passes_of_four_step_distribution_matching():
    w = Workload(params=1, tokens=1, width=1, ffn=1, layers=1, levels=4, critic_updates=5, roles="copies", checkpointing=False)

    def count(**changes):
        plain, graph = passes(replace(w, **changes))
        return sum(i.value for i in plain), sum(i.value for i in graph)

    assert count() == (1.5 + 1 + 2, 1 + 5)
    assert count(reuse=False) == (4.5 + 5 * 2.5, 6)  # 23 evaluations: a fresh rollout for every critic update
    assert count(guidance=1.0) == (3.5, 6)
    assert count(needs_final=True) == (3 + 3, 6)
    assert count(needs_final=True, final_live=True) == (4 - 1.75 + 3, 1.75 + 5)
    assert count(needs_final=True, final_live=True, trajectory=True) == (3, 4.75 + 5)
    assert count(levels=1) == (3, 6)
    assert flops(replace(w, accumulate=4)) == 4 * flops(w)
    # in forward equivalents (backward = 2): 22.5 with re-use, 35 without
    forward_flops, both = pass_flops(w)
    assert both == 3 * forward_flops
    assert flops(w) == 22.5 * forward_flops and flops(replace(w, reuse=False)) == 35 * forward_flops
    assert flops(replace(w, batch=3)) == 3 * flops(w)


def test_two_experts_weigh_twice_and_cost_once():
    one, two = (workload({name: shapes() for name in names}, WanFamily.dimensions_of(shapes(), SIZE, {})) for names in (["a"], ["a", "b"]))
    assert (two.experts, two.params, two.lora_params) == (2, 2 * one.params, 2 * one.lora_params)
    for roles in ("copies", "lora"):
        single, double = replace(one, roles=roles, gpus=2), replace(two, roles=roles, gpus=2)
        assert pass_flops(double) == pass_flops(single), "a sample goes through one expert"
        a, b = lines(single), lines(double)
        for name in ("weights", "gradients", "AdamW", "EMA"):
            assert b[name] == 2 * a[name], (roles, name)
        for name in ("activations", "working memory", "gathered weights"):
            assert b[name] == a[name], (roles, name)


def test_a_frozen_expert_is_shared():
    parts = {name: shapes() for name in ("transformer", "transformer_2")}
    two = workload(parts, WanFamily.dimensions_of(shapes(), SIZE, {}))
    half = two.params // 2
    copies = lines(replace(two, roles="copies", frozen_experts=1, bytes_per_parameter=4))
    assert [copies[k] for k in ("weights", "gradients", "AdamW", "EMA")] == [4 * (two.params + 2 * half), 4 * half, 16 * half, 4 * half]
    assert replace(two, frozen_experts=1).lora_params * 2 == two.lora_params
    assert pass_flops(replace(two, frozen_experts=1)) == pass_flops(two)
    from instep.recipes.common import Common
    from instep.recipes.dmd import dmd2

    recipe = dmd2(Common(experts="low", guidance=1.0, guidance_2=3.0))
    planned = recipe_workload(recipe, recipe.stages[-1], two)
    assert planned.frozen_experts == 1 and planned.guidance == 3.0 and {i.name: i.value for i in passes(planned)[0]}["teacher"] == 2
    assert planned.other_plain == 0
    with pytest.raises(ValueError, match="experts: low is not allowed; this model has one network"):
        recipe_workload(recipe, recipe.stages[-1], of(shapes()))
    with pytest.raises(ValueError, match="frozen_experts: 2 of 2"):
        replace(two, frozen_experts=2)


def test_a_folder_of_two_experts_is_planned(tmp_path):
    pipe = tiny_wan22_pipeline()
    pipe.save_pretrained(tmp_path / "wan22")
    found = outline(tmp_path / "wan22")
    fam = family_of(pipe, Size(48, 48, 9))
    base = workload(found.parts, found.dimensions(fam.size))
    assert base == workload(fam.parts(fam.pretrained), fam.dimensions(fam.pretrained)) and base.experts == 2
    assert base.params == sum(p.numel() for part in (pipe.transformer, pipe.transformer_2) for p in part.parameters())


def test_a_folder_is_planned_from_its_configurations_alone(tmp_path):
    """No weights: the folder holds what save_pretrained writes but for them, and its VAE's compression counts."""
    pipe = tiny_wan_pipeline()
    pipe.save_pretrained(tmp_path / "wan")
    for file in (tmp_path / "wan").rglob("*.safetensors"):
        file.unlink()
    found = outline(tmp_path / "wan")
    assert found.family is WanFamily and all(p.is_meta for p in found.parts["transformer"].parameters())
    fam = WanFamily(pipe, Size(48, 48, 9))
    assert workload(found.parts, found.dimensions(fam.size)) == workload(fam.parts(fam.pretrained), fam.dimensions(fam.pretrained))
    config = json.loads((tmp_path / "wan" / "vae" / "config.json").read_text())
    (tmp_path / "wan" / "vae" / "config.json").write_text(json.dumps({**config, "scale_factor_spatial": 4}))
    assert outline(tmp_path / "wan").dimensions(fam.size).tokens == 4 * found.dimensions(fam.size).tokens


def test_models_that_cannot_be_planned_get_one_line(tmp_path, capsys):
    def answer(model) -> str:
        assert main(["plan", "dmd2", "--model", str(model), "--device", "H100"]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        return line

    assert "'15B' is not known (15B/model_index.json is missing); planned are a bundled video model" in answer("15B")
    assert "the passes and memory of a DiTTransformer2DModel were not counted yet; planned are" in answer("digits")
    index = tmp_path / "model_index.json"
    index.write_text(json.dumps({"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}))
    assert "it is a FluxPipeline, which no family knows yet" in answer(tmp_path)
    index.write_text(json.dumps({"_class_name": "WanPipeline", "transformer": ["diffusers", "WanTransformer3DModel"]}))
    assert "config.json is missing" in answer(tmp_path)
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text("{}")
    index.write_text(json.dumps({"_class_name": "WanPipeline", "transformer": ["diffusers", "WanTransformer9D"]}))
    assert "_class_name: 'WanTransformer9D' is no network of the installed diffusers" in answer(tmp_path)


def test_memory_by_hand():
    w = Workload(params=1000, tokens=10, width=4, ffn=8, layers=2, lora_rank=2, bytes_per_parameter=4, roles="copies")
    assert w.lora_params == 2 * 2 * (18 * 4 + 2 * 8)
    got = lines(w)
    assert [got[k] for k in ("weights", "gradients", "AdamW", "EMA")] == [12000, 4000, 16000, 4000]
    lora = lines(replace(w, roles="lora", ema=False))
    assert [lora[k] for k in ("weights", "gradients", "AdamW", "EMA")] == [4 * (1000 + 704), 4 * 352, 16 * 352, 0]
    halved = lines(replace(w, gpus=2))
    assert halved["AdamW"] == 8000 and halved["gathered weights"] == 2 * 500 * 4
    assert halved["activations"] == got["activations"]


# ---------------------------------------------------------------------------------------------------- against a network


@pytest.mark.parametrize("roles", ["copies", "lora"])
def test_states_are_exact(roles):
    """Weights, gradients, moments and average of one trained role, byte for byte."""
    module, rank = mid(), 8
    w = replace(of(module), roles=roles, lora_rank=rank)
    if roles == "lora":
        module = with_lora(module, rank)
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    forward(module).square().mean().backward()
    gradients = sum(p.grad.nbytes for p in trained)
    optimizer.step()
    moments = sum(v.nbytes for s in optimizer.state.values() for k, v in s.items() if k != "step")
    got = lines(w)
    assert got["gradients"] == gradients and got["AdamW"] == 2 * moments and got["EMA"] == sum(p.nbytes for p in trained)
    whole = sum(p.nbytes for p in module.parameters())
    assert got["weights"] == (3 * whole if roles == "copies" else whole + sum(p.nbytes for p in trained))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("roles", ["copies", "lora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_match_what_autograd_keeps(roles, checkpointing, dtype):
    module = mid().to(dtype)
    w = replace(of(module), roles=roles, lora_rank=8, batch=2, text_tokens=32, checkpointing=checkpointing)
    if roles == "lora":
        module = with_lora(module, 8)
    if checkpointing:
        module.train().enable_gradient_checkpointing()
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(x):
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        x, t, c = torch.randn(2, 16, 4, 16, 16), torch.rand(2) * 1000, torch.randn(2, 32, 64)
        module(x.to(dtype), t, c.to(dtype), return_dict=False)
    measured = sum(x.untyped_storage().nbytes() for x in kept.values())
    expected = activations(w)
    if checkpointing:
        # the block that runs again in full appears only during backward
        full = activations(replace(w, checkpointing=False))
        expected -= full - activations(replace(w, checkpointing=False, layers=7))
    print(f"kept {roles} {dtype} checkpointing={checkpointing}: {expected / measured:.3f} of measured")
    assert expected == pytest.approx(measured, rel=0.06)


def test_flops_match_the_counter():
    from torch.utils.flop_counter import FlopCounterMode

    module = shapes()
    w = replace(of(module), roles="copies", checkpointing=False, text_tokens=32, batch=2)
    with FlopCounterMode(display=False) as counter:
        out = forward(module)
        counted = counter.get_total_flops()
        out.sum().backward()
    one, both = pass_flops(w)
    assert 2 * one == pytest.approx(counted, rel=0.03)
    assert 2 * both == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_flops_of_the_real_model_match_the_counter():
    from torch.utils.flop_counter import FlopCounterMode

    module = outline("1.3B").parts["transformer"]
    with FlopCounterMode(display=False) as counter:
        latents = torch.empty(1, 16, 21, 60, 104, device="meta")
        module(latents, torch.empty(1, device="meta"), torch.empty(1, 512, 4096, device="meta"), return_dict=False)
    w = replace(of(module, Size()), roles="copies")
    assert pass_flops(w)[0] == pytest.approx(counter.get_total_flops(), rel=0.005)


# ------------------------------------------------------------------------------------------------------------- the plan


def test_plan_says_whether_it_fits_and_what_would():
    from rich.console import Console

    small = replace(published("1.3B"), bytes_per_parameter=2)
    fine = plan(small, stated("H100"), 80e9)
    assert fine.fits and fine.verdict().startswith("fits in 80 GB: yes, ") and fine.advice == ()
    large = replace(published("14B"), bytes_per_parameter=2, roles="copies")
    bad = plan(large, stated("H100"), 80e9)
    assert not bad.fits and bad.verdict().startswith("fits in 80 GB: no, ") and "with LoRA roles" in bad.verdict()
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(bad.table())
    text = console.export_text()
    assert "three full copies" in text and "passes a sample" in text and "stated" in text
    assert bad.seconds == pytest.approx(bad.flops / (0.4 * 989e12))


def test_workload_of_a_recipe():
    from instep.recipes.common import Common
    from instep.recipes.dm_align import dm_align_group
    from instep.recipes.dmd import dmd2

    base = of(shapes())
    recipe = dmd2(Common(steps=2, guidance=1.0, critic_updates=3, reuse=False, batch=8))
    w = recipe_workload(recipe, recipe.stages[0], base)
    assert (w.levels, w.guidance, w.critic_updates, w.reuse, w.batch, w.needs_final) == (2, 1.0, 3, False, 8, False)
    assert w.roles == "copies" and w.params == base.params
    joint = dm_align_group(Common(lora_rank=16, ema=None))
    align = recipe_workload(joint, joint.stages[1], base)
    assert align.needs_final and align.final_live == ("final" in joint.stages[1].live) and not align.trajectory
    assert (align.roles, align.lora_rank, align.ema) == ("lora", 16, False)


def test_every_kind_of_stage_is_counted():
    """A policy gradient predicts each stochastic step again, guided as the rollout was; a stage that only fits rolls out to the exits."""
    from instep.diffusion.level_windows import Repeated
    from instep.diffusion.levels import Uniform
    from instep.recipes.apo import apo
    from instep.recipes.common import Common
    from instep.recipes.dmdr import dmdr
    from instep.recipes.dollar import dollar
    from instep.recipes.many_step import ManySteps, dance_grpo, flow_grpo

    base = of(shapes())

    def counted(recipe, stage=-1):
        plain, graph = passes(recipe_workload(recipe, recipe.stages[stage], base))
        return {item.name: item.value for item in plain}, {item.name: item.value for item in graph}

    # its KL penalty asks the reference as often
    assert counted(flow_grpo(ManySteps(steps=10, guidance=3.0), kl=0.01)) == ({"rollout": 20, "other terms": 18}, {"other terms": 18})
    plain, graph = counted(dance_grpo(ManySteps(steps=11, guidance=1.0)))
    assert plain == {"rollout": 11} and graph == {"other terms": 6}, "six of ten transitions"
    assert counted(dmdr(Common(steps=4), warm=0, rl="ddpo"))[1] == {"student": 1, "other terms": 2, "critic": 5}
    fit, last = (counted(dollar(Common(steps=2, guidance=3.0), cd_steps=5), stage) for stage in (0, 1))
    assert fit == ({"rollout": 1.5}, {})
    assert last == ({"rollout": 0.5, "fake": 1, "teacher": 2, "other terms": 11}, {"student": 1, "other terms": 1, "critic": 5})
    assert counted(dollar(matching=0, weight=0)) == ({"other terms": 11}, {"other terms": 1})
    # a pair is two samples at each of five levels, and the reference sees them too; ranked pairs are two of a rollout's samples
    pipeline = apo(ManySteps(steps=10, guidance=3.0), skip=0.5, skip_blocks=(1,))
    online, half, offline, distill, post = (counted(pipeline, stage) for stage in range(5))
    assert online == ({"rollout": 20, "other terms": 5}, {"other terms": 5})
    assert half == ({"rollout": 20, "other terms": 10}, {"other terms": 10})
    assert offline == post == ({"other terms": 10}, {"other terms": 10})
    assert distill == ({"other terms": 3}, {"other terms": 1}), "with the prompt, without it, without some blocks"
    distil = pipeline.stages[3].terms[0]
    assert replace(distil, levels=Repeated(Uniform(), 4)).passes(1) == (12, 4), "a window sums as many"
    assert counted(apo(uniform=1))[1] == {"other terms": 2}


def test_throughput_is_measured():
    w = replace(of(shapes()), bytes_per_parameter=4)
    speed = measure_throughput(w, seconds=0.2)
    assert 1e8 < speed < 1e13
    assert plan(w, speed, 1e9, "measured here").pace().endswith("(measured here)")


def test_errors_name_the_field():
    with pytest.raises(ValueError, match="roles: 'qlora'"):
        Workload(params=1, tokens=1, width=1, ffn=1, layers=1, roles="qlora")
    with pytest.raises(ValueError, match="batch: 0"):
        Workload(params=1, tokens=1, width=1, ffn=1, layers=1, batch=0)
    with pytest.raises(ValueError, match="needs_final=True"):
        Workload(params=1, tokens=1, width=1, ffn=1, layers=1, final_live=True)
    with pytest.raises(ValueError, match="TPU"):
        stated("TPU")
