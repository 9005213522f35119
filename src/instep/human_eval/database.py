"""The SQLite file behind the human-evaluation page: its tables, and how it is opened so that nothing is lost."""

from __future__ import annotations

import contextlib
import datetime
import sqlite3
from collections.abc import Iterator
from pathlib import Path

FORMAT = 1
TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE media (id TEXT PRIMARY KEY, run INTEGER NOT NULL, path TEXT NOT NULL, inside INTEGER NOT NULL, digest TEXT NOT NULL, clip TEXT NOT NULL);
CREATE TABLE item (id TEXT PRIMARY KEY, prompt TEXT NOT NULL, seed INTEGER NOT NULL, copy INTEGER NOT NULL,
  a TEXT NOT NULL REFERENCES media, b TEXT REFERENCES media);
CREATE TABLE annotator (id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, name TEXT NOT NULL, joined TEXT NOT NULL);
CREATE TABLE assignment (annotator INTEGER NOT NULL REFERENCES annotator, item TEXT NOT NULL REFERENCES item, position INTEGER NOT NULL,
  swapped INTEGER NOT NULL, PRIMARY KEY (annotator, item), UNIQUE (annotator, position));
CREATE TABLE judgement (id INTEGER PRIMARY KEY, annotator INTEGER NOT NULL, item TEXT NOT NULL, request TEXT NOT NULL UNIQUE, at TEXT NOT NULL,
  undone TEXT, undo_request TEXT UNIQUE, FOREIGN KEY (annotator, item) REFERENCES assignment);
CREATE UNIQUE INDEX standing ON judgement (annotator, item) WHERE undone IS NULL;
CREATE TABLE answer (judgement INTEGER NOT NULL REFERENCES judgement, question TEXT NOT NULL, value TEXT NOT NULL, PRIMARY KEY (judgement, question));
"""


def connect(path: Path) -> sqlite3.Connection:
    try:
        db = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
    except sqlite3.Error as error:
        raise ValueError(f"store: {path} cannot be opened ({error}); choose another file with --out") from error
    try:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")  # an answer that was acknowledged outlives the machine's power too
        db.execute("PRAGMA foreign_keys = ON")
    except sqlite3.DatabaseError as error:
        db.close()
        raise ValueError(f"store: {path} is not a store of human evaluations ({error}); choose another file with --out") from error
    return db


@contextlib.contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        db.execute("ROLLBACK")
        raise
    db.execute("COMMIT")


def is_new(path: Path) -> bool:
    """Nothing is there yet, or a database without a single table, whose creation was interrupted."""
    if not path.exists() or (path.is_file() and not path.stat().st_size):
        return True
    db = connect(path)
    try:
        return db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0
    finally:
        db.close()


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
