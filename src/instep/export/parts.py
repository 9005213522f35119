"""Writes a student without a stock pipeline (a class-conditional flow): its transformer, its scheduler and its VAE, if it has one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from instep.core.files import atomic_dir
from instep.data.prompt import Prompt
from instep.diffusion.sampling import Sampling
from instep.export.card import ExportInfo
from instep.export.folder import ExportReport, _sync
from instep.export.limits import check_differences
from instep.export.room import check_room
from instep.export.rules import RECORD, check_adapter, check_dtype, check_sampler, check_target
from instep.export.verify import EARLIER, Sampler, check_samples, difference, our_sampler
from instep.export.weights import Finite, stored_dtype, write_network
from instep.models.adapters import plain_weights

if TYPE_CHECKING:
    from instep.models.family import Family

DECODE = """from diffusers import AutoencoderKL

vae = AutoencoderKL.from_pretrained("{name}", subfolder="vae")
x = vae.decode(x / vae.config.scaling_factor).sample
"""
CARD = """# {name}: {steps}-step student ({recipe})

Trained by instep {version} from {base}: `{command}`

There is no stock diffusers pipeline for a class-conditional flow, so this folder holds its parts. They are stock classes:

```python
import torch
from diffusers import {transformer}, FlowMatchEulerDiscreteScheduler

transformer = {transformer}.from_pretrained("{name}", subfolder="transformer")
scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained("{name}", subfolder="scheduler")
scheduler.set_timesteps({steps})
labels = torch.arange(10)
x = torch.randn(10, *{shape})
for t in scheduler.timesteps:
    v = transformer(x, timestep=t.expand(10), class_labels=labels, return_dict=False)[0]{half}
    x = scheduler.step(v, t, x, return_dict=False)[0]
{decode}images = (x.clamp(-1, 1) + 1) / 2
```

Largest difference of final samples between this loop and the sampler that trained it: {sampler:.1e}; between it and the student in memory: {student:.1e}.
"""


def export_parts(
    family: Family,
    network: nn.Module,
    levels: Sequence[float],
    out: Path,
    info: ExportInfo,
    *,
    ours: Sampler,
    adapter: str | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Writes `out` with transformer/, scheduler/, vae/ (of a model in latents) and README.md, and checks the scheduler's plain loop: it draws the same samples
    as `ours`.

    network: the student's; `adapter` is merged in the folder. dtype: float16, bfloat16, float32 or None to keep. The folder appears at once, complete, or not
    at all. Memory and errors are those of `export_student`.
    """
    out, levels = Path(out), tuple(float(t) for t in levels)
    check_dtype(dtype)
    check_target(out, overwrite)
    scheduler = check_sampler(family, Sampling(levels))
    plain = check_adapter(family, network, adapter)
    check_room(out, family, network, plain, dtype, adapter=None)
    ((name, weights),) = plain.items()
    exported, finite = family.parts(network)[name], Finite()
    in_memory = sampled(ours, [info.example_prompt] * 2)
    check_samples("the student in memory", in_memory, EARLIER)
    with atomic_dir(out, "export") as temporary:
        write_network(temporary / name, exported, weights, dtype, finite)
        finite.check(dtype)
        scheduler.save_pretrained(temporary / "scheduler")
        vae = getattr(family, "vae", None)
        if vae is not None:
            write_network(temporary / "vae", vae, plain_weights(vae), None, finite)
            finite.check(None)
        (temporary / RECORD).write_text(json.dumps({"instep": info.instep_version, "levels": levels, "info": info.json()}, indent=2))
        stock, same = stock_loop(family, temporary, [info.example_prompt] * 2)
        for what, drawn in (("the scheduler's loop", stock), ("our sampler", same)):
            check_samples(f"{what} on the exported folder", drawn, EARLIER)
        sampler_difference, student_difference = difference(stock, same), difference(stock, in_memory)
        kinds = {"stored": stored_dtype(exported, weights, dtype), "memory": stored_dtype(exported, weights, None)}
        check_differences(sampler_difference, student_difference, float(stock.abs().max()), **kinds)
        shape = tuple(family.latent_shape)
        out_channels = cast(Any, exported).config.out_channels
        (temporary / "README.md").write_text(
            CARD.format(
                name=out.name,
                steps=len(levels),
                recipe=info.recipe,
                version=info.instep_version,
                base=info.base_model,
                command=info.command,
                transformer=type(exported).__name__,
                shape=shape,
                half="" if out_channels in (None, shape[0]) else f"[:, :{shape[0]}]",
                decode="" if vae is None else DECODE.format(name=out.name),
                sampler=sampler_difference,
                student=student_difference,
            )
        )
        size_bytes = _sync(out, temporary)
    return ExportReport(out, levels, sampler_difference, student_difference, None, 0, size_bytes)


def sampled(sampler: Sampler, prompts: Sequence[Prompt]) -> Tensor:
    """Final latents from torch's global generator at seed 0, whose state is restored: the scheduler draws its noise from it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return sampler(prompts, torch.default_generator)


@torch.no_grad()
def stock_loop(family: Family, folder: Path, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
    """Final latents [B, ...] of the exported parts, in float32: by the stock scheduler's loop, and by our sampler around the same network."""
    import diffusers

    kind: Any = getattr(diffusers, json.loads((folder / "transformer" / "config.json").read_text())["_class_name"])
    network = kind.from_pretrained(folder / "transformer", torch_dtype=torch.float32, local_files_only=True).eval()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler", local_files_only=True)
    levels = json.loads((folder / RECORD).read_text())["levels"]
    cond = family.encode(prompts).to("cpu")

    def stock(names: Sequence[Prompt], rng: torch.Generator) -> Tensor:
        scheduler.set_timesteps(len(levels))
        x = torch.randn(len(names), *family.latent_shape, generator=rng)
        for t in scheduler.timesteps:
            v = family.forward(network, x, t.expand(len(x)) / scheduler.config.num_train_timesteps, cond)
            x = scheduler.step(v, t, x, return_dict=False)[0]
        return x

    return sampled(stock, prompts), sampled(our_sampler(family, network, levels), prompts)
