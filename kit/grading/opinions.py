"""A model asked for its opinion of two texts, shown in both orders (section 4).

Models prefer a place, so each pair is shown both ways, and what is read are the log-probabilities
of the labels' first tokens. `AnswerJudge` grades free text (`verifier: judge`): does an answer mean
what the gold answer means? kit/reporting/pairwise.py compares reasoning. Nothing is generated.
"""

import math
from collections.abc import Sequence
from contextlib import closing
from functools import cached_property
from threading import Lock
from typing import NamedTuple

from kit.backends import open_backend
from kit.backends.base import Backend, Ids, ScoreRequest, Tokenizer
from kit.core.config import ModelConfig, Prompts
from kit.core.errors import KitError
from kit.prompts import fill, render, text_of

SAME = ("Yes", "No")  # the labels of an answer judge
LEAST_PROBABILITY = 0.01  # of both labels together: below it, the model answers something else


class Opinion(NamedTuple):
    """What a model says of a pair."""

    labels: tuple[str, ...]  # the likelier one in each order
    margins: list[float]  # nats between the best label and the next, in each order
    probabilities: list[float]  # of all labels together, in each order


def label_tokens(tokenizer: Tokenizer, labels: Sequence[str], name: str) -> Ids:
    """The first token of each label.

    Raises:
        KitError: several labels begin with the same token.
    """
    tokens = tuple(tokenizer.encode(label, special=False)[0] for label in labels)
    if len(set(tokens)) < len(labels):
        message = f"The labels {', '.join(labels)} begin with the same token of {name}."
        raise KitError(message, "Use another judge.")
    return tokens


def opinion(
    backend: Backend, labels: Sequence[str], template: str, question: str, pair: tuple[str, str]
) -> Opinion | None:
    """Show a pair in both orders; None where it does not fit into the model's context.

    Args:
        template: with places for {question}, {first} and {second}.

    Raises:
        KitError: see `label_tokens`.
    """
    tokens = label_tokens(backend.tokenizer, labels, backend.name)
    orders = []
    for first, second in (pair, pair[::-1]):
        text = fill(template, question=question, first=first, second=second)
        orders.append(render(backend.tokenizer, text))
    if max(map(len, orders)) >= backend.context_tokens:
        return None
    best_labels = []
    margins = []
    probabilities = []
    with closing(backend.session()) as session:
        for ids in orders:
            [[logprobs]] = session.score([ScoreRequest(ids, ((len(ids) - 1, tokens),))])
            *_, runner_up, best = sorted(logprobs)
            best_labels.append(labels[logprobs.index(best)])
            margins.append(round(best - runner_up, 4))
            probabilities.append(sum(map(math.exp, logprobs)))
    return Opinion(tuple(best_labels), margins, probabilities)


class AnswerJudge:
    """Grades answers in free text against the gold answer; for any thread.

    Args:
        engine: the model, loaded when it is first asked.
    """

    def __init__(self, engine: ModelConfig, prompts: Prompts) -> None:
        self.engine = engine
        self.template = text_of(prompts, "grade")
        self._lock = Lock()

    @cached_property
    def backend(self) -> Backend:
        """The model."""
        return open_backend(self.engine)

    def compare(self, question: str, gold: str, answer: str) -> tuple[str, str]:
        """Verdict, and how it came about.

        correct or wrong where both orders say so; undecided where they differ (flips), where the
        model answers neither label (silent), or where the pair does not fit (too long).
        """
        with self._lock:
            result = opinion(self.backend, SAME, self.template, question, (gold, answer))
        if result is None:
            return "undecided", "too long"
        # a NaN is no answer either
        if not all(probability >= LEAST_PROBABILITY for probability in result.probabilities):
            return "undecided", "silent"
        if len(set(result.labels)) > 1:
            return "undecided", "flips"
        return ("correct" if result.labels[0] == SAME[0] else "wrong"), "judge"

    def close(self) -> None:
        """Free the model, if it was loaded."""
        if "backend" in vars(self):
            self.backend.close()
