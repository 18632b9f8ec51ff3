"""One typed config: YAML plus `key=value`, every mistake reported at once.

Sections follow the data: data, teacher, judge, align, train, eval. The resolved config is saved in
the run's folder. Nothing here loads a model or opens a data file.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from kit import Json
from kit.core import methods
from kit.core.errors import ConfigError, nearest
from kit.core.old_keys import upgrade
from kit.core.records import Verifier
from kit.core.stages import STAGES

Dtype = Literal["auto", "fp32", "bf16", "int8", "nf4"]
TeacherBackend = Literal["hf", "gguf", "http", "scripted", "file", "reference"]
Derives = Literal["early", "late", "spread"]
Keep = Literal["first", "shortest", "all"]  # of the correct samples
# What a row of data may hold.
Role = Literal[
    "id", "question", "answer", "solution", "trace", "attempt", "level", "subject", "verifier"
]
Share = Annotated[float, Field(gt=0, le=1)]
Ratio = Annotated[float, Field(ge=0, lt=1)]
Probability = Annotated[float, Field(gt=0, lt=1)]
ENV_NAME = r"^[A-Z_][A-Z0-9_]*$"  # a key pasted in its place has other characters, or is refused
MOST_VALUES = 10_000  # of a config, each alias counted in full
# Keys whose refused value is shown nowhere, since it may hold credentials: what belongs there.
SECRETS = {
    "url": "write http://HOST:PORT/v1, and the key's environment variable under api_key_env",
    "api_key_env": "name an environment variable, in capitals (a key may be in lower case); "
    "never write the key itself",
}
# The placeholders that a prompt must hold.
PLACEHOLDERS = {
    "judge": ("{question}", "{prefix}"),
    "draft": ("{question}", "{prefix}"),
    "compare": ("{question}", "{first}", "{second}"),
    "grade": ("{question}", "{first}", "{second}"),
}


class BaseConfig(BaseModel):
    """A frozen group of keys; an unknown key, an infinity and a NaN are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DatasetConfig(BaseConfig):
    """Where problems come from. A bare string is its `path`.

    The path is builtin, holdout (rows of data.train that training never sees), a file or a hub id.
    """

    path: str = "builtin"
    fields: dict[Role, str] = {}  # any JSONL: which key holds what, e.g. {question: KEY}
    preset: str | None = None  # a file of the field by its name, e.g. svamp: kit/presets.yaml
    name: str | None = None  # in eval/ and in tables; default: from the path
    subset: str | None = None  # a hub dataset's configuration, e.g. main
    steps: tuple[int, int] = (1, 4)  # builtin: fewest and most arithmetic steps of a problem
    max_number: int = Field(
        default=60, ge=6
    )  # builtin: largest number that a story begins with or adds
    split: str | None = None
    limit: PositiveInt | None = None
    seed: int | None = None  # None: the first `limit` rows; a number: a seeded subset
    stratify: str | None = None  # level or subject: the subset keeps each stratum's share
    # Of rows that name none of their own; judge: the model of `answer_judge`.
    verifier: Verifier = "math"
    samples: PositiveInt | None = None  # evaluation: answers per problem; None: eval.samples


PathOrDataset = Annotated[
    DatasetConfig, BeforeValidator(lambda raw: {"path": raw} if isinstance(raw, str) else raw)
]
OneOrSeveral = BeforeValidator(lambda raw: raw if isinstance(raw, (list, tuple)) else [raw])


class Data(BaseConfig):
    """Training problems and the held-out problems of the evaluation."""

    train: PathOrDataset = DatasetConfig()
    eval: Annotated[tuple[PathOrDataset, ...], OneOrSeveral] = (DatasetConfig(),)


class Sampling(BaseConfig):
    """How text is sampled. temperature 0 is greedy."""

    temperature: NonNegativeFloat = 0.6
    top_p: Share = 0.9
    top_k: NonNegativeInt = 0  # 0: off
    min_p: Ratio = 0.0
    repetition_penalty: PositiveFloat = 1.0
    max_new_tokens: PositiveInt = 512
    stop: tuple[str, ...] = ()
    stop_loops: bool = False  # end a sample that repeats itself endlessly; http only names it


class ModelConfig(BaseConfig):
    """A model and what runs it. Swapping one backend for another changes one line."""

    backend: Literal["hf", "gguf", "http", "scripted"] = "hf"
    model: str = "smollm2-135m"  # an alias, a .gguf file, a folder or a hub id; http: served name
    dtype: Dtype = "auto"  # auto: bf16 with CUDA (fp16 on cards without it), fp32 without
    context_tokens: PositiveInt | None = None  # None: what the model was trained for
    # Most llama.cpp sequences, HF batch rows (fewer where the KV cache has no room for them), or
    # HTTP requests at once. None: 32 on a card, else 8.
    max_num_seqs: PositiveInt | None = None
    n_threads: PositiveInt | None = None
    # llama.cpp: layers offloaded; -1: all, where it was built for a GPU. hf: 0 stays on the CPU.
    n_gpu_layers: int = -1
    # llama.cpp: faster prefill; a CPU's margins move by some tenths; always on a card
    flash_attention: bool = False
    kv_cache_gib: PositiveFloat | None = None  # hf: KV-cache budget of a batch; None: what is free
    cuda_graphs: bool = True  # hf: on a card, decoding steps are recorded and replayed
    # http: the server's address, ending in /v1, without credentials
    url: str | None = Field(default=None, pattern=r"^https?://[^@?#\s]+$")
    tokenizer: str | None = None  # http: a hub id, folder or .gguf; None: as the server names it
    # http: the name of the environment variable with the key, in capitals; None: no key
    api_key_env: str | None = Field(default=None, pattern=ENV_NAME)
    timeout_seconds: PositiveFloat = 600.0
    retries: NonNegativeInt = 6
    system: str | None = None  # a system message
    thinking: bool = False  # for models whose template has the switch

    @property
    def on_hf(self) -> Self:
        """The same model on transformers, which trains it and gives whole distributions."""
        return self.model_copy(update={"backend": "hf"})

    def rows(self, on_card: bool = False) -> int:
        """Most sequences at a time."""
        return self.max_num_seqs or (32 if on_card else 8)


class Student(ModelConfig):
    """The model that learns."""

    # A trained run, whose adapter it has on when it judges and continues (backend hf).
    adapter: str | None = None

    @model_validator(mode="after")
    def _adapter_is_loaded_here(self) -> Student:
        if self.adapter and self.backend not in ("hf", "scripted"):
            raise ValueError("adapter needs backend hf; or name an exported model as student.model")
        return self


class Teacher(ModelConfig):
    """Who writes the traces: a model, a file, or the problems' own solutions (reference)."""

    backend: TeacherBackend = "gguf"  # type: ignore[assignment]
    path: str | None = None  # file: JSONL with traces; None: data.train has them
    fields: dict[Role, str] = {}  # file: as data.train.fields
    # reference: how much a trace wanders; 0: the bare solution
    wordiness: float = Field(default=1.0, ge=0, le=100)
    derives: Derives = "early"  # reference: where the steps that derive the answer stand
    dead_ends: int = Field(default=0, ge=0, le=100)  # reference: abandoned approaches before them
    samples: PositiveInt = 1
    keep: Keep = "first"
    sampling: Sampling = Sampling()


class Calibration(BaseConfig):
    """What `judge FILE --validate` found, as its calibration.json has it."""

    setup: dict[str, str]  # what it was measured with: names, prompt words and hashes
    thresholds: dict[str, float | None]  # by judge; None: nothing to choose one by


def _read_calibration(raw: Any) -> Any:
    """Put a file's content in place of its name, so that a changed file is a changed key."""
    if not isinstance(raw, str) or raw in ("none", "content-free"):
        return raw
    if not expand(raw).is_file():
        raise ValueError(f"there is no file {raw}; content-free and none need no file")
    try:
        return Calibration.model_validate(json.loads(expand(raw).read_bytes()))
    except ValueError as error:  # pydantic's is one
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise ValueError(
            f"{raw} is no calibration.json of `judge FILE --validate`: {reason}"
        ) from None


class Judge(BaseConfig):
    """How the student is asked whether a prefix is sufficient (section 3.2 of the paper)."""

    search: Literal["binary", "gallop", "sweep", "scan", "uncached"] = "binary"
    scan_rule: Literal["binary", "first", "stable"] = "binary"  # which boundary a scan keeps
    confirm: PositiveInt = 1  # sweep, scan_rule first: as many ENOUGH in a row, or up to the end
    kind: Literal["verbal", "answer", "success"] = "verbal"
    decode: Literal["constrained", "generate"] = "constrained"
    # kind answer: the gold answer's log-likelihood, or a greedy answer, graded.
    answer_scoring: Literal["likelihood", "greedy"] = "likelihood"
    max_new_tokens: PositiveInt = 256  # decode generate, and answer_scoring greedy
    labels: tuple[str, str] = ("[ENOUGH]", "[NOT_ENOUGH]")
    # A margin at or above it is ENOUGH; None: 0 (verbal), -1.0 nats per token (answer).
    threshold: float | None = None
    # Or the calibration.json of `judge FILE --validate`: its threshold for this kind.
    calibration: Annotated[
        Calibration | Literal["none", "content-free"], BeforeValidator(_read_calibration)
    ] = "none"
    limit_tokens: PositiveInt | None = None  # longest judging prompt; None: the context
    # kind success: at most so many continuations are drawn from a prefix, as `align` draws them;
    # it is enough when their grades make a rate of success_rate or more this probable.
    samples: PositiveInt = 4
    success_rate: Probability = 0.5
    confidence: Probability = 0.8

    @model_validator(mode="after")
    def _success_can_be_decided(self) -> Judge:
        if self.kind != "success":
            return self
        if self.threshold is not None or self.calibration != "none":
            raise ValueError(
                "kind success has no margin that threshold or calibration could move; "
                "set success_rate and confidence instead"
            )
        prior = max(self.success_rate, 1 - self.success_rate)
        if self.confidence <= prior:
            raise ValueError(
                f"a confidence of {self.confidence:g} is reached before anything is drawn; "
                f"set it above {prior:g}, or success_rate nearer to 0.5"
            )
        if 1 - self.success_rate ** (self.samples + 1) < self.confidence:
            raise ValueError(
                f"{self.samples} of {self.samples} correct continuations do not give a confidence "
                f"of {self.confidence:g}; set more samples"
            )
        return self


class Baseline(BaseConfig):
    """Keys of single baselines; the others have none."""

    # step-entropy: the share of the sentences that are dropped, those of least entropy
    drop_ratio: Ratio = 0.8
    skip_marker: str = "[SKIP]"  # step-entropy: in place of sentences that are dropped
    # fixed-prefix-matched: the folder of a P-ALIGN run, whose prefixes it equals in mean length;
    # {seed} in it is the config's
    matched_run: str | None = None


class Align(BaseConfig):
    """The student continues from the kept prefix; correct answers stay (section 3.3, Eq. 9)."""

    # The draft is in the user turn (the paper), or begins the answer.
    mode: Literal["prompt", "prefill"] = "prompt"
    samples: PositiveInt = 1
    keep: Keep = "first"
    extend_rounds: NonNegativeInt = 0  # where no sample is correct: rounds with a longer prefix
    sampling: Sampling = Sampling(repetition_penalty=1.05, max_new_tokens=32768)


class Train(BaseConfig):
    """QLoRA (Paper: LoRA on 16-bit weights. Here: NF4)."""

    dtype: Dtype = "nf4"  # of the frozen base
    init: Literal["fresh", "last"] = "fresh"  # last: go on from student.adapter, if there is one
    rank: PositiveInt = 16
    alpha: PositiveInt = 16
    dropout: Ratio = 0.05
    epochs: PositiveFloat = 3.0
    max_steps: PositiveInt | None = None
    learning_rate: PositiveFloat = 5e-5
    weight_decay: NonNegativeFloat = 0.0
    warmup_ratio: Ratio = 0.1
    lr_scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    batch_size: PositiveInt = 32  # rows per optimizer step
    micro_batch_size: PositiveInt = 1  # rows per forward pass; batch_size is a multiple
    group_by_length: bool = True
    max_seq_tokens: PositiveInt = 32768
    on_too_long: Literal["drop", "truncate"] = "drop"
    optimizer: Literal["auto", "adamw", "paged_adamw_8bit"] = "auto"  # auto: paged 8-bit with CUDA
    gradient_checkpointing: bool = True
    logits_bytes: PositiveInt = 256 << 20  # largest slice of logits in memory at once
    max_grad_norm: PositiveFloat = 1.0
    save_minutes: NonNegativeFloat = 10.0  # between checkpoints; 0: one after every step
    on_low_memory: Literal["warn", "refuse"] = "refuse"  # rows that will not fit the card
    report_to: Annotated[tuple[Literal["tensorboard", "wandb", "trackio"], ...], OneOrSeveral] = ()


class Eval(ModelConfig):
    """The student before and after, on problems it never saw.

    Keys of the model that are left out follow `student`.
    """

    samples: PositiveInt = 1
    base: bool = True  # evaluate the untrained student too
    served_adapter: str | None = None  # http: the adapter's name there; None: found or loaded
    sampling: Sampling = Sampling(max_new_tokens=4096)


class Prompts(BaseConfig):
    """The prompts' words, each replaceable by text or by `file:PATH`. None: kit/prompts.yaml's."""

    instruction: str | None = None  # before a question: teaching, training, evaluation
    judge: str | None = None  # the prefix comes last, so that the prompts share a cache
    draft: str | None = None  # alignment; may also hold {instruction}
    answer_cue: str | None = (
        None  # judge.kind answer: what follows a prefix before the boxed answer
    )
    compare: str | None = None  # compare --pairwise-judge
    grade: str | None = None  # verifier judge; answered with Yes or No

    @field_validator("*")
    @classmethod
    def _read_file(cls, text: str | None, field: ValidationInfo) -> str | None:
        """Put a file's words in place of its name, so that a changed file is a changed key."""
        if text is None:
            return None
        if text.startswith("file:"):
            path = expand(text.removeprefix("file:"))
            try:
                text = readable(path).read_text(encoding="utf-8")
            except (OSError, ValueError) as error:
                raise ValueError(f"{path} cannot be read ({error}); fix the path") from None
        for placeholder in PLACEHOLDERS.get(str(field.field_name), ()):
            if placeholder not in text:
                raise ValueError(f"{placeholder} is missing; put it where it belongs")
        return text


class Config(BaseConfig):
    """A whole run."""

    name: str = Field(default="run", pattern=r"^[\w][\w.-]*$")
    out: str | None = None  # the run's folder; None: runs/NAME
    seed: int = Field(default=0, ge=0, lt=1 << 32)
    method: Annotated[str, AfterValidator(methods.known_method)] = "palign"
    stop_after: str = Field(default="report", pattern=f"^({'|'.join(STAGES)})$")
    # In each round after the first, the student of the round before judges and continues the same
    # traces, and trains on them.
    rounds: PositiveInt = 1
    round_learning_rates: tuple[PositiveFloat, ...] = ()  # of rounds 2, 3, ...; else the first's
    data: Data = Data()
    teacher: Teacher = Teacher()
    student: Student = Student()
    answer_judge: ModelConfig = ModelConfig()  # grades the answers whose verifier is judge
    judge: Judge = Judge()
    baseline: Baseline = Baseline()
    align: Align = Align()
    train: Train = Train()
    eval: Eval = Eval()
    prompts: Prompts = Prompts()

    @model_validator(mode="before")
    @classmethod
    def _eval_follows_student(cls, raw: Any) -> Any:
        try:
            student = {**raw.get("student", {})}
            student.pop("adapter", None)
            return {**raw, "eval": {**student, **raw.get("eval", {})}}
        except (AttributeError, TypeError):
            # Something is not a mapping: the sections' own checks name it.
            return raw

    @model_validator(mode="after")
    def _later_rounds_learn_something(self) -> Config:
        if self.rounds == 1:
            return self
        rule = methods.method_of(self.method)
        if not (rule.continued or rule.is_judged):
            raise ValueError(f"method {self.method} asks the student nothing: set rounds to 1")
        if self.student.backend not in ("hf", "scripted"):
            raise ValueError("rounds need student.backend hf, which puts the adapter on")
        if self.stop_after not in ("train", "eval", "report"):
            raise ValueError(
                f"rounds need a training, which stop_after={self.stop_after} leaves out"
            )
        return self

    def round(self, number: int) -> Config:
        """The config of round 2, 3, ...: a run inside the first one's folder, on the adapter of the
        round before.
        """
        before = self.folder if number == 2 else self.folder / f"round-{number - 1}"
        rates = dict(enumerate(self.round_learning_rates, 2))
        rate = rates.get(number, self.train.learning_rate)
        changes = {
            "name": f"{self.name}-round-{number}",
            "out": str(self.folder / f"round-{number}"),
            "rounds": 1,
            "round_learning_rates": (),
            "student": self.student.model_copy(update={"adapter": str(before)}),
            "train": self.train.model_copy(update={"learning_rate": rate}),
            # the untrained student is the first round's
            "eval": self.eval.model_copy(update={"base": False}),
        }
        return self.model_copy(update=changes)

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return expand(self.out or f"runs/{self.name}")

    @property
    def ratio(self) -> float | None:
        """The fixed share of sentences kept, for the ratio-X baselines."""
        share = self.method.partition("ratio-")[2]
        return float(share) if share else None


def expand(path: str | Path) -> Path:
    """A path with `~` replaced by the home folder."""
    # pathlib would raise for an unknown ~user
    return Path(os.path.expanduser(path))


def readable(path: str | Path) -> Path:
    """A path, `~` expanded, that is no pipe or device (OSError), which may never end."""
    path = expand(path)
    if path.is_fifo() or path.is_char_device():
        raise OSError(errno.EINVAL, "it is a pipe or a device; write it to a file", str(path))
    return path


def read_yaml(text: str | bytes) -> Any:
    """A YAML document's values.

    Raises:
        ValueError: a key that comes twice, or aliases that multiply into too many values.
        yaml.YAMLError: it is not YAML.
    """
    # Nodes share what aliases repeat: they are walked, and counted, before any value is made.
    nodes = [yaml.compose(text, yaml.SafeLoader)]
    for count, node in enumerate(nodes):
        if count == MOST_VALUES:
            raise ValueError(f"more than {MOST_VALUES:,} values")
        if isinstance(node, yaml.SequenceNode):
            nodes += node.value
        if isinstance(node, yaml.MappingNode):
            names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            for name, times in Counter(names).items():
                if times > 1:
                    raise ValueError(f"the key {name} comes {times} times")
            for pair in node.value:
                nodes += pair
    return yaml.safe_load(text)


def load(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, set overrides, validate.

    Args:
        path: None starts from the defaults.
        overrides: `a.b.c=value` each, with a YAML value; a string over a dataset sets its path.

    Raises:
        ConfigError: with every mistake and the nearest valid name of each unknown key.
    """
    try:
        if path and (Path(path) / "config.yaml").exists():
            raise ValueError(f"it is a run's folder; name its config: {path}/config.yaml")
        raw = (read_yaml(readable(path).read_bytes()) if path else None) or {}
        if not isinstance(raw, dict):
            raise ValueError(f"{type(raw).__name__}, not keys")
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        hint = "Fix it, or start from a bundled config like configs/smoke.yaml."
        raise ConfigError(str(path), [f"config: it cannot be read: {error}. {hint}"]) from None
    mistakes = []
    for text in overrides:
        try:
            _override(raw, text)
        except ValueError as error:
            mistakes.append(str(error))
    for note in upgrade(raw):
        print(f"note: {note}", file=sys.stderr)
    return resolve(raw, str(path or "the command line"), mistakes)


def resolve(raw: Json, where: str, mistakes: Sequence[str] = ()) -> Config:
    """Validate a mapping into a `Config`.

    Args:
        where: what the mapping was read from, for the message.
        mistakes: found before, reported with the others.

    Raises:
        ConfigError: with every mistake.
    """
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        mistakes = [*mistakes, *map(_explain, error.errors())]
    if mistakes:
        raise ConfigError(where, mistakes)
    return config


def dump(config: Config) -> str:
    """The resolved config as YAML text."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def flat(value: Any, prefix: str = "") -> Json:
    """A config or nested mapping as {dotted key: leaf value}, to compare two of them key by key."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    if not isinstance(value, dict) or not value:
        return {prefix.removesuffix("."): value}
    leaves = {}
    for key, item in value.items():
        leaves.update(flat(item, f"{prefix}{key}."))
    return leaves


def _override(raw: Json, text: str) -> None:
    """Set one key=value in place (ValueError: in words, what is wrong with it)."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise ValueError(f"{text!r} is not key=value")
    *sections, last = key.split(".")
    node: Any = raw
    for section in sections:
        # data.train is a bare path in the file, and the override is data.train.limit=4
        if isinstance(node.get(section), str):
            node[section] = {"path": node[section]}
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise ValueError(f"{key}: {section} is not a section")
    # What is not YAML is text, and of a text nothing is a comment: out=runs/a #2.
    with contextlib.suppress(yaml.YAMLError, ValueError, RecursionError):
        parsed = read_yaml(value)
        is_comment = parsed is None and value.strip().startswith("#")
        is_plain = isinstance(parsed, str) and value.strip()[:1] not in "\"'|>!&*"
        if not (is_comment or is_plain):
            value = parsed
    replaced = node.get(last)
    if isinstance(value, str) and isinstance(replaced, dict) and "path" in replaced:
        replaced["path"] = value
    else:
        node[last] = value


def _explain(error: Any) -> str:
    """One of pydantic's errors in our words."""
    *parents, key = error["loc"] or ["config"]
    where = ".".join(map(str, [*parents, key]))
    if key in SECRETS and error["type"] != "extra_forbidden":
        return f"{where}: {SECRETS[key]}"
    if error["type"] == "value_error":
        # our own rules name what they are about; a whole section's values would bury it
        return f"{where}: {error['msg'].removeprefix('Value error, ')}"
    if error["type"] != "extra_forbidden":
        return f"{where}: {error['msg']}, got {error['input']!r}"
    # Find the section that does not have the key, for the names that it has.
    section: Any = Config()
    for parent in parents:
        section = section[0] if isinstance(parent, int) else getattr(section, parent, None)
    known = getattr(type(section), "model_fields", None)
    return f"{where}: unknown key; {nearest(str(key), known)}" if known else f"{where}: unknown key"
