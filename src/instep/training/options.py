"""How a run is kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from instep.training import stop
from instep.training.execution import Execution


@dataclass(frozen=True)
class RunOptions:
    """How a run is kept: `save_every` steps a checkpoint (the last `keep` stay), `probe_every` steps a probe, one `seed` for all.

    `teacher_samples`: how many samples of the teacher are made and kept for recipes that need such. `stop_on`: health flags at which the run stops,
    goes back to its best checkpoint by the monitor and exports that; probes that are the best so far are then saved too. `prompt_cache`: the folder of
    encoded prompts, which several runs may share; None: `prompts` in the run's own. `execution`: device, precision and memory.
    ValueError for what is no flag.
    """

    seed: int = 0
    save_every: int = 25
    probe_every: int = 20
    keep: int = 2
    execution: Execution = Execution()
    teacher_samples: int = 512
    stop_on: tuple[str, ...] = ()
    prompt_cache: Path | None = None

    def __post_init__(self) -> None:
        stop.check_flags(self.stop_on)
