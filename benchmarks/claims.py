"""What the papers claim of the matching family, and what the laboratory says: each verdict is computed from benchmarks/results/lab/*.json."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from results_lab import Metrics, load, over_seeds

Verdict = tuple[str, str]  # reproduced, partly or not; and the numbers it rests on


@dataclass(frozen=True)
class Claim:
    """A sentence of a paper, and the function that checks it by what was measured."""

    text: str
    check: Callable[[], Verdict]


def end(experiment: str, name: str) -> Metrics:
    """Mean and deviation of a recipe's metrics at the end. KeyError if it was not measured."""
    return at(experiment, name, -1)


def at(experiment: str, name: str, index: int) -> Metrics:
    measured = load(experiment)
    if measured is None:
        raise KeyError(experiment)
    return over_seeds(next(run for run in measured["runs"] if run["name"] == name)["curve"][index]["figures"])


def show(metrics: Metrics, *keys: str) -> str:
    return ", ".join(f"{key} {metrics[key][0]:.3f} ± {metrics[key][1]:.3f}" for key in keys)


def above(a: Metrics, b: Metrics, key: str) -> bool:
    """Whether a is above b by more than twice the standard error of the difference over three seeds."""
    return a[key][0] - b[key][0] > 2 * ((a[key][1] ** 2 + b[key][1] ** 2) / 3) ** 0.5


def word(reproduced: bool, partly: bool = False) -> str:
    return "reproduced" if reproduced else "partly" if partly else "not reproduced"


def stalls() -> Verdict:
    far, near = end("far", "dmd2"), end("one-step", "dmd2")
    numbers = f"from (5, 5): {show(far, 'quality', 'tv')}; from the mixture: {show(near, 'quality', 'tv')}"
    return word(far["quality"][0] < 0.5), numbers


def mitigations() -> Verdict:
    helped, numbers = [], []
    tried = {"far": ("dmd", "dmd2:gan=0.03"), "far-learned": ("dmd", "dmd2:gan=0.03", "magic"), "far-guided": ("decoupled-dmd",)}
    for experiment, names in tried.items():
        plain, others = at(experiment, "dmd2", 5), {name: at(experiment, name, 5) for name in names}
        best = max(others, key=lambda name: others[name]["quality"][0])
        helped.append(any(above(other, plain, "quality") for other in others.values()))
        numbers.append(f"{experiment}, at a third of the run: plain {show(plain, 'quality')}, best {best} {show(others[best], 'quality')}")
    return word(all(helped), any(helped)), "; ".join(numbers)


def only_rewarded() -> Verdict:
    amd, twice, plain = (end("selective", name) for name in ("amd", "amd:tilt=2", "dmd2"))
    numbers = f"AMD: {show(amd, 'share', 'quality')}; with tilt 2: {show(twice, 'share', 'quality')}; DMD: {show(plain, 'share')}"
    return word(amd["share"][0] > 0.98, amd["share"][0] > 0.7), numbers


def recovers() -> Verdict:
    amd, plain = end("global", "amd"), end("global", "dmd2")
    good = amd["tv"][0] < 0.08 and amd["quality"][0] > plain["quality"][0] - 0.05
    return word(good), f"AMD: {show(amd, 'quality', 'tv')}; DMD: {show(plain, 'quality', 'tv')}"


def naive() -> Verdict:
    amd, bad = end("naive", "amd"), end("naive", "naive-adaptive")
    return word(amd["quality"][0] - bad["quality"][0] >= 0.25), f"AMD: {show(amd, 'quality')}; naive: {show(bad, 'quality')}"


def components() -> Verdict:
    names = {"neither": "amd:sensitivity=0,tilt=0", "score adaptation": "amd:tilt=0", "critic weight": "amd:sensitivity=0", "both": "amd"}
    found = {name: end("ablation", spec) for name, spec in names.items()}
    weight = above(found["critic weight"], found["neither"], "share")
    score = above(found["score adaptation"], found["neither"], "share") and above(found["both"], found["critic weight"], "share")
    return word(weight and score, weight or score), "; ".join(f"{name}: {show(f, 'share', 'quality')}" for name, f in found.items())


def balance() -> Verdict:
    """At the gradient weight whose share is nearest to AMD's."""
    amd = end("selective", "amd")
    tried = {("selective", f"refl:weight={w}") for w in (0.03, 0.1, 0.3)} | {("selective-gradient", f"refl:weight={w}") for w in (0.6, 1, 2)}
    found = {name: end(experiment, name) for experiment, name in sorted(tried) if load(experiment) is not None}
    near = min(found, key=lambda name: abs(found[name]["share"][0] - amd["share"][0]))
    keys = ("share", "quality", "spread", "reached")
    good = above(amd, found[near], "quality") or above(amd, found[near], "reached")
    return word(good), f"AMD: {show(amd, *keys)}; {near}: {show(found[near], *keys)}"


def together() -> Verdict:
    early, late = at("selective", "amd", 2), end("selective", "amd")
    quality, share = above(late, early, "quality"), above(late, early, "share")
    return word(quality and share, quality or share), f"a fifth into the run: {show(early, 'share', 'quality')}; at the end: {show(late, 'share', 'quality')}"


def decoupled() -> Verdict:
    better, numbers = [], []
    for steps, experiment in (("1 step", "one-step-guided"), ("4 steps", "four-steps-guided")):
        own, shared = end(experiment, "decoupled-dmd"), end(experiment, "dmd2")
        better.append(above(own, shared, "quality"))
        numbers.append(f"{steps}: decoupled {show(own, 'quality', 'tv')}, shared {show(shared, 'quality', 'tv')}")
    return word(all(better), any(better)), "; ".join(numbers)


def one_fake() -> Verdict:
    by_exit, one = end("four-steps", "dmd2"), end("four-steps", "dmd2:condition_on_exit=False")
    return word(not above(one, by_exit, "tv")), f"one fake: {show(one, 'tv', 'spread')}; told the exit: {show(by_exit, 'tv', 'spread')}"


CLAIMS = (
    Claim("Plain DMD stalls where the start lies off the support (AMD Fig. 2)", stalls),
    Claim("External force, noise reset or an adapted teacher get it out sooner (AMD Fig. 2, Section 3.1)", mitigations),
    Claim("Under a selective reward AMD converges to rewarded modes only (AMD Fig. 7, top)", only_rewarded),
    Claim("Under a global one it recovers the full distribution (AMD Fig. 7, bottom)", recovers),
    Claim("Naive adaptation collapses, AMD does not (AMD Fig. 8)", naive),
    Claim("Score adaptation and landscape sharpening both contribute (AMD Fig. 5)", components),
    Claim("Reward and quality rise together (AMD Fig. 6)", together),
    Claim("AMD balances where a reward's gradient hacks (AMD Table 4)", balance),
    Claim("Levels of their own for guidance and matching help (Decoupled-DMD)", decoupled),
    Claim("One fake serves all exits of a several-step student (every paper here, tacitly)", one_fake),
)


def lines() -> list[str]:
    """The table of claims; what was not measured is said to be so."""
    out = ["| claim | in the laboratory | numbers |", "|---|---|---|"]
    for claim in CLAIMS:
        try:
            verdict, numbers = claim.check()
        except KeyError as missing:
            verdict, numbers = "not measured", str(missing)
        out.append(f"| {claim.text} | **{verdict}** | {numbers} |")
    return out
