"""One trace under judgement: boundaries are asked, and their verdicts kept (section 3.2).

Paper: every question is prefilled again. Here: all prompts of a trace share one cache; how a
backend reuses it is decided in kit/backends. What is asked is in judge.py, in which order in
search.py.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from functools import partial

from kit.backends.base import (
    Completion,
    Request,
    ScoreRequest,
    ScoringSession,
    TokenUsage,
    Trunk,
)
from kit.core.errors import KitError
from kit.core.records import PrefixRow, Sample, Verdict
from kit.judging.judge import Judge
from kit.judging.search import binary, choose, gallop, sweep
from kit.judging.sentences import ends
from kit.judging.success import missing_draws, success_probability
from kit.sampling import grade_samples

STRETCH_CHARACTERS = 2048  # of a trace, that a sweep reads in one pass: about 512 tokens
STRETCH_DRAWS = 8  # generated in one batch, at most, where a stretch is drawn


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
    verdicts: dict[int, Verdict] = field(default_factory=dict)  # by boundary, in the order asked
    samples: dict[int, tuple[Sample, ...]] = field(default_factory=dict)  # kind success
    generated_tokens: int = 0
    calibration_offset: float = 0.0  # content-free: the margin of an empty prefix

    def __post_init__(self) -> None:
        self.ends = ends(self.row.trace)
        judge = self.judge
        # the largest difference in nats between cached and uncached margins seen so far; raised
        # when a margin that is read again differs more
        is_cached = not (self.session.uncached or judge.generates_verdicts)
        self.cache_move = judge.backend.cache_move if is_cached else 0.0
        if judge.settings.calibration == "content-free" and not judge.generates_verdicts:
            [logprobs] = self.session.score([judge.request(self.row, "")])
            self.calibration_offset = judge.margin(logprobs)

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
        settings = self.judge.settings
        if settings.kind == "success":
            return min(first + max(STRETCH_DRAWS // settings.samples, 1) - 1, m)
        if self.judge.generates_verdicts:
            return min(first + STRETCH_DRAWS - 1, m)
        if self.session.uncached:
            return first
        return min(bisect_right(self.ends, self.ends[first - 1] + STRETCH_CHARACTERS), m)

    def is_isolated(self, kept: int, m: int, search: str) -> bool | None:
        """Whether the boundary after the kept one, of m, is not ENOUGH; None: not known.

        It is asked where the cache makes that cheap. Elsewhere only sweep and scan can tell: after
        binary and gallop the next boundary is ENOUGH or was not asked.
        """
        after = kept + 1
        if after > m:
            return None
        if self.judge.generates_verdicts or self.session.uncached:
            if search not in ("sweep", "scan") or after not in self.verdicts:
                return None
        elif after not in self.verdicts:
            self.ask(after)
        return self.verdicts[after].label != "ENOUGH"

    def ask(self, k: int) -> bool:
        """Whether the first k sentences suffice."""
        return self.ask_many([k])[0]

    def ask_many(self, boundaries: Sequence[int]) -> list[bool]:
        """Ask several boundaries together, none of which was asked before."""
        if self.judge.settings.kind == "success":
            verdicts = self._draw_verdicts(boundaries)
        elif self.judge.generates_verdicts:
            verdicts = self._generate_verdicts(boundaries)
        else:
            verdicts = self._score_verdicts(boundaries)
        # in the order asked, whichever was decided first
        for k in boundaries:
            self.verdicts[k] = verdicts[k]
        if self.steer:
            return [self.steer(k) for k in boundaries]
        return [self.verdicts[k].label == "ENOUGH" for k in boundaries]

    def request(self, k: int) -> ScoreRequest:
        """The question about the first k sentences."""
        return self.judge.request(self.row, self.row.trace[: self.ends[k - 1]])

    def _verdict(self, k: int, margin: float) -> Verdict:
        return Verdict(sentences=k, label=self.judge.label(margin), margin=round(margin, 6))

    # --- read from log-probabilities ---

    def _score_verdicts(self, boundaries: Sequence[int]) -> dict[int, Verdict]:
        """Read verdicts from log-probabilities, all in one call.

        Where a cache moves margins by more than rounding, verdicts nearer to the threshold than
        the largest move are read again without it, the nearest first.
        """
        requests = {k: self.request(k) for k in boundaries}
        scores = self.session.score(list(requests.values()))
        margins = {}
        for k, logprobs in zip(boundaries, scores, strict=True):
            margins[k] = self.judge.margin(logprobs) - self.calibration_offset

        threshold = self.judge.threshold
        for k in sorted(margins, key=lambda k: abs(margins[k] - threshold)):
            if abs(margins[k] - threshold) < self.cache_move:
                margin = self._uncached_margin(requests[k])
                self.cache_move = max(self.cache_move, abs(margin - margins[k]))
                margins[k] = margin
        return {k: self._verdict(k, margin) for k, margin in margins.items()}

    def _uncached_margin(self, request: ScoreRequest) -> float:
        with closing(self.judge.backend.session(uncached=True)) as session:
            [logprobs] = session.score([request])
        self.session.cost.add(session.cost)
        return self.judge.margin(logprobs) - self.calibration_offset

    # --- generated ---

    def _generate_verdicts(self, boundaries: Sequence[int]) -> dict[int, Verdict]:
        """Generate verdicts greedily, as the paper does; UNPARSED ones count as not enough."""
        verdicts = {}
        for k, completions in self._texts(dict.fromkeys(boundaries, 1)):
            label = self.judge.label_in_text(completions[0].text, self.row)
            verdicts[k] = Verdict(sentences=k, label=label, margin=None)
        return verdicts

    def _draw_verdicts(self, boundaries: Sequence[int]) -> dict[int, Verdict]:
        """Draw at all boundaries together until the success rate of each is decided."""
        settings = self.judge.settings
        verdicts: dict[int, Verdict] = {}
        while len(verdicts) < len(boundaries):
            missing = {}
            for k in boundaries:
                grades = [sample.verdict for sample in self.samples.get(k, ())]
                correct = grades.count("correct")
                count = missing_draws(correct, len(grades), settings)
                if count:
                    missing[k] = count
                else:
                    margin = success_probability(correct, len(grades), settings.success_rate)
                    verdicts[k] = self._verdict(k, margin)
            self.draw(missing)
        return verdicts

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
            ids = self.request(k).ids
            request = Request(id, ids, judge.sampling, count, judge.config.seed, self.trunk)
            requests.append(request)
        for generation in judge.backend.generate(requests):
            k = boundary_of[generation.id]
            if generation.error:
                message = f"{self.row.id}: no verdict on {k} sentences: {generation.error}"
                raise KitError(message, "Run the command again to resume.")
            cached_tokens = max(generation.prompt_tokens - generation.prefill_tokens, 0)
            self.session.cost.add(TokenUsage(generation.prefill_tokens, cached_tokens))
            self.generated_tokens += sum(len(text.ids) for text in generation.completions)
            yield k, generation.completions


@contextmanager
def open_trace(
    judge: Judge, row: PrefixRow, furthest: int, uncached: bool = False
) -> Iterator[TraceJudge]:
    """Put a trace under judgement, up to the boundary `furthest`; its cache is freed on leaving."""
    with ExitStack() as stack:
        session = stack.enter_context(closing(judge.backend.session(uncached=uncached)))
        trace = TraceJudge(judge, row, session)
        if judge.generates_verdicts and not uncached:
            longest = len(trace.request(furthest).ids)
            trunk = Trunk(longest + judge.sampling.max_new_tokens)
            trace.trunk = stack.enter_context(trunk)
        yield trace
