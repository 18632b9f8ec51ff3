"""One typed config: YAML plus `key=value`, every mistake reported at once.

Sections follow the way of the data (data, teacher, judge, align, train, eval). The resolved config is
saved in the run. Nothing here loads a model or opens a data file.
"""

from __future__ import annotations

import contextlib
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from kit.core.errors import KitError
from kit.core.old_keys import upgrade

Stage = Literal["teach", "truncate", "align", "train", "eval", "report"]
Dtype = Literal["auto", "fp32", "bf16", "int8", "nf4"]
Keep = Literal["first", "shortest", "all"]  # of the right samples
STAGES = get_args(Stage)
Role = Literal[
    "id", "question", "answer", "solution", "trace", "level", "subject"
]  # what a row of data may hold
BASELINES = r"zero-shot|label-only|long-trace|prefix-only|continuation-only|no-search|ratio-(0?\.\d*[1-9]\d*|1(\.0+)?)"


PLACES = {
    "judge": ("question", "prefix"),
    "draft": ("question", "prefix"),
    "compare": ("question", "first", "second"),
}


class BaseConfig(BaseModel):
    """A frozen group of keys; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class DatasetConfig(BaseConfig):
    """Where problems come from. A bare string is its `path`."""

    path: str = "builtin"  # builtin | holdout (rows of data.train that training never sees) | a file | a hub id
    fields: dict[
        Role, str
    ] = {}  # which key holds what, for any JSONL: {question: KEY, answer: KEY}
    preset: str | None = None  # a file of the field by its name, e.g. svamp: kit/presets.yaml
    name: str | None = None  # the dataset's name in eval/ and in tables; default: from the path
    subset: str | None = None  # a hub dataset's configuration, e.g. main
    steps: tuple[int, int] = (1, 4)  # builtin: fewest and most arithmetic steps of a problem
    max_number: int = Field(60, ge=6)  # builtin: largest number that a story begins with or adds
    split: str | None = None
    limit: int | None = Field(None, ge=1)
    seed: int | None = None  # None: the first `limit` rows; a number: a seeded subset
    stratify: str | None = None  # level or subject: the subset keeps each stratum's share
    verifier: Literal["math", "number", "choice", "text"] = "math"


PathOrDataset = Annotated[
    DatasetConfig, BeforeValidator(lambda raw: {"path": raw} if isinstance(raw, str) else raw)
]
OneOrSeveral = BeforeValidator(lambda raw: raw if isinstance(raw, (list, tuple)) else [raw])


class Data(BaseConfig):
    """Training problems and the held-out problems of the evaluation."""

    train: PathOrDataset = DatasetConfig()
    eval: Annotated[tuple[PathOrDataset, ...], OneOrSeveral] = (DatasetConfig(),)


class Sampling(BaseConfig):
    """How text is drawn. temperature 0 is greedy."""

    temperature: float = Field(0.6, ge=0)
    top_p: float = Field(0.9, gt=0, le=1)
    top_k: int = Field(0, ge=0)  # 0: off
    min_p: float = Field(0.0, ge=0, lt=1)
    repetition_penalty: float = Field(1.0, gt=0)
    max_new_tokens: int = Field(512, ge=1)
    stop: tuple[str, ...] = ()
    stop_loops: bool = (
        False  # end a sample that repeats to no end (http: only name it), as its own finish reason
    )


class ModelConfig(BaseConfig):
    """A model and what runs it. Swapping one backend for another changes one line."""

    backend: Literal["hf", "gguf", "http", "scripted"] = "hf"
    model: str = "smollm2-135m"  # an alias, a .gguf file, a folder, or a hub id; http: the server's name for it
    dtype: Dtype = "auto"  # auto: bf16 with CUDA, fp32 without
    context_tokens: int | None = Field(None, ge=64)  # None: what the model was trained for
    max_num_seqs: int = Field(
        8, ge=1
    )  # sequences in flight: llama.cpp sequences, HF batch rows, HTTP requests
    n_threads: int | None = Field(None, ge=1)
    n_gpu_layers: int = -1  # llama.cpp: layers offloaded; -1 is all, where it was built for a GPU
    flash_attention: bool = False  # llama.cpp: faster prefill, margins move by up to some tenths
    kv_cache_gib: float | None = Field(
        None, gt=0
    )  # HF: KV-cache budget of a batch; None: what is free
    url: str | None = None  # http: the server's address up to and with /v1
    tokenizer: str | None = (
        None  # http: the served model's: a hub id, folder or .gguf; None: as vLLM names it
    )
    api_key_env: str | None = None  # http: the environment's variable with the key; None: no key
    timeout_seconds: float = Field(600.0, gt=0)
    retries: int = Field(6, ge=0)
    system: str | None = None  # a system message; None: none
    thinking: bool = False  # for models whose template has the switch


class Teacher(ModelConfig):
    """Who writes the traces: a model, a file of traces, or the built-in problems' own worked solutions."""

    backend: Literal["hf", "gguf", "http", "scripted", "file", "reference"] = "gguf"  # type: ignore[assignment]
    path: str | None = (
        None  # backend file: JSONL of {id, question, answer, long_cot} or data.train's s1K rows
    )
    fields: dict[Role, str] = {}
    wordiness: float = Field(
        1.0, ge=0
    )  # backend worked: how much a trace wanders; 0 is the bare solution
    samples: int = Field(1, ge=1)
    keep: Keep = "first"
    sampling: Sampling = Sampling()


class Judge(BaseConfig):
    """How sufficiency of a prefix is asked (section 3.2 of the paper)."""

    search: Literal["binary", "gallop", "scan", "uncached"] = "binary"
    scan_rule: Literal["binary", "first", "stable"] = "binary"  # which boundary a scan keeps
    kind: Literal["verbal", "answer"] = "verbal"
    decode: Literal["constrained", "generate"] = "constrained"
    answer_scoring: Literal["likelihood", "greedy"] = (
        "likelihood"  # kind answer: gold's log-likelihood, or greedy and graded
    )
    max_new_tokens: int = Field(256, ge=1)  # decode generate, and answer_scoring greedy
    labels: tuple[str, str] = ("[ENOUGH]", "[NOT_ENOUGH]")
    threshold: float | None = (
        None  # a margin at or above it is ENOUGH; None: 0 verbal, -1.0 nats a token answer
    )
    calibration: Literal["none", "content-free", "share"] = "none"
    share: float = Field(
        0.9, gt=0, le=1
    )  # calibration share: this share of full traces is to be sufficient
    chunk_tokens: int = Field(1024, ge=16)  # prefill chunk: bounds memory on long traces
    limit_tokens: int | None = Field(
        None, ge=64
    )  # longest judging prompt; None: the model's context


class Align(BaseConfig):
    """The student continues from the kept prefix; right answers stay (section 3.3, Eq. 9)."""

    mode: Literal["prompt", "prefill"] = (
        "prompt"  # the draft in the user turn (paper), or as the answer's start
    )
    samples: int = Field(1, ge=1)
    keep: Keep = "first"
    extend_rounds: int = Field(
        0, ge=0
    )  # rounds that move the cut to a longer prefix where no sample is right
    sampling: Sampling = Sampling(
        temperature=0.6, top_p=0.9, repetition_penalty=1.05, max_new_tokens=32768
    )


class Train(BaseConfig):
    """QLoRA (Here: NF4; Paper: LoRA on 16-bit weights)."""

    dtype: Dtype = "nf4"  # of the frozen base
    rank: int = Field(16, ge=1)
    alpha: int = Field(16, ge=1)
    dropout: float = Field(0.05, ge=0, lt=1)
    epochs: float = Field(3.0, gt=0)
    max_steps: int | None = Field(None, ge=1)
    learning_rate: float = Field(5e-5, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    warmup_ratio: float = Field(0.1, ge=0, lt=1)
    lr_scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    batch_size: int = Field(32, ge=1)  # rows an optimizer step
    micro_batch_size: int = Field(1, ge=1)  # rows a forward pass; the rest is gradient accumulation
    group_by_length: bool = True
    max_seq_tokens: int = Field(32768, ge=16)
    on_too_long: Literal["drop", "truncate"] = "drop"
    optimizer: Literal["auto", "adamw", "paged_adamw_8bit"] = "auto"  # auto: paged 8-bit with CUDA
    gradient_checkpointing: bool = True
    logits_bytes: int = Field(256 << 20, ge=1 << 16)  # largest slice of logits ever alive
    max_grad_norm: float = Field(1.0, gt=0)
    save_steps: int = Field(50, ge=1)
    on_low_memory: Literal["warn", "refuse"] = (
        "refuse"  # rows that will not fit the card: refuse before starting
    )


class Eval(ModelConfig):
    """The student before and after, on problems it never saw. Engine keys left out follow `student`."""

    samples: int = Field(1, ge=1)
    base: bool = True  # the untrained student too
    sampling: Sampling = Sampling(max_new_tokens=4096)


class Prompts(BaseConfig):
    """The prompts' words, each replaceable by text, or by `file:PATH`. None: our own, in kit/prompts.yaml."""

    instruction: str | None = (
        None  # joined to the question by one newline: teaching, training, evaluation
    )
    judge: str | None = (
        None  # holds {question} and {prefix}; the prefix comes last for the cache's sake
    )
    draft: str | None = None  # alignment; holds {instruction}, {question} and {prefix}
    answer_cue: str | None = (
        None  # answer judge: what is put after a prefix to force the boxed answer
    )
    compare: str | None = None  # reasoning quality; holds {question}, {first} and {second}

    @field_validator("*")
    @classmethod
    def _read(cls, text: str | None, about: ValidationInfo) -> str | None:
        """A file's words in place of its name, so that a changed file is a changed key; every {place} must be there."""
        if text and text.startswith("file:"):
            try:
                text = Path(text[5:]).read_text(encoding="utf-8")
            except (OSError, ValueError) as error:
                raise ValueError(f"{text[5:]} cannot be read ({error}); mend the path") from None
        for place in PLACES.get(about.field_name or "", ()) if text is not None else ():
            if f"{{{place}}}" not in text:
                raise ValueError(f"lacks {{{place}}}; put it where it belongs")
        return text


class Config(BaseConfig):
    """A whole run."""

    name: str = Field("run", pattern=r"^[\w][\w.-]*$")
    out: str | None = None  # the run's folder; None: runs/NAME
    seed: int = 0
    method: str = Field(
        "palign", pattern=f"^(palign|{BASELINES})$"
    )  # ratio-0.25: this share of the sentences
    stop_after: Stage = "report"
    data: Data = Data()
    teacher: Teacher = Teacher()
    student: ModelConfig = ModelConfig()
    judge: Judge = Judge()
    align: Align = Align()
    train: Train = Train()
    eval: Eval = Eval()
    prompts: Prompts = Prompts()

    @model_validator(mode="before")
    @classmethod
    def _eval_follows_student(cls, raw: Any) -> Any:
        parts = [raw.get("student", {}), raw.get("eval", {})] if isinstance(raw, dict) else []
        return (
            {**raw, "eval": parts[0] | parts[1]}
            if parts and all(isinstance(p, dict) for p in parts)
            else raw
        )

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.out or f"runs/{self.name}")

    @property
    def ratio(self) -> float | None:
        """The fixed share of sentences kept, for the ratio-X baselines."""
        return float(self.method[6:]) if self.method.startswith("ratio-") else None


def load(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, set `a.b.c=value` overrides (YAML values; a string over a source sets its path), validate.

    Without a path, start from the defaults.

    Raises:
        KitError: (exit 2) with every mistake and the nearest valid name of each unknown key.
    """
    try:
        raw = (yaml.safe_load(Path(path).read_text(encoding="utf-8")) if path else None) or {}
        if not isinstance(raw, dict):
            raise ValueError(f"{type(raw).__name__}, not keys")
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        hint = "Mend it, or start from one that comes along, like configs/smoke.yaml."
        raise KitError(f"The config {path} cannot be read: {error}.", hint, 2) from None
    problems = [problem for text in overrides if (problem := _override(raw, text))]
    upgrade(raw, lambda text: print(f"note: {text}", file=sys.stderr))
    return resolve(raw, str(path or "the command line"), problems)


def resolve(raw: dict[str, Any], where: str, problems: Sequence[str] = ()) -> Config:
    """Validate a mapping into a `Config`; all mistakes, `problems` found before included, in one error (exit 2)."""
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        problems = [*problems, *map(_explain, error.errors())]
    if problems:
        raise KitError(
            "\n  - ".join([f"{where} has {len(problems)} problem(s):", *problems]), code=2
        )
    return config


def dump(config: Config) -> str:
    """The resolved config as YAML text."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """A config or nested mapping as {dotted key: leaf value}; how two configs are compared key by key."""
    value = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    if isinstance(value, dict) and value:
        return {
            k: v for key, item in value.items() for k, v in flat(item, f"{prefix}{key}.").items()
        }
    return {prefix.rstrip("."): value}


def _override(raw: dict[str, Any], text: str) -> str | None:
    """Set one key=value in place. Returns what is wrong with it, if anything."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        return f"{text!r} is not key=value"
    *parents, last = key.split(".")
    node: Any = raw
    for part in parents:
        if isinstance(node.get(part), str):  # data.train: PATH in the file, data.train.limit=4 here
            node[part] = {"path": node[part]}
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            return f"{key}: {part} is not a section"
    with contextlib.suppress(yaml.YAMLError, ValueError, RecursionError):  # what is no YAML is text
        value = yaml.safe_load(value)
    over = isinstance(value, str) and isinstance(node.get(last), dict) and "path" in node[last]
    node[last] = {**node[last], "path": value} if over else value
    return None


def _explain(item: Any) -> str:
    """One of pydantic's errors in our words."""
    where, section = ".".join(map(str, item["loc"])), Config()
    if item["type"] != "extra_forbidden":
        return f"{where}: {item['msg'].removeprefix('Value error, ')}, got {item['input']!r}"
    for part in item["loc"][:-1]:
        section = section[0] if isinstance(part, int) else getattr(section, part)
    known = sorted(type(section).model_fields)
    near = difflib.get_close_matches(str(item["loc"][-1]), known, n=1, cutoff=0.5)
    return f"{where}: unknown key" + (
        f"; did you mean {near[0]}?" if near else f"; known: {', '.join(known)}"
    )
