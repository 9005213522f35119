"""The report read as a page, for its tests: elements and text, with every element closed in order."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

from instep.metrics.compare import Row
from instep.metrics.figures import Value
from instep.report import write_report

VOID = {"meta", "link", "img", "br", "hr", "input", "line", "rect", "circle", "path"}


class Page(HTMLParser):
    """Collects elements and text, and insists that every element is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text += data


def words_of(html: str) -> str:
    return " ".join(Page(html.replace("<small>", " <small>")).text.split())


def report(tmp_path: Path, *runs: Path) -> tuple[Page, str]:
    write_report(list(runs), tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    return Page(text), text


def one(value: float, se: float, key: str, kind: str = "naive") -> Row:
    return Row(f"{kind} {value}", kind, {key: Value(value, se)}, 4, 4, 1.0, 10)  # type: ignore[arg-type]
