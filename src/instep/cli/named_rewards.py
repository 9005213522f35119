"""`instep rewards`: the rewards that go by a name, what each needs, and published pickles as safetensors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from instep.rewards.convert import convert
from instep.rewards.located import available
from instep.rewards.named import NAMED

USAGE = """instep rewards: the rewards that go by a name in --reward

  instep rewards                    what each scores, what it needs, and whether that is here
  instep rewards NAME               the same of one, with the commands that fetch it
  instep rewards convert FILE       published weights that are a pickle, as safetensors
"""


@dataclass(frozen=True)
class ListRewardsArgs:
    """List the rewards that go by a name in --reward: what each scores, whether it has a gradient, what it needs and whether that is here."""

    name: Annotated[str | None, tyro.conf.Positional] = None
    """One of them, with the commands that fetch what it needs."""


@dataclass(frozen=True)
class ConvertRewardArgs:
    """Write published weights that are a pickle as safetensors, once, under the names of the networks here; no code of the file runs."""

    file: Annotated[Path, tyro.conf.Positional]
    """The file as it was published: HPS_v2.1_compressed.pt, ImageReward.pt, sac+logos+ava1-l14-linearMSE.pth, pytorch_model.bin of a CLIP. What it holds is
    told by the names in it."""
    to: Path
    """The folder to write into, for example models/hpsv2: --reward hpsv2 looks there."""
    base: Path | None = None
    """Folder with the configuration and tokenizer that the weights belong to, which are copied: a CLIP of the same architecture, BERT for
    ImageReward, Qwen2-VL for HPSv3 and VideoAlign.
    Default: the file's own folder."""
    instruction: Path | None = None
    """The authors' Python file with the instruction that HPSv3 (data_collator_qwen.py) or VideoAlign (prompt_template.py) was trained with. It is parsed, and
    not run."""


def list_rewards_command(args: ListRewardsArgs) -> int:
    """Prints the table, or one entry with its commands."""
    console = Console()
    if args.name is None:
        table = Table("reward", "what it scores", "gradient", "needs")
        for name, known in NAMED.items():
            parts = "".join(f"\n{name}:{part}" for part in known.parts)
            needs = "\n".join(f"{each.source} ({'here' if available(each) else 'not here'})" for each in known.needs) or "nothing"
            table.add_row(name + parts, known.scores, "yes" if known.gradient else "no", needs)
        console.print(table)
        console.print("How to fetch what one needs: instep rewards NAME. In training: --reward '0.5*pickscore, hpsv2'", highlight=False)
        return 0
    if args.name not in NAMED:
        raise ValueError(f"name: {args.name!r} is not known; allowed: {', '.join(NAMED)}")
    known = NAMED[args.name]
    lines = [f"{args.name}: {known.scores}", f"gradient: {'yes' if known.gradient else 'no'}"]
    lines += [f"settings: {', '.join((*known.settings, *(('frames', 'clip') if known.frames else ())))}"] if known.settings or known.frames else []
    for each in known.needs:
        lines += [f"needs {each.source} ({'here' if available(each) else 'not here'}); fetch it with:", *(f"  {line}" for line in each.commands)]
    console.print("\n".join(lines), highlight=False, soft_wrap=True, markup=False)
    return 0


def convert_reward_command(args: ConvertRewardArgs) -> int:
    what = convert(args.file, args.to, args.base, args.instruction)
    print(f"{args.file.name} was {what}; it is now in {args.to}")
    return 0
