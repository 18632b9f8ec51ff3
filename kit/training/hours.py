"""How long a run takes on named cards, from their bandwidth and arithmetic; and as measured.

A decoding step of B sequences reads every weight once and every sequence's cache; a prefill is
bound by arithmetic; a training step by both. The cards' figures come from the makers' data sheets.
What the hf backend adds to a step, and what training moves, was fitted to measurements of a 7B
shape on an H100; other cards are assumed to be like it. Memory is in plan.py.
"""

from typing import NamedTuple

from kit import Json
from kit.core.bundled import bundled
from kit.core.config import Config
from kit.core.memory import FREE_RATIO
from kit.core.run import read_manifest
from kit.shape import NF4_BYTES, ModelShape, card_limit

# Tokens and counts of the paper's data (s1K-1.1, and a 7B student on it), where the config says
# nothing smaller.
PROBLEMS = 1000
EVAL_PROBLEMS = {"math500": 500, "aime24": 30, "aime25": 30, "amc12": 83}
QUESTION_TOKENS = 200
PREFIX_TOKENS = 800
VERDICTS = 8  # of a binary search
TAIL_TOKENS = 300  # evaluated for a verdict, past the shared prefix
JUDGED_RATIO = 0.58  # of a trace, that a binary search prefills
# Shares of the data sheet's figures that are reached.
BANDWIDTH_RATIO = 0.85
ARITHMETIC_RATIO = 0.5
# The rest of a training step (casts, dropout, adapters, norms; forward twice and back), as bytes
# moved per token: so many times linear / hidden. Fitted to steps of 4,096 and 16,384 tokens.
TRAINING_BYTES = 170
# The rest of a replayed step of the hf backend, and what each row adds. Fitted; includes the
# recording, of which there is one in some hundred steps.
STEP_SECONDS = 0.0045
ROW_SECONDS = 0.0001
# Launching a layer's kernels from Python, in each pass that no CUDA graph replays. bitsandbytes'
# layers take longest. Not measured: an unmerged adapter, launched and replayed.
LAYER_SECONDS = 0.0014
NF4_LAYER_SECONDS = 0.0037
LORA_SECONDS = 0.00056
REPLAYED_LORA_SECONDS = 0.0001
SERVED_ROWS = 8  # that must fit beside 16-bit weights, or a server takes 4-bit ones
THIS_RUN = "this run"  # where the hours of named cards are listed


class Lengths(NamedTuple):
    """Mean tokens of what a run generates and trains on; as they are in the paper's data."""

    trace: int = 10_000
    continuation: int = 2900  # with those that run into the limit
    base: int = 1100  # of an answer
    tuned: int = 3400
    target: int = 2600  # of a training row


PAPER = Lengths()


class Card(NamedTuple):
    """A card's data sheet."""

    bandwidth: float  # bytes a second
    arithmetic: float  # 16-bit matrix operations a second, summed in fp32
    memory_gib: float


CARDS = {name: Card(**sheet) for name, sheet in bundled("training/cards").items()}

# bytes that a weight takes, and that a step moves for it
SIXTEEN_BITS = (2.0, 2.0)
FOUR_BITS = (0.6, 0.6)  # Q4_K_M, AWQ
# bitsandbytes dequantizes in each step: reads 4 bits, writes and reads 16, in part in the cache (a
# single row takes less: its 4-bit kernel writes no 16 bits)
NF4 = (NF4_BYTES, 3.5)


class Speed(NamedTuple):
    """A model on a card."""

    shape: ModelShape
    card: Card
    weights: tuple[float, float]  # see SIXTEEN_BITS
    layer_seconds: float = 0.0  # launching a layer from Python
    replayed: bool = False  # whether CUDA graphs launch the steps instead
    step_seconds: float = 0.0  # beside the card's own work
    row_seconds: float = 0.0  # likewise, per token drawn
    lora_seconds: float = 0.0  # likewise, per layer with an unmerged adapter

    def prefill(self, tokens: float) -> float:
        """Seconds to evaluate so many tokens of a prompt."""
        return 2 * self.shape.linear * tokens / (ARITHMETIC_RATIO * self.card.arithmetic)

    def evaluate(self, tokens: float) -> float:
        """Seconds of a pass over so many tokens, launched from Python."""
        return max(self.prefill(tokens), self.shape.layers * self.layer_seconds)

    def train(self, tokens: float) -> float:
        """Seconds to train on a row: forward, again for the checkpoints, back through the base."""
        shape = self.shape
        moved = TRAINING_BYTES * shape.linear / shape.hidden * tokens
        seconds = 3 * self.prefill(tokens) + moved / (BANDWIDTH_RATIO * self.card.bandwidth)
        return max(seconds, 3 * shape.layers * self.layer_seconds)

    def rows(self, context_tokens: float, most: int) -> int:
        """Sequences of so many tokens that run side by side, at most `most`; 0: none fits."""
        held = self.shape.linear * self.weights[0] + self.shape.other * 2
        room = FREE_RATIO * (card_limit(self.card.memory_gib) - held)
        return max(0, min(most, int(room / (2 * self.shape.cached * context_tokens))))

    def step(self, rows: int, context_tokens: float) -> float:
        """Seconds of a step that draws a token for every row."""
        shape = self.shape
        head = 2 * shape.hidden * shape.vocabulary
        weights = shape.linear * self.weights[1] + head
        cache = 2 * shape.cached * rows * context_tokens
        bandwidth = BANDWIDTH_RATIO * self.card.bandwidth
        launching = 0.0 if self.replayed else shape.layers * self.layer_seconds
        bound = max(weights / bandwidth, launching, self.prefill(rows))
        added = shape.layers * self.lora_seconds + self.step_seconds + rows * self.row_seconds
        return bound + cache / bandwidth + added

    def answer(self, prompt: float, tokens: float, most: int) -> float:
        """Seconds per answer of so many tokens, when as many as fit run side by side."""
        context_tokens = prompt + tokens / 2
        rows = self.rows(context_tokens, most)
        return self.evaluate(prompt) + tokens * self.step(rows, context_tokens) / rows


def lengths_of(config: Config) -> Lengths:
    """The paper's lengths, within the config's limits; a trace from a file has the paper's."""
    trace_tokens = config.teacher.sampling.max_new_tokens
    if config.teacher.backend == "file":
        trace_tokens = PAPER.trace
    answer_tokens = config.eval.sampling.max_new_tokens
    limits = Lengths(
        trace=trace_tokens,
        continuation=config.align.sampling.max_new_tokens,
        base=answer_tokens,
        tuned=answer_tokens,
        target=config.train.max_seq_tokens,
    )
    return Lengths(*map(min, PAPER, limits))


def speeds(config: Config, shape: ModelShape, card: Card) -> dict[str, Speed]:
    """The student on a card, by backend; a server takes 4 bits where 16 leave too little room."""
    served = Speed(shape, card, SIXTEEN_BITS)
    if served.rows(PAPER.trace, SERVED_ROWS) < SERVED_ROWS:
        served = Speed(shape, card, FOUR_BITS)
    return {
        "hf": _on_hf(shape, card, config.student.dtype == "nf4", config.student.cuda_graphs),
        "gguf": Speed(shape, card, FOUR_BITS, row_seconds=0.0005),
        "http": served,
    }


def _on_hf(shape: ModelShape, card: Card, in_4_bits: bool, graphs: bool) -> Speed:
    speed = Speed(shape, card, SIXTEEN_BITS, LAYER_SECONDS)
    if in_4_bits:
        speed = Speed(shape, card, NF4, NF4_LAYER_SECONDS)
    if graphs:
        speed = speed._replace(replayed=True, step_seconds=STEP_SECONDS, row_seconds=ROW_SECONDS)
    return speed


def card_hours(config: Config, shape: ModelShape) -> dict[str, Json]:
    """Estimate every stage on every card with every backend.

    Returns:
        {card: {backend: {stage: hours, total}}}; {total: None} where no sequence fits.
    """
    hours: dict[str, Json] = {}
    for name, card in CARDS.items():
        hours[name] = {}
        for backend, speed in speeds(config, shape, card).items():
            evaluating = _evaluating(config, speed) if backend == "hf" else speed
            hours[name][backend] = _hours(config, speed, evaluating)
    return hours


def _evaluating(config: Config, speed: Speed) -> Speed:
    """The hf backend with a trained adapter.

    In 16 bits the adapter is merged. Where they do not fit, 4 bits are estimated.
    """
    graphs = config.eval.cuda_graphs
    in_16_bits = _on_hf(speed.shape, speed.card, False, graphs)
    if config.eval.dtype != "nf4" and in_16_bits.rows(PAPER.trace, 1):
        return in_16_bits
    in_4_bits = _on_hf(speed.shape, speed.card, True, graphs)
    return in_4_bits._replace(lora_seconds=REPLAYED_LORA_SECONDS if graphs else LORA_SECONDS)


def _hours(config: Config, speed: Speed, evaluating: Speed) -> Json:
    """Hours of each stage and in total."""
    most = config.student.rows(on_card=True)
    lengths = lengths_of(config)
    draft_tokens = QUESTION_TOKENS + PREFIX_TOKENS
    written_tokens = draft_tokens + lengths.continuation
    answer_tokens = QUESTION_TOKENS + max(lengths.base, lengths.tuned)
    fits = speed.rows(max(lengths.trace, written_tokens), 1) and evaluating.rows(answer_tokens, 1)
    if not fits:
        return {"total": None}
    problems = config.data.train.limit or PROBLEMS
    teaching = problems * config.teacher.samples
    if config.teacher.backend in ("file", "reference"):
        teaching = 0
    verdict = speed.evaluate(TAIL_TOKENS) + speed.step(1, lengths.trace)
    answer = evaluating.answer(QUESTION_TOKENS, lengths.tuned, most)
    if config.eval.base:
        untrained = evaluating._replace(lora_seconds=0.0)
        answer += untrained.answer(QUESTION_TOKENS, lengths.base, most)
    seconds = {
        "teach": teaching * speed.answer(QUESTION_TOKENS, lengths.trace, most),
        "truncate": problems * (speed.prefill(JUDGED_RATIO * lengths.trace) + VERDICTS * verdict),
        "align": problems
        * config.align.samples
        * speed.answer(draft_tokens, lengths.continuation, most),
        "train": problems * config.train.epochs * speed.train(lengths.target),
        "eval": _eval_answers(config) * answer,
    }
    return in_hours(seconds)


def in_hours(seconds: dict[str, float]) -> Json:
    """Seconds by stage as hours, with their total."""
    hours = {stage: round(each / 3600, 3) for stage, each in seconds.items()}
    return {**hours, "total": round(sum(hours.values()), 3)}


def assumptions(config: Config) -> str:
    """What `card_hours` assumes, a line each."""
    lengths = lengths_of(config)
    overhead = f"hf launches a layer in {LAYER_SECONDS * 1000} to {NF4_LAYER_SECONDS * 1000} ms"
    if config.student.cuda_graphs:
        overhead = f"hf adds {STEP_SECONDS * 1000} ms to a step and {ROW_SECONDS * 1000} ms a row"
    return (
        f"{config.data.train.limit or PROBLEMS} problems, traces of {lengths.trace} tokens, "
        f"{VERDICTS} verdicts each\n"
        f"continuations of {lengths.continuation} tokens, training rows of {lengths.target}\n"
        f"{_eval_answers(config)} answers of {lengths.base} tokens before training, of "
        f"{lengths.tuned} after it\n"
        f"{BANDWIDTH_RATIO:.0%} of a card's bandwidth, {ARITHMETIC_RATIO:.0%} of its arithmetic\n"
        f"{overhead}\n"
        "gguf in 4 bits; http: vLLM in 16 bits; hf evaluates as eval.dtype says; both in 4 bits "
        "where 16 do not fit; train runs on hf\n"
        "teach: as if the teacher had the student's size"
    )


def _eval_answers(config: Config) -> int:
    answers = 0
    for dataset in config.data.eval:
        problems = dataset.limit or EVAL_PROBLEMS.get(str(dataset.name), PROBLEMS)
        answers += problems * (dataset.samples or config.eval.samples)
    return answers


def rows_of(hours: dict[str, Json]) -> list[Json]:
    """The hours as rows of a table, without those where no sequence fits."""
    rows = []
    for card, by_backend in hours.items():
        for backend, stages in by_backend.items():
            if stages["total"] is not None:
                rows.append({"card": card, "backend": backend, **stages})
    return rows


def measured_seconds(config: Config) -> dict[str, float]:
    """Seconds of each stage that is done in the run's folder, for as many problems as this config
    has.
    """
    stages = read_manifest(config.folder).get("stages", {})
    problems = config.data.train.limit
    before = stages.get("teach", {}).get("rows_in")
    growth = problems / before if problems and before else 1.0
    measured = {}
    for stage, entry in stages.items():
        if entry.get("done") and entry.get("seconds"):
            measured[stage] = entry["seconds"] * (1.0 if stage == "eval" else growth)
    return measured
