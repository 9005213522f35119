"""Parts of the pretraining: attention equal to the stock one, Muon, resuming, what prompts reveal."""

import json
from pathlib import Path

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from pretrain.attention import TextBias, TrainingAttention
from pretrain.measure import wobble
from pretrain.optim import Muon, Optimisers, orthogonalise
from pretrain.teacher import Latents, TeacherConfig, TeacherRun, build_transformer, prompt_spec, text_table
from pretrain.text import VOCABULARY, build_text_encoder, build_tokenizer

from instep.bundled.digits import describe, motion_spec, motions_allowed, parse

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def table():
    return text_table(build_tokenizer(), build_text_encoder(0))


def test_training_attention_equals_the_stock_pipeline_at_512_tokens(table):
    torch.manual_seed(0)
    net = build_transformer().eval()
    prompts = ["a seven moving left fast", "", "a digit"]
    rows = torch.tensor([table.rows[p] for p in prompts])
    x, t = torch.randn(3, 16, 3, 6, 6), torch.tensor([900.0, 500.0, 20.0])
    padded = torch.zeros(3, 512, 32)
    for i, row in enumerate(rows):
        padded[i, : table.lengths[row]] = table.embeddings[row, : table.lengths[row]]
    with torch.no_grad():
        stock = net(x, t, padded, return_dict=False)[0]
        bias = TextBias(torch.zeros(1, 1))
        for block in net.blocks:
            block.attn1.set_processor(TrainingAttention(bias))
            block.attn2.set_processor(TrainingAttention(bias))
        text, bias.value = table.condition(rows, torch.full((3,), 512))
        short = net(x, t, text, return_dict=False)[0]
        assert (stock - short).abs().max() < 1e-5
        # the padding's weight matters: without it the answer is another one
        text, bias.value = table.condition(rows, torch.full((3,), 8))
        assert (stock - net(x, t, text, return_dict=False)[0]).abs().max() > 1e-4
        for block in net.blocks:
            block.attn1.set_processor(WanAttnProcessor())


def test_the_tokenizer_knows_every_word_and_the_empty_prompt_is_its_end_token():
    tokenizer = build_tokenizer()
    assert tokenizer("").input_ids == [1]
    for digit in range(10):
        for motion in range(9):
            ids = tokenizer(describe(motion_spec(digit, motion))).input_ids
            assert VOCABULARY.index("<unk>") not in ids and ids[-1] == 1


def test_prompts_of_training_fit_their_videos_and_half_say_everything(table):
    u = torch.rand(4000, 2, generator=torch.Generator().manual_seed(0))
    specs = [prompt_spec(i % 10, i % 9, v, 0.5) for i, v in enumerate(u)]
    full = [s == motion_spec(i % 10, i % 9) for i, s in enumerate(specs)]
    assert 0.45 < sum(full) / len(full) < 0.62
    for i, spec in enumerate(specs):
        assert spec.digit in (None, i % 10) and i % 9 in motions_allowed(spec)
        assert parse(describe(spec)) == spec and describe(spec) in table.rows
    assert len({describe(s) for s in specs}) == len(table.rows) - 1


def test_newton_schulz_flattens_singular_values():
    g = torch.randn(3, 40, 24, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(g))
    assert values.min() > 0.5 and values.max() < 1.4


def test_muon_moves_kernels_of_any_rank_and_the_schedule_ends_at_zero():
    kernel = torch.nn.Parameter(torch.zeros(8, 4, 3, 3))
    target = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    optimiser = Muon([kernel], lr=0.1)
    for _ in range(150):
        (kernel - target).square().sum().backward()
        optimiser.step()
        optimiser.zero_grad()
    assert (kernel - target).square().mean() < 0.3 * target.square().mean()
    schedule = Optimisers([kernel], [torch.nn.Parameter(torch.zeros(2))], steps=100, muon_lr=1.0, adam_lr=1.0, warmup=10)
    assert schedule.scale(0) == pytest.approx(0.1) and schedule.scale(20) == 1 and schedule.scale(65) == pytest.approx(0.5) and schedule.scale(100) == 0


@pytest.mark.slow
def test_an_interrupted_teacher_goes_on_exactly(table, tmp_path):
    rng = torch.Generator().manual_seed(0)
    data = Latents(torch.randn(16, 16, 3, 6, 6, generator=rng).half(), torch.arange(16) % 10, torch.arange(16) % 9)
    config = TeacherConfig(steps=6, batch=2)

    def run() -> TeacherRun:
        return TeacherRun(config, 0, data, table)

    whole, first, second = run(), run(), run()
    for _ in range(4):
        whole.advance()
    for _ in range(2):
        first.advance()
    first.save(tmp_path / "state.safetensors")
    second.load(tmp_path / "state.safetensors")
    for _ in range(2):
        second.advance()
    for (name, a), b in zip(whole.net.state_dict().items(), second.net.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    for name, value in whole.average.weights.items():
        assert torch.equal(value, second.average.weights[name]), name


def test_wobble_ignores_motion_and_sees_changing_shapes():
    from instep.bundled.digits import render

    prompts = [describe(motion_spec(d, d % 9)) for d in range(10)]
    media = render("reference", [parse(p) for p in prompts], 0)
    steady = wobble(media, prompts)
    assert steady.max() < 0.05
    other = render("reference", [parse(p) for p in prompts[1:] + prompts[:1]], 0)
    changing = media.clone()
    changing[:, :, 4:] = 0.7 * media[:, :, 4:] + 0.3 * other[:, :, 4:]
    assert (wobble(changing, prompts) > steady + 0.025).all()


def test_the_command_hands_its_arguments_to_the_model_s_own_training(monkeypatch, capsys):
    from pretrain import __main__ as command

    seen = []
    for name in ("moving_digits", "moving_digits_i2v", "moving_words", "digits"):
        monkeypatch.setattr(f"pretrain.{name}.pretrain_{name}", lambda *given, name=name: seen.append((name, *given)))
    command.main(["moving-digits", "--out", "there", "--seed", "3", "--threads", "1", "--fresh"])
    command.main(["moving-digits-i2v"])
    command.main(["moving-words", "--seed", "1"])
    command.main(["digits", "--threads", "1"])
    assert seen == [
        ("moving_digits", Path("there"), 3, 1, False),
        ("moving_digits_i2v", Path("moving-digits-i2v"), 0, 2, True),
        ("moving_words", Path("moving-words"), 1, 2, True),
        ("digits", Path("digits"), 0, 1),
    ]
    for wrong, named in ((["sd3"], "choose from"), (["digits", "--threads", "0"], "threads: 0 is not allowed")):
        with pytest.raises(SystemExit) as stopped:
            command.main(wrong)
        assert stopped.value.code == 2 and named in capsys.readouterr().err


def test_records_name_the_command_that_repeats_them():
    from instep.bundled import NAMES, folder_of

    for name in NAMES:
        assert json.loads((folder_of(name) / "pretrain.json").read_text())["command"].startswith(f"PYTHONPATH=tools python -m pretrain {name} --seed 0")


def test_the_wheel_holds_the_package_and_its_rows_and_no_pretraining(tmp_path):
    """Built by hatchling where it is installed; otherwise by what the wheel's configuration includes."""
    import tomllib

    root = Path(__file__).parents[1]
    wheel = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel == {"packages": ["src/instep"]}, "nothing else is packed or forced in"
    try:
        from hatchling.builders.wheel import WheelBuilder
    except ImportError:
        names = {path.relative_to(root / "src").as_posix() for path in (root / "src/instep").rglob("*") if path.is_file()}
    else:
        names = {file.distribution_path for file in WheelBuilder(str(root)).recurse_included_files()}
    assert "instep/bundled/worlds.py" in names and "instep/bundled/assets/moving-digits/baselines.json" in names
    assert all(name.startswith("instep/") for name in names) and not any("pretrain" in name and not name.endswith("pretrain.json") for name in names)


def test_the_vae_learns_crops_first_and_whole_frames_late(monkeypatch):
    """Any layout and any videos: here those of moving words, whose frames are not square."""
    from pretrain import vae
    from pretrain.words import build_words_vae, word_videos

    seen = []
    plain = vae.decode_unclamped
    monkeypatch.setattr(vae, "decode_unclamped", lambda model, z: seen.append(out := plain(model, z)) or out)
    config = vae.VaeConfig(steps=3, batch=1, crop=16, first_frames=5, full_from=0.6)
    model = vae.train_vae(config, 0, build_words_vae, lambda n, rng: word_videos(min(n, 2), rng))
    assert [tuple(out.shape[2:]) for out in seen] == [(5, 16, 16), (5, 16, 16), (9, 32, 64)]
    assert len(model.config.latents_std) == 16 and min(model.config.latents_std) > 0 and model.config.latents_std != [1.0] * 16
