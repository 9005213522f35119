"""Folders of media for the human-evaluation page's tests: squares that move, in two colours."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image, ImageDraw

PROMPTS = ("a square moving right", "a square moving left", "a square standing still")


def sample_folder(folder: Path, colour: str, prompts: tuple[str, ...] = PROMPTS, seeds: tuple[int, ...] = (0, 1), size: int = 48, suffix: str = "webp") -> Path:
    """A folder with one animation a prompt and seed, and its manifest; what is drawn depends on colour, prompt and seed."""
    folder.mkdir(parents=True)
    rows = []
    for p, prompt in enumerate(prompts):
        for seed in seeds:
            frames = []
            for f in range(6):
                frame = Image.new("RGB", (size, size), (20 * p, 30 * seed, 40))
                x = size // 6 + (f if "right" in prompt else -f if "left" in prompt else 0) * size // 24 + size // 4
                ImageDraw.Draw(frame).rectangle((x, size // 3, x + size // 5, size // 3 + size // 5), fill=colour)
                frames.append(frame)
            name = f"{colour}-{p}-{seed}.{suffix}"
            extra = {"lossless": True} if suffix == "webp" else {}
            frames[0].save(folder / name, save_all=True, append_images=frames[1:], duration=120, loop=0, **extra)
            rows.append({"file": name, "prompt": prompt, "seed": seed})
    (folder / "samples.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder
