"""What --reward says: a function, a built-in, a command or an address, each with a weight and settings, several separated by commas."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from instep.rewards.base import Reward, as_reward
from instep.rewards.external import command
from instep.rewards.frames import SampledFrames
from instep.rewards.jpeg import JPEG
from instep.rewards.motion import DynamicDegree
from instep.rewards.remote import HttpReward
from instep.rewards.several import several

BUILT_IN = ("compressible", "incompressible", "dynamic-degree")
FORMS = f"{', '.join(BUILT_IN)}, module:function, command:PROGRAM ARGUMENTS, http://HOST/PATH"
# settings that every reward takes, and those of commands and addresses
SEEN: dict[str, Callable[[str], Any]] = {"frames": int, "clip": int}
OF_COMMANDS: dict[str, Callable[[str], Any]] = {"timeout": float, "retries": int}
OF_ADDRESSES: dict[str, Callable[[str], Any]] = {**OF_COMMANDS, "backoff": float, "batch": int, "workers": int, "token": str}


def load_reward(text: str) -> Reward | Callable[..., Any]:
    """Rewards separated by commas, each `[WEIGHT*][SETTING=VALUE ...] NAME`: 0.5*frames=4 compressible, timeout=30 command:python score.py.

    NAME is one of compressible, incompressible, dynamic-degree, module:function, command:PROGRAM ARGUMENTS, or an http(s) address. Commas between quotes
    belong to a command. ValueError that says what is wrong, before anything is loaded but the rewards' own modules.
    """
    parts = [_weighted(part) for part in _split(text)]
    return parts[0][0] if len(parts) == 1 and parts[0][1] == 1 else several(*parts)


def _split(text: str) -> list[str]:
    """At commas outside of quotes, as a shell would see quotes and backslashes."""
    parts = re.findall(r"""(?:\\.|'[^']*'|"(?:\\.|[^"\\])*"|[^,'"\\])+|,|['"\\]""", text)
    if any(part in ("'", '"', "\\") for part in parts):
        raise ValueError(f"reward: {text!r} has a quote that is not closed; write a command's commas between quotes, as command:score.py --scales '1,2'")
    joined: list[str] = [""]
    for part in parts:
        joined.append("") if part == "," else joined.append(joined.pop() + part)
    return [part.strip() for part in joined]


def _weighted(text: str) -> tuple[Any, float]:
    # the star of a weight comes before anything else; others belong to a command or an address
    weight, name = (found[1].strip(), found[2].strip()) if (found := re.match(r"([^*:=/]*)\*(.*)", text, re.DOTALL)) else ("", text)
    try:
        value = float(weight) if found else 1.0
    except ValueError:
        raise ValueError(f"reward: the weight {weight!r} of {name!r} is not a number; write for example module:a,0.5*module:b") from None
    if not -float("inf") < value < float("inf"):
        raise ValueError(f"reward: the weight {weight!r} of {name!r} is not allowed; it is a finite number")
    return _one(name), value


def _one(text: str) -> Any:
    settings: dict[str, str] = {}
    name = text
    while found := re.match(r"([A-Za-z_-]+)=(\S*)\s+(.*)", name, re.DOTALL):
        if found[1] in settings:
            raise ValueError(f"reward: {found[1]} is given twice for {found[3]!r}; give it once")
        settings[found[1]], name = found[2], found[3].strip()
    if not name:
        raise ValueError(f"reward: {text!r} is empty between commas; give one of {FORMS}")
    own = OF_COMMANDS if name.startswith("command:") else OF_ADDRESSES if _is_address(name) else {}
    allowed = {**own, **({} if name == "dynamic-degree" else SEEN)}
    given: dict[str, Any] = {}
    for key, said in settings.items():
        if key not in allowed:
            takes = f"it takes {', '.join(allowed)}" if allowed else "it takes none: its speed is per frame of the whole video"
            raise ValueError(f"reward: {key!r} is no setting of {name!r}; {takes}")
        try:
            given[key] = allowed[key](said)
        except ValueError:
            raise ValueError(f"reward: {key}={said} of {name!r} is not allowed; it is a {'whole ' if allowed[key] is int else ''}number") from None
    frames, clip = given.pop("frames", None), given.pop("clip", None)
    if frames is not None and clip is not None:
        raise ValueError(f"reward: frames and clip of {name!r} cannot go together; frames scores each as an image, clip the short video that they make")
    try:
        return _looking_at(_named(name, given), frames, clip)
    except ValueError as error:
        raise error if str(error).startswith("reward:") else ValueError(f"reward: {error}") from None


def _named(name: str, given: dict[str, Any]) -> Any:
    if name in ("compressible", "incompressible"):
        return JPEG("small" if name == "compressible" else "large")
    if name == "dynamic-degree":
        return DynamicDegree()
    if name.startswith("command:"):
        return command(name.removeprefix("command:"), **given)
    if _is_address(name):
        return HttpReward(name, **given)
    if name.startswith("preferences:"):
        from instep.rewards.preferences import load_preferences

        return load_preferences(Path(name.removeprefix("preferences:")))
    if ":" not in name:
        raise ValueError(f"reward: {name!r} is not of the form module:function, for example my_functions:brightness, and is none of {FORMS}")
    return load_function(name, "reward")


def _looking_at(reward: Any, frames: int | None, clip: int | None) -> Any:
    if frames is None and clip is None:
        return reward
    if clip is not None:
        return SampledFrames(as_reward(reward), clip, "video")
    assert frames is not None
    return JPEG(reward.prefer, frames) if isinstance(reward, JPEG) else SampledFrames(as_reward(reward), frames)


def _is_address(name: str) -> bool:
    return re.match(r"https?:", name) is not None


def load_function(name: str, option: str) -> Callable[..., Any]:
    """`module:function` (the working directory is searched too) as the function itself; `option` is what it was given for."""
    module, _, attribute = name.partition(":")
    if not attribute:
        raise ValueError(f"{option}: {name!r} is not of the form module:function, for example my_functions:brightness")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{option}: {name!r} cannot be imported ({error}); the module lies in the working directory or is installed") from error
