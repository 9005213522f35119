"""Batches and groups larger than a micro-batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partialmethod

import pytest
import torch
from every_recipe import PROMPTS, SIZE, batches_of, family, small, state_of
from fast import slow_but
from short_runs import QUICK
from tiny import tiny_wan_pipeline
from torch import Tensor, nn

from instep.core.rows import by_rows, joined, slices
from instep.models.wan import WanFamily
from instep.rewards.base import FunctionReward
from instep.rewards.decoded import make_reward_grad_fn
from instep.training.execution import Execution
from instep.training.probe import Probe
from instep.training.run import train
from instep.training.state import TrainedParams
from instep.training.step import iteration


def test_slices_cover_all_rows_once():
    assert slices(5, 2) == [slice(0, 2), slice(2, 4), slice(4, 5)] and slices(5, None) == [slice(0, 5)] == slices(5, 9)
    with pytest.raises(ValueError, match="micro_batch: 0"):
        slices(5, 0)


def test_rows_a_few_at_a_time_give_the_same_gradient_with_the_graph_of_a_few():
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x = torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    alive, most = 0, 0

    def seen(rows: slice) -> Tensor:
        nonlocal alive, most
        alive += 1
        most = max(most, alive)
        return net(x[rows])

    def finished(*_: object) -> None:
        nonlocal alive
        alive = 0

    net[0].weight.register_post_accumulate_grad_hook(finished)
    whole = torch.autograd.grad(net(x).square().sum(), (x, *net.parameters()))
    output = joined(seen, 7, 2)
    alive = most = 0
    output.square().sum().backward()
    got = [x.grad, *(p.grad for p in net.parameters())]
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(whole, got, strict=True)) and most <= 1 + len(slices(7, 2))
    with torch.no_grad():
        assert len(by_rows(seen, 7, 3)) == 3


@pytest.mark.parametrize("micro_batch", [1, 2, 8])
def test_a_reward_that_draws_draws_the_same_when_it_is_computed_again(micro_batch):
    """A weight for each sample from the host's generator: the gradient of a sum is those weights, whatever the slices are."""

    class Latents:
        def decode(self, x: Tensor) -> Tensor:
            return x

    decoder = Latents()
    decoder.micro_batch = micro_batch
    reward = FunctionReward(lambda media, prompts: torch.rand(len(media)) * media.mean((1, 2, 3)), "random weights", differentiable=True)
    scores = make_reward_grad_fn(decoder, reward)
    x = torch.ones(8, 3, 2, 2, requires_grad=True)
    torch.manual_seed(0)
    scores(x, ["a"] * 8).sum().backward()
    after = torch.rand(1)
    torch.manual_seed(0)
    weights = torch.rand(8)
    assert torch.allclose(x.grad.sum((1, 2, 3)), weights) and torch.equal(after, torch.rand(1)), "the caller's stream goes on as if nothing was computed twice"


def double(pipe):
    for part in (pipe.transformer, pipe.vae, pipe.text_encoder):
        part.double()
    return pipe


def gradients(name: str, micro_batch: int | None, make: Callable[[], WanFamily], **common) -> dict[str, Tensor]:
    """Gradients of all trained roles after the last stage's backward passes, unclipped."""
    placed = make().placed("cpu", None, micro_batch)
    recipe = small(name, batch=8, **common)
    state = state_of(recipe, placed)
    found: dict[str, Tensor] = {}

    def taking(role: str, trained: TrainedParams) -> Callable[..., tuple[Tensor, Tensor]]:
        def step(lr: float, optim: object = None) -> tuple[Tensor, Tensor]:
            found.update({f"{role}.{key}": p.grad.clone() for key, p in trained.masters.items() if p.grad is not None})
            trained.optimizer.zero_grad()
            return torch.zeros(()), torch.ones((), dtype=torch.bool)

        return step

    for role, trained in state.trained.items():
        if getattr(state.roles.get(role), "exits", None) is not None:
            state.roles[role].exits.to(placed.dtype)
        trained.step = taking(role, trained)  # type: ignore[method-assign]
    stage = recipe.stages[-1] if name != "apo" else recipe.stages[0]
    iteration(state, stage, batches_of(placed).next(stage), 0.0)
    return found


# all but DOLLAR, whose latent reward model is in float32
CHUNKED = ("dm-align-group", "flow-grpo", "dance-grpo", "amd", "refl", "flow-dpo", "draft", "dmdr", "dmd2", "apo")


@pytest.fixture
def groups_of_eight(monkeypatch):
    import every_recipe

    changed = {name: {**own, "group": 8} if "group" in own else own for name, own in every_recipe.STAGES.items()}
    # a discriminator's head is in float32
    changed["dmd2"] = {}
    monkeypatch.setattr(every_recipe, "STAGES", changed)


@pytest.fixture
def all_in_float64(monkeypatch):
    from diffusers.models.normalization import FP32LayerNorm

    from instep.diffusion import noise, rollout

    monkeypatch.setattr(FP32LayerNorm, "forward", lambda self, x: nn.functional.layer_norm(x.double(), self.normalized_shape, self.weight, self.bias, self.eps))
    monkeypatch.setattr(rollout, "randn", lambda shape, rng, device, dtype=torch.float64: noise.randn(shape, rng, device, torch.float64))


@pytest.mark.parametrize("name", slow_but(("dm-align-group", "flow-grpo", "refl", "dmd2", "flow-dpo"), CHUNKED))
def test_a_group_may_be_larger_than_a_micro_batch(name, groups_of_eight, all_in_float64):
    """The gradient of a batch of 8 (one group of 8, where there are groups) in micro-batches of 1, 2 and 8 rows, in float64."""

    def make() -> WanFamily:
        return WanFamily(double(tiny_wan_pipeline()), SIZE, name="tiny")

    whole = gradients(name, None, make)
    assert whole and any(g.abs().max() > 0 for g in whole.values())
    for micro_batch in (1, 2, 8):
        parts = gradients(name, micro_batch, make)
        assert parts.keys() == whole.keys()
        for key, g in whole.items():
            assert (parts[key] - g).abs().max() <= 1e-10 * max(1.0, float(g.abs().max())), (micro_batch, key)


@pytest.mark.parametrize("name", ["dm-align-group", "flow-grpo", "refl", "dollar"])
def test_micro_batches_in_float32(name, groups_of_eight):
    """The same in float32, where sums in another order differ by rounding: at most 1e-4 of the largest gradient."""
    whole, parts = gradients(name, None, family), gradients(name, 2, family)
    largest = max(float(g.abs().max()) for g in whole.values())
    assert max(float((parts[key] - g).abs().max()) for key, g in whole.items()) <= 1e-4 * largest


class Counted:
    """The most rows that a family's network, decoder, encoder, a reward and a monitor were given at once."""

    def __init__(self, placed) -> None:
        self.most: dict[str, int] = {}
        for name, x in (("forward", 1), ("decode_rows", 0), ("encode_rows", 0)):
            setattr(placed, name, self._counting(name, getattr(placed, name), x))

    def _counting(self, name: str, function: Callable, position: int) -> Callable:
        def call(*args):
            self.note(name, len(args[position]))
            return function(*args)

        return call

    def note(self, name: str, rows_: int) -> None:
        self.most[name] = max(self.most.get(name, 0), rows_)


FEW_ROWS = (("dmd2", 1), ("flow-grpo", 1), ("dm-align-group", 3))


@pytest.mark.parametrize(
    ("name", "micro_batch"),
    slow_but(FEW_ROWS, [*FEW_ROWS, *((name, 1) for name in ("refl", "dollar", "apo", "dmd", "dm-align-group"))]),
)
def test_no_forward_decode_or_reward_sees_more_rows_than_a_micro_batch(name, micro_batch, tmp_path, monkeypatch):
    """A whole run: rollouts, critics, rewards, probes, views, the teacher's samples and the export's check."""
    counted: Counted | None = None
    place = WanFamily.placed

    def placed(self, *args, **kwargs):
        nonlocal counted
        other = place(self, *args, **kwargs)
        seen = Counted(other)
        seen.most = counted.most if counted else seen.most
        counted = seen
        return other

    def brightness(media: Tensor, prompts) -> Tensor:
        assert counted is not None
        counted.note("reward", len(media))
        return media.mean((1, 2, 3, 4))

    class Monitor:
        def metrics(self, media, prompts):
            assert counted is not None
            counted.note("monitor", len(media))
            return {"monitor_both": float(media.mean())}

    monkeypatch.setattr(WanFamily, "placed", placed)
    monkeypatch.setattr(Probe, "teacher", partialmethod(Probe.teacher, steps=2))
    lent = family()
    reward = FunctionReward(brightness, "brightness", differentiable=True)
    source = batches_of(lent)
    options = replace(QUICK, execution=Execution(micro_batch=micro_batch))
    train(small(name), lent, out=tmp_path / "run", prompts=PROMPTS, reward=reward, monitor=Monitor(), pairs=source.pairs, options=options)
    assert counted is not None and max(counted.most.values()) <= micro_batch, counted.most
    assert {"forward", "decode_rows", "monitor"} <= counted.most.keys()


def test_large_latents_are_decoded_frame_by_frame_for_their_gradient(monkeypatch):
    """The same video and gradient, and a graph that holds less."""
    from instep.models import wan_vae

    placed, kept, gradients_ = family(), [], []
    for whole in (2**18, 0):
        monkeypatch.setattr(wan_vae, "WHOLE", whole)
        x = torch.randn(1, *placed.latent_shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
        held: dict[int, int] = {}

        def pack(tensor: Tensor, held=held) -> Tensor:
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            media = placed.decode(x)
        media.square().mean().backward()
        kept.append(sum(held.values()))
        gradients_.append((media.detach(), x.grad))
    assert all(torch.equal(a, b) for a, b in zip(*gradients_, strict=True)) and kept[1] < 0.7 * kept[0], kept
