"""From samples to preferred pairs and into training: what is preferred on the page is what training prefers. No person takes part: scripts answer."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from human_eval_helpers import sample_folder
from test_apo import NONE, QUICK, TINY
from test_run import family, rows

from instep.cli.main import main
from instep.cli.sample import save_each
from instep.data.animation import save_animation
from instep.data.media import pair_samples, read_media, repeats
from instep.data.pairs import PreferencePair, read_pairs
from instep.data.prompt import texts_of
from instep.human_eval.samples import match
from instep.methods.role_config import AdamWConfig
from instep.recipes.apo import apo
from instep.training.run import train

FAST = replace(TINY, batch=8, student=AdamWConfig(1e-3))
# what the scripts that stand in for people say of each prompt: b, a or equal
ANSWERS = {
    "agreed": ("b", "b", "b"),
    "most": ("b", "b", "a"),
    "others": ("a", "b", "a"),
    "one said": ("equal", "b", "equal"),
    "split": ("b", "a", "equal"),
    "nothing": ("equal", "equal", "equal"),
}
NAMES = ("Ana", "Bo", "Cy")


def videos(seed: int, bright: int) -> torch.Tensor:
    """A video a prompt, uint8 [N, 9, 48, 48, 3], in the darker or the brighter half; the first two have frames that are alike."""
    rng = torch.Generator().manual_seed(seed)
    made = torch.randint(128, (len(ANSWERS), 9, 48, 48, 3), generator=rng, dtype=torch.uint8) + 128 * bright
    made[0, 4:] = made[0, 4:5]
    made[1, 0:3] = made[1, 0:1]
    return made


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """Samples of two seeds, evaluated through a running server by scripts that see what the page shows, and exported."""
    pytest.importorskip("fastapi")
    from test_human_eval_page import Server

    folder = tmp_path_factory.mktemp("trip")
    sides = {"a": videos(0, 0), "b": videos(1, 1)}
    for seed, (name, made) in enumerate(sides.items()):
        save_each(folder / name, made, list(ANSWERS), 1, seed)
    server = Server(folder / "a", folder / "b", "--match", "prompt", "--questions", "overall", "--out", folder / "human_eval.sqlite")
    try:
        cookie, lefts = server.cookie(), set()
        for i, name in enumerate(NAMES):
            state = server.post("/api/join", {"name": name}, cookie)
            while (item := state["item"]) is not None:
                light = {side: brightness(server, item[side]["id"], cookie) for side in ("left", "right")}
                sides_of = {"b": max(light, key=light.get), "a": min(light, key=light.get), "equal": "equal"}
                lefts.add(sides_of["b"])
                answer = {"overall": sides_of[ANSWERS[item["prompt"]][i]]}
                body = {"name": name, "item": item["id"], "request": f"{name}-{item['id']}", "answers": answer}
                state = server.post("/api/answer", body, cookie)
    finally:
        server.kill()
    assert lefts == {"left", "right"}, "B is shown on both sides"
    assert main(["pairs", "export", str(folder / "human_eval.sqlite"), str(folder / "pairs.jsonl"), "--questions", "overall"]) == 0
    return folder, sides


def brightness(server, media: str, cookie: str) -> float:
    import io

    from PIL import Image, ImageStat

    status, _, data = server.ask(f"/media/{media}", cookie=cookie)
    assert status == 200
    return ImageStat.Stat(Image.open(io.BytesIO(data)).convert("L")).mean[0]


def test_the_files_that_were_preferred_are_the_chosen_ones(evaluated):
    folder, _ = evaluated
    told = {row["prompt"]: row for row in map(json.loads, (folder / "pairs.jsonl").read_text().splitlines())}
    files = {prompt: f"{i:04d}.webp" for i, prompt in enumerate(ANSWERS)}
    for prompt, better, votes in (("agreed", "b", [3, 0, 0]), ("most", "b", [2, 1, 0]), ("others", "a", [2, 1, 0]), ("one said", "b", [1, 0, 2])):
        row, worse = told[prompt], "a" if better == "b" else "b"
        assert (row["chosen"], row["rejected"]) == (f"{better}/{files[prompt]}", f"{worse}/{files[prompt]}")
        assert [row["votes_chosen"], row["votes_rejected"], row["votes_tie"]] == votes and not row["tie"]
    assert told["split"]["tie"] and told["nothing"]["tie"] and sorted(told["split"]["annotators"]) == sorted(NAMES)


def test_what_annotators_preferred_is_what_is_trained_on(evaluated, tmp_path):
    folder, sides = evaluated
    fam = family()
    made = pair_samples(read_pairs(folder / "pairs.jsonl"), fam)
    prompts = list(ANSWERS)
    assert sorted(texts_of(made.prompts)) == sorted(set(prompts) - {"split", "nothing"}), "ties are left out"

    def latents(better: bool) -> torch.Tensor:
        which = [(sides["a" if (prompt == "others") == better else "b"])[prompts.index(prompt)] for prompt in texts_of(made.prompts)]
        return fam.encode_media(torch.stack(which).permute(0, 4, 1, 2, 3).float() / 255)

    torch.testing.assert_close(made.chosen, latents(True), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(made.rejected, latents(False), atol=1e-4, rtol=1e-4)
    recipe = apo(FAST, **NONE | {"offline": 4})
    run = train(recipe, fam, out=tmp_path / "run", prompts=prompts, pairs=made, options=QUICK)
    losses = [row["objective/dpo"] for row in rows(run.out) if "objective/dpo" in row]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4) and losses[-1] < 0.99 * losses[0]


@pytest.mark.parametrize("suffix", ["webp", "gif", "png"])
@pytest.mark.parametrize("pattern", ["abbbbbbbb", "aabbccdde", "abcdefghi", "aabbccdd", "aaaaaaaaa"])
def test_frames_that_a_file_keeps_once_are_read_as_often_as_they_were_shown(tmp_path, suffix, pattern):
    rng = torch.Generator().manual_seed(0)
    # whole colours: also a GIF keeps them
    colours = {letter: torch.randint(256, (1, 1, 3), generator=rng, dtype=torch.uint8).expand(48, 48, 3) for letter in sorted(set(pattern))}
    frames = torch.stack([colours[letter] for letter in pattern])
    save_animation(tmp_path / f"x.{suffix}", frames)
    stored = read_media(tmp_path / f"x.{suffix}")
    assert stored.shape[1] == len(set(pattern)), "these files merge what is alike"
    read = read_media(tmp_path / f"x.{suffix}", len(pattern))
    torch.testing.assert_close(read, frames.permute(3, 0, 1, 2).float() / 255, atol=0.02, rtol=0)


def test_how_often_frames_are_repeated():
    assert repeats([125, 1000], 9) == [1, 8] and repeats([120, 1000], 9) == [1, 8]
    assert repeats([250, 250], 4) == [2, 2], "in the time that makes as many as are wanted"
    assert repeats([250, 250], 5) == [1, 1], "which these do not"
    assert repeats([100, 100, 100], 2) == [1, 1, 1]
    assert repeats([100, 0], 9) == [1, 1], "not known"
    assert repeats([1, 10**9], 9) == [1, 9], "no more than are of use"
    assert repeats([0], 9) == [9] and repeats([1125], 1) == [1]


def test_images_are_no_pairs_for_a_model_of_videos(tmp_path):
    for name, grey in (("a", 0), ("b", 200)):
        save_animation(tmp_path / f"{name}.webp", torch.full((1, 48, 48, 3), grey, dtype=torch.uint8))
    with pytest.raises(ValueError, match="pairs: none of 2 samples moves, and the model makes videos of 9 frames"):
        pair_samples([PreferencePair("x", tmp_path / "a.webp", tmp_path / "b.webp")], family())


def test_samples_of_two_seeds_are_matched_by_the_prompt(tmp_path):
    a, b = sample_folder(tmp_path / "a", "red", seeds=(0, 1)), sample_folder(tmp_path / "b", "blue", seeds=(5, 6, 7))
    with pytest.raises(ValueError, match="the prompt and seed of one of .*--match prompt"):
        match(str(a), str(b))
    found = match(str(a), str(b), "prompt")
    assert [(x.prompt == y.prompt, x.seed, y.seed) for x, y in found.pairs] == [(True, 0, 5), (True, 1, 6)] * 3 and found.alone == (0, 3)
