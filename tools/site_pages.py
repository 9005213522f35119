"""What mkdocs adds to docs/ for the site: the README as its front page, the API reference, linked source files, and a navigation by folder.

The pages in docs/ are written for GitHub, so their links lead to files of the repository. Here a link to a file outside docs/ leads to a page that holds it.
"""

from __future__ import annotations

import ast
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
# pages of the site that stand elsewhere in the repository
OUTSIDE = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "SECURITY.md": "security_policy.md"}
LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
FENCE_WITH_FILE = re.compile(r"^```(\w+) file=(\S+)$", re.MULTILINE)
ROOMS = {
    "core": "Sizes and version",
    "data": "Prompts and samples",
    "methods": "Forces, objectives, recipes",
    "models": "Models",
    "bundled": "Bundled models",
    "recipes": "Recipes of papers",
    "rewards": "Rewards",
    "training": "Training",
}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    named = {page for entry in config.nav or [] for page in _pages(entry)}
    found = [{title: _expanded(value, named) if str(value).endswith("*") else value for title, value in entry.items()} for entry in config.nav or []]
    config.nav = [entry for entry in found if all(entry.values())]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for page, text in _reference().items():
        files.append(File.generated(config, page, content=text))
    linked = {path for page in [*(ROOT / "docs").rglob("*.md"), *(ROOT / name for name in OUTSIDE)] for path in _linked_files(page)}
    for path in sorted(linked):
        text = (ROOT / path).read_text(encoding="utf-8")
        language = {".py": "python", ".toml": "toml"}.get(Path(path).suffix, "text")
        content = f"---\nsearch: {{exclude: true}}\n---\n# {path}\n\n`````{language}\n{text}\n`````\n"
        files.append(File.generated(config, f"source/{path}.md", content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    uri = page.file.src_uri
    here = next((source for source, at in OUTSIDE.items() if at == uri), f"docs/{uri}")
    if uri.startswith(("source/", "reference/")):
        return markdown
    markdown = FENCE_WITH_FILE.sub(r'```\1 title="\2"', markdown)
    return LINK.sub(lambda link: link[1] + _site_link(link[2], here, uri) + (link[3] or "") + link[4], markdown)


def _pages(entry: Any) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    parts = entry.values() if isinstance(entry, dict) else entry
    return [page for part in parts for page in _pages(part)]


def _expanded(pattern: str, named: set[str]) -> list[str]:
    """The pages of a folder in the order of their titles; those of the generated reference in that of the rooms."""
    if pattern == "reference/*":
        return sorted(_reference())
    found = [path for path in (ROOT / "docs").glob(pattern) if path.suffix == ".md"]
    pages = {path.relative_to(ROOT / "docs").as_posix(): path.read_text(encoding="utf-8").split("\n", 1)[0] for path in found}
    pages |= {at: "# Reporting a weakness" for at in ("security_policy.md",) if pattern == "*"}
    return sorted(pages.keys() - named, key=lambda page: pages[page])


def _reference() -> dict[str, str]:
    """A page for each room that public names come from, with their docstrings."""
    stub = ast.parse((ROOT / "src/instep/__init__.pyi").read_text(encoding="utf-8"))
    names: dict[str, list[str]] = {}
    for node in stub.body:
        if isinstance(node, ast.ImportFrom) and node.module:
            names.setdefault(node.module.split(".")[1], []).extend(f"{node.module}.{alias.name}" for alias in node.names if alias.name != "__version__")
    unknown = names.keys() - ROOMS.keys()
    if unknown:
        raise ValueError(f"tools/site_pages.py: ROOMS has no title for {sorted(unknown)}; add one")
    return {
        f"reference/{room}.md": f"# {ROOMS[room]}\n\nEach name is imported from `instep`.\n\n" + "\n\n".join(f"::: {name}" for name in found) + "\n"
        for room, found in names.items()
    }


def _linked_files(page: Path) -> set[str]:
    """Files outside docs/ that a page links to, from the repository's root."""
    folder = page.parent.relative_to(ROOT).as_posix()
    targets = {posixpath.normpath(posixpath.join(folder, link[2])) for link in LINK.finditer(page.read_text(encoding="utf-8")) if "://" not in link[2]}
    return {target for target in targets if not target.startswith("docs/") and target not in OUTSIDE and (ROOT / target).is_file()}


def _site_link(target: str, here: str, uri: str) -> str:
    """A link of the file `here` of the repository, as a link of the page `uri` of the site."""
    if "://" in target or target.startswith("mailto:"):
        return target
    path = posixpath.normpath(posixpath.join(posixpath.dirname(here), target))
    at = OUTSIDE.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else f"source/{path}.md")
    return posixpath.relpath(at, posixpath.dirname(uri) or ".")


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Takes out the one script that Material fetches from elsewhere (it serves the search in pages opened from a disk); ValueError if more is fetched."""
    output = re.sub(r'<script src="https://[^"]*iframe-worker[^"]*"></script>', "", output)
    fetched = re.findall(r'(?:src="|<link rel="(?:stylesheet|preconnect|preload)"[^>]*href=")((?:https?:)?//[^"]+)', output)
    if fetched:
        raise ValueError(f"{page.file.src_uri}: the page would fetch {fetched} from elsewhere when it is read; put the file into docs/")
    return output
