"""The documentation holds: links lead somewhere, commands are accepted as they are printed, settings of papers build their recipes."""

from __future__ import annotations

import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from instep.bundled import WORLDS
from instep.cli.parse import parse, recipe_args
from instep.cli.plan import PlanArgs
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


def printed(page: Path) -> list[str]:
    """The `instep` commands in the code blocks of a page, fenced or indented, with continued lines joined and without comments."""
    lines = page.read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    found = [re.sub(r"^\s*(?:srun |torchrun .*-m )?(?=instep )", "", line) for line in lines]
    return [re.sub(r" +# .*$", "", line).strip() for line in found if re.match(r"instep [a-z-]+ ", line) and "..." not in line]


PRINTED = sorted({line for page in PAGES for line in printed(page)})
# names that stand for a user's own module: the how-tos that write one run them
OWN = re.compile(r" (my_\w+|module):")


@cache
def kinds() -> dict[str, object]:
    from instep.cli import convert, evaluate, export, human_eval, lab, named_rewards, pairs, recipes, sample, tune_ranker

    return {
        "sample": sample.SampleArgs,
        "eval": evaluate.EvalArgs,
        "report": evaluate.ReportArgs,
        "export": export.ExportArgs,
        "recipes": recipes.RecipesArgs,
        "rewards": named_rewards.ListRewardsArgs,
        "rewards convert": named_rewards.ConvertRewardArgs,
        "convert": convert.ConvertArgs,
        "human-eval": human_eval.HumanEvalArgs,
        "pairs export": pairs.ExportPairsArgs,
        "pairs import": pairs.ImportPairsArgs,
        "pairs fit": pairs.FitPairsArgs,
        "pairs slow": pairs.SlowPairsArgs,
        "pairs tune-ranker": tune_ranker.TuneRankerArgs,
        "lab": lab.LabArgs,
    }


def accepted(line: str) -> None:
    """Parses a command without running it; ValueError for an option that there is not, or a value that is not allowed."""
    args = shlex.split(line)[1:]
    if "--help" in args or OWN.search(line):
        return
    if args[0] in ("train", "plan"):
        recipe, options = recipe_args(args[1], args[2:], args[0], TrainArgs if args[0] == "train" else PlanArgs)
        if isinstance(options, TrainArgs) and options.model not in WORLDS:
            missing = {"reward": options.reward is None and bool(recipe.needs & {"reward", "gradient", "labels"}), "prompts": options.prompts is None}
            if any(missing.values()):
                raise ValueError(f"{', '.join(name for name, lacks in missing.items() if lacks)}: none given, and a folder brings none")
        return
    if args[0] == "lab":
        args = ["lab", *args[next((i for i, arg in enumerate(args) if arg.startswith("-")), len(args)) :]]
    name, rest = (" ".join(args[:2]), args[2:]) if " ".join(args[:2]) in kinds() else (args[0], args[1:])
    parse(kinds()[name], rest, name)


def test_commands_of_every_page_are_accepted():
    assert len(PRINTED) > 60
    refused = {}
    for line in PRINTED:
        try:
            accepted(line)
        except ValueError as error:
            refused[line] = str(error)
    assert refused == {}
    with pytest.raises(ValueError, match="no such option"):
        accepted("instep train dmd2 --no-such-option 3")


def named_tests(page: Path) -> set[tuple[str, str]]:
    """File and name of the tests that a page names: `test_x.py::test_y`, and `::test_z` for another one of the file named before it in the line."""
    found = set()
    for line in page.read_text(encoding="utf-8").splitlines():
        file = ""
        for name, test in re.findall(r"`(?:tests/)?(test_\w+\.py)?(?:::(test_\w+))?`", line):
            file = name or file
            if file:
                found.add((file, test))
    return found


def test_the_tests_that_pages_name_exist():
    named = {each for page in PAGES for each in named_tests(page)}
    assert len(named) > 100
    text = {file: (ROOT / "tests" / file).read_text(encoding="utf-8") if (ROOT / "tests" / file).is_file() else None for file, _ in named}
    assert sorted(f"{file}::{test}" for file, test in named if text[file] is None or (test and f"def {test}(" not in text[file])) == []


def test_the_bounds_of_caches_are_those_of_the_code():
    from instep.bundled.baselines import KEPT
    from instep.human_eval.server import KEPT_SHEETS
    from instep.models.prompt_cache import DISK_LIMIT, FEW, MEMORY_LIMIT
    from instep.training.options import RunOptions

    page = (ROOT / "docs/planning.md").read_text(encoding="utf-8")
    assert MEMORY_LIMIT == 512 * 2**20 and RunOptions.keep == 2
    for bound in ("512 MB", f"first {FEW} ", f"{DISK_LIMIT // 10**9} GB", f"{RunOptions.teacher_samples} by default", f"{KEPT} rows", f"last {KEPT_SHEETS} "):
        assert bound in page, bound


# pages whose commands other tests run in another form
OTHERWISE = {"hpsv2_with_refl.md": "test_named_rewards.py", "own_data.md": "test_real_files.py", "sit.md": "test_sit.py"}


def test_every_how_to_with_commands_is_followed():
    """By `followed.follow`, in the order of the page."""
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py") if path.name != Path(__file__).name)
    pages = {page.name for page in (ROOT / "docs/how_to").glob("*.md") if printed(page)}
    assert len(pages) > 15 and {page for page in pages - OTHERWISE.keys() if f'"{page}"' not in sources} == set()
    assert all((ROOT / "tests" / test).is_file() for test in OTHERWISE.values())
