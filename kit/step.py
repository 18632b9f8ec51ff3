"""Step through one trace with a person: the problem, each question of the search, the cut, the continuation.

On a terminal keys go on and back; elsewhere every step is printed as plain text. Nothing is written.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from kit.align import whole
from kit.answers import Grader
from kit.backends import Request, open_backend
from kit.config import Config
from kit.data import load_traces
from kit.errors import KitError
from kit.judge import Judge, cut
from kit.prompts import draft_text, render
from kit.records import Sample, TraceRow
from kit.sentences import split
from kit.teach import graded_samples


def step(config: Config) -> int:
    """Show the steps of the first trace that `config.teacher` names. Returns the exit code."""
    steps, pages, at = _steps(config), [], 0
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        for number, text in enumerate(steps, 1):
            print(f"--- {number}. {text}\n", flush=True)
        return 0
    while True:
        while len(pages) <= at and (text := next(steps, None)) is not None:
            pages.append(text)
        at = min(at, len(pages) - 1)
        print(f"\033[2J\033[H--- {at + 1}. {pages[at]}\n")
        key = input("[enter: on, b: back, q: quit] ").strip().lower()
        if key == "q":
            return 0
        at = max(0, at - 1) if key == "b" else at + 1


def _steps(config: Config) -> Iterator[str]:
    problems = load_traces(config)
    if not problems:
        raise KitError(f"{config.teacher.path} holds no trace to step through.", "Name a file with traces.")
    first = problems[0]
    given = Sample(text=first.trace or "", verdict="unparsed")
    row = whole(TraceRow(id=first.id, question=first.question, answer=first.answer, samples=(given,), kept=(0,)))[0]
    sentences = split(row.trace)
    yield f"The problem\n\n{row.question}\n\nThe gold answer: {row.answer}"
    yield "The teacher's trace, sentence by sentence\n\n" + "\n".join(
        map(_line, range(1, len(sentences) + 1), sentences)
    )
    backend = open_backend(config.student)
    judge = Judge(config, backend)
    try:
        row = cut(judge, row)
        if row.rejected:
            yield f"This trace leaves here: {row.rejected}; {row.detail}"
            return
        for number, verdict in enumerate(row.verdicts, 1):
            margin = "none (generated)" if verdict.margin is None else f"{verdict.margin:+.2f}"
            goes = "a shorter prefix is asked next" if verdict.label == "ENOUGH" else "a longer prefix is asked next"
            yield (
                f"Question {number} of the {config.judge.search} search: are the first {verdict.sentences} of "
                f"{row.sentences_total} sentences enough?\n\n... {sentences[verdict.sentences - 1].strip()} |\n\n"
                f"The student says {verdict.label}: margin {margin}, threshold {judge.threshold:+.2f}; {goes}."
            )
        found = (
            "the shortest prefix judged sufficient"
            if row.sufficient
            else "no prefix was judged sufficient: all is kept"
        )
        prefix = row.trace[: row.end]
        yield f"The cut: {row.sentences} of {row.sentences_total} sentences, {found}\n\n{prefix}| cut here"
        user = draft_text(config.prompts, row.question, prefix)
        prompt = render(backend.tokenizer, user, config.student.system, thinking=config.student.thinking)
        sampling = config.align.sampling.model_copy(
            update={"max_new_tokens": min(512, config.align.sampling.max_new_tokens)}
        )
        made = next(iter(backend.generate([Request(row.id, prompt, sampling, seed=config.seed)])))
    finally:
        judge.close()
        backend.close()
    if made.error:
        yield f"The student could not continue: {made.error}"
        return
    text, finish, tokens = made.completions[0].text, made.completions[0].finish, len(made.completions[0].ids)
    yield f"The student continues from there ({tokens} tokens, finish: {finish})\n\n{text}"
    with Grader() as grader:
        (sample,) = graded_samples(grader, [(text, finish, tokens)], row.answer, config.data.train.verifier)
    kept = "the row trains the student" if sample.verdict == "correct" else "the row is rejected"
    yield f"The grader: {sample.verdict} (answer found: {sample.answer}, gold: {row.answer}); {kept}"


def _line(number: int, sentence: str) -> str:
    text = " ".join(sentence.split())
    return f"{number:4d}  {text if len(text) <= 150 else text[:147] + '...'}"
