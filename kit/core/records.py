"""The typed rows that pass between stages.

Every unit of work leaves exactly one row in its stage's file, a rejected one too (with the reason),
so the funnel adds up by construction. How rows are stored is in kit/core/storage.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, field_validator

from kit.core.thinking import after_thinking, without_opening

Label = Literal["ENOUGH", "NOT_ENOUGH", "UNPARSED"]
Verifier = Literal["math", "number", "choice", "text", "judge"]


def replace_surrogates(text: str) -> str:
    """Text with U+FFFD for lone surrogates, which neither UTF-8 nor any tokenizer accepts."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


class Part(BaseModel):
    """A frozen piece of a row; its texts have no lone surrogates."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _replace_surrogates(cls, value: Any) -> Any:
        return replace_surrogates(value) if isinstance(value, str) else value


class Row(Part):
    """A question with its gold answer: what every row has.

    Several traces of one question have ids of their own.
    """

    id: str
    question: str
    answer: str
    verifier: Verifier = "math"  # how answers are compared with the gold one


class Problem(Row):
    """A question as the data has it."""

    solution: str | None = None  # a worked solution
    trace: str | None = None  # a long chain of thought
    attempt: str | None = None  # what the teacher writes after its thinking
    level: str | None = None
    subject: str | None = None


class Sample(Part):
    """One generated text and its grade."""

    text: str
    verdict: Literal["correct", "wrong", "unparsed", "timeout", "undecided"]
    answer: str | None = None  # as extracted
    finish_reason: Literal["stop", "length", "loop", "error"] = "stop"
    tokens: int = 0  # generated


class Outcome(Row):
    """What every stage's row has: the time it took and, if it was rejected, why."""

    seconds: float = 0.0
    rejected: str | None = None
    detail: str | None = None

    @property
    def processed_tokens(self) -> int:
        """Tokens generated for this row; for rates."""
        samples = () if getattr(self, "drawn_by_judge", False) else getattr(self, "samples", ())
        earlier = getattr(self, "earlier_samples", ())
        return sum(sample.tokens for sample in (*earlier, *samples))


class TraceRow(Outcome):
    """teach: one problem, its sampled traces, and which of them go on."""

    samples: tuple[Sample, ...]
    kept: tuple[int, ...]  # indices into samples
    attempt: str | None = None  # what the teacher writes after its thinking

    def whole(self, sentence_ends: Callable[[str], Sequence[int]]) -> list[PrefixRow]:
        """The kept traces as prefixes that keep everything.

        Args:
            sentence_ends: where each sentence of a text ends, see kit/judging/sentences.py.

        Returns:
            One row per kept trace; where there are several, their indices are part of their ids.
        """
        prefixes = []
        for index in self.kept:
            # <think> in a prefix would be a control token of some students
            trace = without_opening(self.samples[index].text)
            sentences = len(sentence_ends(trace))
            answer = after_thinking(trace) or ""
            prefixes.append(
                PrefixRow(
                    id=self.id if len(self.kept) == 1 else f"{self.id}.{index}",
                    question=self.question,
                    answer=self.answer,
                    verifier=self.verifier,
                    trace=trace,
                    attempt=self.attempt or answer.strip(),
                    end=len(trace),
                    sentences=sentences,
                    sentences_total=sentences,
                    ratio=1.0,
                    sufficient=True,
                )
            )
        return prefixes


class Verdict(Part):
    """The judge's answer at one boundary: the first `sentences` sentences of the trace were shown.

    The margin is the log-odds of ENOUGH (judge.kind verbal), the mean log-likelihood per token of
    the gold answer (answer), or the posterior probability of judge.success_rate (success); None
    where the verdict was generated.
    """

    sentences: int
    label: Label
    margin: float | None


class PrefixRow(Outcome):
    """truncate: what is kept of one trace: its beginning up to `end`, exactly, or `kept_text`."""

    trace: str
    attempt: str | None = None  # what the teacher writes after its thinking
    kept_text: str | None = None  # where it is no beginning: some sentences, or the attempt
    end: int  # characters
    sentences: int  # kept
    sentences_total: int
    ratio: float  # sentences / sentences_total
    sufficient: bool
    verdicts: tuple[Verdict, ...] = ()
    searched_sentences: int = 0  # fewer than all: the judge's context holds no more; 0: unjudged
    isolated: bool | None = None  # the boundary after the kept one is not ENOUGH; None: not known
    violations: int = 0  # NOT_ENOUGH at a boundary after an ENOUGH one
    samples: tuple[Sample, ...] = ()  # judge.kind success: continuations from the kept boundary
    generated_tokens: int = 0  # by the judge
    prompt_tokens: int = 0  # of the longest judging prompt asked
    prefill_tokens: int = 0
    cached_tokens: int = 0

    @property
    def prefix(self) -> str:
        """What is kept."""
        return self.trace[: self.end] if self.kept_text is None else self.kept_text

    @property
    def processed_tokens(self) -> int:
        """Of all questions; for rates."""
        return self.generated_tokens or self.prefill_tokens


class AlignedRow(Outcome):
    """align: the student's continuation from one prefix, graded."""

    prefix: str
    continuation: str
    drawn_by_judge: bool = False  # the samples are those of truncate; none were drawn here
    samples: tuple[Sample, ...] = ()  # of the last round
    earlier_samples: tuple[Sample, ...] = ()  # of the rounds before, all not correct
    pass_rate: float = 0.0  # over all rounds
    kept_by: str | None = None  # first, shortest, all; with +N after N rounds of extension
    lengthened: int = 0
    answer_in_prefix: bool = False


class EvalRow(Outcome):
    """eval: one held-out problem and a model's graded samples."""

    level: str | None = None
    subject: str | None = None
    samples: tuple[Sample, ...] = ()
    published: tuple[bool, ...] = ()  # what the paper's grader says about each sample
    prompt_tokens: int = 0


class TrainRow(Part):
    """One alpaca row; opens in LLaMA-Factory as it is."""

    instruction: str
    input: str
    output: str
