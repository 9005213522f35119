"""Creates a store: items of matched samples, their media, and the settings."""

from __future__ import annotations

import hashlib
import json
import secrets
import sqlite3
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from instep.core.files import write_bytes
from instep.core.outputs import check_output, check_place
from instep.human_eval.database import FORMAT, TABLES, connect, is_new, now, transaction
from instep.human_eval.frames import inspect
from instep.human_eval.questions import Mode, Question
from instep.human_eval.samples import Matched, Sample
from instep.human_eval.store import Store


def create(path: Path, matched: Matched, mode: Mode, questions: Sequence[Question], seed: int) -> Store:
    """A new store for matched samples; media that are not files yet are written to the folder `<name>-media` beside it. It appears whole or not at all."""
    path = path.resolve()
    check = check_place if is_new(path) else check_output
    check("out", path)
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = path.parent / f"{path.stem}-media"
    media, items = [], []
    for first, second in matched.pairs:
        kept = [_keep(sample, run, folder, path.parent) for run, sample in enumerate((first, second))]
        media += kept
        key = (first.prompt, first.seed, first.copy)
        shown: list[tuple[str, str | None]] = [(kept[0][0], kept[1][0])] if mode == "pairs" else [(row[0], None) for row in kept]
        items += [(secrets.token_hex(8), *key, a, b) for a, b in shown]
    secrets.SystemRandom().shuffle(media)  # not even their order tells the runs apart
    meta = {
        "format": str(FORMAT),
        "mode": mode,
        "questions": json.dumps([asdict(question) for question in questions], ensure_ascii=False),
        "runs": json.dumps([matched.a.name, matched.b.name]),
        "sources": json.dumps([matched.a.source, matched.b.source]),
        "fingerprint": matched.fingerprint,
        "seed": str(seed),
        "created": now(),
    }
    db = connect(path)
    try:
        with transaction(db):
            for statement in TABLES.split(";"):
                db.execute(statement)
            db.executemany("INSERT INTO media VALUES (?, ?, ?, ?, ?, ?)", media)
            db.executemany("INSERT INTO item VALUES (?, ?, ?, ?, ?, ?)", items)
            db.executemany("INSERT INTO meta VALUES (?, ?)", list(meta.items()))
    except sqlite3.Error as error:  # another process was quicker, or the disk is full
        raise ValueError(f"out: {path} was not written ({error}); repeat the same command") from error
    finally:
        db.close()
    return Store(path)


def _keep(sample: Sample, run: int, folder: Path, base: Path) -> tuple[str, int, str, int, str, str]:
    """A row of the media table; the file is written where there is none yet."""
    id_, path, digest = secrets.token_hex(8), sample.path, sample.digest
    if path is None:
        assert sample.encode is not None
        data = sample.encode()
        path, digest = folder / f"{id_}.webp", hashlib.sha256(data).hexdigest()
        write_bytes(path, data)
    inside = path.is_relative_to(base)
    clip = json.dumps(asdict(inspect(path)))
    return id_, run, path.relative_to(base).as_posix() if inside else str(path.resolve()), int(inside), digest, clip
