"""What the loader does not understand it refuses, before a weight is read, in one line with the fix."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fast import slow_but
from safetensors.torch import load_file, save_file
from tiny import FRAMES, HEIGHT, WIDTH, tiny_cogvideox_pipeline, tiny_wan_pipeline
from tiny_families import tiny_sdxl_pipeline
from torch import nn

from instep import models
from instep.bundled import load
from instep.cli.main import main
from instep.core.size import Size
from instep.models.families import family_of
from instep.models.index import INDEX

SIZE = Size(HEIGHT, WIDTH, FRAMES)
TRANSFORMER, ENCODER = "transformer/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "wan"
    tiny_wan_pipeline().save_pretrained(path)
    return path


@pytest.fixture
def folder(whole, tmp_path):
    """A copy whose files can be changed."""
    return Path(shutil.copytree(whole, tmp_path / "wan"))


def without_scheduler(folder: Path) -> None:
    (folder / "scheduler" / "scheduler_config.json").unlink()


def without_config(folder: Path) -> None:
    (folder / "vae" / "config.json").unlink()


def without_weights(folder: Path) -> None:
    (folder / ENCODER).unlink()


def pickled(folder: Path) -> None:
    without_weights(folder)
    (folder / "text_encoder" / "pytorch_model.bin").write_bytes(b"whatever")


def variant_alone(folder: Path) -> None:
    (folder / TRANSFORMER).rename(folder / "transformer" / "diffusion_pytorch_model.fp16.safetensors")


def without_a_shard(folder: Path) -> None:
    (folder / TRANSFORMER).rename(folder / "transformer" / "diffusion_pytorch_model-00001-of-00002.safetensors")
    shards = {"a": "diffusion_pytorch_model-00001-of-00002.safetensors", "b": "diffusion_pytorch_model-00002-of-00002.safetensors"}
    (folder / f"{TRANSFORMER}.index.json").write_text(json.dumps({"weight_map": shards}))


def cut_short(folder: Path) -> None:
    os.truncate(folder / TRANSFORMER, (folder / TRANSFORMER).stat().st_size - 1)


def cut_in_the_header(folder: Path) -> None:
    os.truncate(folder / TRANSFORMER, 100)


def of_lfs(folder: Path) -> None:
    (folder / TRANSFORMER).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def without_a_tensor(folder: Path, file: str = TRANSFORMER, name: str = "proj_out.bias") -> None:
    tensors = load_file(folder / file)
    del tensors[name]
    save_file(tensors, folder / file, {"format": "pt"})


def without_an_encoder_s_tensor(folder: Path) -> None:
    without_a_tensor(folder, ENCODER, "encoder.final_layer_norm.weight")


def of_another_shape(folder: Path) -> None:
    tensors = load_file(folder / TRANSFORMER)
    save_file({**tensors, "proj_out.bias": torch.zeros(3)}, folder / TRANSFORMER, {"format": "pt"})


def transformer_alone(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and path.name != "transformer":
            shutil.rmtree(path)
    (folder / INDEX).unlink()
    for path in (folder / "transformer").iterdir():
        path.rename(folder / path.name)


def single_file_in_it(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (folder / "wan.safetensors").write_bytes(b"")


BROKEN: dict[Callable[[Path], None], str] = {
    without_scheduler: r"scheduler lacks scheduler_config.json; copy or download it again",
    without_config: r"vae lacks config.json; copy or download it again",
    without_weights: r"text_encoder/model.safetensors is missing; copy or download it again",
    pickled: r"text_encoder/model.safetensors is missing, and pytorch_model.bin beside it is a pickle, which is never opened; download",
    variant_alone: r"transformer holds the variant fp16 alone, .*fp16.safetensors; load it with --variant fp16 \(variant='fp16'\)",
    without_a_shard: r"diffusion_pytorch_model-00002-of-00002.safetensors is missing, which the index",
    cut_short: r"transformer/diffusion_pytorch_model.safetensors ends too early, after \d+ bytes; copy or download it again",
    cut_in_the_header: r"transformer/diffusion_pytorch_model.safetensors ends too early, after 100 bytes",
    of_lfs: r"diffusion_pytorch_model.safetensors is a pointer of Git LFS.*git lfs pull",
    without_a_tensor: r"transformer lacks proj_out.bias, which a WanTransformer3DModel of its config.json has",
    without_an_encoder_s_tensor: r"text_encoder lacks encoder.final_layer_norm.weight, which a UMT5EncoderModel",
    of_another_shape: r"transformer cannot be loaded as a WanTransformer3DModel: .*proj_out.bias",
    transformer_alone: r"is not a model folder but holds a WanTransformer3DModel alone; put it in its place in a copy of its pipeline's folder",
    single_file_in_it: r"model_index.json is missing\); open wan.safetensors in diffusers \(from_single_file\), save_pretrained\(FOLDER\)",
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_folder_that_is_not_whole_is_refused(broken, folder):
    broken(folder)
    with pytest.raises(ValueError, match=f"^(model|weights): .*{BROKEN[broken]}") as error:
        models.load(folder, SIZE)
    assert "\n" not in str(error.value)


def test_names_and_files_are_refused_with_the_way_to_a_folder(folder, tmp_path, capsys):
    with pytest.raises(ValueError, match="on the hub: hf download Wan-AI/Wan2.1-T2V-1.3B-Diffusers --local-dir Wan2.1-T2V-1.3B-Diffusers, then give Wan2.1"):
        load("Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    with pytest.raises(ValueError, match="is a file, and a model is a folder; open a single-file checkpoint in diffusers"):
        load(folder / TRANSFORMER)
    cut_short(folder)
    (tmp_path / "prompts.txt").write_text("a digit\n")
    assert main(["train", "dmd2", "--model", str(folder), "--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "run")]) == 2
    assert "ends too early" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_variant_is_loaded_where_it_is_asked_for(whole, tmp_path):
    """Parts that have it by their variant, the others as they are."""
    folder = Path(shutil.copytree(whole, tmp_path / "wan"))
    variant_alone(folder)
    family = models.load(folder, SIZE, variant="fp16")
    plain = models.load(whole, SIZE)
    assert family.variant == "fp16" and plain.variant is None
    ours, theirs = family.pretrained.state_dict(), plain.pretrained.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_folder_loads_as_stock_diffusers_loads_it(whole):
    from diffusers import WanPipeline

    stock = WanPipeline.from_pretrained(whole, dtype={"default": torch.bfloat16, "vae": torch.float32}, use_safetensors=True)
    ours = models.load(whole, SIZE, dtype=torch.bfloat16)
    for name in ("transformer", "vae", "text_encoder"):
        mine, theirs = getattr(ours.pipe, name).state_dict(), getattr(stock, name).state_dict()
        assert [(key, p.dtype) for key, p in mine.items()] == [(key, p.dtype) for key, p in theirs.items()], name
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def compiled(pipe) -> None:
    object.__setattr__(pipe, "transformer", torch.compile(pipe.transformer))


def compiled_in_place(pipe) -> None:
    pipe.transformer.blocks[0].compile()


def in_parallel(pipe) -> None:
    object.__setattr__(pipe, "transformer", nn.DataParallel(pipe.transformer))


def by_peft(pipe) -> None:
    from peft import LoraConfig, get_peft_model

    object.__setattr__(pipe, "transformer", get_peft_model(pipe.transformer, LoraConfig(target_modules=["to_q"])))


WRAPPED = {
    compiled: r"torch.compile; give it as it was, pipe.transformer = pipe.transformer._orig_mod.*compile=True",
    compiled_in_place: r"torch.compile, in place; load the pipeline again",
    in_parallel: r"DataParallel; give it as it was, pipe.transformer = pipe.transformer.module",
    by_peft: r"PEFT's PeftModel; merge it, pipe.transformer = pipe.transformer.merge_and_unload",
}


@pytest.mark.parametrize("wrapped", slow_but((in_parallel, by_peft), WRAPPED))  # torch's compiler takes seconds to import
def test_a_wrapped_network_is_refused(wrapped):
    from instep.models.borrow import borrowed_pipeline

    pipe = SimpleNamespace(transformer=nn.Module() if wrapped is in_parallel else tiny_wan_pipeline().transformer, scheduler=None)
    wrapped(pipe)
    pipe.components = {"transformer": pipe.transformer}
    with pytest.raises(ValueError, match=f"pipeline: its transformer is wrapped by {WRAPPED[wrapped]}"):
        borrowed_pipeline(pipe)


def test_a_scheduler_of_another_kind_is_refused():
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

    wan, sdxl, cog = tiny_wan_pipeline(), tiny_sdxl_pipeline(), tiny_cogvideox_pipeline()
    wan.scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    assert family_of(wan, SIZE).shift == 3.0, "as Wan's folders have it"
    for scheduler in (DDIMScheduler(), UniPCMultistepScheduler(), UniPCMultistepScheduler(use_flow_sigmas=True)):
        wan.scheduler = scheduler
        with pytest.raises(ValueError, match=f"scheduler: a {type(scheduler).__name__} is not allowed.*rectified flow.*FlowMatchEulerDiscreteScheduler"):
            family_of(wan, SIZE)
    for pipe in (sdxl, cog):
        pipe.scheduler = FlowMatchEulerDiscreteScheduler()
        with pytest.raises(ValueError, match="scheduler: a FlowMatchEulerDiscreteScheduler.*table.*copy the"):
            family_of(pipe)
