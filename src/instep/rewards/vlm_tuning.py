"""A vision-language ranker fine-tuned on people's preferences (Diffusion-APO, Appendix C.2): `instep pairs tune-ranker`, then `--reward vlm:OUT`.

The model of `vlm_local.py` is asked the appendix's question about each pair, in both orders, and learns to answer with its label: LoRA on the linear layers
of its language model, merged at the end.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from instep.core.files import atomic_dir, write_json
from instep.core.numbers import check_number, check_whole
from instep.core.outputs import check_output
from instep.core.progress import Progress
from instep.core.quiet import quiet
from instep.core.version import __version__
from instep.data.media import read_media
from instep.data.pairs import PreferencePair
from instep.data.prompt import Prompt
from instep.data.slow_copies import is_slow_copy
from instep.rewards.bradley_terry import split
from instep.rewards.preferences import prompts_and_outcomes
from instep.rewards.vlm import Domain, DomainChoice, check_domain, domain_of, label_of, question
from instep.rewards.vlm_local import TransformersEndpoint

RECORD = "tuning.json"


@dataclass(frozen=True)
class Tuning:
    """How a ranker is asked and tuned. `domain` and `frames`: as those of `VisionLanguageRanker`, which is to be asked alike; `rank`, `lr`: of the LoRA;
    `batch`: pairs a step; `seed`: of the LoRA's first values and of the order of pairs.
    """

    domain: DomainChoice = "prompt"
    frames: int = 40
    rank: int = 16
    lr: float = 1e-5
    epochs: int = 1
    batch: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        check_domain(self.domain)
        for name in ("frames", "rank", "epochs", "batch"):
            check_whole(name, getattr(self, name), 1)
        check_number("lr", self.lr, 0, open_below=True, what="it is positive, and finite")

    def steps(self, pairs: int) -> int:
        return self.epochs * math.ceil(pairs / self.batch)


@dataclass(frozen=True)
class Measured:
    """Answers of a ranker about pairs: how many prefer what people preferred where that is Video 1, where it is Video 2, and in both orders; and how many
    of the answers, two a pair, are none of the four options.
    """

    pairs: int
    first: int
    second: int
    both: int
    unread: int


def preferences_of(pairs: Sequence[PreferencePair], heldout: float, seed: int) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """Pairs to train on, and those of other prompts to measure on: divided as `instep pairs fit` divides them, and then without ties, which no label says."""
    prompts, outcome = prompts_and_outcomes(pairs)
    kept, seen, _ = split(outcome, heldout, seed, prompts)
    taught, held = ([pairs[i] for i in rows.tolist() if not pairs[i].tie] for rows in (seen, kept))
    return taught, held


def label_for(pair: PreferencePair, chosen_first: bool) -> int:
    """The label of a pair's right answer: 1 or 2 for the video that is preferred, 3 or 4 where the other is its slow copy, which is no more distorted."""
    return (3 if is_slow_copy(pair) else 1) + (not chosen_first)


def asked(pair: PreferencePair, tuning: Tuning) -> Iterator[tuple[bool, Domain, list[dict[str, Any]]]]:
    """The question about a pair in both orders: whether the preferred one is Video 1, the domain, and the parts of the message. Files are read once."""
    text = Prompt.parse(pair.prompt).text
    domain = domain_of(text) if tuning.domain == "prompt" else tuning.domain
    chosen, rejected = read_media(pair.chosen), read_media(pair.rejected)
    yield True, domain, question(chosen, rejected, domain, tuning.frames)
    yield False, domain, question(rejected, chosen, domain, tuning.frames)


def answer_loss(endpoint: TransformersEndpoint, content: Sequence[dict[str, Any]], label: int) -> Tensor:
    """Mean cross-entropy of the answer's tokens alone: the label's, and the one that ends the answer."""
    answer = torch.tensor([endpoint.tokens_of(str(label))], device=endpoint.network.device)
    given = dict(endpoint.inputs(content))
    shape = given["input_ids"].shape
    tails = {"input_ids": answer, "attention_mask": torch.ones_like(answer)}
    # kinds of tokens (image or text), where a model is told them: the answer is text, 0
    for name, value in given.items():
        if value.shape == shape and not value.is_floating_point():
            given[name] = torch.cat([value, tails.get(name, torch.zeros_like(answer)).to(value.dtype)], 1)
    # the logits of thousands of tokens are large, and only these are needed
    few = {"logits_to_keep": answer.shape[1] + 1} if "logits_to_keep" in inspect.signature(endpoint.network.forward).parameters else {}
    logits = endpoint.network(**given, **few, use_cache=False).logits
    return F.cross_entropy(logits[0, -answer.shape[1] - 1 : -1].float(), answer[0])


@torch.no_grad()
def measure(endpoint: TransformersEndpoint, pairs: Sequence[PreferencePair], tuning: Tuning, name: str) -> Measured:
    """Asks about every pair in both orders and reads the answers as `--reward vlm:` does; `name` stands before the progress."""
    right: list[list[bool]] = []
    unread = 0
    with Progress(name, len(pairs)) as progress:
        for pair in pairs:
            right.append([])
            for chosen_first, domain, content in asked(pair, tuning):
                answer = endpoint.ask(content)
                try:
                    right[-1].append((label_of(answer, domain) in (1, 3)) == chosen_first)
                except ValueError:
                    unread += 1
                    right[-1].append(False)
            progress.step()
    return Measured(len(pairs), sum(a for a, _ in right), sum(b for _, b in right), sum(a and b for a, b in right), unread)


def tune(endpoint: TransformersEndpoint, pairs: Sequence[PreferencePair], tuning: Tuning) -> None:
    """Trains the endpoint's own network, in place, and merges what it learned. Adapters are in float32, whatever the network is in."""
    from peft import LoraConfig, get_peft_model

    network = endpoint.network
    config = LoraConfig(r=tuning.rank, lora_alpha=tuning.rank, target_modules=linear_layers(network))
    with torch.random.fork_rng(), quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks newer versions of transformers by an older name
        torch.manual_seed(tuning.seed)
        adapted = get_peft_model(network, config)
    parameters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert all(parameter.dtype == torch.float32 for parameter in parameters)
    optimizer = torch.optim.AdamW(parameters, tuning.lr, weight_decay=0.0)
    order = torch.Generator().manual_seed(tuning.seed)
    network.train()
    _recompute(network, True)
    with Progress("tuning", tuning.steps(len(pairs))) as progress:
        for _ in range(tuning.epochs):
            for rows in torch.randperm(len(pairs), generator=order).split(tuning.batch):
                loss = _backward(endpoint, [pairs[i] for i in rows.tolist()], tuning)
                if not math.isfinite(loss):
                    raise ValueError(
                        f"lr: the loss is {loss} after {progress.done} steps with {tuning.lr}; lower it, or take another dtype (bfloat16, float32)"
                    )
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad()
                progress.step(loss=loss)
    _recompute(network, False)
    adapted.merge_and_unload(progressbar=False, safe_merge=True)
    network.eval().requires_grad_(False)


def check_tunable(endpoint: TransformersEndpoint) -> None:
    """ValueError for a model that cannot be tuned: without linear layers of a language model, or a token that ends an answer."""
    linear_layers(endpoint.network)
    endpoint.tokens_of("1")


def linear_layers(network: Any) -> list[str]:
    """Names of the linear layers of a network's language model: not those that see the images, and not the last one, which makes logits."""
    language = network.get_decoder()
    prefix = next(name for name, module in network.named_modules() if module is language)
    found = [name for name, module in language.named_modules(prefix=prefix) if isinstance(module, nn.Linear)]
    if language is network or not found:
        raise ValueError(f"ranker: a {type(network).__name__} has no language model of linear layers that could be found; give another model")
    return found


def _recompute(network: Any, on: bool) -> None:
    """Whether activations of the language model are computed again in the backward pass: forty frames are thousands of tokens. What sees the images has no
    backward pass.
    """
    language = network.get_decoder()
    if language.supports_gradient_checkpointing:
        # its name in newer versions of transformers, where the older one warns
        what = "activation" if hasattr(language, "activation_checkpointing_enable") else "gradient"
        if on:
            getattr(language, f"{what}_checkpointing_enable")({"use_reentrant": False})
        else:
            getattr(language, f"{what}_checkpointing_disable")()


def save(endpoint: TransformersEndpoint, out: Path, record: dict[str, Any]) -> None:
    """The network as safetensors, its processor and `tuning.json` in a new folder, which appears complete or not at all."""
    check_output("out", out)
    with atomic_dir(out, "folder") as temporary, quiet():
        endpoint.network.save_pretrained(temporary)
        endpoint.processor.save_pretrained(temporary)
        write_json(temporary / RECORD, record)


def record_of(endpoint: TransformersEndpoint, tuning: Tuning, heldout: float, taught: int, before: Measured, after: Measured) -> dict[str, Any]:
    """What `tuning.json` tells; `endpoint` is the one that was tuned, whose name is of the weights that it had before."""
    given = asdict(tuning) | {"heldout": heldout}
    return {"instep": __version__, "ranker": endpoint.name, "tuning": given, "trained_on": taught, "before": asdict(before), "after": asdict(after)}


def _backward(endpoint: TransformersEndpoint, pairs: Sequence[PreferencePair], tuning: Tuning) -> float:
    """Gradients of the mean loss over pairs in both orders, one question at a time; the loss."""
    total = 0.0
    for pair in pairs:
        for chosen_first, _, content in asked(pair, tuning):
            loss = answer_loss(endpoint, content, label_for(pair, chosen_first)) / (2 * len(pairs))
            loss.backward()
            total += float(loss.detach())
    return total
