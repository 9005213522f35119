"""The documentation holds: links lead somewhere, commands are accepted as they are printed, settings of papers build their recipes."""

from __future__ import annotations

import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from instep.cli.parse import recipe_args
from instep.cli.train import TrainArgs
from instep.rewards.named import NAMED

ROOT = Path(__file__).parents[1]
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), *sorted(ROOT.glob("*.md"))]
FENCED = re.compile(r"^( *)(`{3,})[^\n]*\n.*?^\1\2 *$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
SETTINGS = (ROOT / "docs/paper_settings.md").read_text(encoding="utf-8")


@cache
def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page: lower case, without punctuation, a hyphen for each space, -1 and so on for repeated ones."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.*?) *$", FENCED.sub("", page.read_text(encoding="utf-8")), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()).replace(" ", "-")
        same = sum(1 for other in found if re.fullmatch(re.escape(slug) + r"(-\d+)?", other))
        found.add(f"{slug}-{same}" if same else slug)
    return found


def broken(page: Path) -> list[str]:
    """Links of a page that lead to no file, or to no heading of one."""
    wrong = []
    for target in LINK.findall(FENCED.sub("", page.read_text(encoding="utf-8"))):
        path, _, anchor = target.partition("#")
        if "://" in path or path.startswith("mailto:"):
            continue
        file = page.parent / path if path else page
        if not file.is_file() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            wrong.append(target)
    return wrong


def test_links_lead_to_files_and_headings(tmp_path):
    assert {str(page.relative_to(ROOT)): broken(page) for page in PAGES if broken(page)} == {}
    page = tmp_path / "page.md"
    page.write_text("# One, two\n\n[a](page.md#one-two) [b](page.md#three) [c](none.md)\n\n```\n[d](none.md)\n```\n")
    assert broken(page) == ["page.md#three", "none.md"]


COMMANDS = [line for block in re.findall(r"^```sh\n(.*?)^```", SETTINGS, re.MULTILINE | re.DOTALL) for line in block.splitlines()]


@pytest.mark.parametrize("line", COMMANDS, ids=[" ".join(line.split()[2:5]) for line in COMMANDS])
def test_settings_of_papers_are_accepted(line):
    program, command, name, *args = shlex.split(line)
    assert (program, command) == ("instep", "train")
    recipe, options = recipe_args(name, args, command, TrainArgs)
    assert recipe.name == name and recipe.stages
    for reward in re.split(r", *", options.reward or ""):
        kind, _, part = reward.partition(":")
        assert not reward or " vlm" in kind or kind in NAMED and (not part or part in NAMED[kind].parts), reward


def test_settings_of_papers_in_python():
    (block,) = re.findall(r"^```python\n(.*?)^```", SETTINGS, re.MULTILINE | re.DOTALL)
    exec(compile(block, "paper_settings.md", "exec"), {})
