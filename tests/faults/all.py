"""All rows, in the order of their kinds."""

from __future__ import annotations

from faults import bounds, commands, files, identity, numbers, rewards, runs
from faults.sandbox import Fault

FAULTS: tuple[Fault, ...] = tuple(
    sorted((*numbers.FAULTS, *files.FAULTS, *rewards.FAULTS, *identity.FAULTS, *commands.FAULTS, *runs.FAULTS, *bounds.FAULTS), key=lambda fault: fault.kind)
)
