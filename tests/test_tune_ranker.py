"""A vision-language ranker fine-tuned on pairs, on a tiny LLaVA of random weights: what it is taught, that it learns it, and what is left on disk."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_vlm_local import tiny_llava

from instep.cli.main import main
from instep.cli.rewards import load_reward
from instep.data.animation import save_animation
from instep.data.pairs import PreferencePair, read_pairs, write_pairs
from instep.rewards.vlm import instructions, question
from instep.rewards.vlm_local import transformers_endpoint
from instep.rewards.vlm_tuning import Measured, Tuning, answer_loss, asked, check_tunable, label_for, linear_layers, measure, preferences_of, save, tune


@pytest.fixture
def short(monkeypatch):
    """A question of a few words in place of the appendix's two thousand letters, a token each."""
    monkeypatch.setattr("instep.rewards.vlm.instructions", lambda domain: f"Which, {domain}?")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny LLaVA, whose last layer is enlarged: as it is drawn, its logits cannot be apart by more than 0.3."""
    from safetensors.torch import load_file, save_file

    folder = tiny_llava(tmp_path_factory.mktemp("model") / "llava")
    weights = load_file(folder / "model.safetensors")
    (last,) = (name for name in weights if name.endswith("lm_head.weight"))
    save_file(weights | {last: weights[last] * 30}, folder / "model.safetensors", {"format": "pt"})
    return folder


def loaded(folder, dtype="float32"):
    return transformers_endpoint(str(folder), dtype=dtype, max_new_tokens=4)


@pytest.fixture
def pairs(tmp_path):
    """Six prompts, each with a bright image that is preferred to a dark one."""
    for i in range(6):
        for name, level in (("bright", 220), ("dark", 30)):
            Image.new("RGB", (8, 8), (level + 3 * i, level, level)).save(tmp_path / f"{name}{i}.png")
    found = [PreferencePair(f"a hen {i}", tmp_path / f"bright{i}.png", tmp_path / f"dark{i}.png") for i in range(6)]
    write_pairs(tmp_path / "pairs.jsonl", found)
    return found


def test_labels_by_hand(tmp_path, capsys):
    """1 or 2 for the preferred video; 3 or 4 for a video and the slow copy that `instep pairs slow` made, not for people's own answers about motion."""
    (tmp_path / "mine").mkdir()
    save_animation(tmp_path / "mine" / "a.webp", (torch.arange(9) * 20 + 10)[:, None, None, None].expand(9, 4, 6, 3).to(torch.uint8))
    (tmp_path / "mine" / "a.txt").write_text("a woman waves")
    assert main(["pairs", "slow", str(tmp_path / "mine"), str(tmp_path / "slow.jsonl"), "--frames", "9"]) == 0
    (slow,) = read_pairs(tmp_path / "slow.jsonl")
    other = PreferencePair("a woman waves", Path("a.webp"), Path("b.webp"), "motion")
    overall = PreferencePair("a woman waves", slow.chosen, slow.rejected, "overall")
    assert [[label_for(pair, first) for first in (True, False)] for pair in (slow, other, overall)] == [[3, 4], [1, 2], [1, 2]]
    # the preferred video is shown first, and then second; the prompt says that people are in it
    (first, domain, there), (second, _, back) = asked(slow, Tuning(frames=2))
    assert (first, second, domain) == (True, False, "human") and there[-1]["text"] == instructions("human") and len(there) == 7
    assert there[1:3] == back[4:6] and there[4:6] == back[1:3] and there[1:3] != there[4:6]
    assert next(asked(slow, Tuning("other", 2)))[1] == "other"


@pytest.mark.parametrize("with_images", [True, False])
def test_the_loss_is_of_the_answers_tokens_alone(folder, with_images):
    endpoint = loaded(folder)
    content = question(torch.rand(3, 8, 8), torch.rand(3, 8, 8), "other", 1) if with_images else [{"type": "text", "text": "Which?"}]
    loss = answer_loss(endpoint, content, 3)
    # plainly: the probability of the token "3" after the question, and that of the end after "3"
    given = dict(endpoint.inputs(content))
    log_prob = 0.0
    for token in (endpoint.processor.tokenizer.convert_tokens_to_ids("3"), 1):
        log_prob += float(endpoint.network(**given).logits[0, -1].log_softmax(0)[token])
        given["input_ids"] = torch.cat([given["input_ids"], torch.tensor([[token]])], 1)
        given["attention_mask"] = torch.ones_like(given["input_ids"])
    assert float(loss) == pytest.approx(-log_prob / 2, rel=1e-5)
    assert abs(float(answer_loss(endpoint, content, 1)) - float(loss)) > 1e-4


def test_it_memorises_pairs_and_the_folder_is_a_ranker(folder, pairs, short, tmp_path):
    endpoint, tuning = loaded(folder), Tuning("other", frames=1, lr=2e-2, epochs=40, batch=4)
    before = {name: value.clone() for name, value in endpoint.network.state_dict().items()}
    assert measure(endpoint, pairs[:4], tuning, "before").both == 0
    tune(endpoint, pairs[:4], tuning)
    assert measure(endpoint, pairs[:4], tuning, "after") == Measured(4, 4, 4, 4, 0), "right whichever comes first, and every answer is an option"
    # the adapters are merged, and nothing but the language model's linear layers has changed
    changed = {name for name, value in endpoint.network.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"{name}.weight" for name in linear_layers(endpoint.network)} and before.keys() == endpoint.network.state_dict().keys()
    assert len(changed) == 7 and all(".language_model.layers.0." in name for name in changed) and not endpoint.network.training
    save(endpoint, tmp_path / "out", {})
    assert (tmp_path / "out" / "model.safetensors").is_file() and not list((tmp_path / "out").glob("*adapter*"))
    reward = load_reward(f"frames=1 device=cpu dtype=float32 vlm:{tmp_path / 'out'}")
    bright, dark = torch.full((3, 8, 8), 220 / 255), torch.full((3, 8, 8), 30 / 255)
    assert reward.score(torch.stack([dark, bright, bright, dark]), ["a", "a", "b", "b"]).tolist() == [-1.0, 1.0, 1.0, -1.0]
    assert reward.ranker.endpoint.ask(question(bright, dark, "other", 1)) == "1"
    with pytest.raises(ValueError, match="out: .*out exists; choose another name"):
        save(endpoint, tmp_path / "out", {})


def test_adapters_are_in_float32_and_a_seed_gives_the_same_weights(folder, pairs, short, monkeypatch):
    seen, real = set(), torch.optim.AdamW
    monkeypatch.setattr(
        torch.optim, "AdamW", lambda parameters, *args, **given: (seen.update(p.dtype for p in parameters), real(parameters, *args, **given))[1]
    )
    found = []
    for seed in (0, 0, 1):
        endpoint = loaded(folder, "bfloat16")
        state = torch.get_rng_state()
        tune(endpoint, pairs[:2], Tuning(frames=1, lr=1e-2, epochs=2, seed=seed))
        assert torch.equal(torch.get_rng_state(), state)
        found.append(torch.cat([value.flatten() for value in endpoint.network.state_dict().values()]))
    assert seen == {torch.float32} and found[0].dtype == torch.bfloat16
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_prompts_are_held_out_as_by_pairs_fit(pairs):
    """Ties count where prompts are divided, so that the same prompts are held out, and are then left out."""
    from instep.rewards.bradley_terry import split

    tie = PreferencePair("a tie", pairs[0].chosen, pairs[0].rejected, votes=(0, 0, 1))
    some = [*pairs, tie, PreferencePair("a hen 0", pairs[1].chosen, pairs[1].rejected)]
    for seed in range(5):
        taught, held = preferences_of(some, 0.3, seed)
        kept, _, _ = split(torch.tensor([1.0] * 6 + [0.0, 1.0]), 0.3, seed, [pair.prompt for pair in some])
        assert held == [some[i] for i in kept if not some[i].tie] and not {pair.prompt for pair in taught} & {pair.prompt for pair in held}
        assert len(taught) + len(held) == 7 and tie not in taught


def test_the_command(folder, pairs, short, tmp_path, capsys):
    out = tmp_path / "tuned"
    line = ["pairs", "tune-ranker", str(tmp_path / "pairs.jsonl"), str(out), "--ranker", str(folder), "--frames", "1", "--dtype", "float32"]
    assert main([*line, "--lr", "1e-2", "--epochs", "12", "--batch", "2", "--heldout", "0.3"]) == 0
    said = capsys.readouterr()
    record = json.loads((out / "tuning.json").read_text())
    assert record["trained_on"] == 4 and record["before"] == {"pairs": 2, "first": 0, "second": 0, "both": 0, "unread": 4}
    assert record["after"]["pairs"] == 2 and record["tuning"]["domain"] == "prompt" and record["ranker"].startswith("llava ")
    assert "6, 0 of them ties, which are left out; 4 trained on" in said.out and "before     right 0.0 % with the preferred first" in said.out
    assert f'--reward "domain=prompt frames=1 dtype=float32 vlm:{out}"' in said.out and "tuning: 24/24 in" in said.err
    assert load_reward(f"domain=prompt frames=1 device=cpu dtype=float32 vlm:{out}").name.startswith("ranked by tuned ")
    assert main(line) == 2 and f"out: {out} exists; choose another name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--rank", "0"], "rank: 0 is not allowed; it is 1 or more"),
        (["--frames", "0"], "frames: 0 is not allowed"),
        (["--lr", "0"], "lr: 0.0 is not allowed; it is positive"),
        (["--heldout", "1"], "heldout: 1.0 is not allowed"),
        (["--device", "mars"], "device: 'mars' is not allowed"),
        (["--questions", "taste"], "questions: 'taste' is in no row"),
        (["--ranker", "nowhere-at-all"], "model: 'nowhere-at-all' cannot be loaded"),
    ],
)
def test_what_is_refused(pairs, tmp_path, monkeypatch, capsys, given, message):
    if "nowhere-at-all" not in given:
        monkeypatch.setattr("instep.rewards.vlm_local.transformers_endpoint", lambda *args: pytest.fail("the model was loaded"))
    line = ["pairs", "tune-ranker", str(tmp_path / "pairs.jsonl"), str(tmp_path / "out"), "--ranker", "some"]
    assert main([*line, *given]) == 2 and message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_pairs_that_teach_nothing_are_refused(pairs):
    with pytest.raises(ValueError, match="pairs: 1 of 1 prompt are too few"):
        preferences_of(pairs[:1], 0.2, 0)
    ties = [PreferencePair(pair.prompt, pair.chosen, pair.rejected, votes=(0, 0, 1)) for pair in pairs]
    with pytest.raises(ValueError, match="pairs: 6 of 6 prompts with 0 preferences are too few"):
        preferences_of(ties, 0.2, 0)


def test_models_that_cannot_be_tuned(folder):
    endpoint = loaded(folder)
    check_tunable(endpoint)
    network, config = endpoint.network, endpoint.network.generation_config
    config.eos_token_id = [7, 1]
    assert endpoint.tokens_of("4")[-1] == 1, "the tokenizer's own, where it ends an answer"
    config.eos_token_id = [7, 8]
    assert endpoint.tokens_of("4")[-1] == 7
    config.eos_token_id = None
    with pytest.raises(ValueError, match="model: llava .* names no token that ends an answer"):
        check_tunable(endpoint)
    config.eos_token_id = 1
    network.get_decoder = lambda: network
    with pytest.raises(ValueError, match="ranker: a LlavaForConditionalGeneration has no language model of linear layers"):
        check_tunable(endpoint)


def test_a_loss_that_is_no_number_ends_it(folder, pairs, short):
    endpoint = loaded(folder)
    with torch.no_grad():
        endpoint.network.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="lr: the loss is nan after 0 steps with 0.01; lower it"):
        tune(endpoint, pairs[:1], Tuning(frames=1, lr=1e-2))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_folder_that_cannot_be_finished_is_not_there(folder, tmp_path, monkeypatch, error):
    endpoint = loaded(folder)

    def fail(where):
        assert (where / "model.safetensors").is_file(), "the weights were written"
        raise error

    monkeypatch.setattr(endpoint.processor, "save_pretrained", fail)
    with pytest.raises(type(error)):
        save(endpoint, tmp_path / "out", {})
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from types import SimpleNamespace as Stand
from instep.rewards.vlm_tuning import save
network = Stand(save_pretrained=lambda folder: (folder / "model.safetensors").write_bytes(b"half"))
save(Stand(network=network, processor=Stand(save_pretrained=lambda folder: os.kill(os.getpid(), signal.SIGKILL))), Path(sys.argv[1]), {})
"""


def test_what_a_killed_save_left_goes_with_the_next_one(folder, tmp_path):
    assert subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "out")]).returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert (left / "model.safetensors").read_bytes() == b"half"
    save(loaded(folder), tmp_path / "out", {})
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
