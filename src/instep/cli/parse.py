"""Parses command-line options and reports errors in one line."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import io
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

if TYPE_CHECKING:
    from instep.models.preset import ModelSettings


def parse(kind: Any, args: Sequence[str], command: str, description: str | None = None) -> Any:
    """Parses options into an object. Raises ValueError with a one-line message, as everywhere else, in place of tyro's error box."""
    import tyro

    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(kind, args=list(args), prog=f"instep {command}", description=description)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ValueError(f"{rephrased(errors.getvalue())} (see instep {command} --help)") from None


def rephrased(box: str) -> str:
    """Rewrites tyro's error box as one line: the option, the given value, and what is allowed."""
    plain = re.sub(r"\x1b\[[0-9;]*m|\[/?bold\]", "", box)
    lines = [line.strip().strip("│").strip() for line in plain.splitlines() if not line.strip().startswith(("╭", "╰"))]
    parts = [" ".join(part.split()) for part in re.split(r"[─-]{10,}", "\n".join(lines))]
    if "╭" not in plain and len(parts) > 1:  # where the output is not UTF-8 the title stands above a rule instead of in the frame
        parts = parts[1:]
    message, helped = parts[0], next((part.removeprefix("Argument helptext: ") for part in parts if part.startswith("Argument helptext:")), "")
    if found := re.match(r"Error parsing (?:recipe|options)\.(?:common\.)?(\S+): (\w+): (.*)", message):  # a component rejected its value
        return f"--{found[1]}.{found[2].replace('_', '-')}: {found[3]}"
    if found := re.match(r"Error parsing (\S+): (.*)", message):
        wrong = re.search(r"(?:base 10: |to float: |instantiated from )('.*?'|\[.*?\])", found[2])
        takes = re.sub(r"^([A-Z]+) ", r"\1: ", helped.removeprefix(found[1]).strip())
        return f"{found[1]}: {f'{wrong[1]} is not allowed' if wrong else found[2]}" + (f"; it takes {takes}" if takes else "")
    if found := re.match(r"invalid choice (.*) for argument '(\S+)'\. Expected one of \((.*)\)\.?", message):
        return f"{found[2]}: {found[1]} is not allowed; allowed: {found[3]}"
    if found := re.match(r"Unrecognized options: ([^\s,]+)", message):
        near = re.search(r"Perhaps you meant: (--\S+)", " ".join(parts[1:]))
        return f"{found[1]}: there is no such option" + (f"; did you mean {near[1]}?" if near else "")
    if found := re.match(r"Missing value for argument '(\S+)'\. Expected (\d+) values?", message):
        return f"{found[1]}: its value is missing; it takes {found[2]}"
    return message or " ".join(plain.split())


def recipe_args(name: str, args: Sequence[str], command: str, options: type) -> tuple[Any, Any]:
    """Returns the recipe with its overrides, and the command's own options; the recipe function's parameters are options too.

    What is published for the model, --model among `args` or the default one, stands in place of the defaults of the options that recipes share. Raises
    ValueError for a pipeline that no family knows.
    """
    import tyro

    from instep.bundled import DEFAULT, settings_of
    from instep.recipes import as_recipe, find

    function = find(name)
    _check_names(name, function, command, options)
    settings = settings_of(last_value(args, "model") or DEFAULT)
    fields = [
        ("recipe", Annotated[Any, tyro.conf.arg(name="", constructor=_flat(function, settings))]),
        ("options", Annotated[options, tyro.conf.arg(name="")]),  # type: ignore[valid-type]
    ]
    parsed = parse(dataclasses.make_dataclass("Args", fields), args, f"{command} {name}", (function.__doc__ or "").split("\n")[0])
    return as_recipe(parsed.recipe, function, name if ":" in name else None), parsed.options


def takes(name: str, option: str) -> bool:
    """Whether a recipe has an option, of its own or among those that recipes share."""
    from instep.recipes import find

    hints = inspect.get_annotations(find(name), eval_str=True)
    return option in hints or option in {field.name for field in dataclasses.fields(hints["common"])}


def _check_names(name: str, function: Callable[..., Any], command: str, options: type) -> None:
    """Raises ValueError if a parameter of the recipe has the name of an existing option."""
    hints = inspect.get_annotations(function, eval_str=True)
    for owner, kind in (("Common", hints["common"]), (f"`instep {command}`", options)):
        if clash := hints.keys() & {field.name for field in dataclasses.fields(kind)} - {"return"}:
            raise ValueError(f"recipe: the parameter {sorted(clash)[0]!r} of {name!r} is an option of {owner} itself; choose another name")


def last_value(args: Sequence[str], option: str) -> str | None:
    """The value of an option among arguments that were not parsed yet; the last one, or None where it is not given."""
    joined = [(i, arg.partition("=")[2]) for i, arg in enumerate(args) if arg.startswith(f"--{option}=")]
    spaced = [(i, args[i + 1]) for i, arg in enumerate(args[:-1]) if arg == f"--{option}"]
    return max(joined + spaced)[1] if joined or spaced else None


def _flat(function: Callable[..., Any], settings: ModelSettings | None) -> Callable[..., Any]:
    """The recipe function with its `common` options unnested (--steps, not --common.steps), their defaults being those on the model."""
    import tyro

    from instep.recipes.defaults import common_of, with_settings

    @functools.wraps(function)
    def call(**given: Any) -> Any:
        return function(**given)

    hints = inspect.get_annotations(function, eval_str=True)
    shared = hints["common"]
    call.__annotations__ = hints | {"common": Annotated[shared, tyro.conf.arg(name="")]}
    parameters = [p.replace(annotation=call.__annotations__[name]) for name, p in inspect.signature(function).parameters.items()]
    if settings is not None and (common := common_of(function)) is not None:
        parameters = [p.replace(default=with_settings(common, settings)) if p.name == "common" else p for p in parameters]
    call.__signature__ = inspect.Signature([p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters])  # type: ignore[attr-defined]
    del call.__wrapped__  # type: ignore[attr-defined]
    return call


def recipe_name(args: Sequence[str], command: str) -> str:
    from instep.recipes import NAMES

    if not args or args[0].startswith("-"):
        raise ValueError(f"recipe: none was given; write `instep {command} RECIPE`, one of {', '.join(NAMES)}, or module:function for one of your own")
    return args[0]
