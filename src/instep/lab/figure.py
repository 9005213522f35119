"""Figures of the 2-D laboratory: samples over the exact density, sampling paths, and what a force does to the plane. Needs the extra `lab`.

Matplotlib is used through its objects alone: no windows, no global state. Colours are Okabe and Ito's, distinguishable without colour vision.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from instep.core.files import write_bytes
from instep.data.animation import FORMATS as ANIMATIONS
from instep.data.animation import save_animation
from instep.diffusion.path import RectifiedFlow
from instep.lab.metrics import REACH, check_rewarded
from instep.lab.mixture import Mixture

FORMATS = (".svg", ".png")
ROWS = ("samples", "sampling paths", "descent direction")
DPI = 200
BLUE, VERMILLION, TEXT, SOFT, LINE = "#0072B2", "#D55E00", "#1f2430", "#5b6270", "#b9bdc6"
DENSITY = ("#f1f2f4", "#e3e5e9", "#d3d6dc")  # inside 3, 2 and 1 sigma of a mode
SIDE, GAP, LEFT, RIGHT = 2.1, 0.14, 0.55, 0.08  # inches: an axes, between axes, margins
TITLE, NAME, CAPTION, HEADROOM = 0.28, 0.19, 0.135, 0.08  # inches: the figure's title, a panel's name, a line of caption, above it all
TICKS, KEY, KEY_WIDTH = 0.27, 0.16, 1.42  # inches: room for tick labels, a line of the legend, an entry of it
NBSP = "\u00a0"
WRAP = 42  # characters of a caption line
HOLD = 1.5  # seconds an animation rests on its last frame


@dataclass(frozen=True)
class Panel:
    """A column of the figure: samples [N, 2]; `paths` [S, n, 2] are n samples over S points of sampling, noise first; `field` are points
    [G, 2] and the force [G, 2] there, dL/dx, which is drawn the way it is descended."""

    name: str
    samples: Tensor
    caption: str = ""
    paths: Tensor | None = None
    field: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Frame:
    """What panels share: the square [low, high] of each axis, and the circles around rewarded modes."""

    mixture: Mixture
    x: tuple[float, float]
    y: tuple[float, float]
    rewarded: Tensor | None

    @classmethod
    def around(cls, mixture: Mixture, rewarded: Tensor | None) -> Frame:
        """A square that holds every mode with a fifth of their extent and 4 sigma to spare."""
        low, high = mixture.means.double().min(0).values, mixture.means.double().max(0).values
        half = 1.2 * float((high - low).max()) / 2 + 4 * mixture.sigma
        x, y = ((low + high) / 2).tolist()
        return cls(mixture, (x - half, x + half), (y - half, y + half), rewarded)

    def outside(self, samples: Tensor) -> float:
        """Share of samples [N, 2] that the figure does not show; those that are not finite are among them."""
        x, y = samples.double().unbind(1)
        return 1 - float(((x >= self.x[0]) & (x <= self.x[1]) & (y >= self.y[0]) & (y <= self.y[1])).double().mean())


def draw(file: Path, panels: Sequence[Panel], mixture: Mixture, rewarded: Tensor | None = None) -> None:
    """Writes an .svg or .png, atomically: a column a panel; samples over the exact density (inside 1, 2 and 3 sigma), then paths and
    fields where a panel has them. `rewarded` [M] booleans are circled. Limits come from the mixture; what lies outside is counted.

    ValueError for another suffix, shapes that do not fit, or without matplotlib.
    """
    if file.suffix.lower() not in FORMATS:
        raise ValueError(f"file: {file.name!r} ends in {file.suffix!r}; a figure can be {', '.join(FORMATS)}")
    _check(panels, mixture, rewarded)
    figure = LabFigure(panels, Frame.around(mixture, rewarded))
    buffer = io.BytesIO()
    figure.save(buffer, file.suffix.lower().lstrip("."))
    write_bytes(file, buffer.getvalue())


def animate(file: Path, frames: Sequence[tuple[str, Sequence[Panel]]], mixture: Mixture, rewarded: Tensor | None = None, fps: float = 4.0) -> None:
    """Writes an endless .webp, .gif or animated .png of samples alone, a frame for each (title, panels), `fps` a second; rests on the last.

    ValueError for another suffix, no frames or another number of panels in some of them, shapes that do not fit, or without matplotlib.
    """
    if file.suffix.lower() not in ANIMATIONS:  # before the frames are drawn, which takes a while
        raise ValueError(f"file: {file.name!r} ends in {file.suffix!r}; an animation can be {', '.join(ANIMATIONS)}")
    counts = sorted({len(panels) for _, panels in frames})
    if len(counts) != 1:
        raise ValueError(f"frames: {counts or 'no'} panels are not allowed; give one or more frames with the same number of panels")
    for _, panels in frames:
        _check(panels, mixture, rewarded)
    shared = Frame.around(mixture, rewarded)
    bare = [(title, [replace(panel, paths=None, field=None) for panel in panels]) for title, panels in frames]
    lines = max(_lines(panel, shared) for _, panels in bare for panel in panels)
    pixels = [LabFigure(panels, shared, title, lines).pixels() for title, panels in bare]
    save_animation(file, torch.stack(pixels + pixels[-1:] * math.ceil(HOLD * fps)), fps)


def _check(panels: Sequence[Panel], mixture: Mixture, rewarded: Tensor | None) -> None:
    if not panels:
        raise ValueError("panels: none given; a figure needs one or more")
    if mixture.means.shape[1] != 2:
        raise ValueError(f"mixture: {mixture.means.shape[1]} dimensions cannot be drawn; use a mixture in 2")
    if rewarded is not None:
        check_rewarded(rewarded, mixture)
    for panel in panels:
        _check_shape(panel, "samples", panel.samples, "[N, 2]", 2)
        if panel.paths is not None:
            _check_shape(panel, "paths", panel.paths, "[S, n, 2]", 3)
        if panel.field is not None:
            points, force = panel.field
            _check_shape(panel, "field", points, "points [G, 2]", 2)
            _check_shape(panel, "field", force, f"a force {list(points.shape)} as there are points", 2, len(points))


def _check_shape(panel: Panel, name: str, x: Tensor, wanted: str, ndim: int, length: int | None = None) -> None:
    if x.ndim != ndim or x.shape[-1] != 2 or not x.numel() or length not in (None, len(x)):
        raise ValueError(f"{name}: {tuple(x.shape)} of panel {panel.name!r} is not allowed; give {wanted}")


def _part(panel: Panel, row: str) -> Any:
    """What a panel shows in a row, None if nothing."""
    return dict(zip(ROWS, (panel.samples, panel.paths, panel.field), strict=True))[row]


def _lines(panel: Panel, frame: Frame) -> int:
    """Lines of a panel's caption."""
    return len(_caption(panel, frame).splitlines())


def _caption(panel: Panel, frame: Frame) -> str:
    """The panel's caption, wrapped, with what the figure leaves out."""
    share = frame.outside(panel.samples)
    outside = f"{max(1, round(100 * share))} % outside".replace(" ", NBSP)
    outside = f"<{NBSP}{outside}" if share < 0.005 else outside
    parts = [panel.caption] if panel.caption else []
    text = ", ".join([*parts, outside] if share else parts)
    return "\n".join(line for part in text.splitlines() for line in textwrap.wrap(part, WRAP) or [""])


class LabFigure:
    """One figure of panels, laid out in inches, so that the frames of an animation do not jump."""

    def __init__(self, panels: Sequence[Panel], frame: Frame, title: str = "", lines: int | None = None) -> None:
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ValueError("matplotlib is not installed and figures of the laboratory need it: pip install 'instep[lab]'") from error
        self.frame = frame
        self.rows = [name for name in ROWS if any(_part(panel, name) is not None for panel in panels)]
        lines = max(_lines(panel, frame) for panel in panels) if lines is None else lines
        self.head = HEADROOM + bool(title) * TITLE + NAME + lines * CAPTION + 0.06
        self.width = LEFT + len(panels) * (SIDE + GAP) - GAP + RIGHT
        marks = self._marks()
        columns = min(len(marks), int((self.width - LEFT) / KEY_WIDTH))
        self.height = self.head + len(self.rows) * (SIDE + GAP) - GAP + TICKS + math.ceil(len(marks) / columns) * KEY + 0.02
        self.figure = Figure(figsize=(self.width, self.height), dpi=DPI, facecolor="white")
        self.canvas = FigureCanvasAgg(self.figure)
        if title:
            self._text(LEFT, HEADROOM, title, size=10.5, weight="bold")
        for column, panel in enumerate(panels):
            self._column(column, panel, panels, HEADROOM + bool(title) * TITLE)
        self.figure.legend(
            handles=marks,
            loc="lower left",
            bbox_to_anchor=(LEFT / self.width, 0.04 / self.height),
            ncols=columns,
            frameon=False,
            fontsize=7,
            labelcolor=SOFT,
            handlelength=1.4,
            handletextpad=0.5,
            columnspacing=1.6,
            borderaxespad=0,
            borderpad=0,
        )

    def _column(self, column: int, panel: Panel, panels: Sequence[Panel], top: float) -> None:
        """A panel's heading and its axes. Numbers and the row's name stand at the first axes of a row, numbers below at the last of a column."""
        left = LEFT + column * (SIDE + GAP)
        self._text(left, top, panel.name, size=9, weight="bold")
        self._text(left, top + NAME, _caption(panel, self.frame), size=7, color=SOFT, linespacing=1.25)
        paint: dict[str, Callable[[Any, Any], None]] = dict(zip(ROWS, (self._samples, self._paths, self._field), strict=True))
        own = [name for name in self.rows if _part(panel, name) is not None]
        for name in own:
            first = all(_part(other, name) is None for other in panels[:column])
            axes = self._axes(column, self.rows.index(name), name if first else "", bottom=name == own[-1])
            paint[name](axes, _part(panel, name))

    def _text(self, x: float, y: float, text: str, **style: Any) -> None:
        """Text with its upper left corner at (x, y) inches from the figure's upper left."""
        self.figure.text(x / self.width, 1 - y / self.height, text, va="top", **{"color": TEXT, **style})

    def _axes(self, column: int, row: int, name: str, bottom: bool) -> Any:
        left, top = LEFT + column * (SIDE + GAP), self.head + row * (SIDE + GAP)
        axes = self.figure.add_axes((left / self.width, 1 - (top + SIDE) / self.height, SIDE / self.width, SIDE / self.height))
        axes.set(xlim=self.frame.x, ylim=self.frame.y, aspect="equal")
        axes.locator_params(nbins=4)
        axes.tick_params(labelsize=6.5, length=2.5, width=0.6, color=LINE, labelcolor=SOFT, labelleft=bool(name), labelbottom=bottom)
        for spine in axes.spines.values():
            spine.set(color=LINE, linewidth=0.6)
        if name:
            axes.set_ylabel(name, fontsize=8, color=TEXT)
            axes.yaxis.set_label_coords(-0.34 / SIDE, 0.5)
        self._truth(axes)
        return axes

    def _truth(self, axes: Any) -> None:
        """Contours of the exact density at what a mode alone has at 3, 2 and 1 sigma, and circles around rewarded modes."""
        from matplotlib.patches import Circle

        frame, sigma = self.frame, self.frame.mixture.sigma
        n = min(400, max(120, math.ceil(3 * (frame.x[1] - frame.x[0]) / sigma)))
        x, y = (torch.linspace(*limits, n, dtype=torch.float64) for limits in (frame.x, frame.y))
        points = torch.cartesian_prod(x, y)
        everything, clean = torch.full((len(points),), -1), torch.zeros(len(points), dtype=torch.float64)
        log_density = frame.mixture.log_density(RectifiedFlow(), points, clean, everything).reshape(n, n).T
        peak = -math.log(len(frame.mixture.means) * 2 * math.pi * sigma**2)
        levels = [peak - k**2 / 2 for k in (3, 2, 1)]
        axes.contourf(x, y, log_density, levels=[*levels, math.inf], colors=DENSITY, zorder=0)
        axes.contour(x, y, log_density, levels=levels[:1], colors=LINE, linewidths=0.5, linestyles="solid", zorder=0)
        if frame.rewarded is not None:
            for mean in frame.mixture.means[frame.rewarded.cpu()].tolist():
                axes.add_patch(Circle(mean, (REACH + 0.8) * sigma, fill=False, edgecolor=VERMILLION, linewidth=1.1, zorder=4))

    def _samples(self, axes: Any, samples: Tensor) -> None:
        x, y = samples.detach().double().cpu().unbind(1)
        alpha = min(0.8, max(0.12, 12 / math.sqrt(len(samples))))  # so that mass shows as darkness
        axes.scatter(x, y, s=2.2, c=BLUE, alpha=alpha, linewidths=0, zorder=3, rasterized=True)

    def _paths(self, axes: Any, paths: Tensor) -> None:
        from matplotlib.collections import LineCollection

        paths = paths.detach().double().cpu()
        axes.add_collection(LineCollection(list(paths.transpose(0, 1).numpy()), colors=BLUE, linewidths=0.5, alpha=0.45, zorder=2))
        axes.scatter(*paths[0].T, s=7, facecolors="white", edgecolors=SOFT, linewidths=0.6, zorder=3)
        axes.scatter(*paths[-1].T, s=7, c=BLUE, linewidths=0, zorder=3)

    def _field(self, axes: Any, field: tuple[Tensor, Tensor]) -> None:
        """Arrows of minus the force. The key's is as long as the points are apart and is the 95th percentile; none is longer than 1.5 of it."""
        from matplotlib.patches import Rectangle

        points, force = (part.detach().double().cpu() for part in field)
        size = force.norm(dim=1)
        unit = float(size[size.isfinite()].quantile(0.95)) if size.isfinite().any() else 0.0
        spacing = math.sqrt(float((points.max(0).values - points.min(0).values).prod()) / len(points)) or 0.1 * (self.frame.x[1] - self.frame.x[0])
        arrow = -force / max(unit, 1e-300) * spacing
        arrow = arrow * (1.5 * spacing / arrow.norm(dim=1, keepdim=True).clamp(min=1e-300)).clamp(max=1)
        style = {"color": TEXT, "width": 0.0045, "headwidth": 3.6, "headlength": 4, "headaxislength": 3.6}
        arrows = axes.quiver(*points.T, *arrow.T, angles="xy", scale_units="xy", scale=1, zorder=3, **style)
        axes.add_patch(Rectangle((0.63, 0), 0.37, 0.08, transform=axes.transAxes, facecolor="white", edgecolor=LINE, linewidth=0.6, zorder=5))
        text = {"labelpos": "E", "labelsep": 0.05, "labelcolor": SOFT, "fontproperties": {"size": 6.5}}
        axes.quiverkey(arrows, 0.725, 0.04, spacing, f"force {unit:.2g}", coordinates="axes", **text).set_zorder(6)

    def _marks(self) -> list[Any]:
        """Returns the entries of the legend."""
        from matplotlib.lines import Line2D
        from matplotlib.patches import Patch

        def mark(label: str, **style: Any) -> Line2D:
            return Line2D([], [], linestyle="none", marker="o", label=label, **style)

        marks: list[Any] = [
            mark("sample", color=BLUE, markersize=3, markeredgewidth=0),
            Patch(facecolor=DENSITY[1], edgecolor=LINE, linewidth=0.5, label="exact density, 1 to 3 σ"),
        ]
        if self.frame.rewarded is not None:
            marks.append(mark("rewarded mode", markerfacecolor="none", markeredgecolor=VERMILLION, markersize=7, markeredgewidth=1.1))
        if "sampling paths" in self.rows:
            marks.append(mark("start of a path", markerfacecolor="white", markeredgecolor=SOFT, markersize=3, markeredgewidth=0.6))
        return marks

    def pixels(self) -> Tensor:
        """The figure as uint8 [H, W, 3]."""
        self.canvas.draw()
        return torch.frombuffer(bytearray(self.canvas.buffer_rgba()), dtype=torch.uint8).reshape(*self.canvas.get_width_height()[::-1], 4)[..., :3]

    def save(self, buffer: io.BytesIO, format_: str) -> None:
        """As "svg" or "png"; the same figure gives the same bytes."""
        import matplotlib

        with matplotlib.rc_context({"svg.hashsalt": "instep"}):
            self.figure.savefig(buffer, format=format_, dpi=DPI, metadata={"Date": None} if format_ == "svg" else None)
