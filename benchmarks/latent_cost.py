"""The gradient of a reward on the embedded default: through a latent reward model, and through decoder and reward in pixel space.

    python benchmarks/latent_cost.py      # a minute; process CPU time, medians of interleaved repetitions

DOLLAR's Table 1, measured here: parameters, what is kept for the backward (bytes, by saved-tensor hooks), time of forward and gradient.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from instep.bundled.worlds import moving_digits
from instep.core.files import write_json
from instep.methods.latent_reward_model import LatentRewardShape

BATCH, REPEATS = 8, 7


def kept(function: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Bytes that a forward keeps for its backward beside parameters and the input: each storage once."""
    own = {x.untyped_storage().data_ptr()}
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own and not tensor.is_leaf:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    alive = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (alive.append(tensor), note(tensor))[1], lambda tensor: tensor):
        function(x)
    return sum(storages.values())


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    digits = moving_digits()
    family, classifier = digits.family, digits.reward
    prompts = [digits.prompts[i] for i in range(BATCH)]
    cond, x = family.encode(prompts), torch.randn(BATCH, *family.latent_shape)
    decoder = sum(p.numel() for p in family.pipe.vae.decoder.parameters())
    reward = sum(p.numel() for p in classifier.net.parameters())
    ways: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
        "pixel space: decoder and training classifier": (decoder + reward, lambda z: classifier.score(family.decode(z), prompts)),
    }
    nets: list[nn.Module] = []
    for kind in ("text-video", "video"):
        for frames in ("volume", "average"):
            net = LatentRewardShape(kind, frames).build(family.latent_shape, cond)
            nets.append(net)
            ways[f"latent reward model: {kind}, {frames}"] = (sum(p.numel() for p in net.parameters()), lambda z, net=net: net.rate(z, cond))
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(REPEATS):
        for name, (_, function) in ways.items():
            z, began = x.clone().requires_grad_(), time.process_time()
            torch.autograd.grad(function(z).sum(), z)
            seconds[name].append(time.process_time() - began)
    first = next(iter(ways))
    rows = []
    for name, (parameters, function) in ways.items():
        z = x.clone().requires_grad_()
        rows.append(
            {
                "gradient through": name,
                "parameters": parameters,
                "kept for the backward, MB a video": round(kept(function, z) / BATCH / 1e6, 3),
                "CPU ms a video": round(1000 * median(seconds[name]) / BATCH, 2),
                "times quicker": round(median(seconds[first]) / median(seconds[name]), 1),
            }
        )
    write_json(Path(__file__).parent / "results" / "latent_cost.json", rows)
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
