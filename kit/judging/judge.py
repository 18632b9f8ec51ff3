"""The judge: what a model is asked about a prefix, and how its answer is read (section 3.2).

Three kinds: verbal (is this enough?), answer (is the gold answer likely now?) and success (do
continuations reach it?). Which boundaries are asked is in search.py, how their verdicts come about
in trace.py, and what becomes of a row in cut.py.

Paper: each verdict is a generation of up to 256 tokens. Here: it is read from log-probabilities at
the token where the two labels part; `judge.decode: generate` asks the paper's way.
"""

import re
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import lru_cache

from kit.backends import open_backend
from kit.backends.base import Backend, Ids, Logprobs, ScoreRequest, Tokenizer, common_prefix_len
from kit.core.config import Calibration, Config, Sampling
from kit.core.errors import KitError
from kit.core.methods import method_of
from kit.core.records import Label, PrefixRow
from kit.core.thinking import after_thinking, is_left_open, without_opening
from kit.grading.answers import gold_of
from kit.judging.calibration import calibrated_threshold
from kit.judging.sentences import ends
from kit.prompts import (
    PrefixEncoder,
    draft_turns,
    encode_after,
    encode_answer,
    judge_text,
    render,
    render_text,
    solve_text,
    text_of,
)
from kit.sampling import grader_of, item_of

# How binary-cut asks, whatever the section judge says.
FORCED_ANSWER = {
    "kind": "answer",
    "answer_scoring": "greedy",
    "search": "binary",
    "threshold": None,
    "calibration": "none",
}
LABEL_OF_GRADE: dict[str, Label] = {"correct": "ENOUGH", "wrong": "NOT_ENOUGH"}
ROOM_RATIO = 0.25  # of the limit, at most, that is left free where something is generated

# A generated answer begins inside the box that `prompts.answer_cue` opens: its text up to the brace
# that closes this box, with two levels of braces inside.
_REST_OF_BOX = re.compile(r"((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})+)\}")


class Judge(ExitStack):
    """What one backend is asked about a prefix, and how its answer is read.

    A context manager: leaving it, or `close`, ends the grader; the backend stays open.

    Raises:
        KitError: (exit 2) one label's tokens begin the other's; another judge's calibration.
    """

    def __init__(self, config: Config, backend: Backend) -> None:
        super().__init__()
        settings = config.judge
        self.config = config
        self.settings = settings
        self.backend = backend
        # leaving the judge ends the grader, see ExitStack
        self.grader = self.enter_context(grader_of(config))

        # 1. How a verdict comes about: by what the model writes, or by log-probabilities.
        self.generates_verdicts = {
            "verbal": settings.decode == "generate",
            "answer": settings.answer_scoring == "greedy",
            "success": True,
        }[settings.kind]
        # What is generated is a short greedy answer, or a continuation as `align` draws it.
        self.sampling = Sampling(temperature=0, top_p=1, max_new_tokens=settings.max_new_tokens)
        if settings.kind == "success":
            self.sampling = config.align.sampling

        # 2. From which margin on a prefix is ENOUGH. verbal: log-odds of the first label. answer:
        # mean log-likelihood per gold token in nats; -1 is a token with a probability of 0.37.
        default = {"verbal": 0.0, "answer": -1.0, "success": settings.confidence}[settings.kind]
        self.threshold = default if settings.threshold is None else settings.threshold
        # content-free is an offset of each trace, see trace.py
        if isinstance(settings.calibration, Calibration):
            self.threshold = calibrated_threshold(self, settings.calibration)

        # 3. Where verbal's labels part. Their first tokens may be equal ("[" in ours); the verdict
        # is read after them.
        self.shared_label_tokens, self.label_tokens = split_labels(
            backend.tokenizer, settings.labels
        )

        # Does the prompt end inside the model's thinking? Then a label there is no verdict yet.
        student = config.student
        self.thinks_first = is_left_open(
            render_text(backend.tokenizer, "?", student.system, student.thinking)
        )

        # 4. How long a judging prompt may be.
        # Servers refuse a prompt that leaves no room for a token.
        context_tokens = backend.context_tokens - (config.student.backend == "http")
        self.limit_tokens = min(settings.limit_tokens or context_tokens, context_tokens)
        if self.generates_verdicts:
            room_tokens = int(ROOM_RATIO * self.limit_tokens)
            self.limit_tokens -= min(self.sampling.max_new_tokens, room_tokens)

        # The prompts of a trace begin alike, so it has an encoder of its own, which tokenizes from
        # where they part. A server judges several traces at once.
        encode = backend.tokenizer.encode
        self._encoder_of_trace = lru_cache(maxsize=64)(lambda _row_id: PrefixEncoder(encode))

    def prompt(self, row: PrefixRow, prefix: str) -> Ids:
        """The question about a prefix as token ids (T,), up to where the model answers.

        verbal: the prefix stands in the user's turn, and the answer is a label. answer: the prefix
        and the cue begin the model's own turn, which goes on with the gold answer. success: as
        `align` shows a draft.
        """
        prompts = self.config.prompts
        if self.settings.kind == "verbal":
            user = judge_text(prompts, row.question, prefix)
            answer = ""
        elif self.settings.kind == "success":
            user, answer = draft_turns(self.config, row.question, prefix)
        else:
            user = solve_text(prompts, row.question)
            answer = prefix + text_of(prompts, "answer_cue")
        encode = self._encoder_of_trace(row.id).encode
        tokenizer = self.backend.tokenizer
        return render(tokenizer, user, self.config.student, answer, encode)

    def request(self, row: PrefixRow, prefix: str) -> ScoreRequest:
        """The question with the positions where its verdict is read; none where it is generated.

        What the model expects of a token is read at the position before it.
        """
        ids = self.prompt(row, prefix)
        if self.generates_verdicts:
            return ScoreRequest(ids, ())
        if self.settings.kind == "verbal":
            ids += self.shared_label_tokens
            return ScoreRequest(ids, ((len(ids) - 1, self.label_tokens),))
        # The gold answer is given, and each of its tokens read: its last one need not be evaluated.
        gold = tuple(encode_after(self.backend.tokenizer, gold_of(row.answer)))
        reads = tuple((position, (token,)) for position, token in enumerate(gold, len(ids) - 1))
        return ScoreRequest(ids + gold[:-1], reads)

    def boundaries_within(self, row: PrefixRow) -> int:
        """How many boundaries can be asked: all, or those whose question fits `limit_tokens`."""
        cuts = ends(row.trace)

        def question_tokens(k: int) -> int:
            return len(self.request(row, row.trace[: cuts[k - 1]]).ids)

        if question_tokens(len(cuts)) <= self.limit_tokens:
            return len(cuts)
        # Questions grow with k: how many of the others are at the limit or below?
        return bisect_right(range(1, len(cuts)), self.limit_tokens, key=question_tokens)

    def margin(self, logprobs: Logprobs) -> float:
        """Log-odds of the first label (verbal), or mean log-likelihood per gold token (answer).

        That of success comes from its samples, see trace.py.

        Args:
            logprobs: what a session reads for `request`: at one position the two labels, or at each
                position a token of the gold answer.
        """
        if self.settings.kind == "verbal":
            [(enough, not_enough)] = logprobs
            return enough - not_enough
        return sum(token for [token] in logprobs) / len(logprobs)

    def label(self, margin: float) -> Label:
        """ENOUGH from the threshold on."""
        return "ENOUGH" if margin >= self.threshold else "NOT_ENOUGH"

    def label_in_text(self, text: str, row: PrefixRow) -> Label:
        """The verdict in a generated text: its label (verbal), or its answer's grade (answer).

        UNPARSED where the text holds neither label after its thinking, or no answer that can be
        graded.
        """
        if self.settings.kind == "verbal":
            answered = after_thinking(text)
            if answered is None and (self.thinks_first or without_opening(text) != text):
                return "UNPARSED"
            return first_label(text if answered is None else answered, self.settings.labels)
        boxed = _REST_OF_BOX.match(text)
        if boxed is None:
            return "UNPARSED"
        [grade] = self.grader.grade([item_of(row, boxed[1])], bare=True)
        return LABEL_OF_GRADE.get(grade.verdict, "UNPARSED")


@contextmanager
def open_judge(config: Config) -> Iterator[Judge]:
    """Open the student and a judge on it; both are closed on leaving."""
    if method_of(config.method).cut == "binary-cut":
        settings = config.judge.model_copy(update=FORCED_ANSWER)
        config = config.model_copy(update={"judge": settings})
    with closing(open_backend(config.student)) as backend, Judge(config, backend) as judge:
        yield judge


def split_labels(tokenizer: Tokenizer, labels: tuple[str, str]) -> tuple[Ids, tuple[int, int]]:
    """The tokens that two labels begin with alike, and the two tokens where they part.

    Raises:
        KitError: (exit 2) one label's tokens begin the other's.
    """
    first, second = (encode_answer(tokenizer, label) for label in labels)
    shared = common_prefix_len(first, second)
    if shared == min(len(first), len(second)):
        message = f"One label's tokens begin the other's: {first} and {second}."
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
