"""The annotators' answers in one SQLite file. Each answer is one transaction, on disk before it is acknowledged; nothing is ever deleted."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import re
import sqlite3
import threading
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from instep.human_eval.clip import Clip
from instep.human_eval.database import FORMAT, connect, now, transaction
from instep.human_eval.questions import Mode, Question
from instep.human_eval.samples import Matched

LONGEST_NAME, MOST_ANNOTATORS = 40, 1000


class Conflict(ValueError):
    """Another answer to the same item stands already."""


@dataclass(frozen=True)
class Media:
    """A file that the page may request, by an id that reveals nothing."""

    id: str
    run: int  # 0 for A, 1 for B
    path: Path
    digest: str
    clip: Clip


@dataclass(frozen=True)
class Shown:
    """An item as one annotator sees it: `right` is None where one sample is scored. `before` holds the answers that were undone."""

    id: str
    prompt: str
    left: Media
    right: Media | None
    before: Mapping[str, str]


@dataclass(frozen=True)
class State:
    """Where an annotator stands; no item is left when all are answered."""

    done: int
    total: int
    item: Shown | None


@dataclass(frozen=True)
class Vote:
    """One standing answer. `value` is "a", "b" or "equal" of a pair, whichever side A was on, or what was chosen for a single sample of `run`."""

    annotator: str
    item: str
    prompt: str
    seed: int
    question: str
    value: str
    run: int | None
    swapped: bool


class Store:
    """An open store. Threads may share it; so may processes."""

    def __init__(self, path: Path) -> None:
        """Opens what `create` made; ValueError if `path` is something else."""
        if not path.is_file():
            raise ValueError(f"store: {path} does not exist; `instep human-eval A B --out {path}` makes it")
        self.path, self._lock = path.resolve(), threading.RLock()
        self._db = connect(path)
        try:
            meta = dict(self._db.execute("SELECT key, value FROM meta"))
            if meta.get("format") != str(FORMAT):
                raise ValueError(f"store: {path} has format {meta.get('format')}; this version reads {FORMAT}")
        except sqlite3.DatabaseError as error:
            self._db.close()
            raise ValueError(f"store: {path} is not a store of human evaluations ({error}); choose another file with --out") from error
        self.mode: Mode = meta["mode"]  # type: ignore[assignment]
        self.questions = tuple(Question(**(row | {"choices": tuple(row["choices"])})) for row in json.loads(meta["questions"]))
        self.runs: tuple[str, str] = tuple(json.loads(meta["runs"]))  # type: ignore[assignment]
        self.fingerprint, self._seed = meta["fingerprint"], int(meta["seed"])
        self.media = {row[0]: self._media(*row) for row in self._db.execute("SELECT id, run, path, inside, digest, clip FROM media")}

    def _media(self, id_: str, run: int, path: str, inside: int, digest: str, clip: str) -> Media:
        shown = json.loads(clip)
        return Media(id_, run, self.path.parent / path if inside else Path(path), digest, Clip(**(shown | {"durations": tuple(shown["durations"])})))

    def close(self) -> None:
        self._db.close()

    def check_media(self) -> None:
        """ValueError if a file is gone or is no longer what was shown."""
        for media in self.media.values():
            if not media.path.is_file():
                raise ValueError(f"store: {self.path} was made for {media.path}, which is gone; put it back, or begin a new store with --out")
            with open(media.path, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != media.digest:
                    raise ValueError(f"store: {media.path} is no longer what was shown in {self.path}; put it back, or begin a new store with --out")

    def check_same(self, matched: Matched | None, mode: Mode, questions: Sequence[Question]) -> None:
        """Raises ValueError unless the store was made for exactly these samples (None: any samples), this mode and these questions."""
        if mode != self.mode:
            raise ValueError(f"mode: {mode!r} does not fit {self.path}, which was begun with {self.mode!r}; choose another file with --out")
        if tuple(questions) != self.questions:
            asked = ", ".join(question.key for question in self.questions)
            raise ValueError(f"questions: {self.path} was begun with {asked}; give the same questions, or choose another file with --out")
        if matched is not None and matched.fingerprint != self.fingerprint:
            a, b = self.runs
            raise ValueError(f"out: {self.path} was begun for other samples (of {a!r} and {b!r}, in this order); choose another file with --out")

    def join(self, name: str) -> str:
        """The annotator's name as it is kept; a new one gets an order of the items and sides, both drawn from the store's seed and the name."""
        name, key = clean_name(name)
        with self._transaction():
            known = self._db.execute("SELECT name FROM annotator WHERE key = ?", (key,)).fetchone()
            if known:
                return known[0]
            if self._db.execute("SELECT count(*) FROM annotator").fetchone()[0] >= MOST_ANNOTATORS:
                raise ValueError(f"name: {name!r} cannot join; a store has at most {MOST_ANNOTATORS} annotators")
            items = [row[0] for row in self._db.execute("SELECT id FROM item ORDER BY rowid")]
            rng = random.Random(f"{self._seed}:{key}")
            order = rng.sample(items, len(items))
            sides = [i % 2 for i in range(len(items))] if self.mode == "pairs" else [0] * len(items)
            rng.shuffle(sides)  # as often left as right, so that a habit of one side cancels
            who = self._db.execute("INSERT INTO annotator (key, name, joined) VALUES (?, ?, ?)", (key, name, now())).lastrowid
            rows = [(who, item, i, side) for i, (item, side) in enumerate(zip(order, sides, strict=True))]
            self._db.executemany("INSERT INTO assignment VALUES (?, ?, ?, ?)", rows)
        return name

    def state(self, name: str) -> State:
        """The annotator's next item, first those that were undone."""
        with self._lock:
            who = self._annotator(name)
            done, total = self._db.execute(
                "SELECT count(j.id), count(*) FROM assignment s LEFT JOIN judgement j ON j.annotator = s.annotator AND j.item = s.item AND j.undone IS NULL "
                "WHERE s.annotator = ?",
                (who,),
            ).fetchone()
            row = self._db.execute(
                "SELECT i.id, i.prompt, i.a, i.b, s.swapped FROM assignment s JOIN item i ON i.id = s.item WHERE s.annotator = ? AND NOT EXISTS "
                "(SELECT 1 FROM judgement j WHERE j.annotator = s.annotator AND j.item = s.item AND j.undone IS NULL) ORDER BY s.position LIMIT 1",
                (who,),
            ).fetchone()
            if row is None:
                return State(done, total, None)
            item, prompt, a, b, swapped = row
            before = self._db.execute(
                "SELECT question, value FROM answer WHERE judgement = (SELECT max(id) FROM judgement WHERE annotator = ? AND item = ?)", (who, item)
            ).fetchall()
            left, right = (b, a) if swapped else (a, b)
            return State(done, total, Shown(item, prompt, self.media[left], self.media[right] if right else None, dict(before)))

    def answer(self, name: str, item: str, request: str, answers: Mapping[str, str]) -> None:
        """Keeps one judgement, or nothing. The same request again, or the same answers, change nothing; others raise Conflict."""
        choices = {question.key: question.choices for question in self.questions}
        if set(answers) != set(choices):
            raise ValueError(f"answers: {_keys(answers)} is not allowed; answer each of {_keys(choices)} once")
        for question, value in answers.items():
            if value not in choices[question]:
                raise ValueError(f"answers: {question}: {value!r} is not allowed; allowed: {', '.join(choices[question])}")
        with self._transaction():
            who = self._annotator(name)
            if not self._db.execute("SELECT 1 FROM assignment WHERE annotator = ? AND item = ?", (who, item)).fetchone():
                raise ValueError(f"item: {item!r} is not one of this annotator's items; reload the page")
            same = self._db.execute("SELECT id, annotator, item FROM judgement WHERE request = ?", (request,)).fetchone()
            if same is None:
                same = self._db.execute("SELECT id, annotator, item FROM judgement WHERE annotator = ? AND item = ? AND undone IS NULL", (who, item)).fetchone()
            if same is not None:
                kept = dict(self._db.execute("SELECT question, value FROM answer WHERE judgement = ?", (same[0],)))
                if (same[1], same[2], kept) != (who, item, dict(answers)):
                    raise Conflict("answers: another answer to this item stands already; undo it first")
                return
            row = (who, item, request, now())
            judgement = self._db.execute("INSERT INTO judgement (annotator, item, request, at) VALUES (?, ?, ?, ?)", row).lastrowid
            self._db.executemany("INSERT INTO answer VALUES (?, ?, ?)", [(judgement, question, value) for question, value in answers.items()])

    def undo(self, name: str, request: str) -> bool:
        """Marks the annotator's last standing judgement as undone; the same request again changes nothing. False where none stands."""
        with self._transaction():
            who = self._annotator(name)
            if self._db.execute("SELECT 1 FROM judgement WHERE undo_request = ?", (request,)).fetchone():
                return True
            last = self._db.execute("SELECT max(id) FROM judgement WHERE annotator = ? AND undone IS NULL", (who,)).fetchone()[0]
            if last is None:
                return False
            self._db.execute("UPDATE judgement SET undone = ?, undo_request = ? WHERE id = ?", (now(), request, last))
            return True

    def votes(self) -> list[Vote]:
        """All standing answers, annotator by annotator in the order in which they were given."""
        with self._lock:
            rows = self._db.execute(
                "SELECT n.name, i.id, i.prompt, i.seed, w.question, w.value, m.run, s.swapped FROM answer w JOIN judgement j ON j.id = w.judgement "
                "JOIN annotator n ON n.id = j.annotator JOIN item i ON i.id = j.item JOIN media m ON m.id = i.a "
                "JOIN assignment s ON s.annotator = j.annotator AND s.item = j.item WHERE j.undone IS NULL ORDER BY n.id, j.id, w.rowid"
            ).fetchall()
        pairs, votes = self.mode == "pairs", []
        for name, item, prompt, seed, question, value, run, swapped in rows:
            answer = _by_side(value, bool(swapped)) if pairs else value
            votes.append(Vote(name, item, prompt, seed, question, answer, None if pairs else run, bool(swapped)))
        return votes

    def items(self) -> dict[str, tuple[Media, Media | None]]:
        """The media of each item: A's and B's, or one alone."""
        with self._lock:
            rows = self._db.execute("SELECT id, a, b FROM item ORDER BY rowid").fetchall()
        return {item: (self.media[a], self.media[b] if b else None) for item, a, b in rows}

    def progress(self) -> list[tuple[str, int, int]]:
        """Name, items answered and items in all of each annotator."""
        with self._lock:
            names = [row[0] for row in self._db.execute("SELECT name FROM annotator ORDER BY id")]
        states = [self.state(name) for name in names]
        return [(name, state.done, state.total) for name, state in zip(names, states, strict=True)]

    def _annotator(self, name: str) -> int:
        name, key = clean_name(name)
        row = self._db.execute("SELECT id FROM annotator WHERE key = ?", (key,)).fetchone()
        if row is None:
            raise ValueError(f"name: {name!r} has not joined; enter the name again")
        return row[0]

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock, transaction(self._db):
            yield


def clean_name(name: str) -> tuple[str, str]:
    """A name as it is kept, and the key under which it is found whatever its case and spaces; ValueError if it is none."""
    text = " ".join(unicodedata.normalize("NFC", name).split())
    if not 1 <= len(text) <= LONGEST_NAME or not text.isprintable():
        raise ValueError(f"name: {text[:60]!r} is not allowed; write 1 to {LONGEST_NAME} characters that can be seen")
    return text, unicodedata.normalize("NFKC", text).casefold()


def _by_side(value: str, swapped: bool) -> str:
    """left, right or equal as a, b or equal."""
    return "equal" if value == "equal" else "b" if (value == "left") == swapped else "a"


def _keys(value: Mapping[str, Any]) -> str:
    return ", ".join(re.sub(r"[^\w-]", "?", key)[:40] for key in value) or "nothing"
