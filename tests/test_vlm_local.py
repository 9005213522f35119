"""A vision-language model in this process, tiny and with random weights: what reaches it and what it says; rankers as rewards on the command line."""

from __future__ import annotations

import json
import shlex

import pytest
import torch
from serving import served
from test_ranker import Server, brighter, mean_of, videos
from tiny import byte_tokenizer

from instep.cli.main import main
from instep.cli.rewards import load_reward
from instep.rewards.ranker import Ranked
from instep.rewards.vlm import OpenAIEndpoint, VisionLanguageRanker, instructions
from instep.rewards.vlm_local import TransformersEndpoint, transformers_endpoint

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {% for c in m.content %}{% if c.type == 'image' %}<image>{% else %}{{ c.text }}{% endif %}{% endfor %}|"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def tiny_llava(folder, template=TEMPLATE):
    """A LLaVA of one layer and width 16 with random weights and a byte-level tokenizer, as a folder; its own settings sample wildly."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    small = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=template,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = LlavaForConditionalGeneration(
            LlavaConfig(
                vision_config=CLIPVisionConfig(**small, num_hidden_layers=2, image_size=32, patch_size=8),
                text_config=LlamaConfig(**small, num_hidden_layers=1, vocab_size=len(tokenizer), max_position_embeddings=8192, pad_token_id=0, eos_token_id=1),
                image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
                image_seq_length=16,
                vision_feature_layer=-2,
            )
        )
    network.generation_config.update(do_sample=True, temperature=5.0, top_k=50, repetition_penalty=3.0, no_repeat_ngram_size=1, suppress_tokens=[40, 41, 42])
    network.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory):
    return transformers_endpoint(str(tiny_llava(tmp_path_factory.mktemp("model") / "llava")), dtype="float32", max_new_tokens=6)


def watched(endpoint, monkeypatch, answer=None):
    """What reaches `generate`, which runs, or gives the tokens of `answer`."""
    asked, real = [], endpoint.network.generate

    def generate(**given):
        asked.append(given)
        if answer is None:
            return real(**given)
        said = endpoint.processor.tokenizer(answer, return_tensors="pt")["input_ids"]
        return torch.cat([given["input_ids"], said], 1)

    monkeypatch.setattr(endpoint.network, "generate", generate)
    return asked


def text_of(endpoint, given):
    """The prompt with every image's sixteen tokens (4 x 4 patches) as one [i]."""
    return endpoint.processor.tokenizer.decode(given["input_ids"][0]).replace("<image>" * 16, "[i]")


def test_images_and_words_reach_the_model_in_order(endpoint, monkeypatch):
    asked = watched(endpoint, monkeypatch, "2")
    ranker = VisionLanguageRanker(endpoint, "human", frames=2)
    assert ranker.label(*videos(0.9, 0.1)) == 2
    (given,) = asked
    shown = "Video 1:[i][i]Video 2:[i][i]"
    assert text_of(endpoint, given) == f"user: {shown}{instructions('human')}|assistant: ", "no token of the tokenizer's own is added"
    assert given["pixel_values"].shape == (4, 3, 32, 32)
    mean, std = (torch.tensor(getattr(endpoint.processor.image_processor, name)) for name in ("image_mean", "image_std"))
    level = (given["pixel_values"].mean((2, 3)) * std + mean).mean(1)
    torch.testing.assert_close(level, torch.tensor([0.9, 0.9, 0.1, 0.1]), atol=0.003, rtol=0)
    assert ranker.name == f"{endpoint.name} (human, 2 frames)" and endpoint.name.startswith("llava ") and endpoint.name.endswith(", float32")


def test_it_answers_greedily_whatever_its_own_settings(endpoint, monkeypatch):
    content = [{"type": "text", "text": "Say something."}]
    asked = watched(endpoint, monkeypatch)
    said = endpoint.ask(content)
    assert text_of(endpoint, asked[0]) == "user: Say something.|assistant: " and "pixel_values" not in asked[0]
    # the most probable token, step by step
    tokens = asked[0]["input_ids"]
    for _ in range(6):
        with torch.no_grad():
            tokens = torch.cat([tokens, endpoint.network(input_ids=tokens).logits[:, -1].argmax(1, keepdim=True)], 1)
    assert said == endpoint.processor.tokenizer.decode(tokens[0, -6:], skip_special_tokens=True) and said
    torch.manual_seed(1)
    assert endpoint.ask(content) == said


def test_a_real_answer_of_random_weights_is_no_label(endpoint):
    ranker = VisionLanguageRanker(endpoint, retries=0)
    with pytest.raises(ValueError, match="no label for pair 0, prompt 'a hen' after 1 attempts; the last: .* is none of the four options"):
        ranker.compare(*(video[None] for video in videos(0.9, 0.1)), ["a hen"])


def test_answers_become_comparisons_in_both_orders(endpoint, monkeypatch):
    asked = watched(endpoint, monkeypatch, "1. Video 1 has a lower degree of visual distortion.")
    ranker = VisionLanguageRanker(endpoint, "human")
    assert ranker.compare(videos(0.9), videos(0.1), ["a"]).tolist() == [0.0] and len(asked) == 2, "whichever came first: a tie"
    first, second = (given["pixel_values"] for given in asked)
    torch.testing.assert_close(first, second.roll(2, 0))


def test_models_that_cannot_be_asked(tmp_path, endpoint):
    with pytest.raises(ValueError, match="content: a part of type 'image_url' is not allowed; text, or image_url with a data URL"):
        endpoint.ask([{"type": "image_url", "image_url": {"url": "http://127.0.0.1/x.png"}}])
    with pytest.raises(ValueError, match="dtype: 'int8' is not allowed; use one of bfloat16, float16, float32"):
        transformers_endpoint("x", dtype="int8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_new_tokens: 0 is not allowed"):
        transformers_endpoint("x", max_new_tokens=0)
    with pytest.raises(ValueError, match="model: '.*nowhere' cannot be loaded"):
        transformers_endpoint(str(tmp_path / "nowhere"))
    mute = tiny_llava(tmp_path / "mute", template=None)
    with pytest.raises(ValueError, match="model: '.*mute' has no chat template"):
        transformers_endpoint(str(mute))
    (mute / "model.safetensors").rename(mute / "pytorch_model.bin")
    with pytest.raises(ValueError, match="mute' cannot be loaded .*with .safetensors"):
        transformers_endpoint(str(mute))


def test_its_name_tells_how_it_is_asked(tmp_path):
    """Answers depend on the weights, on the template that puts the question and on how images are prepared."""
    folder = tiny_llava(tmp_path / "llava")
    name = lambda: transformers_endpoint(str(folder), dtype="float32").name  # noqa: E731
    first = name()
    assert name() == first
    template, processor = folder / "chat_template.jinja", folder / "processor_config.json"
    told = template.read_text()
    template.write_text(told + " ")
    other = name()
    template.write_text(told)
    settings = json.loads(processor.read_text())
    settings["image_processor"]["image_mean"] = [0.1, 0.2, 0.3]
    processor.write_text(json.dumps(settings))
    assert len({first, other, name()}) == 3


@pytest.fixture
def serve():
    yield from served(Server)


def test_rankers_on_the_command_line(tmp_path, serve, monkeypatch):
    folder = tiny_llava(tmp_path / "llava")
    local = load_reward(f"domain=human frames=3 device=cpu dtype=float32 vlm:{folder}")
    assert isinstance(local, Ranked) and isinstance(local.ranker.endpoint, TransformersEndpoint) and local.ranker.retries == 0
    assert local.name.startswith("ranked by llava ") and local.name.endswith(", float32 (human, 3 frames)")
    assert load_reward(f"device=cpu vlm:{folder}").ranker.endpoint.network.dtype == torch.bfloat16
    monkeypatch.setenv("MY_KEY", " s3cret\n")
    server = serve(brighter)
    remote = load_reward(f"model=some/model token=MY_KEY domain=human frames=2 timeout=9 retries=0 vlm:{server.url}")
    assert remote.ranker == VisionLanguageRanker(OpenAIEndpoint(server.url, "some/model", "s3cret", 9.0), "human", 2, 0)
    assert remote.name == "ranked by some/model (human, 2 frames)" and "s3cret" not in repr(remote)
    long = torch.stack([torch.full((3, 5, 4, 4), level) for level in (0.2, 0.8)])
    assert remote.score(long, ["a", "a"]).tolist() == [-1.0, 1.0]
    assert mean_of(server.asked[0])[1] == [2, 2] and server.headers[0]["Authorization"] == "Bearer s3cret"
    each = load_reward(f"model=m domain=prompt vlm:{server.url}")
    assert each.name == "ranked by m (a domain a prompt, 40 frames)" and each.ranker.domain == "prompt"
    both = load_reward(f"0.5*model=m vlm:{server.url}, compressible")
    assert both.weights == (0.5, 1.0) and isinstance(both.parts[0], Ranked)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("vlm:http://127.0.0.1:9/v1", "reward: model: none was given for vlm:http://127.0.0.1:9/v1; write model=NAME"),
        ("model=m clip=3 vlm:http://127.0.0.1:9/v1", "reward: 'clip' is no setting of 'vlm:http://127.0.0.1:9/v1'; it takes domain, frames, model, token,"),
        ("model=m domain=cats vlm:http://127.0.0.1:9/v1", "reward: domain: 'cats' is not allowed; human"),
        ("model=m frames=0 vlm:http://127.0.0.1:9/v1", "reward: frames: 0 is not allowed"),
        ("model=m timeout=0 vlm:http://127.0.0.1:9/v1", "reward: timeout: 0.0 is not allowed; it is positive"),
        ("model=m token=NOT_SET_ANYWHERE vlm:https://host/v1", "reward: token: the environment variable 'NOT_SET_ANYWHERE' is not set"),
        ("model=m token=TORN vlm:https://host/v1", "reward: token: the environment variable 'TORN' holds line breaks"),
        ("model=m vlm:http://me:pass@host/v1", "reward: url: the address of 'host' holds a name or password"),
        ("token=X vlm:folder", "reward: 'token' is no setting of 'vlm:folder'; it takes domain, frames, device, dtype"),
        ("device=mars vlm:folder", "reward: device: 'mars' is not allowed"),
        ("device=cpu vlm:nowhere-at-all", "reward: model: 'nowhere-at-all' cannot be loaded"),
    ],
)
def test_rankers_that_are_refused(capsys, monkeypatch, text, message):
    monkeypatch.setenv("TORN", "s3cret\nagain")
    assert main(["train", "apo", "--reward", text]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {message}") and err.count("\n") == 1 and "s3cret" not in err and "pass@" not in err


def test_a_key_is_in_no_error_and_goes_nowhere_else(serve):
    for key in ("s3cret\n", "s3crét"):
        with pytest.raises(ValueError, match="api_key: it holds line breaks or other characters") as error:
            OpenAIEndpoint("http://localhost/v1", "m", key)
        assert "s3cr" not in str(error.value)
    elsewhere = serve(brighter)

    echo = serve(lambda body, n: None)
    handler = echo.http.RequestHandlerClass

    def repeat(self, status=401, where=None):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(status)
        if where is not None:
            self.send_header("Location", where)
        self.end_headers()
        self.wfile.write(self.headers["Authorization"].encode())

    handler.do_POST = repeat
    ranker = VisionLanguageRanker(OpenAIEndpoint(echo.url, "m", "s3cret"), retries=0)
    with pytest.raises(ValueError, match=r"the last: HTTP 401: Bearer \*\*\*"):
        ranker.label(*videos(0.1, 0.2))
    handler.do_POST = lambda self: repeat(self, 302, elsewhere.url)
    with pytest.raises(ValueError, match="the last: HTTP 302"):
        ranker.label(*videos(0.1, 0.2))
    assert not elsewhere.asked, "no redirect is followed"


def test_a_run_of_the_command_line_on_a_ranker(tmp_path, serve, monkeypatch):
    monkeypatch.chdir(tmp_path)
    server = serve(brighter)
    line = "train rl-after --model digits --steps 2 --batch 4 --group 2 --distil 0 --iterations 2 --rl dpo --no-evaluate --out run --threads 1"
    assert main([*shlex.split(line), "--reward", f"model=ranker domain=human vlm:{server.url}"]) == 0
    rows = [json.loads(row) for row in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 2 and rows[-1]["grad/student"] > 0 and len(server.asked) > 8
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["reward"] == "ranked by ranker (human, 40 frames)"
