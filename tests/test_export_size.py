"""Exports at the size of real models: what they hold in memory, and that the files are those that stock diffusers would write."""

from __future__ import annotations

import copy
import json
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
from fast import slow_but
from live_tensors import live_bytes
from safetensors.torch import load_file, save_file
from tiny import FRAMES, HEIGHT, WIDTH, tiny_sd3_pipeline, tiny_wan22_pipeline, tiny_wan_pipeline

from instep.core.size import Size
from instep.data.prompt import Prompt
from instep.diffusion.levels import few_step_levels
from instep.diffusion.sampling import Sampling
from instep.export import weights
from instep.export.load import load_pipeline, narrow_networks, widened
from instep.export.rules import check_adapter
from instep.export.weights import write_pipeline
from instep.methods.role_config import AdamWConfig, LoRA
from instep.models.backbone import Backbone
from instep.models.families import family_of
from instep.models.role import Role
from instep.models.wan import WanFamily
from instep.training.build import averaged
from instep.training.finish import export_role
from instep.training.state import TrainedParams

SIZE = Size(HEIGHT, WIDTH, FRAMES)
LEVELS = few_step_levels(2, 5.0)
DTYPES = (None, torch.float16, torch.bfloat16)


@cache
def heavy_pipeline():
    """`tiny_wan_pipeline` with a transformer next to which activations, text encoder and VAE are small: 177 MB. Families borrow it."""
    from diffusers import WanPipeline, WanTransformer3DModel

    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=256,
        in_channels=16,
        out_channels=16,
        text_dim=16,
        freq_dim=32,
        ffn_dim=2048,
        num_layers=10,
        rope_max_seq_len=32,
    )
    return WanPipeline(**{**tiny_wan_pipeline().components, "transformer": transformer.eval()})


def student_of(family, lora: bool) -> Role:
    if not lora:
        return Role("student", Backbone(family, family.new_backbone()))
    backbone = Backbone(family, family.pretrained)
    backbone.add_adapter("student", LoRA(2, 4.0))
    for p in backbone.adapter_parameters("student").values():
        torch.nn.init.normal_(p, std=0.02)
    return Role("student", backbone, adapter="student")


def exported(role: Role, out: Path, dtype: torch.dtype | None = None, sampling: Sampling | None = None):
    family = role.backbone.family
    about = {"recipe": "dmd2", "seed": 0, "prompts": 1, "example": Prompt("a seven"), "command": "instep"}
    return export_role(role, family, sampling or Sampling(LEVELS), out, **about, dtype=dtype, overwrite=True)


def tensors_of(role: Role) -> list[torch.Tensor]:
    modules = [part for part in role.backbone.family.pipe.components.values() if isinstance(part, torch.nn.Module)]
    return [x for module in (*modules, role.backbone.module) for x in (*module.parameters(), *module.buffers())]


def size_of(module: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


@pytest.mark.parametrize("kind", slow_but(["many-step"], ["full copy", "LoRA", "many-step"]))
def test_an_export_holds_one_more_copy_of_the_network(tmp_path, kind):
    """The copy is that of the check, which loads the folder. (Before: 4.4 copies.)"""
    role = student_of(WanFamily(heavy_pipeline(), SIZE), kind == "LoRA")
    sampling = Sampling(LEVELS, "ode", 5.0) if kind == "many-step" else None
    with live_bytes(tensors_of(role)) as live:
        exported(role, tmp_path / "student", sampling=sampling)
    assert 0.9 < live.peak / size_of(role.backbone.family.pipe.transformer) <= 1.1


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_an_average_is_exported_without_a_copy_of_the_live_weights(tmp_path, lora):
    role = student_of(WanFamily(heavy_pipeline(), SIZE), lora)
    trained = TrainedParams(role.named_parameters(), AdamWConfig(1e-3), ema=0.9)
    live_weights = {key: p.detach().clone() for key, p in role.named_parameters().items()}
    for p in trained.ema.values():
        p.mul_(0.9)
    average = {key: p.clone() for key, p in trained.ema.items()}
    with live_bytes([*tensors_of(role), *trained.ema.values(), *live_weights.values(), *average.values()]) as live, averaged(trained):
        exported(role, tmp_path / "student")
    assert live.peak / size_of(role.backbone.family.pipe.transformer) <= 1.1
    assert all(torch.equal(p, live_weights[key]) for key, p in role.named_parameters().items())
    assert all(torch.equal(p, average[key]) for key, p in trained.ema.items())
    if not lora:
        saved = load_file(tmp_path / "student" / "transformer" / "diffusion_pytorch_model.safetensors")
        assert all(torch.equal(saved[key], value) for key, value in average.items())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("lora", [False, True])
def test_another_dtype_takes_no_more(tmp_path, lora, dtype):
    role = student_of(WanFamily(heavy_pipeline(), SIZE), lora)
    with live_bytes(tensors_of(role)) as live:
        exported(role, tmp_path / "student", dtype)
    assert 0.9 < live.peak / size_of(role.backbone.family.pipe.transformer) <= 1.1, "one copy in float32; the file is cast a tensor at a time"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("make", [tiny_wan_pipeline, tiny_wan22_pipeline, tiny_sd3_pipeline])
def test_the_check_loads_what_stock_diffusers_loads(tmp_path, make, dtype):
    from diffusers import DiffusionPipeline

    family = family_of(make())
    network = family.new_backbone()
    write_pipeline(tmp_path, family.pipeline(family.parts(network)), check_adapter(family, network, None), dtype)
    ours, stock = load_pipeline(tmp_path, "cpu"), DiffusionPipeline.from_pretrained(tmp_path, dtype=torch.float32)
    networks = [name for name, part in stock.components.items() if isinstance(part, torch.nn.Module)]
    assert {name for name in networks if not name.startswith("text_encoder")} == narrow_networks(tmp_path).keys()
    for name in networks:
        one, other = (getattr(pipe, name) for pipe in (ours, stock))
        assert type(one) is type(other) and one.training == other.training
        if name in narrow_networks(tmp_path):
            assert {**one.config, "_name_or_path": ""} == {**other.config, "_name_or_path": ""}
        mine, theirs = ({**dict(net.named_parameters()), **dict(net.named_buffers())} for net in (one, other))
        assert mine.keys() == theirs.keys()
        assert all(mine[key].dtype == theirs[key].dtype and torch.equal(mine[key], theirs[key]) for key in theirs), name


def test_a_folder_whose_files_do_not_fit_the_network_is_refused(tmp_path):
    from diffusers import WanTransformer3DModel

    family = WanFamily(tiny_wan_pipeline(), SIZE)
    network = family.new_backbone()
    write_pipeline(tmp_path, family.pipeline(family.parts(network)), check_adapter(family, network, None), torch.bfloat16)
    folder = tmp_path / "transformer"
    file = folder / "diffusion_pytorch_model.safetensors"
    there = load_file(file)
    save_file({key: value for key, value in there.items() if key != "proj_out.bias"}, file)
    with pytest.raises(ValueError, match="lacks proj_out.bias"):
        widened(folder, WanTransformer3DModel)
    save_file({**there, "extra": torch.ones(2)}, file)
    with pytest.raises(ValueError, match="holds extra"):
        widened(folder, WanTransformer3DModel)
    save_file(there, file)
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(ValueError, match="ends within"):
        widened(folder, WanTransformer3DModel)


@pytest.mark.parametrize(("lora", "dtype"), slow_but([(False, None), (True, torch.float16), (False, torch.bfloat16)], product((False, True), DTYPES)))
def test_writing_holds_a_few_tensors(tmp_path, lora, dtype):
    role = student_of(WanFamily(heavy_pipeline(), SIZE), lora)
    family, network = role.backbone.family, role.backbone.module
    largest = max(p.numel() * p.element_size() for p in network.parameters())
    with live_bytes(tensors_of(role)) as live:
        write_pipeline(tmp_path, family.pipeline(family.parts(network)), check_adapter(family, network, role.adapter), dtype)
    assert live.peak <= 3 * largest < 0.15 * size_of(family.pipe.transformer)


def reference(family, network, dtype, out: Path) -> None:
    """What stock diffusers writes of copies, which are cast before."""
    pipe = family.pipeline(family.parts(network))
    pipe = type(pipe)(
        **{name: copy.deepcopy(part) if isinstance(part, torch.nn.Module) else part for name, part in pipe.components.items()},
        **{key: pipe.config[key] for key in ("boundary_ratio",) if key in pipe.config},
    )
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module) and dtype is not None:
            keep = type(part)._keep_in_fp32_modules or ()
            for name, p in part.named_parameters():
                p.data = p.data if any(word in name.split(".") for word in keep) else p.data.to(dtype)
    pipe.save_pretrained(out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", [tiny_wan_pipeline, tiny_wan22_pipeline, tiny_sd3_pipeline])
def test_the_files_are_those_of_stock_diffusers(tmp_path, make, dtype):
    family = family_of(make())
    network = family.new_backbone()
    write_pipeline(tmp_path / "ours", family.pipeline(family.parts(network)), check_adapter(family, network, None), dtype)
    reference(family, network, dtype, tmp_path / "stock")
    theirs = {path.relative_to(tmp_path / "stock") for path in (tmp_path / "stock").rglob("*") if path.is_file()}
    assert {path.relative_to(tmp_path / "ours") for path in (tmp_path / "ours").rglob("*") if path.is_file()} == theirs
    for path in theirs:
        one, other = tmp_path / "ours" / path, tmp_path / "stock" / path
        if path.suffix == ".safetensors":
            ours, stock = load_file(one), load_file(other)
            assert ours.keys() == stock.keys()
            assert all(ours[key].dtype == stock[key].dtype and torch.equal(ours[key], stock[key]) for key in stock), path
        elif path.suffix == ".json":
            private = {"_name_or_path"}
            ours, stock = ({k: v for k, v in json.loads(file.read_text()).items() if k not in private} for file in (one, other))
            assert ours == stock, path


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_shards_have_diffusers_names_and_load(tmp_path, monkeypatch, dtype):
    from diffusers import WanTransformer3DModel
    from transformers import UMT5EncoderModel

    monkeypatch.setattr(weights, "SHARD_BYTES", 20_000)
    family = WanFamily(tiny_wan_pipeline(), SIZE)
    report = exported(student_of(family, False), tmp_path / "student", dtype)
    folder = report.folder / "transformer"
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    n = len(files)
    assert n > 3 and files == [f"diffusion_pytorch_model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]
    held = {name: load_file(folder / name) for name in files}
    assert all(sum(x.numel() * x.element_size() for x in shard.values()) <= 20_000 or len(shard) == 1 for shard in held.values())
    index = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["weight_map"] == {key: name for name, shard in held.items() for key in shard}
    assert index["metadata"]["total_size"] == sum(x.numel() * x.element_size() for shard in held.values() for x in shard.values())
    loaded = WanTransformer3DModel.from_pretrained(folder, dtype=torch.float32)
    expected = family.pretrained.state_dict()
    keep = WanTransformer3DModel._keep_in_fp32_modules
    for key, value in loaded.state_dict().items():
        rounded = expected[key] if dtype is None or any(word in key.split(".") for word in keep) else expected[key].to(dtype).float()
        assert torch.equal(value, rounded), key
    encoder = report.folder / "text_encoder"
    assert len(list(encoder.glob("model-*-of-*.safetensors"))) > 1
    text = json.loads((encoder / "model.safetensors.index.json").read_text())
    assert text["metadata"]["total_size"] == sum(x.numel() * x.element_size() for f in encoder.glob("*.safetensors") for x in load_file(f).values())
    assert UMT5EncoderModel.from_pretrained(encoder, dtype=torch.float32).shared.weight.isfinite().all()


def test_a_merge_is_rounded_once(tmp_path):
    """W + (alpha / r) B A of bfloat16 weights in float32: the file holds the sum, not the sum rounded to bfloat16."""
    role = student_of(WanFamily(tiny_wan_pipeline().to(torch.bfloat16), SIZE), True)
    plain = check_adapter(role.backbone.family, role.backbone.module, "student")["transformer"]["blocks.0.attn1.to_q.weight"]
    layer = role.backbone.module.blocks[0].attn1.to_q
    a, b = layer.lora_A["student"].weight.float(), layer.lora_B["student"].weight.float()
    expected = layer.base_layer.weight.float() + 2.0 * b @ a
    torch.testing.assert_close(plain.value(torch.float32), expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(plain.value(), plain.value(torch.float32).bfloat16())
    assert not torch.equal(plain.value(torch.float32), plain.value().float())


@pytest.mark.parametrize("lora", [False, True])
def test_a_student_in_bfloat16_is_compared_in_bfloat16(tmp_path, lora):
    """Its folder holds the same weights, so nothing differs; the sampler is compared in float32, as ever."""
    pipe = tiny_wan_pipeline().to(torch.bfloat16)
    pipe.transformer.rope = tiny_wan_pipeline().transformer.rope  # from_pretrained leaves the frequencies wide
    role = student_of(WanFamily(pipe, SIZE), lora)
    report = exported(role, tmp_path / "student")
    assert load_file(report.folder / "transformer" / "diffusion_pytorch_model.safetensors")["proj_out.weight"].dtype == torch.bfloat16
    assert report.sampler_difference < 1e-5
    assert report.student_difference == 0 if not lora else 0 < report.student_difference < 0.1


def test_the_students_weights_and_hooks_stay_as_they_are(tmp_path):
    role = student_of(WanFamily(tiny_wan_pipeline(), SIZE), True)
    module = role.backbone.module
    before = {key: (value.clone(), value.data_ptr()) for key, value in module.state_dict().items()}
    processors, grads = list(module.attn_processors.values()), {key: p.requires_grad for key, p in module.named_parameters()}
    exported(role, tmp_path / "student", torch.float16)
    assert {key: value.data_ptr() for key, value in module.state_dict().items()} == {key: at for key, (_, at) in before.items()}
    assert all(torch.equal(value, before[key][0]) for key, value in module.state_dict().items())
    assert list(module.attn_processors.values()) == processors and {key: p.requires_grad for key, p in module.named_parameters()} == grads
