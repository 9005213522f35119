"""Parses --reward: functions, built-ins, commands or addresses, each with a weight and settings, separated by commas."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from instep.core.user_code import load_function
from instep.rewards.base import FunctionReward, Reward, as_reward
from instep.rewards.external import command
from instep.rewards.frames import SampledFrames
from instep.rewards.jpeg import JPEG
from instep.rewards.named import NAMED, Choice, Named, named
from instep.rewards.ranker import Ranked
from instep.rewards.remote import HttpReward, secret_of
from instep.rewards.samples import positive
from instep.rewards.several import several
from instep.rewards.vlm import OpenAIEndpoint, VisionLanguageRanker, check_domain

FORMS = f"{', '.join(NAMED)}, module:function, command:PROGRAM ARGUMENTS, http://HOST/PATH, preferences:FOLDER, vlm:ADDRESS or FOLDER"
# settings that every reward takes, and those of commands and addresses
SEEN: dict[str, Callable[[str], Any]] = {"frames": int, "clip": int}
OF_COMMANDS: dict[str, Callable[[str], Any]] = {"timeout": float, "retries": int}
OF_ADDRESSES: dict[str, Callable[[str], Any]] = {**OF_COMMANDS, "backoff": float, "batch": int, "workers": int, "token": str}
# settings of rewards with a name: where their files are
OF_NAMED: dict[str, Callable[[str], Any]] = {"folder": Path, "base": Path, "dtype": str, "fps": float}
# settings of functions: whether their scores have a gradient
OF_FUNCTIONS: dict[str, Callable[[str], Any]] = {"gradient": lambda value: {"yes": True, "no": False}[value]}
# settings of rankers: frames of each video; settings of rankers at an address, and of those in this process
OF_RANKERS: dict[str, Callable[[str], Any]] = {"domain": str, "frames": int}
OF_SERVERS: dict[str, Callable[[str], Any]] = {**OF_RANKERS, "model": str, "token": str, "timeout": float, "retries": int}
OF_FOLDERS: dict[str, Callable[[str], Any]] = {**OF_RANKERS, "device": str, "dtype": str}


# rewards of a bundled model by their names: they need no argument
Own = Mapping[str, Callable[[], Reward]]


def load_reward(text: str, own: Own | None = None) -> Reward | Callable[..., Any]:
    """Rewards separated by commas, each `[WEIGHT*][SETTING=VALUE ...] NAME`: 0.5*frames=4 compressible, timeout=30 command:python score.py.

    NAME is one of `own`, a reward that `instep rewards` lists, module:function, command:PROGRAM ARGUMENTS, an http(s) address, preferences:FOLDER (of
    `instep pairs fit`), or vlm: and an address or a model's folder. Quoted commas belong to a command. Raises ValueError, with the reason,
    before anything but the rewards' own modules and networks is loaded.
    """
    parts = [_weighted(part, own or {}) for part in _split(text)]
    return parts[0][0] if len(parts) == 1 and parts[0][1] == 1 else several(*parts)


def _split(text: str) -> list[str]:
    """Splits at commas outside of quotes; quotes and backslashes are read as in a shell."""
    parts = re.findall(r"""(?:\\.|'[^']*'|"(?:\\.|[^"\\])*"|[^,'"\\])+|,|['"\\]""", text)
    if any(part in ("'", '"', "\\") for part in parts):
        raise ValueError(f"reward: {text!r} has a quote that is not closed; write a command's commas between quotes, as command:score.py --scales '1,2'")
    joined: list[str] = [""]
    for part in parts:
        joined.append("") if part == "," else joined.append(joined.pop() + part)
    return [part.strip() for part in joined]


def _weighted(text: str, own: Own) -> tuple[Any, float]:
    # only a leading NUMBER* is a weight; other stars belong to a command or an address
    weight, name = (found[1].strip(), found[2].strip()) if (found := re.match(r"([^*:=/]*)\*(.*)", text, re.DOTALL)) else ("", text)
    try:
        value = float(weight) if found else 1.0
    except ValueError:
        raise ValueError(f"reward: the weight {weight!r} of {name!r} is not a number; write for example module:a,0.5*module:b") from None
    if not -float("inf") < value < float("inf"):
        raise ValueError(f"reward: the weight {weight!r} of {name!r} is not allowed; it is a finite number")
    return _one(name, own), value


def _one(text: str, own: Own) -> Any:
    settings: dict[str, str] = {}
    name = text
    while found := re.match(r"([A-Za-z_-]+)=(\S*)\s+(.*)", name, re.DOTALL):
        if found[1] in settings:
            raise ValueError(f"reward: {found[1]} is given twice for {found[3]!r}; give it once")
        settings[found[1]], name = found[2], found[3].strip()
    if not name:
        raise ValueError(f"reward: {text!r} is empty between commas; give one of {FORMS}")
    allowed = _settings(name, own)
    given: dict[str, Any] = {}
    for key, value in settings.items():
        if key not in allowed:
            takes = f"it takes {', '.join(allowed)}" if allowed else "it takes none: it scores the whole video"
            raise ValueError(f"reward: {key!r} is no setting of {name!r}; {takes}")
        try:
            given[key] = allowed[key](value)
        except KeyError:
            raise ValueError(f"reward: {key}={value} of {name!r} is not allowed; yes or no") from None
        except ValueError:
            raise ValueError(f"reward: {key}={value} of {name!r} is not allowed; it is a {'whole ' if allowed[key] is int else ''}number") from None
    ranks = name.startswith("vlm:")
    frames, clip = (None, None) if ranks else (given.pop("frames", None), given.pop("clip", None))
    if frames is not None and clip is not None:
        raise ValueError(f"reward: frames and clip of {name!r} cannot go together; frames scores each as an image, clip the short video that they make")
    try:
        return _ranked(name.removeprefix("vlm:"), **given) if ranks else _looking_at(_named(name, given, own), frames, clip)
    except ValueError as error:
        raise error if str(error).startswith("reward:") else ValueError(f"reward: {error}") from None


def _settings(name: str, own: Own) -> dict[str, Callable[[str], Any]]:
    """Returns the settings that a reward of this name takes."""
    if name in own:
        return dict(SEEN)
    if name.startswith("vlm:"):
        return OF_SERVERS if _is_address(name.removeprefix("vlm:")) else OF_FOLDERS
    if (known := _known(name)) is not None:
        return {**{key: OF_NAMED[key] for key in known.settings}, **(SEEN if known.frames else {})}
    if name.startswith("preferences:"):
        return dict(SEEN)
    taken = OF_COMMANDS if name.startswith("command:") else OF_ADDRESSES if _is_address(name) else OF_FUNCTIONS
    return {**taken, **SEEN}


def _known(name: str) -> Named | None:
    """The entry of a reward with a name of its own; a module may be called like one that has no parts."""
    head, colon, _ = name.partition(":")
    return known if (known := NAMED.get(head)) is not None and (known.parts or not colon) else None


def _named(name: str, given: dict[str, Any], own: Own) -> Any:
    if name in own:
        return own[name]()
    if _known(name) is not None:
        return named(name, Choice(**given))
    if name.startswith("command:"):
        return command(name.removeprefix("command:"), **given)
    if _is_address(name):
        return HttpReward(name, **given)
    if name.startswith("preferences:"):
        from instep.bundled.features import features_of
        from instep.rewards.preferences import load_preferences

        return load_preferences(Path(name.removeprefix("preferences:")), features_of)
    if ":" not in name:
        raise ValueError(f"reward: {name!r} is not of the form module:function, for example my_functions:brightness, and is none of {', '.join([*own, FORMS])}")
    return _function(name, **given)


def _function(name: str, gradient: bool | None = None) -> Any:
    """The user's function or reward; `gradient` says of a plain function whether its scores have one."""
    function = load_function(name, "reward")
    if gradient is None:
        return function
    found = as_reward(function)
    if not isinstance(found, FunctionReward):
        raise ValueError(f"gradient: {name} is a reward of its own, whose field `differentiable` says it; leave the setting out")
    return replace(found, differentiable=gradient)


def _ranked(
    where: str,
    domain: Any = "other",
    frames: int = 40,
    model: str | None = None,
    token: str | None = None,
    timeout: float = 120.0,
    retries: int = 2,
    device: str | None = None,
    dtype: Any = "bfloat16",
) -> Ranked:
    """Makes a group reward from a vision-language model at an address or in a folder."""
    check_domain(domain)
    if frames < 1:
        raise ValueError(f"frames: {frames} is not allowed; it is 1 or more of each video")
    if _is_address(where):
        if model is None:
            raise ValueError(f"model: none was given for vlm:{where}; write model=NAME, as the server calls it, before it")
        positive(timeout=timeout)
        endpoint = OpenAIEndpoint(where, model, secret_of(token) if token is not None else None, timeout)
        return Ranked(VisionLanguageRanker(endpoint, domain, frames, retries))
    import torch

    from instep.cli import checked_device
    from instep.rewards.vlm_local import transformers_endpoint

    place = checked_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    # greedy answers do not change on a retry
    return Ranked(VisionLanguageRanker(transformers_endpoint(where, place, dtype), domain, frames, retries=0))


def _looking_at(reward: Any, frames: int | None, clip: int | None) -> Any:
    if frames is None and clip is None:
        return reward
    if clip is not None:
        return SampledFrames(as_reward(reward), clip, "video")
    assert frames is not None
    return JPEG(reward.prefer, frames) if isinstance(reward, JPEG) else SampledFrames(as_reward(reward), frames)


def _is_address(name: str) -> bool:
    return re.match(r"https?:", name) is not None
