"""Many small videos through the latent cache: memory, throughput, and what a kill costs.

    python benchmarks/many_videos.py FOLDER --videos 50000 --out benchmarks/results/many_videos.json

It makes WebDataset shards of synthetic videos in FOLDER, encodes them in a process of its own that is killed once in the middle, goes on in another one, and
checks rows of the cache against videos that are read and encoded alone. Videos of 64 x 64 and 9 frames are read at 32 x 32 and 5 frames; the encoder is the VAE
of moving-digits. FOLDER may be used again: what is there stays.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from instep.bundled import load
from instep.core.files import write_json
from instep.core.size import Size
from instep.data import latent_cache
from instep.data.clips import read_clip
from instep.data.real_files import RealFile, real_files

SIDE, FRAMES, FPS, SHARD = 64, 9, 16.0, 1000
READ = Size(32, 32, 5)  # the model's size


def video(i: int) -> bytes:
    """A bright square that moves over a dark ground, its place, colour and direction made from `i`."""
    x, y, dx, dy = 8 + i % 33, 8 + i // 33 % 33, 2 * (i % 2) - 1, i // 2 % 3 - 1
    frames = np.full((FRAMES, SIDE, SIDE, 3), 20, np.uint8)
    for f, frame in enumerate(frames):
        top, left = y + dy * f, x + dx * f
        frame[top : top + 16, left : left + 16] = (80 + i % 170, 80 + i // 170 % 170, 200)
    first, *others = [Image.fromarray(frame) for frame in frames]
    buffer = io.BytesIO()
    first.save(buffer, "WEBP", save_all=True, append_images=others, duration=round(1000 / FPS), lossless=True, method=0)
    return buffer.getvalue()


def make(folder: Path, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, count, SHARD):
        shard = folder / f"{start // SHARD:05d}.tar"
        if shard.is_file():
            continue
        with tarfile.open(shard.with_suffix(".part"), "w") as archive:
            for i in range(start, min(count, start + SHARD)):
                for name, data in ((f"{i:08d}.webp", video(i)), (f"{i:08d}.txt", f"square {i}".encode())):
                    entry = tarfile.TarInfo(name)
                    entry.size = len(data)
                    archive.addfile(entry, io.BytesIO(data))
        shard.with_suffix(".part").rename(shard)


def memory(field: str = "RssAnon") -> float:
    """Megabytes of this process that no file stands behind."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def encode(files: list[RealFile], cache: Path, record: Path) -> None:
    """Encodes what is missing; memory and the number of batches on disk go into `record` every five seconds."""
    family, rows, begun = load("moving-digits", READ), [], time.monotonic()
    plain, last = latent_cache.read_clip, [begun]

    def watched(*given):
        if time.monotonic() - last[0] > 5:
            last[0] = time.monotonic()
            done = (cache / latent_cache.DONE).read_bytes().count(1)
            rows.append({"seconds": last[0] - begun, "batches": done, "megabytes": memory()})
            write_json(record, rows)
        return plain(*given)

    latent_cache.read_clip = watched
    latent_cache.real_samples(files, family, cache, FPS)
    rows.append({"seconds": time.monotonic() - begun, "batches": -(-len(files) // latent_cache.BATCH), "megabytes": memory()})
    write_json(record, rows)


def child(folder: Path, cache: Path, record: Path, until: int | None) -> float:
    """Runs `encode` in a process, which is killed once `until` batches are on disk; seconds."""
    begun = time.monotonic()
    process = subprocess.Popen([sys.executable, __file__, str(folder), "--encode", str(cache), str(record)])
    marks = cache / latent_cache.DONE
    while process.poll() is None:
        time.sleep(0.2)
        if until is not None and marks.is_file() and marks.read_bytes().count(1) >= until:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            return time.monotonic() - begun
    if process.returncode:
        raise SystemExit(f"encoding ended with status {process.returncode}")
    return time.monotonic() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--videos", type=int, default=50000)
    parser.add_argument("--out", type=Path, default=Path("many_videos.json"))
    parser.add_argument("--encode", nargs=2, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.encode:
        encode(real_files(args.folder), *args.encode)
        return
    begun = time.monotonic()
    make(args.folder, args.videos)
    made = time.monotonic() - begun
    begun = time.monotonic()
    files = real_files(args.folder)
    listed = time.monotonic() - begun
    cache = args.folder.with_name(args.folder.name + "-cache")
    before, after = args.folder.with_name("before.json"), args.folder.with_name("after.json")
    batches = -(-len(files) // latent_cache.BATCH)
    child(args.folder, cache, before, batches // 3)
    kept = (cache / latent_cache.DONE).read_bytes().count(1)
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = child(args.folder, cache, after, None)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = used.ru_utime + used.ru_stime - spent.ru_utime - spent.ru_stime
    rows, family = latent_cache.mapped(cache / latent_cache.NAME, "r"), load("moving-digits", READ)
    worst = 0.0
    for i in range(0, len(files), max(1, len(files) // 50)):
        alone = family.encode_media(read_clip(files[i], family.size, FPS)[None])[0]
        worst = max(worst, float((alone - torch.from_numpy(rows[i].copy())).abs().max()))
    curves = [[row["megabytes"] for row in json.loads(record.read_text())] for record in (before, after)]
    write_json(
        args.out,
        {
            "videos": len(files),
            "size": [SIDE, SIDE, FRAMES],
            "read_at": [READ.height, READ.width, READ.frames],
            "seconds_to_make": made,
            "seconds_to_list": listed,
            "batches": batches,
            "batches_kept_after_the_kill": kept,
            "encoded_after_the_kill": len(files) - kept * latent_cache.BATCH,
            "seconds": seconds,
            "cpu_seconds": cpu,
            "megabytes": [{"first": curve[0], "least": min(curve), "most": max(curve), "last": curve[-1], "readings": len(curve)} for curve in curves],
            "megabytes_of_cache": rows.nbytes / 2**20,
            "largest_difference": worst,
        },
    )
    print(args.out.read_text())


if __name__ == "__main__":
    main()
