"""Draw samples for items, grade them, choose which correct ones are kept: how stages use a model.

Teaching (section 3.1), alignment (3.3) and evaluation (4) go through `Sampler`. What is asked, and
what becomes of the samples, is up to the stage.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from functools import cached_property
from typing import Any, TypeVar

from kit.backends import open_backend
from kit.backends.base import Backend, Completion, Generation, Request
from kit.backends.hf import HfBackend
from kit.core.config import Align, Config, Eval, ModelConfig, Teacher
from kit.core.memory import limit_bytes
from kit.core.records import Outcome, Row, Sample
from kit.core.run import Run
from kit.core.stages import work_through
from kit.core.storage import RowFile
from kit.grading.answers import Grader, Item
from kit.grading.opinions import AnswerJudge
from kit.models import fingerprints
from kit.prompts import render, solve_text

BATCHES = 4  # items of a batch, over the sequences at a time
PROBLEM_FIELDS = set(Row.model_fields)  # what every row says about its problem

Result = TypeVar("Result", bound=Outcome)
Sampled = tuple[Any, tuple[Sample, ...], Generation]  # an item, graded, and what was generated
Turns = Callable[[Any], tuple[str, str]]  # an item's user turn, and how the answer begins


class Sampler(ExitStack):
    """A model and the grader of what it writes; leaving the context closes both.

    Args:
        run: gives the config's prompts and seed, and the folder of `write_rows`.
        engine: the model. It is opened when it is first asked, so a finished stage loads none.
        settings: the section of the config with `sampling` and `samples`.
        adapter: a PEFT folder, a GGUF LoRA, or the name of a served one.
    """

    def __init__(
        self,
        run: Run,
        engine: ModelConfig,
        settings: Teacher | Align | Eval,
        adapter: str | None = None,
    ) -> None:
        super().__init__()
        self.run = run
        self.engine = engine
        self.settings = settings
        self.adapter = adapter
        self.grader = self.enter_context(grader_of(run.config))

    @cached_property
    def backend(self) -> Backend:
        """The model."""
        backend = self.enter_context(closing(open_backend(self.engine, adapter=self.adapter)))
        if self.adapter and isinstance(backend, HfBackend):
            backend.merge_adapter()
        return backend

    def write_rows(
        self,
        stage: str,
        name: str,
        kind: type[Result],
        items: Sequence[Row],
        work: Callable[[list[Any]], Iterator[Any]],
    ) -> list[Result]:
        """Write one row of `kind` per item to the run's file `name`, resuming where it ends.

        `work` gives the rows of a batch. A batch ends with few sequences running, so that a card
        or a server, where no row is repeatable bit for bit, gets everything in one. A CPU gets
        batches of the same items after a resume.
        """
        file = RowFile(self.run.path(name), kind)
        repeatable = self.engine.backend != "http" and not limit_bytes()[0]
        batch_items = BATCHES * self.engine.rows() if repeatable else None
        at_once = max(1, self.engine.rows() // self.settings.samples)
        return work_through(self.run, stage, file, items, batch_items, work, at_once)

    def sample(
        self, items: Sequence[Any], turns: Turns | None = None, samples: int | None = None
    ) -> Iterator[Sampled]:
        """Draw samples for each item and grade them, each item as it is finished.

        Args:
            items: rows with ids of their own.
            turns: what an item is asked; None: to solve its question.
            samples: per item; None: as the settings say.
        """
        config = self.run.config
        by_id = {}
        requests = []
        for item in items:
            by_id[item.id] = item
            user = solve_text(config.prompts, item.question)
            answer = ""
            if turns:
                user, answer = turns(item)
            ids = render(self.backend.tokenizer, user, self.engine, answer)
            count = samples or self.settings.samples
            requests.append(Request(item.id, ids, self.settings.sampling, count, config.seed))

        for generation in self.backend.generate(requests):
            # a server's say how much its cache has served so far
            if self.engine.backend != "http":
                self.run.progress.tell(self.backend.notes)
            item = by_id[generation.id]
            yield item, grade_samples(self.grader, generation.completions, item), generation


def grader_of(config: Config) -> Grader:
    """A grader that may ask the config's judge model."""
    return Grader(judge=AnswerJudge(config.answer_judge, config.prompts))


def model_fingerprints(config: Config, section: str, rows: Iterable[Row]) -> dict[str, str]:
    """Those of a section's model, and of the judge model where a row is graded by it."""
    hashes = fingerprints(section, getattr(config, section))
    if any(row.verifier == "judge" for row in rows):
        hashes.update(fingerprints("answer_judge", config.answer_judge))
    return hashes


def item_of(row: Row, text: str) -> Item:
    """A text as an answer to a row's question, to be graded."""
    return Item(row.answer, text, row.verifier, row.question)


def grade_samples(
    grader: Grader, completions: Sequence[Completion], row: Row
) -> tuple[Sample, ...]:
    """Grade the completions of one problem against its gold answer, in their order."""
    grades = grader.grade([item_of(row, completion.text) for completion in completions])
    return tuple(
        Sample(
            text=completion.text,
            verdict=grade.verdict,
            answer=grade.answer,
            finish_reason=completion.finish_reason,
            tokens=len(completion.ids),
        )
        for completion, grade in zip(completions, grades, strict=True)
    )


def choose(samples: Sequence[Sample], keep: str) -> tuple[int, ...]:
    """Indices of the correct samples that are kept, at most one unless `keep` is all.

    Args:
        samples: of one problem.
        keep: first, shortest (in characters), or all.
    """
    correct = []
    for index, sample in enumerate(samples):
        if sample.verdict == "correct" and sample.text.strip():
            correct.append(index)
    if keep == "all":
        return tuple(correct)
    if keep == "shortest":
        correct.sort(key=lambda index: len(samples[index].text))
    # one that ended by itself goes before one that was cut off; equals stay in their order
    correct.sort(key=lambda index: samples[index].finish_reason != "stop")
    return tuple(correct[:1])


def rejection(generation: Generation, reason: str, samples: Sequence[Sample]) -> dict[str, str]:
    """The fields `rejected` and `detail` of a row without a kept sample.

    The detail is the generation's error, or like '0 of 4 right: 3 wrong, 1 unparsed; 2 cut off'.
    """
    if generation.error:
        return {"rejected": "generation failed", "detail": generation.error}
    counts = Counter(sample.verdict for sample in samples)
    correct = counts.pop("correct", 0)
    others = ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common())
    detail = f"{correct} of {len(samples)} right: {others or 'none'}"
    cut_off = sum(sample.finish_reason == "length" for sample in samples)
    if cut_off:
        detail += f"; {cut_off} cut off at the token limit"
    return {"rejected": reason, "detail": detail}
