"""A whole trace goes in, a cut one comes out: the kept prefix, its verdicts, what it cost.

Section 3.2 of the paper. An insufficient trace is kept whole. Verdicts come from trace.py.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from kit.core.config import Config
from kit.core.errors import KitError
from kit.core.memory import is_out_of_memory
from kit.core.records import PrefixRow, Problem, Sample, TraceRow
from kit.data import load_traces
from kit.judging.judge import Judge
from kit.judging.search import violations
from kit.judging.sentences import ends
from kit.judging.trace import open_trace
from kit.sampling import PROBLEM_FIELDS

Cut = Callable[[PrefixRow], PrefixRow]  # a rule: a whole trace in, a cut or rejected one out


def cut(
    judge: Judge,
    row: PrefixRow,
    steer: Callable[[int], bool] | None = None,
    search: str | None = None,
) -> PrefixRow:
    """Judge one trace and cut it.

    Args:
        judge: whose `settings.search` is used, if no other is given.
        row: a whole trace, as `TraceRow.whole` gives it; one of a single sentence is kept.
        steer: see `TraceJudge`.
        search: binary, gallop, sweep, scan or uncached.

    Returns:
        A copy of the row with its kept prefix, verdicts in the order asked, and costs; or rejected,
        with the reason. A trace that is longer than the judge reads is searched as far as it fits.
    """
    # Traces that cannot be judged (here an empty one is rejected), or that leave nothing to decide.
    if not row.trace.strip():
        return cut_at_ratio(row)
    if judge.settings.kind != "verbal" and not row.answer.strip():
        detail = f"judge.kind={judge.settings.kind} compares with the gold answer"
        return reject(row, "no gold answer", detail)
    reachable = judge.boundaries_within(row)
    if not reachable:
        detail = f"the first judging prompt is over the limit of {judge.limit_tokens} tokens"
        return reject(row, "no boundary within the context", detail)
    if row.sentences_total == 1:
        return cut_at_ratio(row)

    search = search or judge.settings.search
    return within_memory(partial(_judge_and_cut, judge, reachable, search, steer), row)


def within_memory(rule: Cut, row: PrefixRow) -> PrefixRow:
    """What a rule makes of a row, or the row rejected where the memory did not suffice."""
    try:
        return rule(row)
    except (RuntimeError, MemoryError, KitError) as error:
        if not is_out_of_memory(error):
            raise
        return reject(row, "out of memory", str(error))


def _judge_and_cut(
    judge: Judge,
    reachable: int,
    search: str,
    steer: Callable[[int], bool] | None,
    row: PrefixRow,
) -> PrefixRow:
    """Judge and cut a trace of which the first `reachable` boundaries can be asked."""
    begun = time.perf_counter()

    # 1. Ask, each question from the cache of the ones before. The row keeps what the search asked;
    # the one further question after it is for `isolated` alone.
    with open_trace(judge, row, reachable, search == "uncached") as trace:
        trace.steer = steer
        sufficient = trace.search(search, reachable)
        verdicts = tuple(trace.verdicts.values())
        isolated = None
        if sufficient and not steer:
            isolated = trace.ask_isolated(sufficient, reachable, search)

    # 2. Keep what suffices; a trace without a sufficient prefix is kept whole.
    kept = sufficient or row.sentences_total
    enough = {verdict.sentences: verdict.label == "ENOUGH" for verdict in verdicts}
    longest_question = trace.request(max(enough))
    cut_row = keep(
        row,
        kept,
        sufficient=sufficient is not None,
        searched_sentences=reachable,
        isolated=isolated,
        verdicts=verdicts,
        violations=violations(enough),
        samples=trace.samples.get(kept, ()),
        generated_tokens=trace.generated_tokens,
        prompt_tokens=len(longest_question.ids),
        **vars(trace.session.cost),
        seconds=round(time.perf_counter() - begun, 3),
    )

    # 3. Where not all of it could be searched, what suffices may come later: it is rejected.
    if sufficient is None and reachable < row.sentences_total:
        detail = (
            f"{reachable} of {row.sentences_total} sentences were searched, "
            f"the limit is {judge.limit_tokens} tokens"
        )
        return reject(cut_row, "nothing sufficient within the context", detail)
    return cut_row


def cut_at_ratio(row: PrefixRow, ratio: float = 1.0) -> PrefixRow:
    """Cut at a share of the sentences in (0, 1], at least one (the ratio-X baselines), unjudged."""
    if not row.trace.strip():
        return reject(row, "empty trace", "there is nothing to cut")
    return keep(row, sentences_at(row.sentences_total, ratio))


def sentences_at(sentences: int, ratio: float) -> int:
    """How many sentences a share of them is, at least one."""
    return max(1, round(sentences * ratio))


def cut_at_answer(judge: Judge, row: PrefixRow) -> PrefixRow:
    """`binary-cut` (arXiv 2505.18440): the shortest beginning that the student can conclude from.

    Paper: a binary search for the shortest prefix from which the student's forced conclusion is
    still right. Here: as `FORCED_ANSWER` asks it, an answer of one line; the gold answer in its box
    concludes the target.
    """
    cut_row = cut(judge, row)
    if cut_row.rejected or cut_row.sufficient:
        return cut_row
    return reject(
        cut_row, "no right conclusion", f"none of {len(cut_row.verdicts)} gave the gold answer"
    )


def keep(row: PrefixRow, sentences: int, **fields: Any) -> PrefixRow:
    """A copy of the row that keeps so many sentences, with further fields replaced.

    Args:
        fields: those that a judge fills; without `samples`, the row has none.
    """
    # an empty trace has no sentences, and may have an attempt to keep
    update = {
        "sentences": sentences,
        "ratio": sentences / max(1, row.sentences_total),
        "end": [0, *ends(row.trace)][sentences],
        "samples": (),
        **fields,
    }
    return row.model_copy(update=update)


def reject(row: PrefixRow, reason: str, detail: str) -> PrefixRow:
    """A copy of the row, rejected with a reason."""
    return row.model_copy(update={"rejected": reason, "detail": detail, "sufficient": False})


def from_problem(problem: Problem) -> PrefixRow:
    """A problem's own trace, whole, as `cut` takes it; no grader has looked at it."""
    fields = problem.model_dump(include=PROBLEM_FIELDS)
    sample = Sample(text=problem.trace or "", verdict="unparsed")
    row = TraceRow(**fields, samples=(sample,), kept=(0,))
    return row.whole(ends)[0]


def traces_in_file(config: Config) -> list[PrefixRow]:
    """The traces that `config.teacher.path` names, each as `from_problem` gives it."""
    return [from_problem(problem) for problem in load_traces(config)]
