"""What the package reads runs no code: no unpickling, no evaluation of text, no shell, no code of model folders."""

from __future__ import annotations

import ast
import pickle
from pathlib import Path

import torch

import instep

SOURCE = Path(instep.__file__).parent
CALLS = {"eval", "exec", "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.loads", "yaml.load", "os.system", "os.popen", "joblib.load", "shelve.open"}


def unsafe(tree: ast.AST) -> list[str]:
    """Calls that run what they are given, and arguments that make a call do so."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {keyword.arg: keyword.value.value for keyword in node.keywords if isinstance(keyword.value, ast.Constant)}
        if name in CALLS or given.get("shell") or given.get("trust_remote_code") or given.get("allow_pickle"):
            found.append(name)
        if name == "torch.load" and given.get("weights_only") is not True:
            found.append(name)
    return found


def test_nothing_in_the_package_runs_what_it_reads():
    assert {str(file): unsafe(ast.parse(file.read_text(encoding="utf-8"))) for file in SOURCE.rglob("*.py") if unsafe(ast.parse(file.read_text()))} == {}
    for line in (
        "pickle.load(f)",
        "torch.load(f)",
        "eval(text)",
        "run(text, shell=True)",
        "load(folder, trust_remote_code=True)",
        "np.load(f, allow_pickle=True)",
    ):
        assert unsafe(ast.parse(line)), line


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    from instep.cli.main import main

    mark = tmp_path / "ran"
    torch.save({"weight": torch.zeros(2), "bomb": Bomb(mark)}, tmp_path / "published.pt")
    (tmp_path / "base").mkdir()
    assert main(["rewards", "convert", str(tmp_path / "published.pt"), "--base", str(tmp_path / "base"), "--to", str(tmp_path / "to")]) == 2
    assert not mark.exists() and not (tmp_path / "to").exists()
    with (tmp_path / "plain.pkl").open("wb") as file:
        pickle.dump(Bomb(mark), file)
    pickle.loads((tmp_path / "plain.pkl").read_bytes())
    assert mark.exists(), "it would have run"
