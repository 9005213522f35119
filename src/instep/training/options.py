"""How a run is kept."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from instep.core.numbers import check_number, check_whole
from instep.core.ranks import PATIENCE
from instep.training import stop
from instep.training.execution import Execution
from instep.training.hold import HOLD_EVERY, Bound

# generators on the host take no larger seed
LARGEST_SEED = 2**63 - 1
# steps between probes
PROBE_EVERY = 20
# minutes of patience at most: a week
LONGEST = 7 * 24 * 60


@dataclass(frozen=True)
class RunOptions:
    """How a run is kept: `save_every` steps a checkpoint (the last `keep` stay), `probe_every` steps a probe, one `seed` for all.

    `teacher_samples`: how many samples of the teacher are made and kept for recipes that need such. `stop_on`: health flags at which the run stops, goes back
    to its best checkpoint by the monitor and exports that; probes that are the best so far are then saved too. `prompt_cache`: the folder of encoded prompts,
    which several runs may share; None: `prompts` in the run's own. `execution`: device, precision and memory. `hold`: figures of the probe that the weights of
    reward terms are steered by (`hold.py`). `probe_every` None: 20, and 5 with `hold`. `terms_every`: steps between two measurements of each term's gradient,
    one more backward pass a term; 0: none. `patience`: minutes that one of several processes waits for another one within an iteration. ValueError for what
    is no flag.
    """

    seed: int = 0
    save_every: int = 25
    probe_every: int | None = None
    keep: int = 2
    execution: Execution = Execution()
    teacher_samples: int = 512
    stop_on: tuple[str, ...] = ()
    prompt_cache: Path | None = None
    hold: tuple[Bound, ...] = ()
    terms_every: int = 20
    patience: float = PATIENCE.total_seconds() / 60

    def __post_init__(self) -> None:
        stop.check_flags(self.stop_on)
        check_whole("seed", self.seed, 0, LARGEST_SEED)
        for name in ("save_every", "keep", "teacher_samples"):
            check_whole(name, getattr(self, name), 1)
        if self.probe_every is not None:
            check_whole("probe_every", self.probe_every, 1)
        check_whole("terms_every", self.terms_every, 0, what="steps between two measurements of each term's gradient, or 0 for none")
        check_number("patience", self.patience, 0, LONGEST, open_below=True, what=f"it is minutes above 0 and at most {LONGEST:,}")

    @property
    def waits(self) -> timedelta:
        """The patience."""
        return timedelta(minutes=self.patience)

    @property
    def probe_interval(self) -> int:
        """Steps between probes."""
        return self.probe_every or (HOLD_EVERY if self.hold else PROBE_EVERY)
