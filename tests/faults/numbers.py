"""Kinds 4 and 2: numbers that mean nothing, at the command line and in the library, where one rule a field holds both."""

from __future__ import annotations

import math
from functools import partial

from faults.sandbox import Fault, call, command
from instep.methods.role_config import AdamWConfig, LoRA, RoleConfig
from instep.recipes.amd import amd
from instep.recipes.common import Common
from instep.recipes.dmd import dmd2
from instep.recipes.many_step import ManySteps
from instep.training.options import RunOptions

# option of `instep train dmd2`, its value, what the message begins with
TRAIN = (
    ("--student.clip", "0", r"--student\.clip: clip: 0\.0 is not allowed|clip: 0\.0 is not allowed"),
    ("--student.warmup", "-1", "warmup: -1 is not allowed; it is 0 or more"),
    ("--student.lr", "inf", "lr: inf is not allowed"),
    ("--student.betas", "0.9 1.5", r"betas\[1\]: 1\.5 is not allowed"),
    ("--guidance", "-1", r"guidance: -1\.0 is not allowed"),
    ("--guidance", "nan", "guidance: nan is not allowed"),
    ("--shift", "0", r"shift: 0\.0 is not allowed"),
    ("--steps", "1000", "steps: 1000 is not allowed; a few-step student has 1 to 100"),
    ("--lora-rank", "100000", "lora_rank: 100000 is not allowed"),
    ("--seed", "-1", "seed: -1 is not allowed"),
    ("--seed", "100000000000000000000", "seed: 100000000000000000000 is not allowed"),
    ("--probe-every", "0", "probe_every: 0 is not allowed"),
    ("--save-every", "0", "save_every: 0 is not allowed"),
    ("--terms-every", "-5", "terms_every: -5 is not allowed"),
    ("--ema", "1", r"ema: 1\.0 is not allowed"),
    ("--real-fps", "0", r"real_fps: 0\.0 is not allowed"),
)
OTHERS = (
    ("sample x --steps 0", "steps: 0 is not allowed"),
    ("sample x --copies 0", "copies: 0 is not allowed"),
    ("sample x --guidance -2", r"guidance: -2\.0 is not allowed"),
    ("sample x --seed -1", "seed: -1 is not allowed"),
    ("eval x --prompts p.txt --copies 0", "copies: 0 is not allowed"),
    ("eval --teacher-steps 0", "steps: 0 is not allowed"),
    ("lab dmd2 --guidance nan", "guidance: nan is not allowed"),
    ("lab dmd2 --seed -1", "seed: -1 is not allowed"),
)
# values that would make every result wrong without a word, given in the library
LIBRARY = (
    ("AdamWConfig(lr=nan)", lambda: AdamWConfig(math.nan), "lr: nan is not allowed"),
    ("AdamWConfig(clip=0), which trains nothing", lambda: AdamWConfig(1e-3, clip=0.0), "clip: 0.0 is not allowed"),
    ("AdamWConfig(clip=inf)", lambda: AdamWConfig(1e-3, clip=math.inf), "clip: inf is not allowed"),
    ("AdamWConfig(weight_decay=nan)", lambda: AdamWConfig(1e-3, weight_decay=math.nan), "weight_decay: nan is not allowed"),
    ("Common(guidance=inf)", lambda: Common(guidance=math.inf), "guidance: inf is not allowed"),
    ("amd(sensitivity=nan)", lambda: amd(Common(), sensitivity=math.nan), "nan is not allowed"),
    ("RoleConfig(ema=nan)", lambda: RoleConfig(ema=math.nan), "ema: nan is not allowed"),
    ("dmd2(Common(shift=nan))", lambda: dmd2(Common(shift=math.nan)), "shift: nan is not allowed"),
)
TYPES = (
    ("Common(steps='4')", lambda: Common(steps="4"), "steps: '4' is not allowed; it is a whole number"),  # type: ignore[arg-type]
    ("Common(critic_updates=0)", lambda: Common(critic_updates=0), "critic_updates: 0 is not allowed"),
    ("LoRA(rank=0)", lambda: LoRA(0), "lora_rank: 0 is not allowed"),
    ("LoRA(alpha=0), which changes nothing", lambda: LoRA(8, 0.0), "lora_alpha: 0.0 is not allowed"),
    ("RunOptions(keep=0)", lambda: RunOptions(keep=0), "keep: 0 is not allowed"),
    ("RunOptions(probe_every=0)", lambda: RunOptions(probe_every=0), "probe_every: 0 is not allowed"),
    ("RunOptions(seed=True)", lambda: RunOptions(seed=True), "seed: True is not allowed; it is a whole number"),
    ("ManySteps(steps=1)", lambda: ManySteps(steps=1), "steps: 1 is not allowed"),
)

FAULTS = (
    *(
        Fault(
            4,
            f"instep train dmd2 {option} {value}",
            "refused before a model is loaded: the field, the value, what is allowed",
            partial(command, ["train", "dmd2", option, *value.split()], pattern),
        )
        for option, value, pattern in TRAIN
    ),
    *(Fault(4, f"instep {line}", "refused before a model is loaded", partial(command, line.split(), pattern)) for line, pattern in OTHERS),
    *(Fault(4, what, "ValueError where it is made", partial(call, do, pattern)) for what, do, pattern in TYPES),
    *(Fault(2, what, "ValueError where it is made", partial(call, do, pattern)) for what, do, pattern in LIBRARY),
)
