"""Rebuilds a bundled model, from a clone: `PYTHONPATH=tools python -m pretrain MODEL --out FOLDER [--seed 0] [--threads 2] [--fresh]`."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from instep.bundled import DIGITS, MOVING_DIGITS, MOVING_DIGITS_I2V, MOVING_WORDS

WORD_READERS = "word-readers"


def main(given: Sequence[str] | None = None) -> None:
    """Reads the command line and trains; exit status 2 for what is not allowed."""
    parser = argparse.ArgumentParser(
        prog="python -m pretrain", description="Rebuild a bundled model from raw scans or drawn letters, seeded; a video model takes an hour on two cores."
    )
    parser.add_argument("model", choices=(MOVING_DIGITS, MOVING_DIGITS_I2V, DIGITS, MOVING_WORDS, WORD_READERS))
    parser.add_argument("--out", type=Path, help="the model's folder, by default its name (the readers' is that of moving-words); an interrupted run goes on")
    parser.add_argument("--seed", type=int, default=0, help="seed of every part")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--fresh", action="store_true", help="forget what an interrupted run left")
    args = parser.parse_args(given)
    if args.threads < 1:
        parser.error(f"threads: {args.threads} is not allowed; use 1 or more, at most the number of cores")
    out = args.out or Path(MOVING_WORDS if args.model == WORD_READERS else args.model)
    _rebuild(args.model)(out, args.seed, args.threads, not args.fresh)


def _rebuild(model: str) -> Callable[[Path, int, int, bool], None]:
    """The function (out, seed, threads, resume) that trains a bundled model."""
    from pretrain.digits import pretrain_digits
    from pretrain.moving_digits import pretrain_moving_digits
    from pretrain.moving_digits_i2v import pretrain_moving_digits_i2v
    from pretrain.moving_words import pretrain_moving_words
    from pretrain.word_readers import pretrain_word_readers

    def digits(out: Path, seed: int, threads: int, resume: bool) -> None:
        pretrain_digits(out, seed, threads)  # minutes: it begins again every time

    video = {MOVING_DIGITS: pretrain_moving_digits, MOVING_DIGITS_I2V: pretrain_moving_digits_i2v, MOVING_WORDS: pretrain_moving_words}
    return (video | {DIGITS: digits, WORD_READERS: pretrain_word_readers})[model]


if __name__ == "__main__":
    main()
