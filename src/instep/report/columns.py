"""What the report calls the metrics, what they mean, and how many decimals they deserve."""

from __future__ import annotations

from dataclasses import dataclass

from instep.metrics.compare import direction
from instep.metrics.figures import Value


@dataclass(frozen=True)
class Column:
    """A metric: its key in metrics.json, heading, explanation, decimals."""

    key: str
    head: str
    meaning: str
    decimals: int = 2

    @property
    def arrow(self) -> str:
        return {1: "↑", -1: "↓", 0: ""}[direction(self.key)]

    def text(self, value: float, *, sign: bool = False) -> str:
        value = round(value, self.decimals) + 0.0  # no "−0.000"
        return f"{value:{'+' if sign and value else ''}.{self.decimals}f}".replace("-", "−")


MAIN = (
    Column(
        "heldout_both",
        "prompt followed",
        "share of samples whose digit and motion are both right by a held-out classifier, which neither training nor its watchers ever used",
        3,
    ),
    Column(
        "fd",
        "FD",
        "Fréchet distance: how far all samples together are from real videos, in a held-out classifier's features; compare equal numbers of samples",
        1,
    ),
    Column("fd_open", "FD (open prompts)", "the same distance on prompts that leave digit or motion open, where few-step models lose variety", 1),
    Column("modes_motion", "motions seen", "modes covered: different motions among the samples of “a seven”, of 9 at most", 2),
    Column("modes_digit", "digits seen", "modes covered: different digits among the samples of “a digit moving left fast”, of 10 at most", 2),
    Column("mean_brightness", "mean brightness", "mean of all pixels; above that of real videos, strokes are too thick or colours too strong", 4),
    Column("wobble", "wobble", "change of shape from frame to frame once motion is taken out, relative to the mean brightness", 3),
    Column("first_frame", "first frame", "of image-to-video: root mean square of the difference between the first frame and the given one, in [0, 1]", 3),
    Column("seconds", "CPU s / video", "seconds of all threads to generate one video", 3),
)
MORE = (
    Column("heldout_digit", "digit", "held-out classifier: digit right", 3),
    Column("heldout_motion", "motion", "held-out classifier: motion right", 3),
    Column("heldout_both_open", "followed, open", "held-out classifier: what an open prompt does say is right", 3),
    Column("heldout_score", "log p", "held-out classifier: mean log-probability of what the prompt says", 2),
    Column("monitor_both", "monitor", "monitor classifier (watched during training, never descended): both right", 3),
    Column("train_both", "training", "training classifier (the reward itself): both right; far above the others means that it was hacked", 3),
    Column("train_score", "reward", "training classifier: mean log-probability, the reward", 2),
    Column("precision", "precision", "share of samples that look like real ones (nearest neighbours in held-out features)", 3),
    Column("recall", "recall", "share of real videos that the samples come near to", 3),
    Column("vendi", "Vendi", "Vendi score: the effective number of different samples of one open prompt", 2),
    Column("saturation", "saturated", "share of raw values more than 0.05 outside [0, 1]", 4),
    Column("flicker", "steadiness", "VBench temporal flickering: 1 minus the mean difference of consecutive frames", 4),
    Column("dynamic", "travel, px", "distance that the centre of brightness travels", 2),
    Column("seconds_wall", "s / video", "seconds on the clock to generate one video", 3),
)
EVERY = {column.key: column for column in (*MAIN, *MORE)}
VERDICT = ("heldout_both", "fd", "fd_open", "modes_motion", "modes_digit", "vendi", "wobble", "mean_brightness", "first_frame")


def with_error(column: Column, value: Value) -> str:
    """`0.912 ± 0.031`, two standard errors; the error is left out where none was estimated."""
    error = f" <small>± {column.text(2 * value.se)}</small>" if value.se else ""
    return column.text(value.value) + error
