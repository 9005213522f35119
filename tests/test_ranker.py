"""Rankers: rewards as rankers and rankers as rewards, a head learned from preferences, and a vision-language model behind a fake server."""

from __future__ import annotations

import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
from serving import served

from instep.rewards.base import FunctionReward, Reward, checked_scores
from instep.rewards.bradley_terry import LearnedReward, RewardHead, fit, rao_kupper_log_prob
from instep.rewards.decoded import chunks
from instep.rewards.ranker import Ranked, RewardRanker, both_ways, relative, reward_ranker
from instep.rewards.several import several
from instep.rewards.vlm import OPTIONS, PEOPLE, OpenAIEndpoint, VisionLanguageRanker, domain_of, instructions, label_of

F64 = torch.float64


def brightness(media, prompts):
    return media.mean((1, 2, 3, 4))


def videos(*levels):
    return torch.stack([torch.full((3, 2, 4, 4), level) for level in levels])


def test_a_reward_ranks_and_a_ranker_rewards():
    ranker = reward_ranker(brightness, margin=0.1)
    got = ranker.compare(videos(0.9, 0.2, 0.5), videos(0.1, 0.8, 0.45), ["a"] * 3)
    assert got.tolist() == [1.0, -1.0, 0.0] and ranker.name == "brightness"
    ranked = Ranked(ranker)
    assert isinstance(ranked, Reward) and not ranked.differentiable and ranked.name == "ranked by brightness"
    # groups of two, three and one, as they lie in a batch
    scores = checked_scores(ranked, videos(0.9, 0.1, 0.5, 0.52, 0.9, 0.3), ["a", "a", "b", "b", "b", "c"])
    assert scores.tolist() == [1.0, -1.0, -0.5, -0.5, 1.0, 0.0]
    with pytest.raises(ValueError, match="margin: -1 is not allowed"):
        RewardRanker(FunctionReward(brightness), -1)

    class Odd:
        name = "odd"

        def compare(self, first, second, prompts):
            return torch.full((len(first),), 0.5)

    with pytest.raises(ValueError, match="ranker 'odd' returned .1,. for 1 pairs, or a value that is not 1, 0 or -1"):
        Ranked(Odd()).score(videos(0.1, 0.2), ["a", "a"])


def test_groups_are_scored_whole():
    """A group that would be cut where decoding pauses is decoded to its end; rewards that do not compare are left as they were."""
    names = ["x"] * 31 + ["a"] * 3 + ["b"] * 3
    assert chunks(names, 32, whole=False) == [slice(0, 32), slice(32, 37)]
    assert chunks(names, 32, whole=True) == [slice(0, 34), slice(34, 37)]
    assert chunks(["a"] * 64, 32, whole=False) == [slice(0, 32), slice(32, 64)] and chunks([], 32, whole=True) == []
    assert relative(Ranked(reward_ranker(brightness))) and relative(several((Ranked(reward_ranker(brightness)), 1.0), (brightness, 1.0)))
    assert not relative(FunctionReward(brightness))


def test_what_depends_on_the_order_is_a_tie():
    first_wins = lambda a, b, prompts: torch.ones(len(a))  # noqa: E731
    assert both_ways(first_wins, videos(0.1, 0.2), videos(0.3, 0.4), ["a", "b"]).tolist() == [0.0, 0.0]
    fair = reward_ranker(brightness).compare
    assert both_ways(fair, videos(0.1, 0.9), videos(0.3, 0.4), ["a", "b"]).tolist() == [-1.0, 1.0]


def test_rao_kupper_probabilities_sum_to_one_and_their_gradient_is_the_hand_derivation():
    gap, eta = torch.linspace(-3, 3, 7, dtype=F64, requires_grad=True), torch.tensor(0.4, dtype=F64, requires_grad=True)
    log = [rao_kupper_log_prob(gap, torch.full((7,), outcome, dtype=F64), eta) for outcome in (1.0, -1.0, 0.0)]
    torch.testing.assert_close(sum(x.exp() for x in log), torch.ones(7, dtype=F64))
    theta, a, b = eta.exp(), gap.exp(), torch.ones(7, dtype=F64)
    torch.testing.assert_close(log[0].exp(), a / (a + theta * b))
    torch.testing.assert_close(log[2].exp(), (theta**2 - 1) * a * b / ((a + theta * b) * (b + theta * a)))
    first, second = torch.sigmoid(gap - eta).detach(), torch.sigmoid(-gap - eta).detach()
    by_gap = {1.0: 1 - first, -1.0: -(1 - second), 0.0: second - first}
    tie = 2 * torch.exp(2 * eta.detach()) / torch.expm1(2 * eta.detach())
    by_eta = {1.0: -(1 - first), -1.0: -(1 - second), 0.0: tie - (1 - first) - (1 - second)}
    for outcome, value in zip((1.0, -1.0, 0.0), log, strict=True):
        d_gap, d_eta = torch.autograd.grad(value.sum(), (gap, eta))
        torch.testing.assert_close(d_gap, by_gap[outcome])
        torch.testing.assert_close(d_eta, by_eta[outcome].sum())
    # without ties it is Bradley-Terry
    torch.testing.assert_close(rao_kupper_log_prob(gap, torch.ones(7, dtype=F64), torch.zeros((), dtype=F64)), torch.nn.functional.logsigmoid(gap))


def preferences(n=1500, eta=0.5, seed=0):
    """Features whose reward is known, and outcomes drawn from the model itself."""
    rng = torch.Generator().manual_seed(seed)
    weight = torch.tensor([1.5, -1.0, 0.0, 0.5])
    first, second = (torch.randn(n, 4, generator=rng) * torch.tensor([1.0, 3.0, 1.0, 0.2]) + 2 for _ in range(2))
    weight = weight / torch.tensor([1.0, 3.0, 1.0, 0.2])
    gap = (first - second) @ weight
    p = torch.stack([rao_kupper_log_prob(gap, torch.full((n,), o), torch.tensor(eta)).exp() for o in (1.0, -1.0, 0.0)], 1)
    outcome = torch.tensor([1.0, -1.0, 0.0])[torch.multinomial(p, 1, generator=rng).flatten()]
    return first, second, outcome, weight


@pytest.mark.parametrize("hidden", [0, 16])
def test_a_head_learns_what_people_prefer_and_says_how_well(tmp_path, hidden):
    first, second, outcome, weight = preferences()
    got = fit(first, second, outcome, hidden=hidden)
    assert got.accuracy > 0.85 and got.heldout == 300 and got.pairs == 1200
    chance = float(torch.tensor(1 / 3).log())
    assert got.log_prob > chance + 0.2
    if not hidden:
        learned = got.head.layers[0].weight[0] / got.head.std
        torch.testing.assert_close(learned / learned.norm(), weight / weight.norm(), rtol=0, atol=0.1)
        assert float(got.head.eta) == pytest.approx(0.5, abs=0.15)
    got.head.save(tmp_path / "head")
    again = RewardHead.load(tmp_path / "head")
    torch.testing.assert_close(again(first), got.head(first), rtol=0, atol=0)
    x = torch.rand(3, 3, 2, 4, 4, requires_grad=True)
    reward = LearnedReward(again, lambda media, prompts: media.mean((2, 3, 4)).repeat(1, 2)[:, :4])
    assert isinstance(reward, Reward)
    assert torch.autograd.grad(checked_scores(reward, x, ["a"] * 3).sum(), x)[0].abs().sum() > 0


def test_shuffled_preferences_are_not_learned():
    first, second, outcome, _ = preferences()
    random = outcome[torch.randperm(len(outcome), generator=torch.Generator().manual_seed(1))]
    assert fit(first, second, random).accuracy == pytest.approx(0.5, abs=0.12)


def test_pairs_that_teach_nothing_are_refused():
    x = torch.randn(10, 3)
    with pytest.raises(ValueError, match="pairs: 10 with 0 preferences are too few"):
        fit(x, x, torch.zeros(10))
    with pytest.raises(ValueError, match="outcome: it is 1"):
        fit(x, x, torch.full((10,), 0.5))
    with pytest.raises(ValueError, match="features: .10, 3. and .9, 3. for 10 outcomes"):
        fit(x, x[:9], torch.ones(10))
    with pytest.raises(ValueError, match="heldout: 0 is not allowed"):
        fit(x, x, torch.ones(10), heldout=0)


@pytest.mark.parametrize("domain", ["human", "other"])
def test_answers_are_read_strictly(domain):
    for i, option in enumerate(OPTIONS[domain], 1):
        for text in (str(i), f"{i}.", f"({i})", f" {i}) \n", option, option.rstrip("."), f"{i}. {option}", option.upper()):
            assert label_of(text, domain) == i
    for text in ("", "5", "12", "Video 1", "1 or 2", "I would say 1.", f"2. {OPTIONS[domain][0]}", f"{OPTIONS[domain][0]} Also 2."):
        with pytest.raises(ValueError, match="is none of the four options"):
            label_of(text, domain)


def test_prompts_are_the_appendixs():
    human, other = instructions("human"), instructions("other")
    assert "severed limbs, misplaced facial features" in human and "PPT-like fading" in other and human != other
    assert human.endswith(f"4. {OPTIONS['human'][3]}") and "1. Primary Criterion - Degree of Visual Distortion" in human
    with pytest.raises(ValueError, match="domain: 'animals' is not allowed"):
        instructions("animals")  # type: ignore[arg-type]


def test_a_domain_a_prompt():
    """Human where a whole word of the prompt names people."""
    people = ("A WOMAN in red", "the fisherman's boat", "two kids, playing", "a pair of hands", "Children!", "a man-made lake", "an astronaut on a horse")
    others = ("a mango", "humane", "a handle", "a cat and a dog", "", "seven", "mankind", "surfing", "a family of ducks")
    assert [domain_of(text) for text in people] == ["human"] * 7 and [domain_of(text) for text in others] == ["other"] * 9
    assert all(word == word.casefold() and word.isalpha() for word in PEOPLE) and domain_of("pirouette") == "other"

    class Told:
        name = "told"

        def __init__(self):
            self.asked = []

        def ask(self, content):
            self.asked.append(content[-1]["text"])
            return OPTIONS["human" if content[-1]["text"] == instructions("human") else "other"][0]

    told = Told()
    ranker = VisionLanguageRanker(told, "prompt", retries=0)
    assert (
        ranker.compare(videos(0.9, 0.1), videos(0.2, 0.6), ["a man", "a hen"]).tolist() == [0.0, 0.0] and ranker.name == "told (a domain a prompt, 40 frames)"
    )
    assert told.asked == [instructions(domain) for domain in ("human", "other", "human", "other")], "asked, and read, in each prompt's own words"
    with pytest.raises(ValueError, match="domain: 'animals' is not allowed; human .people are in it., other, or prompt"):
        VisionLanguageRanker(told, "animals")


class Server:
    """A chat endpoint that ranks by brightness, or says what it is told to."""

    def __init__(self, answer):
        self.asked, self.headers = [], []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append(body)
                outer.headers.append(dict(self.headers))
                said = answer(body, len(outer.asked))
                code, payload = (500, b"overloaded") if said is None else (200, json.dumps({"choices": [{"message": {"content": said}}]}).encode())
                self.send_response(code)
                self.end_headers()
                self.wfile.write(payload)

            def log_message(self, *args):
                pass

        self.http = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def close(self):
        self.http.shutdown()
        self.http.server_close()


def mean_of(body):
    """Mean brightness of each of the two videos of a request, and how many frames each has."""
    from PIL import Image

    sums: dict[int, list[float]] = {}
    number = 0
    for part in body["messages"][0]["content"]:
        if part["type"] == "text" and part["text"].startswith("Video "):
            number = int(part["text"].removeprefix("Video ").rstrip(":"))
        elif part["type"] == "image_url":
            image = Image.open(io.BytesIO(base64.b64decode(part["image_url"]["url"].partition(",")[2])))
            sums.setdefault(number, []).append(sum(image.convert("L").tobytes()) / (image.width * image.height))
    return [sum(sums[i]) / len(sums[i]) for i in (1, 2)], [len(sums[i]) for i in (1, 2)]


@pytest.fixture
def serve():
    yield from served(Server)


def brighter(body, n):
    (a, b), _ = mean_of(body)
    return "1. " + OPTIONS["human"][0] if a > b else "4."


def test_a_fake_server_ranks_in_both_orders(serve):
    server = serve(brighter)
    ranker = VisionLanguageRanker(OpenAIEndpoint(server.url, "some-model", "key"), "human", wait=0)
    got = ranker.compare(videos(0.9, 0.1), videos(0.2, 0.6), ["a", "b"])
    assert got.tolist() == [1.0, -1.0] and len(server.asked) == 4, "two pairs, each in both orders"
    body = server.asked[0]
    assert body["model"] == "some-model" and body["temperature"] == 0 and server.headers[0]["Authorization"] == "Bearer key"
    assert body["messages"][0]["content"][-1]["text"] == instructions("human") and mean_of(body)[1] == [2, 2]
    assert "key" not in repr(ranker.endpoint)
    # as the reward of a run: groups of two
    assert Ranked(ranker).score(videos(0.9, 0.1, 0.3, 0.5), ["a", "a", "b", "b"]).tolist() == [1.0, -1.0, -1.0, 1.0]
    long = torch.rand(3, 90, 4, 4)
    ranker.label(long, long)
    assert mean_of(server.asked[-1])[1] == [40, 40]


def test_a_model_that_prefers_the_first_makes_ties(serve):
    ranker = VisionLanguageRanker(OpenAIEndpoint(serve(lambda body, n: "1").url, "m"), wait=0)
    assert ranker.compare(videos(0.9, 0.1), videos(0.2, 0.6), ["a", "b"]).tolist() == [0.0, 0.0]


def test_answers_that_are_none_are_asked_again_and_then_named(serve):
    hesitant = serve(lambda body, n: ["Hmm.", None, "2"][min(n, 3) - 1])
    assert VisionLanguageRanker(OpenAIEndpoint(hesitant.url, "m"), wait=0).label(*videos(0.1, 0.2)) == 2 and len(hesitant.asked) == 3
    silent = serve(lambda body, n: "I cannot tell.")
    ranker = VisionLanguageRanker(OpenAIEndpoint(silent.url, "m"), retries=1, wait=0)
    with pytest.raises(ValueError, match="no label for pair 0, prompt 'a cat' after 2 attempts; the last: 'I cannot tell.' is none of the four options"):
        ranker.compare(videos(0.1), videos(0.2), ["a cat"])
    assert len(silent.asked) == 2
    broken = serve(lambda body, n: None)
    with pytest.raises(ValueError, match="no label for pair 0, prompt 'x' after 1 attempts; the last: HTTP 500: overloaded"):
        VisionLanguageRanker(OpenAIEndpoint(broken.url, "m"), retries=0).compare(videos(0.1), videos(0.2), ["x"])
    nowhere = VisionLanguageRanker(OpenAIEndpoint("http://127.0.0.1:9/v1", "m"), retries=0)
    with pytest.raises(ValueError, match="no label for pair 0, prompt 'x'"):
        nowhere.compare(videos(0.1), videos(0.2), ["x"])
    with pytest.raises(ValueError, match="base_url: 'localhost:8000' is not allowed"):
        OpenAIEndpoint("localhost:8000", "m")


def test_neighbouring_groups_of_one_prompt_are_ranked_apart():
    """Where an order of prompts begins again its last and first may be the same: the tie of the first group below is no preference over the second."""
    from instep.training.rollouts import scoring_slices

    assert scoring_slices(["a", "a", "b", "b", "b", "b", "c", "c"], 2) == [slice(0, 4), slice(4, 8)]
    assert scoring_slices(["a", "a", "b", "b"], 2) == [slice(0, 4)]
    score = lambda media, prompts: media.mean((1, 2, 3))  # noqa: E731
    ranked, media = Ranked(reward_ranker(score, margin=0.15)), torch.tensor([0.1, 0.2, 0.3, 0.9])[:, None, None, None].expand(4, 3, 2, 2)
    prompts = ["a"] * 4
    each = torch.cat([ranked.score(media[rows], prompts[rows]) for rows in scoring_slices(prompts, 2)])
    assert each.tolist() == [0, 0, -1, 1] and ranked.score(media, prompts).tolist() != each.tolist()
