"""Commands that show rather than make: a rendered prompt, and verdicts along the traces of a file.

Nothing here writes a file. The step-through of one trace (`judge FILE --step`) lives in kit/step.py.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from kit import prompts
from kit.config import Config, resolve
from kit.errors import KitError
from kit.progress import Progress


def prompt(config: Config, of: str) -> dict[str, Any]:
    """Render a prompt of the first training problem.

    Args:
        of: solve (teaching, training, evaluation), judge, or draft (alignment).

    Returns:
        {of, text, tokens, special}: the text as the model sees it, its length, and how many ids are special tokens.
    """
    from kit.data import load, load_traces
    from kit.models import load_tokenizer
    from kit.sentences import ends

    problems = load_traces(config) if config.teacher.backend == "file" else load(config.data.train, config.seed)
    if not problems:
        raise KitError("There is no problem to render.", "Check data.train.")
    problem, student = problems[0], config.student
    trace = problem.trace or problem.solution or "(the trace would stand here)"
    prefix = trace[: ends(trace)[max(0, len(ends(trace)) // 4 - 1)]]
    user, answer = prompts.solve_text(config.prompts, problem.question), ""
    if of == "judge":
        fields = {"question": problem.question, "prefix": prefix}
        user = prompts.fill(prompts.text_of(config.prompts, "judge"), **fields)
    elif of == "draft" and config.align.mode == "prompt":
        user = prompts.draft_text(config.prompts, problem.question, prefix)
    elif of == "draft":
        answer = prefix
    tokenizer = load_tokenizer(student.tokenizer or student.model)
    ids = prompts.render(tokenizer, user, student.system, answer, student.thinking)
    special = set(tokenizer.special)
    count = sum(tokenizer.decode([i]) in special for i in ids)
    return {"of": of, "text": tokenizer.decode(ids), "tokens": len(ids), "special": count}


def show_prompt(result: dict[str, Any]) -> None:
    """Print it."""
    print(result["text"])
    print(f"--- {result['of']} prompt: {result['tokens']} tokens, {result['special']} of them special")


def command(args: argparse.Namespace, progress: Progress) -> int:
    """`palign.py judge FILE`: the verdict curve of each trace, or `--step` through one."""
    from kit.judge import judge_file, show

    keys = {"judge": {"search": args.search, "kind": args.kind, "threshold": args.threshold}}
    student = {"backend": args.backend, "model": args.model, "dtype": args.dtype, "url": args.url}
    teacher = {"backend": "file", "path": args.file}
    raw = {**keys, "student": student, "teacher": teacher, "data": {"train": {"limit": args.limit}}}
    config = resolve(raw, "the command line")
    if args.step:
        from kit.step import step

        return step(config)
    result = judge_file(config, progress)
    if args.json:
        print(json.dumps(result, ensure_ascii=False))
    else:
        show(result)
    return 0
