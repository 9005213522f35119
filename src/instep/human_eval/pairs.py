"""Exports people's preferences as training pairs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from instep.data.pairs import PreferencePair
from instep.human_eval.store import Store, Vote


def pairs_of(store: Store, questions: Sequence[str] = (), *, each: bool = False, ties: bool = True) -> list[PreferencePair]:
    """One pair an item and question, chosen by most votes (`each`: one an answer). ValueError if the store scores single samples or none is left."""
    if store.mode != "pairs":
        raise ValueError(f"store: {store.path} holds scores of single samples; pairs come from --mode pairs")
    asked = [question.key for question in store.questions]
    for key in questions:
        if key.replace("-", "_") not in asked:
            raise ValueError(f"questions: {key!r} was not asked in {store.path}; allowed: {', '.join(asked)}")
    wanted = {key.replace("-", "_") for key in questions} or set(asked)
    groups: dict[tuple[object, ...], list[Vote]] = {}
    for vote in store.votes():
        if vote.question in wanted:
            groups.setdefault((vote.question, vote.item, vote.annotator if each else None), []).append(vote)
    media, found = store.items(), []
    for votes in groups.values():
        counts = Counter(vote.value for vote in votes)
        a, b = media[votes[0].item]
        assert b is not None
        chosen, rejected, count = (b, a, (counts["b"], counts["a"])) if counts["b"] > counts["a"] else (a, b, (counts["a"], counts["b"]))
        names = tuple(vote.annotator for vote in votes)
        pair = PreferencePair(votes[0].prompt, chosen.path, rejected.path, votes[0].question, (*count, counts["equal"]), names, votes[0].seed)
        if ties or not pair.tie:
            found.append(pair)
    if not found:
        raise ValueError(f"store: {store.path} has no answers to make pairs of" + ("" if ties else " that are no ties"))
    return found
