"""The bundled pipeline: its files are those that were measured, and it draws what prompts say."""

import json

import torch
from pretrain.files import checksums
from pretrain.measure import Sampler

from instep.bundled.classifiers import FOLDER, load_classifier
from instep.bundled.digits import full_prompts

torch.set_num_threads(1)
ASSETS = FOLDER.parent


def test_files_are_the_ones_that_were_measured_and_stay_small():
    about = json.loads((ASSETS / "pretrain.json").read_text())
    # what was measured of the model afterwards ships beside it, under fingerprints of its own (test_baselines.py)
    measured = {"baselines.json", "teacher_probe.json"}
    assert {name: digest for name, digest in checksums(ASSETS).items() if name not in measured} == about["sha256"]
    assert sum(f.stat().st_size for f in ASSETS.rglob("*") if f.is_file()) < 8_000_000
    assert about["seed"] == 0 and set(about["seconds"]) == {"vae", "classifier-training", "classifier-monitor", "classifier-heldout", "teacher", "measure"}


def test_the_stock_pipeline_loads_it_and_its_videos_show_what_prompts_say():
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(ASSETS, torch_dtype=torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    prompts = full_prompts()[::5]
    x = torch.randn(len(prompts), 16, 3, 6, 6, generator=torch.Generator().manual_seed(4))
    call = {"height": 48, "width": 48, "num_frames": 9, "num_inference_steps": 8, "guidance_scale": 3.0, "max_sequence_length": 512}
    stock = pipe(prompts, latents=x, output_type="pt", **call).frames.transpose(1, 2)
    hits = load_classifier("heldout").correct(stock, prompts)
    assert hits.both.float().mean() > 0.8
    # the batched sampler of the measurement makes the same videos
    sampler = Sampler(pipe)
    ours = sampler(prompts, sampler.stock_levels(8), 3.0, seed=4)
    assert (ours - stock).abs().max() < 2e-3
