"""truncate: the untrained student judges where a trace may be cut (section 3.2 of the paper).

Paper: every verdict is a generation of up to 256 tokens over a prompt prefilled anew. Here: all prompts of a
trace share one cache, and a verdict is read from log-probabilities at the token where the two labels part;
`judge.decode: generate` asks the paper's way. Which boundaries to ask is kit/search.py's, how a backend
reuses its cache is the backend's.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing

from kit.backends import open_backend
from kit.backends.base import Backend, Logprobs, Request, ScoreRequest, ScoringSession, TokenUsage
from kit.core.config import Config, Sampling
from kit.core.errors import KitError
from kit.core.records import Label, PrefixRow, Problem, Sample, TraceRow, Verdict
from kit.grading.answers import Grader, Item, gold_of
from kit.judging import search
from kit.judging.sentences import ends
from kit.prompts import fill, render, solve_text, text_of

Force = Callable[[int], bool] | None
THRESHOLD = {
    "verbal": 0.0,
    "answer": -1.0,
}  # nats; answer: a gold token more likely than exp(-1) on average
AHEAD = 6  # what may be asked next is read along where that makes a pass longer by at most a sixth of what was read
_BOXED = re.compile(
    r"((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})+)\}"
)  # up to the brace that closes the forced box


class Judge:
    """What is asked about a prefix of one backend, and how the answer is read; see `part` for what it raises."""

    def __init__(self, config: Config, backend: Backend) -> None:
        self.config, self.keys, self.backend = config, config.judge, backend
        verbal = self.keys.kind == "verbal"
        self.generates = (
            self.keys.decode == "generate" if verbal else self.keys.answer_scoring == "greedy"
        )
        # With room for a generated label.
        self.limit_tokens = backend.context_tokens - 16 * self.generates
        self.threshold = (
            THRESHOLD[self.keys.kind] if self.keys.threshold is None else self.keys.threshold
        )
        labels = (
            tuple(backend.tokenizer.encode(label, special=False)) for label in self.keys.labels
        )
        self.common, self.parting = part(*labels)
        self.held = ExitStack()
        self.grader = self.held.enter_context(Grader()) if self.generates and not verbal else None

    def probe(self, row: PrefixRow, prefix: str) -> ScoreRequest:
        """The question about a prefix, and where its verdict is read: the labels' parting, or the gold answer."""
        student, prompts, answer = self.config.student, self.config.prompts, ""
        if self.keys.kind == "verbal":
            user = fill(text_of(prompts, "judge"), question=row.question, prefix=prefix)
        else:
            user, answer = (
                solve_text(prompts, row.question),
                prefix + text_of(prompts, "answer_cue"),
            )
        ids = render(self.backend.tokenizer, user, student.system, answer, student.thinking)
        if self.generates:
            return ScoreRequest(ids, ())
        if self.keys.kind == "verbal":
            return ScoreRequest(ids + self.common, ((len(ids + self.common) - 1, self.parting),))
        gold = self.backend.tokenizer.encode(gold_of(row.answer), special=False)
        return ScoreRequest(
            (*ids, *gold[:-1]), tuple((len(ids) - 1 + i, (token,)) for i, token in enumerate(gold))
        )

    def margin(self, readings: Logprobs) -> float:
        """Log-odds of the first label (verbal), or mean log-likelihood of a gold token (answer)."""
        if self.keys.kind == "verbal":
            return readings[0][0] - readings[0][1]
        return sum(values[0] for values in readings) / len(readings)

    def label(self, margin: float) -> Label:
        """ENOUGH from the threshold on."""
        return "ENOUGH" if margin >= self.threshold else "NOT_ENOUGH"

    def close(self) -> None:
        """End the graders, if any; the backend stays open."""
        self.held.close()


class TraceJudge:
    """One trace under judgement: asks boundaries, keeps verdicts and what they cost.

    Args:
        force: measurements only: steers the search, while the verdicts are asked all the same.
    """

    def __init__(
        self, judge: Judge, row: PrefixRow, session: ScoringSession, force: Force = None
    ) -> None:
        self.judge, self.row, self.session, self.force = judge, row, session, force
        self.verdicts: dict[int, Verdict] = {}
        self.margins: dict[int, float] = {}  # of what was asked, or read ahead
        self.cost, self.prompt_tokens, self.base, self.ends = TokenUsage(), 0, 0.0, ends(row.trace)
        if judge.keys.calibration == "content-free" and not judge.generates:
            self.base = judge.margin(session.score([judge.probe(row, "")])[0])

    def ask(self, k: int, *ahead: int) -> bool:
        """Whether the first k sentences suffice. What may be asked next is read along where that costs little."""
        return self.ask_many([k], ahead)[0]

    def ask_many(self, boundaries: Sequence[int], ahead: Sequence[int] = ()) -> list[bool]:
        """Ask several boundaries together."""
        probes = {k: self._probe(k) for k in boundaries}
        self.prompt_tokens = max(self.prompt_tokens, *(len(probe.ids) for probe in probes.values()))
        if self.judge.generates:
            found = self._generated(probes)
        else:
            self._read(probes, ahead)
            found = {k: self._verdict(k) for k in probes}
        self.verdicts |= {k: found[k] for k in boundaries}
        return [self.force(k) if self.force else found[k].label == "ENOUGH" for k in boundaries]

    def _probe(self, k: int) -> ScoreRequest:
        return self.judge.probe(self.row, self.row.trace[: self.ends[k - 1]])

    def _read(self, probes: dict[int, ScoreRequest], ahead: Sequence[int]) -> None:
        unread = {k: probe for k, probe in probes.items() if k not in self.margins}
        near = getattr(self.session, "ahead_tokens", 0)
        if unread and near:
            more = {k: self._probe(k) for k in ahead if k not in self.margins}
            longest = max(len(probe.ids) for probe in probes.values())
            reach = longest + max(near, longest // AHEAD)
            if longest < self.prompt_tokens or any(
                len(probe.ids) > reach for probe in more.values()
            ):
                reach, ahead = (
                    self.prompt_tokens,
                    ahead[:2],
                )  # one step, and only where the text is cached already
            unread |= {
                k: probe for k, probe in more.items() if k in ahead and len(probe.ids) <= reach
            }
        for k, readings in zip(
            unread, self.session.score([*unread.values()]) if unread else [], strict=True
        ):
            self.margins[k] = self.judge.margin(readings) - self.base

    def _verdict(self, k: int) -> Verdict:
        return Verdict(
            sentences=k, label=self.judge.label(self.margins[k]), margin=round(self.margins[k], 6)
        )

    def _generated(self, probes: dict[int, ScoreRequest]) -> dict[int, Verdict]:
        """Verdicts by greedy generation; what is neither label is UNPARSED, and counts as not enough in the search."""
        sampling = Sampling(temperature=0, top_p=1, max_new_tokens=self.judge.keys.max_new_tokens)
        asked = [Request(str(k), probe.ids, sampling) for k, probe in probes.items()]
        found = {}
        for made in self.judge.backend.generate(asked):
            if made.error:
                raise KitError(
                    f"{self.row.id}: no verdict on {made.id} sentences: {made.error}",
                    "Run again to go on.",
                )
            self.cost.add(TokenUsage(made.prefill_tokens, made.prompt_tokens - made.prefill_tokens))
            label = self._parsed(made.completions[0].text)
            found[int(made.id)] = Verdict(sentences=int(made.id), label=label, margin=None)
        return found

    def _parsed(self, text: str) -> Label:
        if self.judge.grader is None:
            return label_in(text, self.judge.keys.labels)
        if (boxed := _BOXED.match(text)) is None:
            return "UNPARSED"
        item = Item(
            self.row.answer, f"\\boxed{{{boxed[1]}}}", self.judge.config.data.train.verifier
        )
        [grade] = self.judge.grader.grade([item])
        return {"correct": "ENOUGH", "wrong": "NOT_ENOUGH"}.get(grade.verdict, "UNPARSED")  # type: ignore[return-value]


def cut(judge: Judge, row: PrefixRow, force: Force = None, how: str | None = None) -> PrefixRow:
    """Judge one trace and cut it.

    Args:
        row: a whole trace, as `kit.align.whole` gives it; one of a single sentence is kept.
        force: see `Asking`.
        how: a search other than the config's. fresh asks what binary asks, without a cache.

    Returns:
        The row with its kept prefix, verdicts in the order asked, and costs; or rejected, where the trace is empty or
        its prompt is longer than the judge reads.
    """
    begun, how, m = time.perf_counter(), how or judge.keys.search, row.sentences_total
    tokens = len(judge.probe(row, row.trace).ids)
    if tokens > judge.limit_tokens:
        return _rejected(
            row, "prompt too long", f"{tokens} tokens to judge, the limit is {judge.limit_tokens}"
        )
    if m <= 1:
        return fixed(row)
    session = judge.backend.session(uncached=how == "uncached")
    asking = TraceJudge(judge, row, session, force)
    if how == "scan":
        kept = search.choose(asking.ask_many(range(1, m + 1)), judge.keys.scan_rule)
    else:
        kept = (search.gallop if how == "gallop" else search.binary)(m, asking.ask)
    asking.cost.add(session.cost)
    session.close()
    judged = {k: verdict.label == "ENOUGH" for k, verdict in asking.verdicts.items()}
    found = {
        "sufficient": kept is not None,
        "verdicts": tuple(asking.verdicts.values()),
        **vars(asking.cost),
    }
    found |= {"violations": search.violations(judged), "prompt_tokens": asking.prompt_tokens}
    return _kept(row, kept or m).model_copy(
        update=found | {"seconds": round(time.perf_counter() - begun, 3)}
    )


def open_judge(config: Config, held: ExitStack) -> Judge:
    """Open the student and a judge on it; both are closed with `held`."""
    backend = open_backend(config.student)
    held.callback(backend.close)
    return held.enter_context(closing(Judge(config, backend)))


def part(
    first: tuple[int, ...], second: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, int]]:
    """The common beginning of two labels' tokens, and the two tokens where they part."""
    for i, pair in enumerate(zip(first, second, strict=False)):
        if pair[0] != pair[1]:
            return first[:i], pair
    why = f"One label's tokens begin the other's: {list(first)} and {list(second)}."
    raise KitError(why, "Set judge.labels to two texts of which neither starts with the other.", 2)


def label_in(text: str, labels: tuple[str, str]) -> Label:
    """The label that stands first in a generated text (the longer one, where one holds the other)."""
    found = [
        (text.find(label), -len(label), name)
        for label, name in zip(labels, ("ENOUGH", "NOT_ENOUGH"), strict=True)
    ]
    return min((x for x in found if x[0] >= 0), default=(0, 0, "UNPARSED"))[2]  # type: ignore[return-value]


def from_problem(problem: Problem) -> PrefixRow:
    """A problem's own trace, whole, as `cut` takes it."""
    fields = {name: getattr(problem, name) for name in ("id", "question", "answer")}
    sample = Sample(text=problem.trace or "", verdict="unparsed")
    return TraceRow(**fields, samples=(sample,), kept=(0,)).whole(ends)[0]


def fixed(row: PrefixRow, ratio: float | None = None) -> PrefixRow:
    """Cut at a share of the sentences, at least one (the ratio-X baselines); None keeps all."""
    if not row.trace.strip():
        return _rejected(row, "empty trace", "there is nothing to cut")
    return _kept(row, max(1, round(row.sentences_total * (1 if ratio is None else ratio))))


def _kept(row: PrefixRow, k: int) -> PrefixRow:
    return row.model_copy(
        update={"sentences": k, "ratio": k / row.sentences_total, "end": ends(row.trace)[k - 1]}
    )


def _rejected(row: PrefixRow, reason: str, detail: str) -> PrefixRow:
    return row.model_copy(update={"rejected": reason, "detail": detail, "sufficient": False})
