"""Looking closely: one trace walked through interactively, and a prompt as the model sees it.

The steps are those of sections 3.2 and 3.3: the problem, each question of the search, the cut, the
continuation and its grade, as plain text. On a terminal each step waits for a key. Nothing is
written.
"""

import sys
from collections.abc import Generator, Iterator
from contextlib import closing
from typing import Any

from kit.backends.base import Request
from kit.core.config import Config
from kit.core.progress import visible
from kit.core.records import PrefixRow
from kit.data import load_traces
from kit.judging.cut import cut, cut_at_ratio, from_problem, traces_in_file
from kit.judging.judge import Judge, open_judge
from kit.judging.sentences import split
from kit.models import load_tokenizer
from kit.prompts import draft_turns, judge_text, render, solve_text
from kit.sampling import grade_samples

MAX_TOKENS = 512  # of the continuation: a person waits for it


def walk(config: Config) -> int:
    """Show the steps of the first trace that `config.teacher` names. Returns the exit code."""
    on_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    with closing(_steps(config)) as steps:
        for number, step in enumerate(steps, 1):
            print(f"--- {number}. {visible(step)}\n", flush=True)
            # A step is made only when it is wanted.
            if on_terminal:
                print("[enter: next, q: quit] ", end="", flush=True)
                if sys.stdin.readline().strip() == "q":
                    break
    return 0


def _steps(config: Config) -> Generator[str, None, None]:
    """What is shown, one text per step."""
    trace = traces_in_file(config)[0]
    sentences = [" ".join(sentence.split()) for sentence in split(trace.trace)]
    numbered = [f"{number:4d}  {text}" for number, text in enumerate(sentences, 1)]
    yield f"The problem {trace.id}\n\n{trace.question}\n\nThe gold answer: {trace.answer}"
    yield "\n".join(["The trace, sentence by sentence\n", *numbered])

    with open_judge(config) as judge:
        row = cut(judge, trace)
        if row.rejected:
            yield f"This trace is rejected: {row.rejected}; {row.detail}"
            return
        for number, verdict in enumerate(row.verdicts, 1):
            margin = "none (generated)"
            if verdict.margin is not None:
                margin = f"{verdict.margin:+.2f}"
            yield (
                f"Question {number} of the {config.judge.search} search: "
                f"are the first {verdict.sentences} of {len(sentences)} sentences enough?\n\n"
                f"{numbered[verdict.sentences - 1]}\n\n"
                f"The student says {verdict.label}: margin {margin}, "
                f"threshold {judge.threshold:+.2f}."
            )
        reason = "none was judged sufficient: all is kept"
        if row.sufficient:
            reason = "the shortest prefix judged sufficient"
        yield (
            f"The cut: {row.sentences} of {row.sentences_total} sentences, {reason}\n\n"
            f"{row.prefix}| cut here"
        )
        yield from _continuation(config, judge, row)


def _continuation(config: Config, judge: Judge, row: PrefixRow) -> Iterator[str]:
    """The student's continuation from the kept prefix, and its grade."""
    user, answer = draft_turns(config, row.question, row.prefix)
    ids = render(judge.backend.tokenizer, user, config.student, answer)
    sampling = config.align.sampling.model_copy(update={"max_new_tokens": MAX_TOKENS})
    request = Request(row.id, ids, sampling, seed=config.seed)
    [generation] = judge.backend.generate([request])
    if generation.error:
        yield f"The student could not continue: {generation.error}"
        return
    [sample] = grade_samples(judge.grader, generation.completions, row)
    yield (
        f"The student continues from there ({sample.tokens} tokens, "
        f"finish: {sample.finish_reason})\n\n{sample.text}"
    )
    outcome = "becomes training data" if sample.verdict == "correct" else "is rejected"
    yield (
        f"The grader: {sample.verdict} (answer found: {sample.answer}, gold: {row.answer}); "
        f"the row {outcome}"
    )


def prompt(config: Config, of: str) -> dict[str, Any]:
    """Render a prompt of the first training problem.

    Args:
        of: solve (teaching, training, evaluation), judge, or draft (alignment); the latter two with
            the first quarter of the problem's trace, or of its solution.

    Returns:
        {of, tokens, special: how many of them are special tokens, text}.
    """
    problem = load_traces(config)[0]
    student = config.student
    trace = problem.trace or problem.solution or "(the trace goes here)"
    row = cut_at_ratio(from_problem(problem.model_copy(update={"trace": trace})), 0.25)
    prompts = config.prompts
    turns = {
        "solve": (solve_text(prompts, row.question), ""),
        "judge": (judge_text(prompts, row.question, row.prefix), ""),
        "draft": draft_turns(config, row.question, row.prefix),
    }
    user, answer = turns[of]
    tokenizer = load_tokenizer(student.tokenizer or student.model)
    ids = render(tokenizer, user, student, answer)
    special = sum(tokenizer.decode([i]) in tokenizer.special for i in ids)
    return {"of": of, "tokens": len(ids), "special": special, "text": tokenizer.decode(ids)}
