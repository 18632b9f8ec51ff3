"""What the baselines of the field keep of a trace, where the student is asked for no verdict.

A rule takes a whole trace and returns a copy of its row: a beginning of the trace, some of its
sentences in their order, or what the teacher wrote after its thinking; or rejected, with the
reason. Which method has which rule is in kit/core/methods.py. `binary-cut` and the fixed shares are
cuts of cut.py. How the kept text is trained on is not known here.
"""

import re
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from itertools import pairwise
from typing import cast

from kit.backends import open_backend
from kit.backends.base import Ids, common_prefix_len
from kit.backends.hf import HfBackend
from kit.core.config import Config, expand
from kit.core.errors import KitError
from kit.core.methods import method_of
from kit.core.records import PrefixRow
from kit.core.run import stage_entry
from kit.core.storage import RowFile
from kit.data import normal
from kit.grading.answers import Grader, gold_of, last_box
from kit.judging.cut import Cut, cut_at_ratio, keep, reject, sentences_at, within_memory
from kit.judging.sentences import ends, split
from kit.prompts import PrefixEncoder, render, solve_text
from kit.sampling import grader_of, item_of

# What may stand before the value in which a sentence ends: 3 + 4 = 7, "so it is 7", "leaves 7".
_BEFORE_RESULT = (
    r"(?:[=≈]|\b(?:is|are|be|equals?|gives?|gets?|makes?|leaves?|has|have|so|then|thus|hence|"
    r"therefore|total|sum|result|answer|to|of)\b)[^=\d]{0,80}?"
)
# A sentence that opens a check of what is known already. "Wait" alone does not: what follows it
# may be a correction.
_CHECK = re.compile(
    r"\b(?:(?:double|cross|sanity)[- ]?check\w*|re-?check\w*|verif(?:y|ies|ying|ication)|"
    r"(?:let me|let's|i(?:'ll| should| can| want to| need to)|to) (?:just )?(?:check|confirm|"
    r"validate|make sure|be (?:sure|certain)|re-?examine|go (?:over|through) (?:it|this|that)|"
    r"test (?:it|this)|plug (?:it|this|that|them|these) (?:back )?in)|"
    r"plugging (?:\w+ )?back|going backwards|as a check|check:)",
    re.IGNORECASE,
)


@contextmanager
def open_rule(config: Config) -> Iterator[Cut]:
    """The rule of the config's method; the model or grader that it needs is closed on leaving."""
    name = method_of(config.method).cut
    if name == "ratio":
        yield partial(cut_at_ratio, ratio=config.ratio or 1.0)
    elif name == "fixed-prefix-matched":
        yield partial(cut_at_ratio, ratio=matched_ratio(config))
    elif name == "step-entropy":
        with closing(open_backend(config.student.on_hf)) as backend:
            rule = partial(step_entropy, config, cast(HfBackend, backend))
            yield partial(within_memory, rule)
    else:
        rules = {
            "post-think": post_think,
            "first-correct": first_correct,
            "no-verify": no_verify,
            "mix-long-short": long_or_short,
        }
        with grader_of(config) as grader:
            yield partial(rules[name], grader)


def post_think(grader: Grader, row: PrefixRow) -> PrefixRow:
    """`post-think` (ACL 2026): only what the teacher writes after its thinking.

    That is a key of its own in the data (s1K: deepseek_attempt), what follows `</think>` in a
    trace, or, of the teacher `reference`, the problem's solution.
    """
    if not row.attempt:
        return reject(row, "no attempt", "the teacher wrote nothing after its thinking")
    [grade] = grader.grade([item_of(row, row.attempt)])
    if grade.verdict == "wrong":
        return reject(row, "wrong attempt", f"the attempt's answer is {grade.answer!s:.80}")
    return keep(row, 0, kept_text=row.attempt, end=0)


def first_correct(grader: Grader, row: PrefixRow) -> PrefixRow:
    """`first-correct` (arXiv 2605.13165): up to the first sentence that concludes rightly.

    A sentence concludes with the right answer if it names it as an answer (a box, "the answer is"),
    or if the last value in it is a result and equal to the answer as written: 3 + 4 = 7. A sentence
    of the question is no conclusion.
    """
    question = normal(row.question)
    for number, sentence in enumerate(split(row.trace), 1):
        if normal(sentence) not in question and _concludes(grader, row, sentence):
            return keep(row, number)
    return reject(
        row, "no correct sentence", f"none of {row.sentences_total} concludes with the gold answer"
    )


def _concludes(grader: Grader, row: PrefixRow, sentence: str) -> bool:
    gold = gold_of(row.answer)
    if holds_answer(sentence, gold):
        pattern = rf"{_BEFORE_RESULT}(?<![\w.]){re.escape(gold)}(?!\w|\.\d)[^=\d]{{0,80}}\Z"
        if re.search(pattern, sentence, re.IGNORECASE):
            return True
    elif "boxed" not in sentence:
        return False
    [grade] = grader.grade([item_of(row, sentence)])
    return grade.verdict == "correct"


def holds_answer(text: str, answer: str) -> bool:
    """Whether the gold answer occurs in a text as a word (no number inside another number)."""
    word = rf"(?<![\w.]){re.escape(answer)}(?![\w]|\.\d)"
    return bool(answer and re.search(word, text))


def no_verify(_grader: Grader, row: PrefixRow) -> PrefixRow:
    """`no-verify` (arXiv 2505.14582): all sentences but those that verify what is known already.

    Paper: a model takes the trace apart into a graph of steps, and steps of verification are
    dropped. Here: a sentence that announces a check opens one, and its paragraph ends it; in a
    trace without paragraphs, the sentence is all of it. A boxed answer stays.
    """
    sentences = split(row.trace)
    has_paragraphs = "\n\n" in row.trace.strip()
    kept = []
    verifies = False
    for sentence in sentences:
        if _CHECK.search(sentence):
            verifies = True
        if not verifies or last_box(sentence):
            kept.append(sentence)
        if "\n\n" in sentence or not has_paragraphs:
            verifies = False
    if not kept:
        return reject(row, "only verification", f"all {len(sentences)} sentences verify something")
    return keep(row, len(kept), kept_text="".join(kept), end=0)


def long_and_short(row: PrefixRow) -> list[PrefixRow]:
    """The two rows that `mix-long-short` makes of a trace, not cut yet."""
    return [row.model_copy(update={"id": f"{row.id}{suffix}"}) for suffix in ("-long", "-short")]


def long_or_short(grader: Grader, row: PrefixRow) -> PrefixRow:
    """`mix-long-short` (arXiv 2502.12143, 2505.03469): a long and a short target of each question.

    Paper: short chains of another model, or a model's rewriting, in a share that is tuned. Here:
    both come from one trace, one row each: the whole trace, and the attempt where there is one,
    else the trace up to its first correct sentence.
    """
    if row.id.endswith("-long"):
        return row
    return post_think(grader, row) if row.attempt else first_correct(grader, row)


def step_entropy(config: Config, backend: HfBackend, row: PrefixRow) -> PrefixRow:
    """`step-entropy` (arXiv 2508.03346): the sentences about which the student is least certain.

    A sentence's entropy is the sum of its tokens' (of the distributions that the student would draw
    them from, as its answer to the question). The `baseline.drop_ratio` of the sentences with the
    least are dropped, and `baseline.skip_marker` stands in their place.

    Paper: steps are paragraphs, each with a marker of its own. Here: sentences, and one marker for
    neighbours that are dropped together.
    """
    from kit.backends.hf_session import entropies

    ids, bounds = _token_bounds(config, backend, row)
    if len(ids) > backend.context_tokens:
        return reject(
            row,
            "trace over the context",
            f"question and trace: {len(ids)} tokens; the context: {backend.context_tokens}",
        )
    # A token that runs over a sentence's end belongs to the next sentence. How uncertain it is,
    # the token before it says.
    entropy = entropies(backend, ids)
    sums = [sum(entropy[begin - 1 : end - 1]) for begin, end in pairwise(bounds)]
    least_first = sorted(range(len(sums)), key=sums.__getitem__)
    dropped = set(least_first[: int(len(sums) * config.baseline.drop_ratio)])

    parts = []
    for number, sentence in enumerate(split(row.trace)):
        if number not in dropped:
            parts.append(sentence)
        elif config.baseline.skip_marker and number - 1 not in dropped:
            parts.append(f"{config.baseline.skip_marker} ")
    return keep(row, len(sums) - len(dropped), kept_text="".join(parts), end=0)


def _token_bounds(config: Config, backend: HfBackend, row: PrefixRow) -> tuple[Ids, list[int]]:
    """The student's prompt and the trace as token ids, and where each sentence's tokens begin.

    The last bound is the number of ids.
    """
    tokenizer = backend.tokenizer
    encode = PrefixEncoder(tokenizer.encode).encode
    user = solve_text(config.prompts, row.question)

    def rendered(end: int) -> Ids:
        answer = row.trace[:end]
        return render(tokenizer, user, config.student, answer, encode)

    ids = rendered(len(row.trace))
    bounds = [common_prefix_len(ids, rendered(end)) for end in (0, *ends(row.trace)[:-1])]
    return ids, [*bounds, len(ids)]


def matched_ratio(config: Config) -> float:
    """`fixed-prefix-matched`: the fixed share that keeps as many characters as a P-ALIGN run.

    It is the control that an adaptive cut must beat: of the run's own traces, cut all at this share
    of their sentences, the mean length is as near as sentences allow to that of the cuts which its
    student judged (before any extension in align, which this method has too).

    Raises:
        KitError: (exit 2) no run is named, or no judge cut its traces.
    """
    name = str(config.baseline.matched_run).replace("{seed}", str(config.seed))
    folder = expand(name)
    rows = []
    if stage_entry(folder, "truncate").get("done"):
        rows = RowFile(folder / "prefixes.jsonl", PrefixRow).read(repair=False)
    rows = [row for row in rows if row.verdicts and not row.rejected]
    if not rows:
        raise KitError(
            f"baseline.matched_run={name} holds no run whose traces a judge has cut.",
            "Set it to the folder of a P-ALIGN run that is done.",
            2,
        )
    offsets = [ends(row.trace) for row in rows]
    wanted = sum(row.end for row in rows)

    def distance(ratio: float) -> int:
        return abs(wanted - sum(cuts[sentences_at(len(cuts), ratio) - 1] for cuts in offsets))

    # in steps of a thousandth
    return min((step / 1000 for step in range(1, 1001)), key=distance)
