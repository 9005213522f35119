"""The laboratory's metrics against closed forms and exact samples, and its figures: what is on them, and what they refuse."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image
from torch import Tensor

from instep.diffusion.path import RectifiedFlow
from instep.lab.figure import Frame, LabFigure, Panel, animate, draw
from instep.lab.metrics import energy_distance, log_kde, mean_sd, measure, measure_exact, reverse_kl, total_variation
from instep.lab.mixture import Mixture

RING = Mixture.ring()
REWARDED = torch.arange(8) % 4 == 1  # a mode of each class: a quarter


def new_rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def at_modes(modes: Tensor) -> tuple[Tensor, Tensor]:
    """Samples at the very means of these modes [N], and their labels."""
    return RING.means[modes].double(), RING.classes[modes]


def exact(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    label = torch.arange(n) % 2
    return RING.sample(label, new_rng(seed)), label


def smoothed_kl(r: float) -> float:
    """E_p log (p * k) - log p of a 2-D Gaussian of variance 1 and a kernel of variance r: what a kernel estimate adds to the KL of exact samples."""
    return r / (1 + r) - math.log1p(r)


# ---- metrics ----


def test_exact_samples_reach_their_closed_forms():
    rows = [measure_exact(RING, 4000, seed, REWARDED) for seed in range(4)]
    mean = {name: value for name, (value, _) in mean_sd(rows).items()}
    assert mean["quality"] == pytest.approx(1 - math.exp(-4.5), abs=0.003)  # a 2-D Gaussian within 3 sigma
    assert 0.01 < mean["tv"] < 0.03
    # two classes of four modes: half of 4 x E|mass - 1/4|, a binomial's mean deviation at 2,000 a class
    assert mean["tv"] == pytest.approx(0.5 * 4 * math.sqrt(2 / math.pi * 0.25 * 0.75 / 2000), abs=0.006)
    assert abs(mean["energy"]) < 0.002
    assert mean["rkl"] == pytest.approx(smoothed_kl((0.08 / 0.15) ** 2), abs=0.01)
    assert mean["share"] == pytest.approx(0.25, abs=0.02)
    assert all(row["reached"] == 8 for row in rows)


def test_true_spread_follows_from_the_cut_at_three_sigma():
    """u = r^2 / (2 sigma^2) of a 2-D Gaussian is exponential, and the cut is u <= 4.5: E[u | u <= 4.5]."""
    cut = 4.5
    truth = (1 - (1 + cut) * math.exp(-cut)) / (1 - math.exp(-cut))
    u = torch.linspace(0, cut, 100_001, dtype=torch.float64)
    assert truth == pytest.approx(float(torch.trapezoid(u * (-u).exp(), u) / torch.trapezoid((-u).exp(), u)), abs=1e-8)
    assert truth == pytest.approx(0.949, abs=5e-4)
    values = [measure_exact(RING, 4000, seed)["spread"] for seed in range(6)]
    assert sum(values) / len(values) == pytest.approx(truth, abs=0.02)  # 6 x 4,000 samples: standard error .006


def test_spread_of_narrower_samples_is_the_ratio_of_variances():
    label = torch.arange(4000) % 2
    x = replace(RING, sigma=0.05).sample(label, new_rng())
    assert measure(x, label, RING, new_rng())["spread"] == pytest.approx(1 / 9, abs=0.01)


def test_collapse_onto_one_mode_a_class():
    x, label = at_modes(torch.tensor([0, 4]).repeat(100))
    metrics = measure(x, label, RING, new_rng(), REWARDED)
    assert metrics["tv"] == 0.75 and metrics["quality"] == 1 and metrics["reached"] == 2 and metrics["spread"] == 0 and metrics["share"] == 0


def test_samples_in_the_other_class_are_misplaced():
    x, label = at_modes(torch.arange(8).repeat(10))
    metrics = measure(x, 1 - label, RING, new_rng(), REWARDED)
    assert metrics["quality"] == 0 and metrics["tv"] == 1 and metrics["reached"] == 0
    assert math.isnan(metrics["spread"]) and math.isnan(metrics["share"])  # nothing is on-mode
    everything = torch.full_like(label, -1)
    assert measure(x, everything, RING, new_rng())["quality"] == 1 and total_variation(x, everything, RING) == 0


def test_tv_is_averaged_over_classes_not_samples():
    """Class 0 perfect with 40 samples, class 1 collapsed with 4: (0 + .75) / 2 however few class 1 has."""
    x, label = at_modes(torch.cat([torch.arange(4).repeat(10), torch.full((4,), 5)]))
    assert measure(x, label, RING, new_rng())["tv"] == pytest.approx(0.375)


def test_share_counts_on_mode_samples_only():
    modes = torch.tensor([1] * 30 + [0] * 10 + [5] * 20 + [6] * 20)
    x, label = at_modes(modes)
    x[:10] = 0  # ten of the rewarded ones leave
    assert measure(x, label, RING, new_rng(), REWARDED)["share"] == pytest.approx(40 / 70)
    assert "share" not in measure(x, label, RING, new_rng())


@pytest.mark.parametrize(("count", "reached"), [(9, 7), (10, 8), (11, 8)])
def test_reached_at_a_quarter_of_the_due_mass(count: int, reached: int):
    """320 samples, 40 due a mode: a mode that holds 10 is reached, one that holds 9 is not."""
    modes = torch.cat([torch.arange(8).repeat_interleave(40)[: 320 - 40], torch.full((count,), 7), torch.full((40 - count,), 6)])
    assert measure(*at_modes(modes), RING, new_rng())["reached"] == reached


def test_a_class_that_left_its_modes_has_reached_nothing():
    """One of class 1's 40 samples is on-mode: 1 of 41 against 1/8 due, though it is all of class 1's on-mode mass."""
    x, label = at_modes(torch.arange(8).repeat(10))
    x[(label == 1).nonzero().flatten()[1:]] = 0
    assert measure(x, label, RING, new_rng())["reached"] == 4


def test_energy_distance_of_two_point_masses():
    x, y = torch.zeros(7, 2).double(), torch.tensor([[3.0, 4.0]]).double().repeat(5, 1)
    assert energy_distance(x, y) == pytest.approx(10, abs=1e-12)
    assert energy_distance(x, x[:5]) == 0


def test_energy_distance_of_a_shifted_gaussian():
    """X - Y is a 2-D Gaussian of variance 2 a coordinate around the shift: its length has the mean of a Rice distribution."""
    special = pytest.importorskip("scipy.special")
    rng, shift = new_rng(), 1.5

    def mean_length(d: float) -> float:
        return math.sqrt(2) * math.sqrt(math.pi / 2) * float(special.hyp1f1(-0.5, 1, -(d**2) / 4))

    x, y = (torch.randn(4000, 2, generator=rng, dtype=torch.float64) for _ in range(2))
    assert energy_distance(x + torch.tensor([shift, 0.0]), y) == pytest.approx(2 * mean_length(shift) - 2 * mean_length(0), rel=0.05)


def test_energy_distance_is_unbiased_even_for_few_samples():
    """Five a side: with self-pairs (a V-statistic) the mean would be 2 E|X - X'| / 5 = .71."""
    rng = new_rng()
    values = torch.tensor([energy_distance(*torch.randn(2, 5, 2, generator=rng, dtype=torch.float64)) for _ in range(1000)])
    assert abs(float(values.mean())) < 4 * float(values.std()) / math.sqrt(1000) < 0.1


def test_energy_is_taken_class_by_class():
    """Swapped labels leave the pooled samples exact, and each class far off."""
    x, label = exact(2000)
    assert measure(x, 1 - label, RING, new_rng(1))["energy"] > 1


def test_density_at_level_zero_is_the_mixture_itself():
    x, label = exact(50)
    label[::5] = -1
    members = [torch.distributions.MultivariateNormal(mean.double(), 0.15**2 * torch.eye(2).double()) for mean in RING.means]
    each = torch.stack([member.log_prob(x.double()) for member in members], 1).exp()
    weight = RING.member(label).double()
    wanted = ((each * weight).sum(1) / weight.sum(1)).log()
    got = RING.log_density(RectifiedFlow(), x.double(), torch.zeros(50).double(), label)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-9)


def test_reverse_kl_of_a_too_wide_gaussian():
    """One mode, samples twice as wide: KL = (s^2 / sigma^2 - 1) - log(s^2 / sigma^2), plus what the kernel smooths."""
    sigma, wide, n = 0.5, 1.0, 4000
    one = Mixture(torch.zeros(1, 2), sigma, torch.zeros(1).long())
    label = torch.zeros(n).long()
    x = replace(one, sigma=wide).sample(label, new_rng()).double()
    ratio = wide**2 / sigma**2
    truth = ratio - 1 - math.log(ratio) + smoothed_kl((0.08 / wide) ** 2)
    assert reverse_kl(x, label, one) == pytest.approx(truth, abs=0.1)  # over eight draws: .025 above on average, standard deviation .027


def test_kernel_estimate_leaves_the_point_out_and_keeps_its_own_kernel_as_least():
    h = 0.5
    x = torch.tensor([[0.0, 0.0], [0.0, 0.3], [90.0, 0.0]]).double()
    peak = -math.log(2 * math.pi * h**2)
    near = -(0.3**2) / (2 * h**2) - math.log(2)  # of two others, one is near
    expected = torch.tensor([peak + near, peak + near, peak - math.log(3)]).double()
    torch.testing.assert_close(log_kde(x, h), expected)


def test_strays_do_not_improve_the_reverse_kl():
    x, label = exact(2000)
    clean = reverse_kl(x.double(), label, RING)
    x[:4] = torch.tensor([[9.0, 9.0], [-9.0, 9.0], [9.0, -9.0], [-9.0, -9.0]])
    assert reverse_kl(x.double(), label, RING) > clean + 1


def test_float32_and_float64_samples_measure_alike():
    x, label = exact(500)
    a, b = (measure(x.to(dtype), label, RING, new_rng(), REWARDED) for dtype in (torch.float32, torch.float64))
    assert a == b


def test_mean_sd():
    assert mean_sd([{"tv": 1.0}, {"tv": 2.0}, {"tv": 6.0}]) == {"tv": (3.0, pytest.approx(math.sqrt(7)))}
    mean, sd = mean_sd([{"tv": 1.0}])["tv"]
    assert mean == 1 and math.isnan(sd)
    assert math.isnan(mean_sd([{"share": 1.0}, {"share": math.nan}])["share"][0])
    with pytest.raises(ValueError, match="same metrics"):
        mean_sd([{"tv": 1.0}, {"share": 1.0}])
    with pytest.raises(ValueError, match="one or more rows"):
        mean_sd([])


@pytest.mark.parametrize(
    ("x", "label", "said"),
    [
        (torch.zeros(4, 3), torch.zeros(4).long(), "2 dimensions"),
        (torch.zeros(4, 2), torch.zeros(3).long(), "one integer a sample"),
        (torch.zeros(4, 2), torch.zeros(4), "one integer a sample"),
        (torch.zeros(4, 2), torch.full((4,), 2), r"classes are \[0, 1\]"),
        (torch.zeros(3, 2), torch.tensor([0, 0, 1]), "1 has 1 sample"),
        (torch.zeros(0, 2), torch.zeros(0).long(), "no samples"),
        (torch.tensor([[0.0, math.nan], [1.0, 1.0]]), torch.zeros(2).long(), "1 of 2 samples are not finite"),
    ],
)
def test_what_measure_refuses(x: Tensor, label: Tensor, said: str):
    with pytest.raises(ValueError, match=said):
        measure(x, label, RING, new_rng())


def test_exact_samples_and_rewarded_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="n: 3 is not allowed; use 4 or more"):
        measure_exact(RING, 3, 0)
    with pytest.raises(ValueError, match=r"booleans \[8\]"):
        measure_exact(RING, 100, 0, torch.ones(4, dtype=torch.bool))
    with pytest.raises(ValueError, match="rewarded: torch.float32"):
        measure_exact(RING, 100, 0, torch.ones(8))


# ---- figures ----


def grid(n: int = 6) -> Tensor:
    return torch.cartesian_prod(torch.linspace(-2, 2, n), torch.linspace(-2, 2, n))


def panels() -> list[Panel]:
    x = exact(200)[0]
    paths = torch.stack([torch.randn(10, 2), x[:10] / 2, x[:10]])
    return [Panel("teacher", x, "quality .99"), Panel("student", x + 0.1, paths=paths), Panel("particles", x, field=(grid(), grid()))]


def test_a_figure_has_every_panel_and_row(tmp_path: Path):
    draw(tmp_path / "lab.svg", panels(), RING, REWARDED)
    text = (tmp_path / "lab.svg").read_text(encoding="utf-8")
    ElementTree.fromstring(text)
    for words in ("teacher", "student", "particles", "quality .99", "samples", "sampling paths", "descent direction", "rewarded mode"):
        assert f"<!-- {words} -->" in text, words  # matplotlib writes text as outlines, and what it says beside them
    assert text.count('<g id="axes_') == 5  # samples of three, paths of one, a field of one
    assert [file.name for file in tmp_path.iterdir()] == ["lab.svg"]  # no temporary file is left


def test_a_figure_as_png_and_without_extras(tmp_path: Path):
    bare = [Panel(panel.name, panel.samples) for panel in panels()]
    draw(tmp_path / "all.PNG", panels(), RING, REWARDED)
    draw(tmp_path / "new" / "bare.png", bare, RING)
    with Image.open(tmp_path / "all.PNG") as full, Image.open(tmp_path / "new" / "bare.png") as small:
        assert full.format == small.format == "PNG"
        assert full.width == small.width and full.height > 2.5 * small.height  # three rows, and one
        assert len(small.convert("RGB").getcolors(1 << 20)) > 100


def test_the_same_figure_gives_the_same_bytes(tmp_path: Path):
    for name in ("a.svg", "b.svg", "a.png", "b.png"):
        torch.manual_seed(0)
        draw(tmp_path / name, panels(), RING, REWARDED)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_axes_are_equal_shared_and_hold_the_data():
    figure = LabFigure(panels(), Frame.around(RING, REWARDED))
    limits = {(*axes.get_xlim(), *axes.get_ylim()) for axes in figure.figure.axes}
    assert len(limits) == 1
    low, high, bottom, top = limits.pop()
    assert high - low == pytest.approx(top - bottom) and high > 2 + 3 * 0.15 and low == pytest.approx(-high)
    shown = [c.get_offsets().shape[0] for axes in figure.figure.axes for c in axes.collections if c.get_offsets().shape[0] == 200]
    assert len(shown) == 3  # every sample of every panel
    height, width, channels = figure.pixels().shape
    assert channels == 3 and width == pytest.approx(200 * figure.width, abs=2) and height == pytest.approx(200 * figure.height, abs=2)


def test_paths_run_from_noise_to_sample():
    paths = torch.randn(5, 10, 2, generator=new_rng())
    figure = LabFigure([Panel("a", paths[-1], paths=paths)], Frame.around(RING, None))
    lines, starts, ends = figure.figure.axes[1].collections[-3:]
    torch.testing.assert_close(torch.stack([torch.as_tensor(line) for line in lines.get_segments()]), paths.double().transpose(0, 1))
    for marks, points, hollow in ((starts, paths[0], True), (ends, paths[-1], False)):
        torch.testing.assert_close(torch.tensor(marks.get_offsets().data), points.double())
        assert (marks.get_facecolor()[0, :3].min() == 1) == hollow  # where a path starts is white inside


def test_arrows_point_down_the_force():
    from matplotlib.quiver import Quiver

    points = grid()
    force = 3 * points  # L = 3/2 |x|^2 is descended towards the middle
    figure = LabFigure([Panel("a", points, field=(points, force))], Frame.around(RING, None))
    (quiver,) = [child for axes in figure.figure.axes for child in axes.get_children() if isinstance(child, Quiver)]
    arrows = torch.stack([torch.as_tensor(quiver.U), torch.as_tensor(quiver.V)], 1)
    cosine = torch.nn.functional.cosine_similarity(arrows, -points.double(), dim=1)
    torch.testing.assert_close(cosine, torch.ones(36).double())
    ratio = arrows.norm(dim=1) / points.double().norm(dim=1)
    assert float(ratio.max() / ratio.min()) == pytest.approx(1)  # lengths are to scale: none is long enough to be cut


def test_an_extreme_arrow_is_cut_and_no_force_at_all_is_drawn():
    from matplotlib.quiver import Quiver

    points = grid(10)
    force = torch.ones_like(points)
    force[0] = 1e6
    for field in (force, torch.zeros_like(force)):
        figure = LabFigure([Panel("a", points, field=(points, field))], Frame.around(RING, None))
        (quiver,) = [child for axes in figure.figure.axes for child in axes.get_children() if isinstance(child, Quiver)]
        length = torch.as_tensor(quiver.U).hypot(torch.as_tensor(quiver.V))
        assert float(length.max()) <= 1.5 * 4 / 9 and bool(length.isfinite().all())  # the points' spacing is 4 / 9 or a little less
        figure.pixels()


def test_samples_outside_are_counted(tmp_path: Path):
    x = RING.means.repeat(25, 1)
    x[:20], x[20:24, 0] = 50.0, math.nan
    frame = Frame.around(RING, None)
    assert frame.outside(x) == pytest.approx(0.12) and frame.outside(RING.means) == 0
    draw(tmp_path / "a.svg", [Panel("a", x, "of run 1"), Panel("b", RING.means)], RING)
    text = (tmp_path / "a.svg").read_text(encoding="utf-8").replace("\u00a0", " ")
    assert "of run 1, 12 % outside" in text and text.count("outside") == 1
    x = RING.means.repeat(125, 1)
    x[0] = 50.0
    draw(tmp_path / "b.svg", [Panel("a", x)], RING)
    assert "&lt; 1 % outside" in (tmp_path / "b.svg").read_text(encoding="utf-8").replace("\u00a0", " ")


@pytest.mark.parametrize("name", ["a.webp", "a.gif"])
def test_an_animation_has_a_frame_each_and_rests_on_the_last(tmp_path: Path, name: str):
    first, *_ = panels()
    frames = [(f"iteration {100 * k}", [replace(first, samples=first.samples + k)] * 2) for k in range(3)]
    animate(tmp_path / name, frames, RING, REWARDED, fps=4)
    with Image.open(tmp_path / name) as image:
        assert image.n_frames >= 3
        durations = []
        for k in range(image.n_frames):
            image.seek(k)
            image.load()
            durations.append(image.info["duration"])
    assert sum(durations) == pytest.approx(3 * 250 + 1500, abs=250)


def test_what_figures_refuse(tmp_path: Path):
    some = panels()
    with pytest.raises(ValueError, match="'.pdf'; a figure can be .svg, .png"):
        draw(tmp_path / "a.pdf", some, RING)
    with pytest.raises(ValueError, match="'.mp4'; an animation can be"):
        animate(tmp_path / "a.mp4", [("a", some)], RING)
    with pytest.raises(ValueError, match="panels: none given"):
        draw(tmp_path / "a.png", [], RING)
    with pytest.raises(ValueError, match=r"samples: \(4, 3\) of panel 'a'"):
        draw(tmp_path / "a.png", [Panel("a", torch.zeros(4, 3))], RING)
    with pytest.raises(ValueError, match=r"paths: \(4, 2\) of panel 'a'"):
        draw(tmp_path / "a.png", [Panel("a", torch.zeros(4, 2), paths=torch.zeros(4, 2))], RING)
    with pytest.raises(ValueError, match=r"field: \(3, 2\) of panel 'a' is not allowed; give a force \[4, 2\]"):
        draw(tmp_path / "a.png", [Panel("a", torch.zeros(4, 2), field=(torch.zeros(4, 2), torch.zeros(3, 2)))], RING)
    with pytest.raises(ValueError, match="mixture: 3 dimensions"):
        draw(tmp_path / "a.png", some, Mixture(torch.zeros(1, 3), 1.0, torch.zeros(1).long()))
    with pytest.raises(ValueError, match=r"booleans \[8\]"):
        draw(tmp_path / "a.png", some, RING, REWARDED[:3])
    with pytest.raises(ValueError, match=r"frames: \[1, 3\] panels"):
        animate(tmp_path / "a.webp", [("a", some), ("b", some[:1])], RING)
    with pytest.raises(ValueError, match="frames: no panels"):
        animate(tmp_path / "a.webp", [], RING)
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"pip install 'instep\[lab\]'"):
        draw(tmp_path / "a.png", panels(), RING)
