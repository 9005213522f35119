"""HPSv3 and VideoAlign on a tiny Qwen2-VL, from files as they are published: values and gradients against a second computation."""

from __future__ import annotations

import json

import pytest
import torch
from test_named_rewards import PROMPTS, agree, by_hand, resized
from tiny import byte_tokenizer
from torch import Tensor, nn

from instep.cli.main import main
from instep.cli.rewards import load_reward
from instep.rewards.convert import convert
from instep.rewards.named import Choice, named
from instep.rewards.qwen_scorer import fitting
from instep.rewards.videoalign import VideoAlign

MARKS = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}{% else %}"
    "<|vision_start|><|{{ c.type }}_pad|><|vision_end|>{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
AUTHORS = '''
import nothing_that_exists
DETAILED_PROMPT_WITH_SPECIAL_TOKEN = """
VQ <|VQ_reward|> MQ <|MQ_reward|> of {text_prompt}: <|TA_reward|>
"""
INSTRUCTION = """How good? {text_prompt}"""
prompt_with_special_token = """ <|Reward|> END"""
'''
WIDTH = 16


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Configuration and tokenizer of a tiny Qwen2-VL in a folder, its network with random weights, and the authors' file; patches of 4, merged by 2."""
    from transformers import Qwen2VLConfig, Qwen2VLModel

    folder = tmp_path_factory.mktemp("qwen")
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(MARKS, special_tokens=True)
    tokenizer.chat_template = TEMPLATE
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("image_pad", "video_pad", "vision_start", "vision_end")}
    text = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = Qwen2VLConfig(
        text_config={**text, "vocab_size": 320, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}},
        vision_config={"depth": 1, "embed_dim": 16, "hidden_size": WIDTH, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4},
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
    )
    torch.manual_seed(0)
    network = Qwen2VLModel(config).eval()
    for p in network.parameters():
        nn.init.normal_(p, std=0.3)
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "authors.py").write_text(AUTHORS)
    return folder, network, tokenizer


def published(network: nn.Module) -> dict[str, Tensor]:
    """Under the names of the transformers that the authors used."""
    own = {name.replace("language_model.", "model."): value.clone() for name, value in network.state_dict().items()}
    return own | {"lm_head.weight": torch.zeros(320, WIDTH)}


def by_loops(frames: Tensor) -> Tensor:
    """Frames [F, 3, H, W], F even, as patches of 4 x 4 and 2 frames, [N, 96]: in the order of blocks of 2 x 2 patches."""
    f, _, height, width = frames.shape
    rows = []
    for t in range(0, f, 2):
        for y in range(0, height, 8):
            for x in range(0, width, 8):
                rows += [frames[t : t + 2, :, y + dy : y + dy + 4, x + dx : x + dx + 4].transpose(0, 1).flatten() for dy in (0, 4) for dx in (0, 4)]
    return torch.stack(rows)


def hidden(base, frames: Tensor, text: str, mark: str, marks: list[str]) -> Tensor:
    """Hidden states [S, 16] at special tokens of one sample, read alone: prepared frames [F, 3, h, w], the text around `mark`."""
    _, network, tokenizer = base
    grid = torch.tensor([[len(frames) // 2, frames.shape[2] // 4, frames.shape[3] // 4]])
    seen = network.visual(by_loops(frames), grid_thw=grid).pooler_output
    ids = torch.tensor([tokenizer(text.replace(mark, mark * len(seen))).input_ids])
    words = network.language_model.embed_tokens(ids)
    place = (ids == tokenizer.convert_tokens_to_ids(mark))[0]
    words = words.clone()
    words[0, place] = seen
    out = network.language_model(inputs_embeds=words).last_hidden_state[0]
    return torch.stack([out[(ids[0] == tokenizer.convert_tokens_to_ids(name)).nonzero().item()] for name in marks])


def message(body: str, kind: str) -> str:
    return f"<|im_start|>user\n<|vision_start|><|{kind}_pad|><|vision_end|>{body}<|im_end|>\n<|im_start|>assistant\n"


def published_videoalign(network: nn.Module) -> tuple[dict[str, Tensor], Tensor]:
    """The weights of VideoAlign as they are published, a LoRA of rank 4 in one layer among them, and its head."""
    torch.manual_seed(1)
    head, a, b = torch.randn(1, WIDTH), torch.randn(4, WIDTH), torch.randn(WIDTH, 4)
    weights = {f"base_model.model.{name}": value for name, value in published(network).items()}
    stem = "base_model.model.model.layers.0.self_attn.q_proj"
    weights[f"{stem}.base_layer.weight"] = weights.pop(f"{stem}.weight") - 0.5 * b @ a
    weights |= {f"{stem}.lora_A.default.weight": a, f"{stem}.lora_B.default.weight": b}
    return weights | {"base_model.model.rm_head.original_module.weight": head * 0, "base_model.model.rm_head.modules_to_save.default.weight": head}, head


SETTINGS = {"peft_lora_config": {"lora_r": 4, "lora_alpha": 2}, "data_config": {"fps": 4, "max_frame_pixels": 24 * 40}}


def test_videoalign_from_the_published_file(base, tmp_path, capsys):
    folder, network, tokenizer = base
    weights, head = published_videoalign(network)
    (tmp_path / "checkpoint-1").mkdir()
    torch.save(weights, tmp_path / "checkpoint-1" / "model.pth")
    line = ["rewards", "convert", str(tmp_path / "checkpoint-1" / "model.pth"), "--base", str(folder), "--to", str(tmp_path / "to")]
    assert main(line) == 2 and "holds a LoRA, and no model_config.json" in capsys.readouterr().err
    (tmp_path / "model_config.json").write_text(json.dumps(SETTINGS | {"inference_config": {"TA_mean": 0.5, "TA_std": 2.0}}))
    assert main(line) == 2 and "instruction: none was given, and VideoAlign was trained with one" in capsys.readouterr().err
    assert not (tmp_path / "to").exists()
    assert main([*line, "--instruction", str(folder / "authors.py")]) == 0
    assert "model.pth was VideoAlign" in capsys.readouterr().out
    own = (folder, network, tokenizer.__class__.from_pretrained(tmp_path / "to"))
    rewards = {part: named(f"videoalign{part}", Choice(folder=tmp_path / "to", dtype="float32", fps=8)) for part in ("", ":vq", ":mq", ":ta")}

    def plain(media: Tensor, prompts: list[str]) -> Tensor:
        """7 frames at 8 a second, 4 a second seen, at least 4: frames 0, 2, 4, 6, of 22 x 32 enlarged to 32 x 40."""
        scores = []
        for video, prompt in zip(media, prompts, strict=True):
            frames = by_hand(resized(video[:, [0, 2, 4, 6]].transpose(0, 1), 32, 40))
            body = f"\nVQ <|VQ_reward|> MQ <|MQ_reward|> of {prompt}: <|TA_reward|>\n"
            scores.append(hidden(own, frames, message(body, "video"), "<|video_pad|>", ["<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>"]) @ head[0])
        return (torch.stack(scores) - torch.tensor([3.6757, 1.1646, 0.5])) / torch.tensor([2.2476, 1.3811, 2.0])

    media = torch.rand(2, 3, 7, 22, 32)
    agree(rewards[""], lambda x: plain(x, PROMPTS).sum(1), media, atol=1e-3)
    for i, part in enumerate((":vq", ":mq", ":ta")):
        torch.testing.assert_close(rewards[part].score(media, PROMPTS), plain(media, PROMPTS)[:, i], atol=1e-3, rtol=1e-3)
        assert rewards[part].name.startswith(f"videoalign{part} ") and rewards[part].name.endswith("float32, 8 fps")
    by_name = load_reward(f"0.3*folder={tmp_path / 'to'} dtype=bfloat16 fps=8 videoalign:ta, compressible")
    assert isinstance(by_name.parts[0], VideoAlign) and by_name.weights == (0.3, 1.0)
    torch.testing.assert_close(by_name.parts[0].score(media, PROMPTS), plain(media, PROMPTS)[:, 2], atol=0.2, rtol=0.1)
    for text, wrong in (
        ("videoalign:xx", "'xx' is no part of 'videoalign'; allowed: videoalign:vq"),
        ("videoalign:ta", "videoalign: KwaiVGI/Video.* is not"),
    ):
        with pytest.raises(ValueError, match=f"reward: {wrong}"):
            load_reward(text)


def test_frames_that_videoalign_sees():
    sees = VideoAlign.seen
    reward = VideoAlign.__new__(VideoAlign)
    object.__setattr__(reward, "fps", 16.0)
    object.__setattr__(reward, "sampled", 2.0)
    assert sees(reward, 81) == [0, 9, 18, 27, 36, 44, 53, 62, 71, 80] and sees(reward, 9) == [0, 3, 5, 8] and sees(reward, 1) == [0]


def published_hpsv3(network: nn.Module, folder) -> nn.Module:
    """HPSv3.safetensors in a folder; its head."""
    from safetensors.torch import save_file

    torch.manual_seed(2)
    head = nn.Sequential(nn.Linear(WIDTH, 8), nn.ReLU(), nn.Dropout(0.05), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    nn.init.constant_(head[3].bias, 1.0)  # no unit is dead for both samples
    weights = {f"model.{name}": value for name, value in network.state_dict().items()} | {f"rm_head.{k}": v for k, v in head.state_dict().items()}
    save_file(weights, folder / "HPSv3.safetensors")
    return head


def test_hpsv3_from_the_published_file(base, tmp_path):
    folder, network, _ = base
    head = published_hpsv3(network, tmp_path)
    with pytest.raises(ValueError, match="instruction: .*tokenizer.json assigns no text to INSTRUCTION; give the authors' file"):
        convert(tmp_path / "HPSv3.safetensors", tmp_path / "to", folder, folder / "tokenizer.json")
    assert convert(tmp_path / "HPSv3.safetensors", tmp_path / "to", folder, folder / "authors.py") == "HPSv3"
    record = json.loads((tmp_path / "to" / "reward.json").read_text())
    assert record["pixels"] == [256 * 28 * 28] * 2 and record["instruction"] == "How good? {text_prompt} <|Reward|> END"
    # the published size of an image would take minutes here
    (tmp_path / "to" / "reward.json").write_text(json.dumps(record | {"pixels": [16 * 24] * 2}))
    reward = named("hpsv3", Choice(folder=tmp_path / "to", dtype="float32"))
    own = (folder, network, base[2].__class__.from_pretrained(tmp_path / "to"))

    def plain(media: Tensor) -> Tensor:
        """Images of 40 x 56 resized to 16 x 16; an image is a video of two equal frames."""
        scores = []
        for image, prompt in zip(media, PROMPTS, strict=True):
            frames = by_hand(resized(image[None], 16, 16)).expand(2, -1, -1, -1)
            scores.append(head(hidden(own, frames, message(f"How good? {prompt} <|Reward|> END", "image"), "<|image_pad|>", ["<|Reward|>"]))[0, 0])
        return torch.stack(scores)

    agree(reward, plain, torch.rand(2, 3, 40, 56), atol=1e-3)
    assert reward.score(torch.rand(2, 3, 3, 40, 56), PROMPTS).shape == (2,)
    with pytest.raises(ValueError, match="dtype: 'int8' is not allowed"):
        named("hpsv3", Choice(folder=tmp_path / "to", dtype="int8"))


def test_sizes_are_qwens():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    for height, width in ((480, 832), (832, 480), (48, 48), (1080, 1920), (28, 100), (333, 777)):
        for low, high in ((3136, 1003520), (100352, 200704), (200704, 200704)):
            assert fitting(height, width, 28, (low, high)) == smart_resize(height, width, 28, low, high), (height, width, low, high)
