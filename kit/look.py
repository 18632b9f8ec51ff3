"""A rendered prompt as the model sees it (`palign.py prompt`); nothing is written."""

from __future__ import annotations

from typing import Any

from kit import prompts
from kit.config import Config
from kit.data import load_traces
from kit.errors import KitError
from kit.models import load_tokenizer
from kit.sentences import ends


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
    prefix = trace[: ends(trace)[max(0, len(ends(trace)) // 4 - 1)]]
    user, answer = prompts.solve_text(config.prompts, problem.question), ""
    if of == "judge":
        user = prompts.fill(prompts.text_of(config.prompts, "judge"), question=problem.question, prefix=prefix)
    elif of == "draft" and config.align.mode == "prompt":
        user = prompts.draft_text(config.prompts, problem.question, prefix)
    elif of == "draft":
        answer = prefix
    tokenizer = load_tokenizer(student.tokenizer or student.model)
    ids = prompts.render(tokenizer, user, student.system, answer, student.thinking)
    special = sum(tokenizer.decode([i]) in tokenizer.special for i in ids)
    return {"of": of, "tokens": len(ids), "special": special, "text": tokenizer.decode(ids)}
