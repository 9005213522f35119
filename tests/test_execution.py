"""Settings of an execution: what is refused, checkpointing, compilation, attention."""

from __future__ import annotations

import pytest
import torch
from every_recipe import PROMPTS, SIZE, batches_of, family, run_stages, small, state_of
from short_runs import run
from tiny import tiny_wan_pipeline
from torch import nn

from instep.models.wan import WanFamily
from instep.training.execution import LARGE, Execution
from instep.training.options import RunOptions
from instep.training.run import train


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"micro_batch": 0}, "micro_batch: 0 is not allowed; 1 or more rows"),
        ({"dtype": "float16"}, "dtype: 'float16' is not allowed; allowed: bfloat16, float32"),
        ({"checkpointing": True}, "checkpointing: True is not allowed; allowed: auto, on, off"),
        ({"attention": "fastest"}, "attention: 'fastest' is not allowed; allowed: flash, .*_native_cudnn"),
        ({"device": "gpu"}, "device: 'gpu' is not allowed; cpu, cuda, cuda:1 or mps"),
        ({"device": "cuda:77"}, "device: cuda:77 is not there; this machine has"),
    ],
)
def test_settings_that_cannot_be(given, message):
    with pytest.raises(ValueError, match=message):
        Execution(**given)


def test_a_run_needs_a_device_with_values_and_the_package_of_its_backend(tmp_path):
    for options, message in (
        ({"device": "meta"}, "device: meta is not allowed for a run: .*cpu, cuda"),
        ({"attention": "flash"}, "attention: flash is not usable here: .*flash-attn.*; usable: .*native"),
    ):
        with pytest.raises(ValueError, match=message) as refused:
            run(WanFamily(tiny_wan_pipeline(), SIZE, name="tiny"), tmp_path / "a", **options)
        assert "\n" not in str(refused.value) and not (tmp_path / "a").exists()
    Execution(attention="native").check()


def test_checkpointing_follows_the_size():
    with torch.device("meta"):
        large, little = nn.Linear(LARGE // 1000 + 1, 1000), nn.Linear(10, 10)
    assert [Execution().checkpoints(net) for net in (large, little)] == [True, False]
    assert Execution(checkpointing="on").checkpoints(little) and not Execution(checkpointing="off").checkpoints(large)


@pytest.mark.parametrize("rank", [None, pytest.param(4, marks=pytest.mark.slow)])
def test_compiled_blocks_compute_the_same(rank, monkeypatch):
    """Traced, and run by PyTorch itself: with adapters, checkpointing and a condition that blocks read; no variant is left uncompiled."""
    import torch._dynamo

    from instep.training import execution as module

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(module, "COMPILE", {"backend": "eager"})
    logs = []
    for compiled in (False, True):
        execution = Execution(compile=compiled, checkpointing="on")
        placed = execution.place(WanFamily(tiny_wan_pipeline(layers=1), SIZE, name="tiny"))
        recipe = small("dm-align-group", lora_rank=rank)
        logs.append(run_stages(recipe, state_of(recipe, placed, execution), batches_of(placed)))
    frames = torch._dynamo.utils.counters["frames"]
    assert logs[0] == logs[1] and frames["ok"] == frames["total"] >= 4 and not torch._dynamo.utils.counters["graph_break"]


def test_the_attention_backend_is_that_of_the_run_alone(tmp_path):
    from diffusers.models import attention_dispatch

    before, seen = attention_dispatch._AttentionBackendRegistry.get_active_backend()[0], set()

    def reward(media, prompts):
        seen.add(attention_dispatch._AttentionBackendRegistry.get_active_backend()[0].value)
        return media.mean((1, 2, 3, 4))

    options = RunOptions(save_every=50, probe_every=50, execution=Execution(attention="_native_math"))
    recipe = small("dm-align-group")
    train(recipe, family(), out=tmp_path / "a", prompts=PROMPTS, reward=reward, options=options)
    assert seen == {"_native_math", before.value} and attention_dispatch._AttentionBackendRegistry.get_active_backend()[0] == before
