"""The section of docs/results.md on many real videos, from what benchmarks/many_videos.py measured."""

from __future__ import annotations

import json
from pathlib import Path

FILE = Path(__file__).parent / "results" / "many_videos.json"


def lines() -> list[str]:
    """The section; empty as long as nothing was measured."""
    if not FILE.is_file():
        return []
    found = json.loads(FILE.read_text())
    side, _, frames = found["size"]
    height, width, read = found["read_at"]
    before, after = found["megabytes"]
    encoded = found["encoded_after_the_kill"]
    return [
        "## Many real videos",
        "",
        f"`python benchmarks/many_videos.py FOLDER --videos {found['videos']} --out benchmarks/results/many_videos.json`: {found['videos']:,} synthetic videos "
        f"in WebDataset shards, {side} x {side} and {frames} frames, go into the latent cache of `--real` at {height} x {width} and {read} frames, through the "
        "VAE of `moving-digits`, on one thread of a busy processor. The process that encodes is killed once on the way (SIGKILL), and another one goes on.",
        "",
        "| | |",
        "|---|---|",
        f"| the shards are listed in | {found['seconds_to_list']:.0f} s |",
        f"| batches of eight on disk at the kill, all kept | {found['batches_kept_after_the_kill']:,} of {found['batches']:,} |",
        f"| encoded afterwards | {encoded:,} videos in {found['seconds']:.0f} s ({encoded / found['seconds']:.0f} a second), of which the processor worked "
        f"{found['cpu_seconds']:.0f} s ({encoded / found['cpu_seconds']:.0f} videos a second of it) |",
        f"| memory of the first process, no file behind it | {before['least']:.0f} to {before['most']:.0f} MB ({before['readings']} readings) |",
        f"| of the second | {after['least']:.0f} to {after['most']:.0f} MB ({after['readings']} readings) |",
        f"| latents on disk | {found['megabytes_of_cache']:.0f} MB |",
        f"| largest difference of some 50 rows from videos that are encoded alone | {found['largest_difference']:.1e} |",
        "",
    ]
