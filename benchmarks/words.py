"""The gates of the moving-words world: how many words an outside reader reads right, real, through the VAE and from the teacher.

    PYTHONPATH=tools python benchmarks/words.py sample FOLDER --out crops.npz     # minutes; instep's own environment
    python benchmarks/words.py read crops.npz --out words.json                    # an environment with `pip install rapidocr onnxruntime numpy`
    PYTHONPATH=src python benchmarks/words.py ours crops.npz --out ours.json      # the same videos, uncropped, by the bundled readers; seconds

Words are held out of training, prompts say everything, and a reader sees each frame cut to its ink and 2 px around. A frame counts where no ink touches the
edge of the canvas (all frames of a video that has none such); a video is right when more than half of its frames that count are read exactly.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

INK = 0.5  # a pixel darker than this is ink
MARGIN = 2


def crops(video: np.ndarray) -> list[np.ndarray]:
    """The frames [F, H, W] (uint8, dark on light) that count, each cut to its ink and `MARGIN` px of white around; a frame without ink is left out."""
    ink = video < 255 * INK
    inside = ~(ink[:, 0].any(1) | ink[:, -1].any(1) | ink[:, :, 0].any(1) | ink[:, :, -1].any(1))
    found = []
    for frame, dark in zip(video[inside] if inside.any() else video, ink[inside] if inside.any() else ink, strict=True):
        if dark.any():
            rows, columns = np.flatnonzero(dark.any(1)), np.flatnonzero(dark.any(0))
            padded = np.pad(frame, MARGIN, constant_values=255)
            found.append(padded[rows[0] : rows[-1] + 1 + 2 * MARGIN, columns[0] : columns[-1] + 1 + 2 * MARGIN])
    return found


def sample(folder: Path, out: Path, n: int, guidance: float, steps: list[int], seed: int) -> None:
    """Writes videos of n prompts with held-out words: real, through the VAE, and sampled with each number of steps, guided."""
    import torch
    from diffusers import WanPipeline
    from pretrain.measure import Sampler
    from pretrain.words import WordTexts

    from instep.bundled import words
    from instep.models.wan_vae import decode_latents, encode_latents

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    prompts = words.prompts_of("heldout", n, seed + 1, full=1.0)
    real = words.render([words.parse(prompt) for prompt in prompts], seed).media
    pipe = WanPipeline.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)
    with torch.no_grad():
        through = torch.cat([decode_latents(pipe.vae, encode_latents(pipe.vae, part)) for part in real.split(32)])
    arms = {"real": real, "real through the VAE": through}
    sampler = Sampler(pipe, WordTexts(pipe.tokenizer, pipe.text_encoder), (16, 3, 8, 16))
    for k in steps:
        arms[f"{k} steps, guidance {guidance:g}"] = sampler(prompts, sampler.levels(k), guidance, seed)
    videos = {name: (media.mean(1).clamp(0, 1) * 255).round().byte().numpy() for name, media in arms.items()}
    np.savez(out, words=np.array([words.parse(prompt).word for prompt in prompts]), **videos)


def read(given: Path, out: Path) -> None:
    """Shares of videos and of frames that PP-OCR reads right, with the standard error of the first, for each arm."""
    from rapidocr import RapidOCR

    engine = RapidOCR(params={"Global.log_level": "error", "EngineConfig.onnxruntime.intra_op_num_threads": 1})
    arms: dict[str, Any] = {}
    with np.load(given) as stored:
        wanted = stored["words"].tolist()
        for name in (key for key in stored.files if key != "words"):
            videos = []
            for word, video in zip(wanted, stored[name], strict=True):
                texts = [engine(np.repeat(crop[..., None], 3, -1), use_det=False, use_cls=False, use_rec=True).txts for crop in crops(video)]
                videos.append([bool(text) and text[0].replace(" ", "").upper() == word for text in texts])
            right = float(np.mean([sum(hits) > len(hits) / 2 for hits in videos]))
            frames = float(np.mean([hit for hits in videos for hit in hits] or [0.0]))
            arms[name] = {"videos right": round(right, 4), "error": round((right * (1 - right) / len(videos)) ** 0.5, 4), "frames right": round(frames, 4)}
            print(f"{name:<28} videos right {right:.3f} +- {arms[name]['error']:.3f}   frames right {frames:.3f}", flush=True)
    out.write_text(json.dumps({"reader": "PP-OCR (rapidocr)", "videos": len(wanted), "arms": arms}, indent=1) + "\n")


def ours(given: Path, out: Path) -> None:
    """Shares of videos that the bundled readers read right, with standard errors, and of frames in which they read four letters, for each arm."""
    import torch

    from instep.bundled.word_readers import correct_of, reader

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    arms: dict[str, Any] = {}
    with np.load(given) as stored:
        prompts = [f"the word {word}" for word in stored["words"].tolist()]
        for name in (key for key in stored.files if key != "words"):
            media = torch.from_numpy(stored[name]).float().div(255)[:, None].expand(-1, 3, -1, -1, -1)
            for which in ("training", "monitor"):
                found = reader(which).judge(media)
                right = float(correct_of(found, prompts).word.float().mean())
                four = float(np.mean([len(text) == 4 for texts in found.texts for text in texts]))
                error = round((right * (1 - right) / len(prompts)) ** 0.5, 4)
                row = {"videos right": round(right, 4), "error": error, "frames with four letters": round(four, 4)}
                arms.setdefault(name, {})[which] = row
                print(f"{name:<28} {which:<9} videos right {right:.3f} +- {error:.3f}   frames with four letters {four:.3f}", flush=True)
    out.write_text(json.dumps({"readers": "bundled", "videos": len(prompts), "arms": arms}, indent=1) + "\n")


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    one = parts.add_parser("sample", help="draw and sample videos")
    one.add_argument("folder", type=Path)
    one.add_argument("--n", type=int, default=128, help="prompts")
    one.add_argument("--guidance", type=float, default=4.0)
    one.add_argument("--steps", type=int, nargs="*", default=[50, 4, 2, 1])
    one.add_argument("--seed", type=int, default=0)
    two = parts.add_parser("read", help="read them with PP-OCR")
    three = parts.add_parser("ours", help="read them with the bundled readers")
    for part in (two, three):
        part.add_argument("crops", type=Path)
    for part in (one, two, three):
        part.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.part == "sample":
        sample(args.folder, args.out, args.n, args.guidance, args.steps, args.seed)
    else:
        {"read": read, "ours": ours}[args.part](args.crops, args.out)


if __name__ == "__main__":
    main()
