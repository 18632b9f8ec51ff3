"""Draw samples for items, grade them, and choose which right ones are kept: how every stage uses a model.

What is asked and what becomes of the samples is the stage's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from functools import cached_property
from typing import Any, TypeVar

from kit.backends import open_backend
from kit.backends.base import Backend, Generation, Request
from kit.core.config import Align, Eval, ModelConfig, Teacher
from kit.core.records import Outcome, Row, Sample
from kit.core.run import Run
from kit.core.stages import work_through
from kit.core.storage import RowFile
from kit.grading.answers import Grader, Item
from kit.prompts import render, solve_text

T = TypeVar("T", bound=Row)


FACTS = {*Row.model_fields}  # what every row says of its problem
R = TypeVar("R", bound=Outcome)


Work = Callable[[list[Any]], Iterator[Any]]  # rows of a batch of items


Text = tuple[str, str, int]  # text, finish and tokens of a sample


Words = Callable[[Any], tuple[str, str]]  # an item's user turn and the beginning of the answer


Drawn = tuple[
    Any, tuple[Sample, ...], Generation
]  # an item, its graded samples, what was generated


class Sampler(ExitStack):
    """A model and the grader of what it writes; the model is opened when it is first asked, both close on leaving.

    Args:
        how: the section with `sampling` and `samples`.
        adapter: a PEFT adapter's folder.
    """

    def __init__(
        self, run: Run, engine: ModelConfig, how: Teacher | Align | Eval, adapter: str | None = None
    ) -> None:
        super().__init__()
        self.run, self.engine, self.how, self.adapter = run, engine, how, adapter
        self.grader = self.enter_context(Grader())

    @cached_property
    def backend(self) -> Backend:
        """The model."""
        return self.enter_context(closing(open_backend(self.engine, adapter=self.adapter)))

    def sweep(
        self, stage: str, name: str, kind: type[R], items: Sequence[T], work: Work
    ) -> list[R]:
        """A row of the file `name` for each item, resuming where it ends, in batches that keep the model busy."""
        units, file = [(item.id, item) for item in items], RowFile(self.run.path(name), kind)
        return work_through(self.run, stage, file, units, 4 * self.engine.max_num_seqs, work)

    def ask(self, items: Sequence[T], verifier: str, words: Words | None = None) -> Iterator[Drawn]:
        """Draw samples for items and grade them, each item as it is finished; without `words` it is to be solved."""
        config, engine, requests = self.run.config, self.engine, []
        for item in items:
            user, answer = words(item) if words else (solve_text(config.prompts, item.question), "")
            prompt = render(self.backend.tokenizer, user, engine.system, answer, engine.thinking)
            requests.append(
                Request(item.id, prompt, self.how.sampling, n=self.how.samples, seed=config.seed)
            )
        yield from self.grade(items, self.backend.generate(requests), verifier)

    def grade(
        self, items: Sequence[T], made: Iterable[Generation], verifier: str
    ) -> Iterator[Drawn]:
        """Grade what was generated for items, in the order of `made`."""
        by_id = {item.id: item for item in items}
        for done in made:
            item, texts = (
                by_id[done.id],
                [(one.text, one.finish_reason, len(one.ids)) for one in done.completions],
            )
            yield item, graded_samples(self.grader, texts, item.answer, verifier), done


def graded_samples(
    grader: Grader, texts: Sequence[Text], gold: str, verifier: str
) -> tuple[Sample, ...]:
    """Grade the samples of one problem."""
    grades = grader.grade([Item(gold, text, verifier) for text, _, _ in texts])
    return tuple(
        Sample(
            text=text,
            verdict=grade.verdict,
            answer=grade.answer,
            finish_reason=finish_reason,
            tokens=tokens,
        )
        for (text, finish_reason, tokens), grade in zip(texts, grades, strict=True)
    )


def choose(samples: tuple[Sample, ...], keep: str) -> tuple[int, ...]:
    """Indices of the right samples that are kept; one that ended by itself goes before one that was cut off.

    Args:
        keep: first, shortest (in characters), or all.
    """
    right = [
        i for i, sample in enumerate(samples) if sample.verdict == "correct" and sample.text.strip()
    ]
    if keep == "all":
        return tuple(right)
    length = (lambda i: len(samples[i].text)) if keep == "shortest" else (lambda i: i)
    return tuple(sorted(right, key=lambda i: (samples[i].finish_reason != "stop", length(i)))[:1])


def why(done: Generation, reason: str, samples: Sequence[Sample]) -> dict[str, str]:
    """A lost row's fields: the error, or `reason` and '0 of 4 right: 3 wrong, 1 unparsed; 2 cut off at ...'."""
    if done.error:
        return {"rejected": "generation failed", "detail": done.error}
    counts = Counter(sample.verdict for sample in samples)
    capped = sum(sample.finish_reason == "length" for sample in samples)
    parts = ", ".join(
        f"{n} {verdict}" for verdict, n in counts.most_common() if verdict != "correct"
    )
    cut = f"; {capped} cut off at the token limit" if capped else ""
    return {
        "rejected": reason,
        "detail": f"{counts['correct']} of {len(samples)} right: {parts or 'none'}{cut}",
    }
