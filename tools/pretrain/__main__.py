"""`python -m pretrain --out FOLDER [--seed 0] [--threads 2] [--fresh]`: trains the embedded default from raw scans."""

import argparse
from pathlib import Path

from pretrain.moving_digits import pretrain_moving_digits


def main() -> None:
    """Reads the command line and trains."""
    about = "Train the moving-digits pipeline from raw scans (under 90 minutes on 2 cores)."
    parser = argparse.ArgumentParser(prog="python -m pretrain", description=about)
    parser.add_argument("--out", type=Path, required=True, help="folder of the pipeline; an interrupted run there goes on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--fresh", action="store_true", help="forget what an interrupted run left")
    args = parser.parse_args()
    pretrain_moving_digits(args.out, seed=args.seed, threads=args.threads, resume=not args.fresh)


if __name__ == "__main__":
    main()
