"""Rewards with a name, on tiny random networks of the published architectures: values and gradients against a second computation, files, names, conversion."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_preferences import tiny_clip
from tiny import byte_tokenizer
from torch import Tensor, nn

from instep.cli.main import main
from instep.cli.rewards import load_reward
from instep.rewards.base import checked_scores
from instep.rewards.convert import convert, read_weights
from instep.rewards.dinov2 import class_names
from instep.rewards.image_reward import MEAN, STD
from instep.rewards.named import NAMED, Choice, named
from instep.rewards.prepare import CLIP_MEAN, CLIP_STD
from instep.rewards.score_head import LAYERS, ScoreHead

PROMPTS = ["a hen", "a red cat runs"]


def resized(media: Tensor, height: int, width: int) -> Tensor:
    """[N, 3, H, W] resized by Pillow's bicubic filter, read off what it makes of unit matrices in 32-bit floats: a second computation, with a graph."""

    def matrix(n: int, m: int) -> Tensor:
        image = Image.fromarray(np.eye(n, dtype=np.float32)).resize((n, m), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(image))

    return matrix(media.shape[2], height) @ media @ matrix(media.shape[3], width).T


def by_hand(frames: Tensor, mean=CLIP_MEAN, std=CLIP_STD) -> Tensor:
    return (frames - torch.tensor(mean).reshape(3, 1, 1)) / torch.tensor(std).reshape(3, 1, 1)


def agree(reward, plain, media: Tensor, prompts=PROMPTS, atol: float = 2e-5) -> None:
    """Value and gradient of a reward and of a second computation of it."""
    a, b = media.clone().requires_grad_(), media.clone().requires_grad_()
    got, want = checked_scores(reward, a, prompts), plain(b)
    torch.testing.assert_close(got, want, atol=atol, rtol=1e-4)
    slopes = [torch.autograd.grad((score * torch.tensor([1.0, -2.0])).sum(), x)[0] for score, x in ((got, a), (want, b))]
    assert slopes[0].abs().max() > 0
    torch.testing.assert_close(slopes[0], slopes[1], atol=1e-3 * float(slopes[1].abs().max()), rtol=1e-3)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A tiny CLIP as a folder, its network and processor; images of 32 x 32."""
    folder = tmp_path_factory.mktemp("clip")
    network, processor = tiny_clip(folder)
    return folder, network, processor


def cosines(clip, frames: Tensor, prompts=PROMPTS) -> Tensor:
    _, network, processor = clip
    tokens = processor.tokenizer(prompts, return_tensors="pt", padding=True)
    out = network(pixel_values=frames, **tokens)
    return (out.logits_per_image / network.logit_scale.exp()).diagonal()


def cropped(media: Tensor) -> Tensor:
    """40 x 56 with the shorter side resized to 32 and the middle 32 columns of 44 kept."""
    return by_hand(resized(media, 32, 44)[..., 6:38])


@pytest.mark.parametrize("name", ["clipscore", "pickscore", "hpsv2", "dfn-clip"])
def test_cosines_of_image_and_prompt(clip, name):
    folder, network, _ = clip
    reward, media = named(name, Choice(folder=folder)), torch.rand(2, 3, 40, 56, generator=torch.Generator().manual_seed(1))
    scale = {"clipscore": 100.0, "dfn-clip": 100.0, "hpsv2": 1.0, "pickscore": float(network.logit_scale.detach().exp())}[name]
    # 40 x 56 in a square of 32: 23 rows between black bars of 4 and 5
    prepare = {"hpsv2": lambda x: by_hand(F.pad(resized(x, 23, 32), (0, 0, 4, 5))), "dfn-clip": lambda x: by_hand(resized(x, 32, 32))}.get(name, cropped)
    agree(reward, lambda x: scale * cosines(clip, prepare(x)), media, atol=2e-5 * scale)
    assert reward.differentiable == NAMED[name].gradient and reward.name.startswith(f"{name} ") and str(folder) not in reward.name


def test_a_video_scores_the_mean_of_its_frames(clip):
    reward, media = named("pickscore", Choice(folder=clip[0])), torch.rand(2, 3, 3, 40, 56)
    each = torch.stack([reward.score(media[:, :, f], PROMPTS) for f in range(3)], 1)
    torch.testing.assert_close(reward.score(media, PROMPTS), each.mean(1))
    some = load_reward(f"frames=2 folder={clip[0]} pickscore")
    torch.testing.assert_close(some.score(media, PROMPTS), each[:, [0, 2]].mean(1))


def test_the_head_is_five_layers_in_a_row():
    head = ScoreHead(12)
    published = nn.Sequential(nn.Linear(12, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2), nn.Linear(128, 64), nn.Dropout(0.1))
    published.extend([nn.Linear(64, 16), nn.Linear(16, 1)])
    head.layers.load_state_dict(published.state_dict())
    assert [f"layers.{i}.weight" in head.state_dict() for i in range(8)] == [i in LAYERS for i in range(8)]
    x = torch.randn(3, 12)
    torch.testing.assert_close(head.train()(x), published.eval()(x)[:, 0])


def test_aesthetic(clip, tmp_path):
    torch.manual_seed(0)
    head = ScoreHead(24)
    torch.save(head.state_dict(), tmp_path / "sac+logos+ava1-l14-linearMSE.pth")
    assert convert(tmp_path / "sac+logos+ava1-l14-linearMSE.pth", tmp_path / "head") == "the head of the aesthetic predictor"
    reward = named("aesthetic", Choice(folder=tmp_path / "head", base=clip[0]))

    def plain(x: Tensor) -> Tensor:
        embedded = clip[1].get_image_features(pixel_values=cropped(x)).pooler_output
        return head(embedded / embedded.norm(dim=1, keepdim=True))

    agree(reward, plain, torch.rand(2, 3, 40, 56))
    torch.save(ScoreHead(20).state_dict(), tmp_path / "other.pth")
    convert(tmp_path / "other.pth", tmp_path / "other")
    with pytest.raises(ValueError, match="aesthetic: its head reads 20 features and the CLIP gives 24"):
        named("aesthetic", Choice(folder=tmp_path / "other", base=clip[0]))
    (tmp_path / "head" / "head.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="aesthetic: .*head.safetensors does not hold the weights of its head"):
        named("aesthetic", Choice(folder=tmp_path / "head", base=clip[0]))


def tiny_dinov2(folder):
    from transformers import BitImageProcessor, Dinov2Config, Dinov2ForImageClassification

    torch.manual_seed(0)
    names = {0: "tench, Tinca tinca", 1: "crane", 2: "hen", 3: "crane"}
    network = Dinov2ForImageClassification(
        Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, mlp_ratio=2, image_size=28, patch_size=14, id2label=names)
    )
    nn.init.normal_(network.classifier.weight)
    network.save_pretrained(folder)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    BitImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}, image_mean=mean, image_std=std).save_pretrained(folder)
    return network.eval(), (mean, std)


def test_a_classifier_scores_the_class_that_the_prompt_names(tmp_path):
    network, normal = tiny_dinov2(tmp_path)
    reward, media = named("dinov2", Choice(folder=tmp_path)), torch.rand(2, 3, 40, 56)

    def plain(x: Tensor) -> Tensor:
        logits = network(pixel_values=by_hand(resized(x, 32, 44)[..., 2:30, 8:36], *normal)).logits
        return torch.stack([logits[0].softmax(0)[2], logits[1].softmax(0)[0]]).log()

    agree(reward, plain, media, ["Hen", " tinca tinca"])
    torch.testing.assert_close(reward.score(media, ["2", "tench, Tinca tinca"]), reward.score(media, ["hen", "0"]))
    assert class_names({0: "a, b", 1: "b"}) == {"a": 0, "a, b": 0, "0": 0, "1": 1}
    with pytest.raises(
        ValueError, match="reward 'dinov2': the prompt 'crane' is no class of the classifier; its 8 names and numbers begin 'tench', 'tinca tinca'"
    ):
        checked_scores(reward, media, ["hen", "crane"])


class PublishedBlip(nn.Module):
    """The image encoder of BLIP under its authors' names, one block of width 16 and one head; images of 16 x 16 in patches of 8."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_token, self.pos_embed = nn.Parameter(torch.randn(1, 1, 16)), nn.Parameter(torch.randn(1, 5, 16))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, 16, 8, 8)})
        attention, mlp = (
            nn.ModuleDict({"qkv": nn.Linear(16, 48), "proj": nn.Linear(16, 16)}),
            nn.ModuleDict({"fc1": nn.Linear(16, 32), "fc2": nn.Linear(32, 16)}),
        )
        norms = {"norm1": nn.LayerNorm(16, eps=1e-6), "norm2": nn.LayerNorm(16, eps=1e-6)}
        self.blocks = nn.ModuleList([nn.ModuleDict({"attn": attention, "mlp": mlp, **norms})])
        self.norm = nn.LayerNorm(16, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed["proj"](x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        block = self.blocks[0]
        q, k, v = block["attn"]["qkv"](block["norm1"](x)).chunk(3, 2)
        x = x + block["attn"]["proj"]((q @ k.transpose(1, 2) / math.sqrt(16)).softmax(2) @ v)
        x = x + block["mlp"]["fc2"](F.gelu(block["mlp"]["fc1"](block["norm2"](x))))
        return self.norm(x)


def published_image_reward(folder) -> tuple[dict[str, Tensor], PublishedBlip, nn.Module, ScoreHead]:
    """ImageReward.pt in a folder, beside a tokenizer in bert/; its weights, and the networks that they are of."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    vision = PublishedBlip()
    # the authors' text encoder is BERT's with one cross-attention a layer and without token types
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 32, "max_position_embeddings": 64}
    bert = BertConfig(**small, vocab_size=len(tokenizer), is_decoder=True, add_cross_attention=True)
    text, mlp = BertModel(bert, add_pooling_layer=False), ScoreHead(16)
    for p in text.parameters():
        nn.init.normal_(p, std=0.5)
    nn.init.zeros_(text.embeddings.token_type_embeddings.weight)
    published = {f"blip.visual_encoder.{k}": v for k, v in vision.state_dict().items()}
    published |= {f"blip.text_encoder.{k}": v for k, v in text.state_dict().items() if "token_type" not in k}
    published |= {"blip.text_encoder.embeddings.position_ids": torch.arange(64)[None], "blip.vision_proj.weight": torch.zeros(2, 16)}
    published |= {f"mlp.{k}": v for k, v in mlp.state_dict().items()}
    torch.save(published, folder / "ImageReward.pt")
    tokenizer.save_pretrained(folder / "bert")
    return published, vision, text.eval(), mlp


def test_image_reward_from_the_published_file(tmp_path):
    published, vision, text, mlp = published_image_reward(tmp_path)
    assert convert(tmp_path / "ImageReward.pt", tmp_path / "to", tmp_path / "bert") == "ImageReward"
    reward = named("imagereward", Choice(folder=tmp_path / "to"))
    tokens = byte_tokenizer()(PROMPTS, padding="max_length", max_length=35, return_tensors="pt")
    layer = text.encoder.layer[0]

    def plain(x: Tensor) -> Tensor:
        seen, mask = vision(by_hand(resized(x, 16, 22)[..., 3:19])), tokens.attention_mask
        hidden = text.embeddings(input_ids=tokens.input_ids)
        hidden = attended(layer.attention, hidden, hidden, (1 - mask.float())[:, None] * -1e9)
        hidden = attended(layer.crossattention, hidden, seen, torch.zeros(2, 1, 5))
        read = layer.output.LayerNorm(layer.output.dense(F.gelu(layer.intermediate.dense(hidden))) + hidden)
        return (mlp(read[:, 0]) - MEAN) / STD

    agree(reward, plain, torch.rand(2, 3, 40, 56), atol=1e-4)
    with pytest.raises(ValueError, match="base: none was given, and ImageReward reads prompts with BERT's tokenizer"):
        convert(tmp_path / "ImageReward.pt", tmp_path / "other")
    published.pop("mlp.layers.0.bias")
    torch.save(published, tmp_path / "torn.pt")
    with pytest.raises(ValueError, match=r"file: it is not ImageReward as it was published \(head.layers.0.bias is missing\)"):
        convert(tmp_path / "torn.pt", tmp_path / "other", tmp_path / "bert")
    assert not (tmp_path / "other").exists()


def wavy(weights: dict[str, Tensor], factor: dict[str, float] | None = None) -> dict[str, Tensor]:
    """Values for weights of these names and shapes, which another program makes alike; scales of norms are near 1, weights of a name that begins with a key of
    `factor` are scaled by it."""
    made = {}
    for name, value in weights.items():
        if not value.is_floating_point():
            made[name] = value
            continue
        wave = torch.sin(0.7 * torch.arange(value.numel(), dtype=torch.float64) + len(name)).reshape(value.shape)
        scale = next((size for start, size in (factor or {}).items() if name.startswith(start)), 0.4)
        norm = name.endswith("weight") and ("ln_" in name or "norm" in name.lower())
        made[name] = (scale * wave + (1.0 if norm else 0.0)).float()
    return made


def wavy_images(side: int) -> Tensor:
    """Two images [2, 3, side, side] in [0, 1], which another program makes alike."""
    p = torch.arange(2 * 3 * side * side, dtype=torch.float64)
    return (0.5 + 0.5 * torch.sin(0.013 * p * (1 + p / 4000))).reshape(2, 3, side, side).float()


CROSSED = (["a hen", "two cats on a mat"], ["two cats on a mat", "a hen"])


def test_image_reward_gives_the_values_of_the_authors_package(tmp_path):
    """image-reward 1.5's own networks (with transformers 4.40.2) with the same weights on the same pixels and tokens, run once in an environment of its own."""
    published = published_image_reward(tmp_path)[0]
    torch.save(wavy(published, {"mlp": 0.2}), tmp_path / "ImageReward.pt")
    convert(tmp_path / "ImageReward.pt", tmp_path / "to", tmp_path / "bert")
    reward = named("imagereward", Choice(folder=tmp_path / "to"))
    scores = torch.stack([reward.score(wavy_images(16), prompts) for prompts in CROSSED])
    torch.testing.assert_close(scores, torch.tensor([[1.4240045547485352, 1.483884334564209], [1.483760952949524, 1.4233334064483643]]), atol=2e-5, rtol=0)


def attended(block: nn.Module, hidden: Tensor, to: Tensor, mask: Tensor) -> Tensor:
    """BERT's attention of one head, with what follows it."""
    own = block.self
    weights = (own.query(hidden) @ own.key(to).transpose(1, 2) / math.sqrt(16) + mask).softmax(2)
    return block.output.LayerNorm(block.output.dense(weights @ own.value(to)) + hidden)


class OpenClip(nn.Module):
    """A CLIP under open_clip's names, with torch's own attention: one block of width 16 and two heads a tower."""

    def __init__(self, words: int) -> None:
        super().__init__()
        block = lambda: nn.ModuleDict(  # noqa: E731
            {
                "ln_1": nn.LayerNorm(16),
                "attn": nn.MultiheadAttention(16, 2, batch_first=True),
                "ln_2": nn.LayerNorm(16),
                "mlp": nn.ModuleDict({"c_fc": nn.Linear(16, 32), "c_proj": nn.Linear(32, 16)}),
            }
        )
        self.visual = nn.Module()
        self.visual.class_embedding = nn.Parameter(torch.randn(16))
        self.visual.positional_embedding, self.visual.proj = nn.Parameter(torch.randn(17, 16)), nn.Parameter(torch.randn(16, 24))
        self.visual.conv1 = nn.Conv2d(3, 16, 8, 8, bias=False)
        self.visual.ln_pre, self.visual.ln_post = nn.LayerNorm(16), nn.LayerNorm(16)
        self.visual.transformer = nn.ModuleDict({"resblocks": nn.ModuleList([block()])})
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList([block()])})
        self.token_embedding, self.ln_final = nn.Embedding(words, 16), nn.LayerNorm(16)
        self.positional_embedding, self.text_projection = nn.Parameter(torch.randn(32, 16)), nn.Parameter(torch.randn(16, 24))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    @staticmethod
    def through(tower: nn.Module, x: Tensor, mask: Tensor | None = None) -> Tensor:
        block = tower["resblocks"][0]
        y = block["ln_1"](x)
        x = x + block["attn"](y, y, y, need_weights=False, attn_mask=mask)[0]
        h = block["mlp"]["c_fc"](block["ln_2"](x))
        # quick_gelu, as the configuration of the tiny base has it
        return x + block["mlp"]["c_proj"](h * (1.702 * h).sigmoid())

    def cosine(self, frames: Tensor, tokens: Tensor, last: Tensor) -> Tensor:
        v, n = self.visual, tokens.shape[1]
        x = torch.cat([v.class_embedding.expand(len(frames), 1, -1), v.conv1(frames).flatten(2).transpose(1, 2)], 1) + v.positional_embedding
        image = v.ln_post(self.through(v.transformer, v.ln_pre(x))[:, 0]) @ v.proj
        causal = torch.full((n, n), -torch.inf).triu(1)
        read = self.ln_final(self.through(self.transformer, self.token_embedding(tokens) + self.positional_embedding[:n], causal))
        return F.cosine_similarity(image, read[torch.arange(len(tokens)), last] @ self.text_projection)


def test_hpsv2_from_the_published_file(clip, tmp_path):
    folder, network, processor = clip
    torch.manual_seed(0)
    published = OpenClip(len(processor.tokenizer))
    torch.save({"state_dict": published.state_dict()}, tmp_path / "HPS_v2.1_compressed.pt")
    assert convert(tmp_path / "HPS_v2.1_compressed.pt", tmp_path / "to", folder) == "a CLIP of open_clip"
    reward = named("hpsv2", Choice(folder=tmp_path / "to"))
    tokens = processor.tokenizer(PROMPTS, padding="max_length", max_length=32, return_tensors="pt").input_ids
    last = (tokens == network.config.text_config.eos_token_id).int().argmax(1)

    def plain(x: Tensor) -> Tensor:
        return published.cosine(by_hand(F.pad(resized(x, 32, 23), (4, 5))), tokens, last)

    agree(reward, plain, torch.rand(2, 3, 56, 40))
    with pytest.raises(ValueError, match="to: .*model.safetensors exists; choose another name"):
        convert(tmp_path / "HPS_v2.1_compressed.pt", tmp_path / "to", folder)
    tiny = OpenClip(7)
    torch.save(tiny.state_dict(), tmp_path / "small.pt")
    with pytest.raises(ValueError, match=r"base: .* is not of the file's architecture \(.*token_embedding.weight is \(7, 16\)"):
        convert(tmp_path / "small.pt", tmp_path / "other", folder)
    with pytest.raises(ValueError, match="base: .* has no config.json; give a CLIP with the same architecture"):
        convert(tmp_path / "small.pt", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_hpsv2_gives_the_values_of_open_clip(clip, tmp_path):
    """open_clip 3.3.0's own CLIP with the same weights on the same pixels, run once in an environment of its own; HPSv2's package holds a copy of it."""
    weights = wavy(OpenClip(len(clip[2].tokenizer)).state_dict())
    torch.save({"state_dict": weights}, tmp_path / "HPS_v2.1_compressed.pt")
    convert(tmp_path / "HPS_v2.1_compressed.pt", tmp_path / "to", clip[0])
    scores = [named("hpsv2", Choice(folder=tmp_path / "to")).score(wavy_images(32), prompts) for prompts in CROSSED]
    want = torch.tensor([[-0.20561090111732483, -0.41256558895111084], [-0.4016343951225281, -0.19388428330421448]])
    torch.testing.assert_close(torch.stack(scores), want, atol=2e-5, rtol=0)


def test_a_pickle_of_transformers_becomes_safetensors_in_place(clip, tmp_path, capsys):
    folder, network, processor = clip
    network.config.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    torch.save(network.state_dict() | {"text_model.embeddings.position_ids": torch.arange(32)[None]}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"folder: .* lacks \*.safetensors; it holds .* of apple/DFN5B.* hf download apple/DFN5B"):
        named("dfn-clip", Choice(folder=tmp_path))
    assert main(["rewards", "convert", str(tmp_path / "pytorch_model.bin"), "--to", str(tmp_path)]) == 0
    assert "pytorch_model.bin was a CLIP of transformers; it is now in" in capsys.readouterr().out
    media = torch.rand(2, 3, 32, 32)
    score = lambda place: named("dfn-clip", Choice(folder=place)).score(media, PROMPTS)  # noqa: E731
    torch.testing.assert_close(score(tmp_path), score(folder))


class Evil:
    def __reduce__(self):
        return print, ("code of a pickle ran",)


def test_no_code_of_a_file_runs(tmp_path, capsys):
    torch.save({"layers.0.weight": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="file: .*evil.pt cannot be read as plain weights .*nothing but tensors is read"):
        convert(tmp_path / "evil.pt", tmp_path / "to")
    assert "code of a pickle ran" not in capsys.readouterr().out
    (tmp_path / "text.pt").write_text("not weights")
    torch.save({"a": 1}, tmp_path / "numbers.pt")
    torch.save({"a": torch.zeros(1)}, tmp_path / "unknown.pt")
    for name, message in (
        ("none", "does not exist"),
        ("text", "cannot be read"),
        ("numbers", "holds no table of tensors"),
        ("unknown", "is none of the files"),
    ):
        with pytest.raises(ValueError, match=f"file: .*{name}.pt {message}"):
            convert(tmp_path / f"{name}.pt", tmp_path / "to")
    torch.save({"module.a": torch.ones(1)}, tmp_path / "wrapped.pt")
    assert list(read_weights(tmp_path / "wrapped.pt")) == ["a"]


def test_names_on_the_command_line(clip, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    both = load_reward(f"0.5*folder={clip[0]} pickscore, compressible")
    assert both.weights == (0.5, 1.0) and both.parts[0].name.startswith("pickscore ") and both.parts[1].name == "compressible"
    # models/NAME in the working directory is found
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "hpsv2").symlink_to(clip[0])
    assert load_reward("hpsv2").name == named("hpsv2", Choice(folder=clip[0])).name
    for text, message in (
        ("pickscore", "reward: pickscore: yuvalkirstain/PickScore_v1 is not in models/pickscore or the hub cache; fetch it once with: hf download yuval"),
        ("imagereward", "reward: imagereward: THUDM/ImageReward is not in models/imagereward; fetch it once with: hf download THUDM/ImageReward"),
        ("folder=nowhere pickscore", "reward: folder: nowhere is no folder; it holds config.json"),
        ("base=x pickscore", "reward: 'base' is no setting of 'pickscore'; it takes folder, frames, clip"),
        (f"folder={tmp_path} dinov2", r"reward: folder: .* lacks config.json"),
    ):
        with pytest.raises(ValueError, match=message):
            load_reward(text)
    with pytest.raises(ValueError, match="reward 'pickscore': the prompt of sample 1 of the batch is empty"):
        checked_scores(both.parts[0], torch.rand(2, 3, 32, 32), ["a", " "])
    assert main(["rewards"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in NAMED)
    assert main(["rewards", "pickscore"]) == 0
    assert "hf download yuvalkirstain/PickScore_v1" in capsys.readouterr().out
    assert main(["rewards", "pikscore"]) == 2
    assert "name: 'pikscore' is not known; allowed: clipscore" in capsys.readouterr().err


def test_the_hub_cache_is_found_and_never_filled(clip, tmp_path, monkeypatch):
    import shutil

    import huggingface_hub.constants as constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot = tmp_path / "hub" / "models--yuvalkirstain--PickScore_v1" / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    shutil.copytree(clip[0], snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    assert load_reward("pickscore").name == named("pickscore", Choice(folder=clip[0])).name
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="is not in models/pickscore or the hub cache"):
        load_reward("pickscore")


def test_names_change_with_weights_and_preparation(clip, tmp_path):
    tiny_clip(tmp_path / "other", seed=1)
    first, other = (named("pickscore", Choice(folder=folder)).name for folder in (clip[0], tmp_path / "other"))
    assert first != other
    file = tmp_path / "other" / "processor_config.json"
    settings = json.loads(file.read_text())
    settings["image_processor"]["image_mean"] = [0.5] * 3
    file.write_text(json.dumps(settings))
    assert named("pickscore", Choice(folder=tmp_path / "other")).name != other
