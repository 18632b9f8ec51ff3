"""One trace under judgement: boundaries are asked, and their verdicts kept (section 3.2).

Paper: every question is prefilled again. Here: all prompts of a trace share one cache; how a
backend reuses it is decided in kit/backends. What is asked is in judge.py, in which order in
search.py.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from functools import partial

from kit.backends.base import Completion, Request, ScoreRequest, ScoringSession, TokenUsage, Trunk
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
        steer: for measurements: whether a boundary suffices is taken from here; the model is asked
            all the same, and its verdicts are kept.
        trunk: keeps what the prompts of generated verdicts and continuations share; None: every
            prompt is whole.
    """

    judge: Judge
    row: PrefixRow
    session: ScoringSession
    steer: Callable[[int], bool] | None = None
    trunk: Trunk | None = None
    verdicts: dict[int, Verdict] = field(default_factory=dict)  # by boundary, in the order asked
    # by boundary, of kind success: the continuations drawn so far, graded
    samples: dict[int, tuple[Sample, ...]] = field(default_factory=dict)
    generated_tokens: int = 0
    calibration_offset: float = 0.0  # content-free: the margin of an empty prefix

    def __post_init__(self) -> None:
        self.ends = ends(self.row.trace)
        judge = self.judge
        # Is a verdict read from a cache that the other boundaries share, and so cheap?
        self.reads_cache = not (self.session.uncached or judge.generates_verdicts)
        # Largest known distance of a cached margin from the uncached one, in nats. It grows with
        # what this trace shows.
        self.cache_error = judge.backend.cache_error if self.reads_cache else 0.0
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
        if name == "gallop":
            return gallop(m, self.ask)
        # uncached asks what binary asks; only its session differs
        return binary(m, self.ask)

    def _stretch_end(self, m: int, first: int) -> int:
        """The last boundary that a sweep asks together with `first`, of m at most.

        As many as one batch draws, or one pass evaluates.
        """
        settings = self.judge.settings
        if self.judge.generates_verdicts:
            draws = settings.samples if settings.kind == "success" else 1
            last = first + max(STRETCH_DRAWS // draws, 1) - 1
        elif self.session.uncached:
            last = first
        else:
            last = bisect_right(self.ends, self.ends[first - 1] + STRETCH_CHARACTERS)
        return min(last, m)

    def ask_isolated(self, kept: int, m: int, search: str) -> bool | None:
        """Whether the boundary after the kept one is not ENOUGH; None: not known, or it is after m.

        It is asked where the cache makes that cheap. Elsewhere only a sweep or a scan can tell, if
        it asked there: binary and gallop never ask a later boundary that is not ENOUGH.
        """
        after = kept + 1
        if after > m or not (self.reads_cache or search in ("sweep", "scan")):
            return None
        if self.reads_cache and after not in self.verdicts:
            self.ask(after)
        verdict = self.verdicts.get(after)
        return None if verdict is None else verdict.label != "ENOUGH"

    def ask(self, k: int) -> bool:
        """Whether the first k sentences suffice."""
        return self.ask_many([k])[0]

    def ask_many(self, boundaries: Sequence[int]) -> list[bool]:
        """Ask several boundaries together, none of which was asked before.

        Returns:
            Whether each suffices: by its verdict, or by `steer`.
        """
        if self.judge.settings.kind == "success":
            verdicts = self._draw_verdicts(boundaries)
        elif self.judge.generates_verdicts:
            verdicts = self._generate_verdicts(boundaries)
        else:
            verdicts = self._score_verdicts(boundaries)
        self.verdicts.update(verdicts)
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
        """Read verdicts from log-probabilities, all in one call."""
        requests = {k: self.request(k) for k in boundaries}
        scores = self.session.score(list(requests.values()))
        margins = {}
        for k, logprobs in zip(boundaries, scores, strict=True):
            margins[k] = self.judge.margin(logprobs) - self.calibration_offset

        # Margins within `cache_error` of the threshold are read again without the cache, nearest
        # first. A larger error widens the band, so that more of the others are read again.
        threshold = self.judge.threshold
        for k in sorted(margins, key=lambda k: abs(margins[k] - threshold)):
            if abs(margins[k] - threshold) < self.cache_error:
                cached_margin = margins[k]
                margins[k] = self._uncached_margin(requests[k])
                self.cache_error = max(self.cache_error, abs(margins[k] - cached_margin))
        return {k: self._verdict(k, margin) for k, margin in margins.items()}

    def _uncached_margin(self, request: ScoreRequest) -> float:
        with closing(self.judge.backend.session(uncached=True)) as session:
            [logprobs] = session.score([request])
        self.session.cost.add(session.cost)
        return self.judge.margin(logprobs) - self.calibration_offset

    # --- generated ---

    def _generate_verdicts(self, boundaries: Sequence[int]) -> dict[int, Verdict]:
        """Generate verdicts greedily, as the paper does; UNPARSED ones count as not enough."""
        labels = {}
        for k, [completion] in self._generate(dict.fromkeys(boundaries, 1)):
            labels[k] = self.judge.label_in_text(completion.text, self.row)
        return {k: Verdict(sentences=k, label=labels[k], margin=None) for k in boundaries}

    def _draw_verdicts(self, boundaries: Sequence[int]) -> dict[int, Verdict]:
        """Draw at all boundaries together until the success rate of each is decided."""
        settings = self.judge.settings
        while True:
            missing = {k: missing_draws(*self._successes(k), settings) for k in boundaries}
            undecided = {k: draws for k, draws in missing.items() if draws}
            if not undecided:
                break
            self.draw(undecided)
        verdicts = {}
        for k in boundaries:
            margin = success_probability(*self._successes(k), settings.success_rate)
            verdicts[k] = self._verdict(k, margin)
        return verdicts

    def _successes(self, k: int) -> tuple[int, int]:
        """How many continuations of a boundary are correct, and how many were drawn."""
        grades = [sample.verdict for sample in self.samples.get(k, ())]
        return grades.count("correct"), len(grades)

    def draw(self, counts: Mapping[int, int]) -> None:
        """Draw and grade so many more continuations at each boundary, into `samples`.

        They are seeded by row, boundary and number, so every search draws the same.
        """
        for k, completions in self._generate(counts):
            drawn = grade_samples(self.judge.grader, completions, self.row)
            self.samples[k] = self.samples.get(k, ()) + drawn

    def _generate(self, counts: Mapping[int, int]) -> Iterator[tuple[int, Sequence[Completion]]]:
        """Generate so many texts at each boundary, and count the tokens; KitError: one fails.

        They come boundary by boundary, in the order in which the backend finishes them.
        """
        judge = self.judge
        boundary_of = {}
        requests = []
        for k, count in counts.items():
            # Seeds come from the request's id: further draws have other ones than those before.
            request_id = f"{self.row.id}@{k}+{len(self.samples.get(k, ()))}"
            boundary_of[request_id] = k
            prompt = self.request(k).ids
            seed = judge.config.seed
            requests.append(Request(request_id, prompt, judge.sampling, count, seed, self.trunk))
        for generation in judge.backend.generate(requests):
            k = boundary_of[generation.id]
            if generation.error:
                message = f"{self.row.id}: no verdict on {k} sentences: {generation.error}"
                raise KitError(message, "Run the command again to resume.")
            cached_tokens = max(generation.prompt_tokens - generation.prefill_tokens, 0)
            self.session.cost.add(TokenUsage(generation.prefill_tokens, cached_tokens))
            self.generated_tokens += sum(len(sample.ids) for sample in generation.completions)
            yield k, generation.completions


@contextmanager
def open_trace(
    judge: Judge, row: PrefixRow, furthest: int, uncached: bool = False
) -> Iterator[TraceJudge]:
    """Put a trace under judgement, up to the boundary `furthest`; its cache is freed on leaving."""
    with ExitStack() as stack:
        session = stack.enter_context(closing(judge.backend.session(uncached=uncached)))
        trace = TraceJudge(judge, row, session)
        # What is scored shares the session's cache; what is generated needs a trunk with room for
        # the longest prompt and its answer.
        if judge.generates_verdicts and not uncached:
            longest = len(trace.request(furthest).ids)
            trunk = Trunk(longest + judge.sampling.max_new_tokens)
            trace.trunk = stack.enter_context(trunk)
        yield trace
