"""The questions to annotators: preferences between two samples, or scores of one (APO, Table 2 and "absolute distortion rates", Table 1)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Mode = Literal["pairs", "score"]
MODES: tuple[Mode, ...] = get_args(Mode)
PREFERENCE, SCORE, YES_NO = ("left", "equal", "right"), ("0", "1", "2"), ("no", "yes")
DISTORTED = "distorted"


@dataclass(frozen=True)
class Question:
    """A key for files and tables, the words on the page, and the allowed answers."""

    key: str
    label: str
    hint: str
    choices: tuple[str, ...]


ASKED: dict[Mode, tuple[Question, ...]] = {
    "pairs": (
        Question("visual_quality", "Visual quality", "Sharper, cleaner, fewer broken shapes", PREFERENCE),
        Question("text_alignment", "Text alignment", "Shows what the prompt says", PREFERENCE),
        Question("motion", "Motion", "Moves smoothly, believably, and as much as it should", PREFERENCE),
        Question("overall", "Overall", "The one you would keep", PREFERENCE),
    ),
    "score": (
        Question("visual_plausibility", "Visual plausibility", "Could the picture be real?", SCORE),
        Question("human_plausibility", "Human plausibility", "Are people, or whoever acts, built and moving right?", SCORE),
        Question("subject_consistency", "Subject consistency", "Does the subject stay the same throughout?", SCORE),
        Question("motion_aesthetics", "Motion aesthetics", "Is the motion smooth, lively and good to look at?", SCORE),
        Question("instruction_following", "Instruction following", "Does it show what the prompt says?", SCORE),
        Question(DISTORTED, "Distorted", "Any broken anatomy, warped object or glitch?", YES_NO),
    ),
}


def choose(mode: Mode, wanted: Sequence[str]) -> tuple[Question, ...]:
    """The questions of a mode; `wanted` selects built-in ones by key (text_alignment) and adds custom ones (key=QUESTION). None: all known ones."""
    if mode not in MODES:
        raise ValueError(f"mode: {mode!r} is not allowed; allowed: {', '.join(MODES)}")
    known = {question.key: question for question in ASKED[mode]}
    if not wanted:
        return ASKED[mode]
    chosen: list[Question] = []
    for text in wanted:
        key, found, label = text.partition("=")
        key = key.strip().replace("-", "_")
        if not re.fullmatch(r"[a-z][a-z0-9_]{0,39}", key) or (found and not 1 <= len(label.strip()) <= 200):
            raise ValueError(f"questions: {text!r} is not allowed; write {', '.join(known)}, or your own as key=What is asked (key: a-z, 0-9, _)")
        if found and key in known:
            raise ValueError(f"questions: {key!r} is asked already in other words; choose another key for {label.strip()!r}")
        if not found and key not in known:
            raise ValueError(f"questions: {key!r} is not known; allowed: {', '.join(known)}, or your own as key=What is asked")
        if key in (question.key for question in chosen):
            raise ValueError(f"questions: {key!r} is given twice; once is enough")
        choices = PREFERENCE if mode == "pairs" else SCORE
        chosen.append(Question(key, label.strip(), "", choices) if found else known[key])
    return tuple(chosen)
