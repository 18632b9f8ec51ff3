"""Looking closely: one trace stepped through with a person, and a rendered prompt as the model sees it.

The steps: the problem, each question of the search, the cut, the continuation. On a terminal keys go on and back;
elsewhere every step is printed as plain text. Nothing is written.
"""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterator
from contextlib import ExitStack, closing
from itertools import islice
from typing import Any

from kit.backends.base import Request
from kit.core.config import Config
from kit.core.errors import KitError
from kit.core.progress import visible
from kit.data import load_traces
from kit.grading.answers import Grader
from kit.judging.judge import cut, from_problem, open_judge
from kit.judging.sentences import ends, split
from kit.models import load_tokenizer
from kit.pipeline.align import words
from kit.prompts import fill, render, solve_text, text_of
from kit.sampling import graded_samples

MAX_TOKENS = 512  # of the continuation: a person waits for it


def walk(config: Config) -> int:
    """Show the steps of the first trace that `config.teacher` names. Returns the exit code."""
    with closing(_steps(config)) as steps:
        titled = (f"--- {number}. {visible(text)}\n" for number, text in enumerate(steps, 1))
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            for text in titled:
                print(text, flush=True)
            return 0
        screens, seen, at, key = (screen for text in titled for screen in _screens(text)), [], 0, ""
        while key != "q":
            seen += islice(
                screens, max(0, at + 1 - len(seen))
            )  # a step is made when it is first wanted
            at = min(at, len(seen) - 1)
            print(f"\033[2J\033[H{seen[at]}\n[enter: on, b: back, q: quit] ", end="", flush=True)
            key = (sys.stdin.readline() or "q").strip().lower()
            at = max(0, at - 1) if key == "b" else at + 1
    return 0


def _screens(text: str) -> Iterator[str]:
    """A step's lines, wrapped and cut to the terminal's size."""
    width, height = shutil.get_terminal_size()
    lines = [part for line in text.splitlines() for part in textwrap.wrap(line, width) or [""]]
    for start in range(0, len(lines), height - 3):
        more = "\n(more)" if start + height - 3 < len(lines) else ""
        yield "\n".join(lines[start : start + height - 3]) + more


def _steps(config: Config) -> Iterator[str]:
    problems = load_traces(config)
    if not problems:
        raise KitError(
            f"{config.teacher.path} holds no trace to step through.", "Name a file with traces."
        )
    row = from_problem(problems[0])
    sentences = [" ".join(sentence.split()) for sentence in split(row.trace)]
    yield f"The problem {row.id}\n\n{row.question}\n\nThe gold answer: {row.answer}"
    yield "The trace, sentence by sentence\n\n" + "\n".join(
        f"{i:4d}  {text}" for i, text in enumerate(sentences, 1)
    )
    with ExitStack() as held:
        judge = open_judge(config, held)
        row = cut(judge, row)
        if row.rejected:
            yield f"This trace leaves here: {row.rejected}; {row.detail}"
            return
        for number, asked in enumerate(row.verdicts, 1):
            margin = "none (generated)" if asked.margin is None else f"{asked.margin:+.2f}"
            yield (
                f"Question {number} of the {config.judge.search} search: are the first {asked.sentences} of "
                f"{len(sentences)} sentences enough?\n\n{asked.sentences:4d}  {sentences[asked.sentences - 1]}\n\n"
                f"The student says {asked.label}: margin {margin}, threshold {judge.threshold:+.2f}."
            )
        found = (
            "the shortest prefix judged sufficient"
            if row.sufficient
            else "none was judged sufficient: all is kept"
        )
        prefix = row.trace[: row.end]
        yield f"The cut: {row.sentences} of {row.sentences_total} sentences, {found}\n\n{prefix}| cut here"
        user, begun = words(config, row)
        prompt = render(
            judge.backend.tokenizer, user, config.student.system, begun, config.student.thinking
        )
        sampling = config.align.sampling.model_copy(update={"max_new_tokens": MAX_TOKENS})
        made = next(
            iter(judge.backend.generate([Request(row.id, prompt, sampling, seed=config.seed)]))
        )
        if made.error:
            yield f"The student could not continue: {made.error}"
            return
        text, finish_reason, tokens = (
            made.completions[0].text,
            made.completions[0].finish_reason,
            len(made.completions[0].ids),
        )
        yield f"The student continues from there ({tokens} tokens, finish: {finish_reason})\n\n{text}"
        grader = held.enter_context(Grader())
        (sample,) = graded_samples(
            grader, [(text, finish_reason, tokens)], row.answer, config.data.train.verifier
        )
    kept = "the row trains the student" if sample.verdict == "correct" else "the row is rejected"
    yield f"The grader: {sample.verdict} (answer found: {sample.answer}, gold: {row.answer}); {kept}"


def prompt(config: Config, of: str) -> dict[str, Any]:
    """Render a prompt of the first training problem.

    Args:
        of: solve (teaching, training, evaluation), judge, or draft (alignment); the latter two with the first quarter
            of the problem's trace, or of its solution.

    Returns:
        {of, tokens, special: how many of them are special tokens, text}.
    """
    problems = load_traces(config)
    if not problems:
        raise KitError("There is no problem to render.", "Check data.train.")
    problem, student = problems[0], config.student
    trace = problem.trace or problem.solution or "(the trace would stand here)"
    draft = from_problem(problem.model_copy(update={"trace": trace}))
    draft = draft.model_copy(update={"end": ends(trace)[max(0, len(ends(trace)) // 4 - 1)]})
    user, answer = solve_text(config.prompts, problem.question), ""
    if of == "judge":
        shown = {"question": problem.question, "prefix": trace[: draft.end]}
        user = fill(text_of(config.prompts, "judge"), **shown)
    elif of == "draft":
        user, answer = words(config, draft)
    tokenizer = load_tokenizer(student.tokenizer or student.model)
    ids = render(tokenizer, user, student.system, answer, student.thinking)
    special = sum(tokenizer.decode([i]) in tokenizer.special for i in ids)
    return {"of": of, "tokens": len(ids), "special": special, "text": tokenizer.decode(ids)}
