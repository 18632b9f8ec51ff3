"""The judge: is a prefix of a trace sufficient, and where is the trace cut (section 3.2)?

`Judge` holds what is asked about a prefix and how the answer is read. `TraceJudge` is one trace
under judgement: it asks boundaries and keeps their verdicts. `cut` judges one trace and cuts it.
What a kind asks is in `Judge`, how its verdict comes about in `TraceJudge`; searches: search.py.

Paper: each verdict is a generation of up to 256 tokens over a prompt that is prefilled again.
Here: all prompts of a trace share one cache, and a verdict is read from log-probabilities at the
token where the two labels part; `judge.decode: generate` asks the paper's way, and kind success
draws continuations (success.py). How a backend reuses its cache is decided in kit/backends.
"""

from __future__ import annotations

import re
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

from kit.backends import open_backend
from kit.backends.base import (
    Backend,
    Completion,
    Logprobs,
    Request,
    ScoreRequest,
    ScoringSession,
    TokenUsage,
    Trunk,
    common_prefix_len,
)
from kit.core.config import Calibration, Config, Sampling
from kit.core.errors import KitError
from kit.core.memory import is_out_of_memory
from kit.core.records import Label, PrefixRow, Problem, Sample, TraceRow, Verdict
from kit.grading.answers import Item, gold_of
from kit.judging.calibration import calibrated_threshold
from kit.judging.search import binary, choose, gallop, sweep, violations
from kit.judging.sentences import ends
from kit.judging.success import missing_draws, success_probability
from kit.prompts import (
    PrefixEncoder,
    draft_turns,
    encode_after,
    encode_answer,
    judge_text,
    render,
    solve_text,
    text_of,
)
from kit.sampling import PROBLEM_FIELDS, grade_samples, grader_of

# From this margin on a prefix is ENOUGH. verbal: log-odds of the first label. answer: mean
# log-likelihood per gold token in nats; -1 is a token with a probability of 0.37.
DEFAULT_THRESHOLDS = {"verbal": 0.0, "answer": -1.0}
LABEL_OF_GRADE: dict[str, Label] = {"correct": "ENOUGH", "wrong": "NOT_ENOUGH"}
LABEL_ROOM_TOKENS = 16  # left free after a prompt where the label is generated
STRETCH_CHARACTERS = 2048  # of a trace, that a sweep reads in one pass: about 512 tokens
STRETCH_DRAWS = 8  # generated in one batch, at most, where a stretch is drawn

# The text up to the brace that closes the box which `prompts.answer_cue` opened.
_BOXED = re.compile(r"((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})+)\}")


class Judge(ExitStack):
    """What one backend is asked about a prefix, and how its answer is read.

    A context manager: leaving it, or `close`, ends the grader; the backend stays open.

    Raises:
        KitError: (exit 2) one label's tokens begin the other's.
    """

    def __init__(self, config: Config, backend: Backend) -> None:
        super().__init__()
        settings = config.judge
        self.config = config
        self.settings = settings
        self.backend = backend
        self.grader = self.enter_context(grader_of(config))
        # of generated verdicts; continuations are drawn as `align` draws them
        greedy = {"temperature": 0, "top_p": 1, "max_new_tokens": settings.max_new_tokens}
        self.sampling = Sampling.model_validate(greedy)
        if settings.kind == "success":
            self.sampling = config.align.sampling
        usual = {**DEFAULT_THRESHOLDS, "success": settings.confidence}[settings.kind]
        self.threshold = usual if settings.threshold is None else settings.threshold

        # Does the model write its verdict, or is it read from log-probabilities?
        self.generates_verdicts = {
            "verbal": settings.decode == "generate",
            "answer": settings.answer_scoring == "greedy",
            "success": True,
        }[settings.kind]

        if isinstance(settings.calibration, Calibration):
            self.threshold = calibrated_threshold(self, settings.calibration)

        # The prompts of a trace begin alike; a server judges several traces at once.
        encode = backend.tokenizer.encode
        self._encoder = lru_cache(maxsize=64)(lambda _id: PrefixEncoder(encode))

        # A label's first tokens may be equal ("[" in ours); the verdict is read after them.
        self.shared_label_tokens, self.label_tokens = split_labels(
            *(encode_answer(backend.tokenizer, label) for label in settings.labels)
        )

        limit_tokens = settings.limit_tokens or backend.context_tokens
        self.limit_tokens = min(limit_tokens, backend.context_tokens)
        if self.generates_verdicts:
            self.limit_tokens -= LABEL_ROOM_TOKENS

    def prompt(self, row: PrefixRow, prefix: str) -> tuple[int, ...]:
        """The question about a prefix as token ids (T,), up to where the model answers."""
        student = self.config.student
        prompts = self.config.prompts
        if self.settings.kind == "verbal":
            user = judge_text(prompts, row.question, prefix)
            answer = ""
        elif self.settings.kind == "success":
            user, answer = draft_turns(self.config, row.question, prefix)
        else:
            user = solve_text(prompts, row.question)
            answer = prefix + text_of(prompts, "answer_cue")
        encode = self._encoder(row.id).encode
        tokenizer = self.backend.tokenizer
        return render(tokenizer, user, student.system, answer, student.thinking, encode)

    def request(self, row: PrefixRow, prefix: str) -> ScoreRequest:
        """The question with the places where its verdict is read; none where it is generated."""
        ids = self.prompt(row, prefix)
        if self.generates_verdicts:
            return ScoreRequest(ids, ())
        if self.settings.kind == "verbal":
            ids += self.shared_label_tokens
            return ScoreRequest(ids, ((len(ids) - 1, self.label_tokens),))
        gold_text = gold_of(row.answer)
        gold = tuple(encode_after(self.backend.tokenizer, gold_text))
        reads = tuple((place, (token,)) for place, token in enumerate(gold, len(ids) - 1))
        return ScoreRequest(ids + gold[:-1], reads)

    def boundaries_within(self, row: PrefixRow) -> int:
        """How many boundaries can be asked: all, or those whose question fits `limit_tokens`."""
        cuts = ends(row.trace)

        def tokens(k: int) -> int:
            return len(self.request(row, row.trace[: cuts[k - 1]]).ids)

        if tokens(len(cuts)) <= self.limit_tokens:
            return len(cuts)
        return bisect_right(range(1, len(cuts)), self.limit_tokens, key=tokens)

    def margin(self, logprobs: Logprobs) -> float:
        """Log-odds of the first label (verbal), or mean log-likelihood per gold token (answer)."""
        if self.settings.kind == "verbal":
            return logprobs[0][0] - logprobs[0][1]
        return sum(values[0] for values in logprobs) / len(logprobs)

    def label(self, margin: float) -> Label:
        """ENOUGH from the threshold on."""
        return "ENOUGH" if margin >= self.threshold else "NOT_ENOUGH"

    def label_in_text(self, text: str, row: PrefixRow) -> Label:
        """The verdict in a generated text: its label (verbal), or its answer's grade (answer).

        UNPARSED where the text holds neither label, or no answer that can be graded.
        """
        if self.settings.kind == "verbal":
            return first_label(text, self.settings.labels)
        boxed = _BOXED.match(text)
        if boxed is None:
            return "UNPARSED"
        item = Item(row.answer, f"\\boxed{{{boxed[1]}}}", row.verifier, row.question)
        [grade] = self.grader.grade([item])
        return LABEL_OF_GRADE.get(grade.verdict, "UNPARSED")


@dataclass
class TraceJudge:
    """One trace under judgement: asks boundaries, and keeps their verdicts.

    Args:
        judge: asks and reads; shared by all traces.
        row: the whole trace.
        session: this trace's own, so that its prompts share one cache. It counts the tokens.
        steer: for measurements: decides where the search goes; verdicts are asked all the same.
        trunk: what generated verdicts and continuations share; None: every prompt is whole.
    """

    judge: Judge
    row: PrefixRow
    session: ScoringSession
    steer: Callable[[int], bool] | None = None
    trunk: Trunk | None = None
    known: dict[int, Verdict] = field(default_factory=dict)  # by boundary
    verdicts: dict[int, Verdict] = field(default_factory=dict)  # those asked, in that order
    samples: dict[int, tuple[Sample, ...]] = field(default_factory=dict)  # kind success
    generated_tokens: int = 0
    prompt_tokens: int = 0  # of the longest question asked
    calibration_offset: float = 0.0  # content-free: the margin of an empty prefix

    def __post_init__(self) -> None:
        self.ends = ends(self.row.trace)
        judge = self.judge
        # in nats; known once a session is open, and grows where a verdict that is read twice shows
        is_cached = not (self.session.uncached or judge.generates_verdicts)
        self.cache_move = judge.backend.cache_move if is_cached else 0.0
        if judge.settings.calibration == "content-free" and not judge.generates_verdicts:
            [logprobs] = self.session.score([judge.request(self.row, "")])
            self.calibration_offset = judge.margin(logprobs)

    @property
    def _no_cache(self) -> bool:
        """Whether every question is a whole prefill: the model's cache cannot branch."""
        return self.session.uncached

    def search(self, name: str, m: int) -> int | None:
        """The boundary that a search keeps, of the first m; None: none is ENOUGH."""
        settings = self.judge.settings
        if name == "scan":
            enough = self.ask_many(range(1, m + 1))
            return choose(enough, settings.scan_rule, settings.confirm)
        if name == "sweep":
            return sweep(m, self.ask_many, partial(self._stretch_end, m), settings.confirm)
        # uncached asks what binary asks; only its session differs
        return gallop(m, self.ask) if name == "gallop" else binary(m, self.ask)

    def _stretch_end(self, m: int, first: int) -> int:
        """The last boundary of a sweep's stretch: what one pass evaluates, or one batch draws."""
        if self.judge.generates_verdicts:
            at_once = STRETCH_DRAWS
            if self.judge.settings.kind == "success":
                at_once //= self.judge.settings.samples
            return min(first + max(at_once, 1) - 1, m)
        if self._no_cache:
            return first
        return min(bisect_right(self.ends, self.ends[first - 1] + STRETCH_CHARACTERS), m)

    def is_isolated(self, kept: int, m: int, search: str) -> bool | None:
        """Whether the boundary after the kept one, of m, is not ENOUGH; None: not known.

        It is asked where the cache makes that cheap. Elsewhere only sweep and scan can tell: binary
        and gallop keep no boundary before one that they know to be insufficient.
        """
        after = kept + 1
        if after > m:
            return None
        if self.judge.generates_verdicts or self._no_cache or search == "uncached":
            if search not in ("sweep", "scan") or after not in self.known:
                return None
        elif after not in self.known:
            self._score({after: self._request(after)})
        return self.known[after].label != "ENOUGH"

    def ask(self, k: int) -> bool:
        """Whether the first k sentences suffice."""
        return self.ask_many([k])[0]

    def ask_many(self, boundaries: Sequence[int]) -> list[bool]:
        """Ask several boundaries together."""
        requests = {k: self._request(k) for k in boundaries}
        longest_tokens = max(len(request.ids) for request in requests.values())
        self.prompt_tokens = max(self.prompt_tokens, longest_tokens)
        unknown = {k: request for k, request in requests.items() if k not in self.known}
        if self.judge.settings.kind == "success":
            self._judge_by_success(unknown)
        elif self.judge.generates_verdicts:
            self._generate(unknown)
        elif unknown:
            self._score(unknown)
        for k in boundaries:
            self.verdicts[k] = self.known[k]
        if self.steer:
            return [self.steer(k) for k in boundaries]
        return [self.known[k].label == "ENOUGH" for k in boundaries]

    def _request(self, k: int) -> ScoreRequest:
        end = self.ends[k - 1]
        return self.judge.request(self.row, self.row.trace[:end])

    def _score(self, requests: dict[int, ScoreRequest]) -> None:
        """Read verdicts from log-probabilities, all in one call.

        Where a cache moves margins by more than rounding, verdicts nearer to the threshold than
        the largest move are read again without it, the nearest first.
        """
        scores = self.session.score(list(requests.values()))
        margins = {}
        for k, logprobs in zip(requests, scores, strict=True):
            margins[k] = self.judge.margin(logprobs) - self.calibration_offset

        threshold = self.judge.threshold
        for k in sorted(margins, key=lambda k: abs(margins[k] - threshold)):
            margin = margins[k]
            if abs(margin - threshold) < self.cache_move:
                margin = self._uncached_margin(requests[k])
                self.cache_move = max(self.cache_move, abs(margin - margins[k]))
            label = self.judge.label(margin)
            self.known[k] = Verdict(sentences=k, label=label, margin=round(margin, 6))

    def _uncached_margin(self, request: ScoreRequest) -> float:
        with closing(self.judge.backend.session(uncached=True)) as session:
            [logprobs] = session.score([request])
        self.session.cost.add(session.cost)
        return self.judge.margin(logprobs) - self.calibration_offset

    def _generate(self, boundaries: Iterable[int]) -> None:
        """Generate verdicts greedily, as the paper does; UNPARSED ones count as not enough."""
        for k, completions in self._texts(dict.fromkeys(boundaries, 1)):
            label = self.judge.label_in_text(completions[0].text, self.row)
            self.known[k] = Verdict(sentences=k, label=label, margin=None)

    def _judge_by_success(self, boundaries: Iterable[int]) -> None:
        """Draw at all boundaries together until the success rate of each is decided."""
        settings = self.judge.settings
        open_boundaries = set(boundaries)
        while open_boundaries:
            counts = {}
            for k in sorted(open_boundaries):
                verdicts = [sample.verdict for sample in self.samples.get(k, ())]
                correct = verdicts.count("correct")
                counts[k] = missing_draws(correct, len(verdicts), settings)
                if counts[k] == 0:
                    open_boundaries.remove(k)
                    margin = success_probability(correct, len(verdicts), settings.success_rate)
                    label = self.judge.label(margin)
                    self.known[k] = Verdict(sentences=k, label=label, margin=round(margin, 6))
            self.draw({k: count for k, count in counts.items() if count})

    def draw(self, counts: Mapping[int, int]) -> None:
        """Draw and grade so many more continuations at each boundary, into `samples`.

        They are seeded by row, boundary and number, so every search draws the same.
        """
        for k, completions in self._texts(counts):
            drawn = grade_samples(self.judge.grader, completions, self.row)
            self.samples[k] = self.samples.get(k, ()) + drawn

    def _texts(self, counts: Mapping[int, int]) -> Iterator[tuple[int, Sequence[Completion]]]:
        """Generate so many texts at each boundary, and count the tokens; KitError: one fails."""
        judge = self.judge
        boundary_of = {}
        requests = []
        for k, count in counts.items():
            id = f"{self.row.id}@{k}+{len(self.samples.get(k, ()))}"
            boundary_of[id] = k
            ids = self._request(k).ids
            seed = judge.config.seed
            requests.append(Request(id, ids, judge.sampling, count, seed, self.trunk))
        for generation in judge.backend.generate(requests):
            k = boundary_of[generation.id]
            if generation.error:
                message = f"{self.row.id}: no verdict on {k} sentences: {generation.error}"
                raise KitError(message, "Run the command again to resume.")
            cached_tokens = max(generation.prompt_tokens - generation.prefill_tokens, 0)
            self.session.cost.add(TokenUsage(generation.prefill_tokens, cached_tokens))
            self.generated_tokens += sum(len(text.ids) for text in generation.completions)
            yield k, generation.completions


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
    # Traces that cannot be judged, and those that leave nothing to decide.
    if not row.trace.strip():
        return cut_at_ratio(row)
    if judge.settings.kind != "verbal" and not row.answer.strip():
        detail = f"judge.kind={judge.settings.kind} compares with the gold answer"
        return _reject(row, "no gold answer", detail)
    searched = judge.boundaries_within(row)
    if not searched:
        detail = f"the first sentence's question is over the limit of {judge.limit_tokens} tokens"
        return _reject(row, "no boundary within the context", detail)
    if row.sentences_total == 1:
        return cut_at_ratio(row)

    try:
        return _search(judge, row, steer, search or judge.settings.search, searched)
    except (RuntimeError, MemoryError, KitError) as error:
        if not is_out_of_memory(error):
            raise
        return _reject(row, "out of memory", str(error))


def _search(
    judge: Judge,
    row: PrefixRow,
    steer: Callable[[int], bool] | None,
    search: str,
    searched: int,
) -> PrefixRow:
    """Judge and cut a trace of which the first `searched` sentences fit the judge."""
    begun = time.perf_counter()

    # 1. Ask, each question from the cache of the ones before.
    with open_trace(judge, row, searched, search == "uncached") as trace:
        trace.steer = steer
        boundary = trace.search(search, searched)
        isolated = None
        if boundary and not steer:
            isolated = trace.is_isolated(boundary, searched, search)

    # 2. Keep what suffices; an insufficient trace is kept whole, if all of it was searched.
    kept = boundary or row.sentences_total
    judged = {k: verdict.label == "ENOUGH" for k, verdict in trace.verdicts.items()}
    cut_row = keep(
        row,
        kept,
        sufficient=boundary is not None,
        searched_sentences=searched,
        isolated=isolated,
        verdicts=tuple(trace.verdicts.values()),
        violations=violations(judged),
        samples=trace.samples.get(kept, ()),
        generated_tokens=trace.generated_tokens,
        prompt_tokens=trace.prompt_tokens,
        **vars(trace.session.cost),
        seconds=round(time.perf_counter() - begun, 3),
    )
    if boundary is None and searched < row.sentences_total:
        detail = (
            f"{searched} of {row.sentences_total} sentences were searched, "
            f"the limit is {judge.limit_tokens} tokens"
        )
        return _reject(cut_row, "nothing sufficient within the context", detail)
    return cut_row


@contextmanager
def open_trace(
    judge: Judge, row: PrefixRow, furthest: int, uncached: bool = False
) -> Iterator[TraceJudge]:
    """Put a trace under judgement, up to the boundary `furthest`; its cache is freed on leaving."""
    with ExitStack() as stack:
        session = stack.enter_context(closing(judge.backend.session(uncached=uncached)))
        trace = TraceJudge(judge, row, session)
        if judge.generates_verdicts and not uncached:
            longest = len(trace._request(furthest).ids)
            trunk = Trunk(longest + judge.sampling.max_new_tokens)
            trace.trunk = stack.enter_context(trunk)
        yield trace


def cut_at_ratio(row: PrefixRow, ratio: float = 1.0) -> PrefixRow:
    """Cut at a share of the sentences in (0, 1], at least one (the ratio-X baselines), unjudged."""
    if not row.trace.strip():
        return _reject(row, "empty trace", "there is nothing to cut")
    return keep(row, max(1, round(row.sentences_total * ratio)))


def keep(row: PrefixRow, sentences: int, **fields: Any) -> PrefixRow:
    """A copy of the row that keeps so many sentences, with further fields replaced."""
    cut_fields = {
        "sentences": sentences,
        "ratio": sentences / row.sentences_total,
        "end": ends(row.trace)[sentences - 1],
        "samples": (),
    }
    return row.model_copy(update={**cut_fields, **fields})


def _reject(row: PrefixRow, reason: str, detail: str) -> PrefixRow:
    return row.model_copy(update={"rejected": reason, "detail": detail, "sufficient": False})


@contextmanager
def open_judge(config: Config) -> Iterator[Judge]:
    """Open the student and a judge on it; both are closed on leaving."""
    with closing(open_backend(config.student)) as backend, Judge(config, backend) as judge:
        yield judge


def from_problem(problem: Problem) -> PrefixRow:
    """A problem's own trace, whole, as `cut` takes it."""
    fields = problem.model_dump(include=PROBLEM_FIELDS)
    sample = Sample(text=problem.trace or "", verdict="unparsed")
    row = TraceRow(**fields, samples=(sample,), kept=(0,))
    return row.whole(ends)[0]


def split_labels(
    first: Sequence[int], second: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, int]]:
    """The tokens that two labels begin with alike, and the two tokens where they part.

    Raises:
        KitError: (exit 2) one label's tokens begin the other's.
    """
    shared = common_prefix_len(first, second)
    if shared == min(len(first), len(second)):
        message = f"One label's tokens begin the other's: {list(first)} and {list(second)}."
        hint = "Set judge.labels to two texts of which neither starts with the other."
        raise KitError(message, hint, 2)
    return tuple(first[:shared]), (first[shared], second[shared])


def first_label(text: str, labels: tuple[str, str]) -> Label:
    """The label that comes first in a generated text, the longer one where both begin there."""
    longest_first = sorted(labels, key=len, reverse=True)
    match = re.search("|".join(map(re.escape, longest_first)), text)
    if match is None:
        return "UNPARSED"
    return "ENOUGH" if match[0] == labels[0] else "NOT_ENOUGH"
