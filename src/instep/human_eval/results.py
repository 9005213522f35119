"""Results of the annotators' judgements, with intervals: rates (Wilson), win rate and mean scores (bootstrap over prompts), agreement (Fleiss' kappa)."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from instep.core.statistics import Interval, wilson
from instep.human_eval.questions import DISTORTED
from instep.human_eval.store import Store, Vote

DRAWS, CHUNK = 10_000, 500
OUTCOMES = ("a", "equal", "b")
Statistic = Callable[[np.ndarray, np.ndarray], np.ndarray]  # of sums and counts [draws, columns]


@dataclass(frozen=True)
class Preference:
    """One question of blind pairs, seen from A. Rates are of answers; good, same and bad of items, by the majority of their annotators."""

    question: str
    win: Interval
    tie: Interval
    loss: Interval
    good: Interval
    same: Interval
    bad: Interval
    win_rate: Interval  # (wins + ties / 2) / answers, in [0, 1]; 0.5 is as good as B
    left: Interval | None  # how often the left side was chosen among answers other than equal: far from 0.5 is a habit, not a judgement
    kappa: float | None

    @property
    def net(self) -> Interval:
        """(wins - losses) / answers, in [-1, 1]: twice the win rate less one, and so is its interval."""
        low, high = (None if end is None else 2 * end - 1 for end in (self.win_rate.low, self.win_rate.high))
        return Interval(2 * self.win_rate.value - 1, low, high, self.win_rate.n)


@dataclass(frozen=True)
class QuestionScore:
    """Mean opinion score of one question, in [0, 2], of A and of B, and their difference (A - B)."""

    question: str
    a: Interval | None
    b: Interval | None
    difference: Interval | None
    kappa: float | None


@dataclass(frozen=True)
class Distortion:
    """Share of samples of A and of B that were called distorted, in [0, 1]."""

    a: Interval | None
    b: Interval | None
    kappa: float | None


@dataclass(frozen=True)
class Results:
    """All results of a store; `overall` is the sum of the scored questions' means (out of two each), as in APO's Table 2."""

    runs: tuple[str, str]
    mode: str
    progress: tuple[tuple[str, int, int], ...]
    prompts: int  # of which there are answers
    labels: tuple[tuple[str, str], ...]  # the questions' keys and words
    preferences: tuple[Preference, ...] = ()
    scores: tuple[QuestionScore, ...] = ()
    overall: QuestionScore | None = None
    distortion: Distortion | None = None

    def label(self, key: str) -> str:
        return dict(self.labels).get(key, key)


def results(store: Store, seed: int = 0) -> Results:
    """Computes all results of a store; `seed` is the bootstrap's."""
    votes = store.votes()
    by_question: dict[str, list[Vote]] = {question.key: [] for question in store.questions}
    for vote in votes:
        by_question[vote.question].append(vote)
    head = (store.runs, store.mode, tuple(store.progress()), len({vote.prompt for vote in votes}), tuple((q.key, q.label) for q in store.questions))
    if store.mode == "pairs":
        preferences = tuple(preference(question, rows, seed) for question, rows in by_question.items() if rows)
        return Results(*head, preferences=preferences)
    scored = {question: rows for question, rows in by_question.items() if question != DISTORTED and rows}
    scores = tuple(question_score(question, rows, seed) for question, rows in scored.items())
    overall = total(list(scored.values()), seed) if len(scored) > 1 else None
    seen = by_question.get(DISTORTED)
    return Results(*head, scores=scores, overall=overall, distortion=distortion(seen) if seen else None)


def preference(question: str, votes: Sequence[Vote], seed: int = 0) -> Preference:
    """Metrics of one question's answers to pairs, at least one."""
    counts, n = Counter(vote.value for vote in votes), len(votes)
    items: dict[str, Counter[str]] = defaultdict(Counter)
    for vote in votes:
        items[vote.item][vote.value] += 1
    majority = Counter("a" if c["a"] > c["b"] else "b" if c["b"] > c["a"] else "equal" for c in items.values())
    sided = [(vote.value == "b") == vote.swapped for vote in votes if vote.value != "equal"]  # whether left was chosen
    worth = {"a": 1.0, "equal": 0.5, "b": 0.0}
    win, tie, loss = (wilson(counts[outcome], n) for outcome in OUTCOMES)
    good, same, bad = (wilson(majority[outcome], len(items)) for outcome in OUTCOMES)
    return Preference(
        question,
        win,
        tie,
        loss,
        good,
        same,
        bad,
        win_rate=mean([(vote.prompt, worth[vote.value]) for vote in votes], seed),
        left=wilson(sum(sided), len(sided)) if sided else None,
        kappa=kappa_of(votes, OUTCOMES),
    )


def question_score(question: str, votes: Sequence[Vote], seed: int = 0) -> QuestionScore:
    """Mean opinion scores of one question's answers 0, 1, 2."""
    return QuestionScore(question, *_both([votes], seed), kappa=kappa_of(votes, ("0", "1", "2")))


def total(questions: Sequence[Sequence[Vote]], seed: int = 0) -> QuestionScore:
    """Sum of the questions' mean scores; every question is resampled with the same prompts."""
    return QuestionScore("overall", *_both(questions, seed), kappa=None)


def distortion(votes: Sequence[Vote]) -> Distortion:
    """Share of "yes" with Wilson's interval."""
    sides = [[vote.value == "yes" for vote in votes if vote.run == run] for run in (0, 1)]
    a, b = (wilson(sum(side), len(side)) if side else None for side in sides)
    return Distortion(a, b, kappa_of(votes, ("no", "yes")))


def mean(values: Sequence[tuple[str, float]], seed: int = 0) -> Interval:
    """Mean of (prompt, value) over all values, with the percentile interval of a bootstrap that draws whole prompts."""
    sums, counts = _by_prompt([values])
    value = float(sums.sum() / counts.sum())
    low, high = _percentiles(sums, counts, lambda s, n: s[:, 0] / n[:, 0], seed)
    return Interval(value, low, high, len(values))


def fleiss_kappa(table: Sequence[Sequence[int]]) -> float | None:
    """Agreement beyond chance of a table of counts [items, categories] (Fleiss 1971): (P - P_e) / (1 - P_e).

    P is the mean over items of (sum_j n_ij^2 - n_i) / (n_i (n_i - 1)), P_e the sum of the categories' squared shares. Items with fewer than two
    answers carry no information on agreement and are left out; n_i may differ. 1 is perfect, 0 chance. None without such items, or if only one category occurs.
    """
    rated = [row for row in table if sum(row) >= 2]
    if not rated:
        return None
    counts = np.asarray(rated, dtype=np.float64)
    n = counts.sum(1)
    observed = float((((counts**2).sum(1) - n) / (n * (n - 1))).mean())
    chance = float(((counts.sum(0) / n.sum()) ** 2).sum())
    return None if chance >= 1 - 1e-12 else (observed - chance) / (1 - chance)


def kappa_of(votes: Iterable[Vote], categories: Sequence[str]) -> float | None:
    """Fleiss' kappa of votes on the same items."""
    items: dict[str, Counter[str]] = defaultdict(Counter)
    for vote in votes:
        items[vote.item][vote.value] += 1
    return fleiss_kappa([[count[category] for category in categories] for count in items.values()])


def _both(questions: Sequence[Sequence[Vote]], seed: int) -> tuple[Interval | None, Interval | None, Interval | None]:
    """Summed means of A, of B, and A - B. Each resample draws prompts for all questions and both runs at once."""
    columns = [[(vote.prompt, float(vote.value)) for vote in votes if vote.run == run] for run in (0, 1) for votes in questions]
    q = len(questions)
    there = [all(columns[run * q : (run + 1) * q]) for run in (0, 1)]
    sums, counts = _by_prompt(columns)
    n = [sum(len(column) for column in columns[run * q : (run + 1) * q]) for run in (0, 1)]

    def part(run: int, s: np.ndarray, c: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            return (s[:, run * q : (run + 1) * q] / c[:, run * q : (run + 1) * q]).sum(1)

    def interval(statistic: Statistic, answers: int) -> Interval:
        value = float(statistic(sums.sum(0, keepdims=True), counts.sum(0, keepdims=True))[0])
        low, high = _percentiles(sums, counts, statistic, seed)
        return Interval(value, low, high, answers)

    a = interval(lambda s, c: part(0, s, c), n[0]) if there[0] else None
    b = interval(lambda s, c: part(1, s, c), n[1]) if there[1] else None
    return a, b, interval(lambda s, c: part(0, s, c) - part(1, s, c), sum(n)) if all(there) else None


def _by_prompt(columns: Sequence[Sequence[tuple[str, float]]]) -> tuple[np.ndarray, np.ndarray]:
    """Sums and counts [prompts, columns] of values (prompt, value)."""
    index = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompt for column in columns for prompt, _ in column))}
    sums, counts = np.zeros((len(index), len(columns))), np.zeros((len(index), len(columns)))
    for c, column in enumerate(columns):
        for prompt, value in column:
            sums[index[prompt], c] += value
            counts[index[prompt], c] += 1
    return sums, counts


def _percentiles(sums: np.ndarray, counts: np.ndarray, statistic: Statistic, seed: int) -> tuple[float, float] | tuple[None, None]:
    """2.5% and 97.5% of a statistic(sums, counts) over draws of prompts with replacement; draws in which it is undefined do not count."""
    prompts = len(sums)
    if prompts < 2:
        return None, None
    rng, found = np.random.default_rng(seed), []
    for _ in range(DRAWS // CHUNK):
        times = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=CHUNK).astype(np.float64)
        found.append(statistic(times @ sums, times @ counts))
    drawn = np.concatenate(found)
    drawn = drawn[np.isfinite(drawn)]
    if not len(drawn):
        return None, None
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)
