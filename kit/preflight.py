"""Preflight: what would stop a run, found before it starts, by `check` and at the start of `run`.

Most checks are the very functions in which a stage would fail later, and all problems are listed at
once. No weights are loaded, no row is made, and nothing is asked for a stage that is done. The
command of one stage looks at what that stage needs.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from functools import partial
from itertools import chain, dropwhile
from pathlib import Path
from typing import Any

from kit import Json
from kit.backends import open_backend, tokenizer_alone
from kit.backends.base import Tokenizer
from kit.core.config import Config, ModelConfig, Student, expand, flat, load
from kit.core.errors import ConfigError, KitError
from kit.core.fingerprints import cache_folder
from kit.core.memory import may_have_card
from kit.core.methods import method_of
from kit.core.progress import visible
from kit.core.run import read_manifest, recorded_keys, stage_entry, trained_adapter
from kit.core.stages import STAGE_TABLE, STAGES, check_ids, file_name
from kit.data import Loaded, load_all
from kit.grading.opinions import SAME, label_tokens
from kit.judging.baselines import matched_ratio
from kit.models import HfTokenizer, check_base, fingerprints, gguf_file, lacks_copy, resolve
from kit.prompts import render, template_notes
from kit.shape import SHAPES

SERVER_SECONDS = 10.0  # a server is asked once, with this time-out
LONGEST_NAME = 240  # bytes of a file's name; file systems end at 255

Check = tuple[str, Callable[[], Any]]  # the config key or section that it is about, and what raises
Problem = dict[str, str]  # what would stop a run: key, message, fix
LINE = "{key}: {message} {fix}"


def check(path: str | None, overrides: Sequence[str] = ()) -> Json:
    """Look at everything that a run of a config depends on.

    Returns:
        {ok, problems: [{key, message, fix}], warnings, seconds}.
    """
    began = time.perf_counter()
    warnings: list[str] = []
    try:
        config = load(path, overrides)
        problems = failures(
            [
                ("out", partial(_check_folder, config.folder)),
                *_checks(config, partial(load_all, config), warnings, warnings),
            ]
        )
    except ConfigError as error:
        problems = [{"key": "config", "message": mistake, "fix": ""} for mistake in error.mistakes]
    return {
        "ok": not problems,
        "problems": problems,
        "warnings": warnings,
        "seconds": round(time.perf_counter() - began, 2),
    }


def show(result: Json) -> None:
    """Print a result of `check`, a line for each problem and warning."""
    for problem in result["problems"]:
        print("-", visible(LINE.format(**problem)))
    for warning in result["warnings"]:
        print(visible(f"note: {warning}"))
    print(f"{len(result['problems'])} problem(s) would stop this run.")


def refuse(config: Config, load_data: Callable[[], Loaded], command: str) -> list[str]:
    """The pass at the start of `run`, or of a stage's command.

    Returns:
        What is odd about its models. What is odd about the data is said where it is read.

    Raises:
        ConfigError: with every problem.
    """
    notes: list[str] = []
    problems = failures(_checks(config, load_data, [], notes, command))
    if problems:
        raise ConfigError("This run", [LINE.format(**problem) for problem in problems])
    return notes


def failures(checks: Iterable[Check]) -> list[Problem]:
    """The problems of all checks, each told once."""
    problems: dict[str, Problem] = {}
    for key, run_check in checks:
        try:
            run_check()
        except KitError as error:
            message = str(error.args[0])
            problems.setdefault(message, {"key": key, "message": message, "fix": error.hint})
    return list(problems.values())


def _checks(
    config: Config,
    load_data: Callable[[], Loaded],
    warnings: list[str],
    notes: list[str],
    command: str = "run",
) -> Iterator[Check]:
    """The checks of the stages that are still to do; they add to `warnings`, and of models to
    `notes`.
    """
    todo = _todo(config, command)
    if command in ("run", "teach", "eval"):
        yield "data", partial(_check_data, config, load_data, todo, warnings)
    if todo and may_have_card():
        from kit.core.card import check_card

        yield "CUDA_VISIBLE_DEVICES", check_card
    if "teach" in todo and config.teacher.backend not in ("file", "reference"):
        yield "teacher", partial(_open_tokenizer, config.teacher, notes)
    if todo and config.student.adapter:
        yield "student.adapter", partial(_check_adapter, config.student)
    yield from _student_checks(config, todo, notes)
    if "train" in todo:
        from kit.training.plan import accumulation_steps

        yield "train.micro_batch_size", partial(accumulation_steps, config.train)
        yield "student.model", partial(_check_training, config, notes)
        # A training alone looks at its real rows, at once.
        if command == "run":
            yield "train.max_seq_tokens", partial(_check_memory, config, warnings)
    if "eval" in todo:
        yield "eval", partial(_check_eval, config, todo, notes)


def _student_checks(config: Config, todo: list[str], notes: list[str]) -> Iterator[Check]:
    """What the method asks of the student before its training, and of another run."""
    method = method_of(config.method)
    if "truncate" in todo and method.cut == "fixed-prefix-matched":
        yield "baseline", partial(matched_ratio, config)
    if "truncate" in todo and method.is_judged:
        yield "student", partial(_check_labels, config, notes)
    elif "align" in todo and method.continued:
        yield "student", partial(_open_tokenizer, config.student, notes)


def stages_of(config: Config, command: str) -> list[str]:
    """The stages that a command carries out. A run that stops early gets a report too."""
    if command != "run":
        return [command]
    return [*STAGES[:-1][: STAGES.index(config.stop_after) + 1], "report"]


def _todo(config: Config, command: str = "run") -> list[str]:
    """The stages of a run, or the one, from the first that is not done under this config."""
    # a report needs neither a card nor a model
    needed = ("eval",) if config.method == "zero-shot" else STAGES[:-1]
    todo = dropwhile(partial(_is_done, config), stages_of(config, command))
    return [stage for stage in todo if stage in needed]


def _is_done(config: Config, stage: str) -> bool:
    """Whether the manifest says that a stage is done, under this config and with the models that
    are here now.
    """
    entry: Json = {}
    # A folder that is no run's is a problem of its own.
    with suppress(KitError):
        entry = stage_entry(config.folder, stage)
    if not entry.get("done"):
        return False
    section = {"teach": "teacher", "eval": "eval"}.get(stage, "student")
    engine = getattr(config, section)
    if stage == "train":
        engine = engine.on_hf
    about = STAGE_TABLE[stage]
    now = {**about.dependencies(flat(config)), **fingerprints(section, engine)}
    return not about.changes(recorded_keys(stage, entry), now)


def _check_folder(folder: Path) -> None:
    """Whether a folder is a run's or can become one."""
    read_manifest(folder)
    _check_writable(folder, "Choose another with out=DIR, or fix its permissions.")


def _check_writable(folder: Path, hint: str) -> None:
    """Whether files can be written in a folder, or in the nearest above it that exists."""
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        raise KitError(f"{folder} cannot be written: {error.strerror}.", hint) from None


def _check_data(
    config: Config, load_data: Callable[[], Loaded], todo: list[str], warnings: list[str]
) -> None:
    loaded = load_data()
    warnings += loaded.warnings
    teacher = config.teacher
    # Several traces of one problem are numbered: a.0, a.1.
    ids = [problem.id for problem in loaded.train]
    if teacher.keep == "all":
        check_ids([*ids, *(f"{id}.{number}" for id in ids for number in range(teacher.samples))])
    if "teach" in todo and teacher.backend == "reference":
        from kit.synthetic import wander

        for problem in loaded.train:
            wander(problem, 0, 0)
    if "eval" in todo and not loaded.evals:
        raise KitError("data.eval names nothing to evaluate on.", "Or set stop_after=train.")
    everything = chain(loaded.train, *loaded.evals.values())
    if any(problem.verifier == "judge" for problem in everything):
        tokenizer = _open_tokenizer(config.answer_judge, [])
        label_tokens(tokenizer, SAME, config.answer_judge.model)
    for name in loaded.evals:
        path = file_name(config.eval.model, "tuned", name)
        if len(os.fsencode(path)) > LONGEST_NAME:
            raise KitError(f"{path} is too long for a file's name.", "Shorten data.eval.name.")


def _open_tokenizer(engine: ModelConfig, notes: list[str]) -> Tokenizer:
    """The tokenizer of a model that is there, after a chat was rendered with it; adds to `notes`
    what is odd about its template.
    """
    if engine.backend in ("http", "scripted"):
        seconds = min(SERVER_SECONDS, engine.timeout_seconds)
        once = engine.model_copy(update={"timeout_seconds": seconds, "retries": 0})
        with closing(open_backend(once)) as backend:
            tokenizer = backend.tokenizer
    else:
        if engine.backend == "gguf":
            gguf_file(engine.model)
        folder = Path(resolve(engine.model))
        if folder.is_dir() and not any(folder.glob("*.safetensors")):
            raise KitError(f"{folder} has no weights in safetensors.", "Complete the folder.")
        tokenizer = tokenizer_alone(engine.model)
        if engine.backend == "hf" and lacks_copy(engine.model):
            _check_writable(cache_folder(), "Free some space, or set PALIGN_CACHE.")
    render(tokenizer, "What is 1 + 1?", engine)
    if engine.backend != "scripted":
        notes += [note for note in template_notes(tokenizer, engine) if note not in notes]
    return tokenizer


def _check_adapter(student: Student) -> None:
    adapter = trained_adapter(expand(str(student.adapter)))
    check_base(adapter, student.model)


def _check_labels(config: Config, notes: list[str]) -> None:
    from kit.judging.judge import split_labels

    tokenizer = _open_tokenizer(config.student, notes)
    split_labels(tokenizer, config.judge.labels)


def _check_training(config: Config, notes: list[str]) -> None:
    """The end of a turn."""
    # It trains on backend hf, whatever backend it judges on.
    tokenizer = _open_tokenizer(config.student.on_hf, notes)
    if isinstance(tokenizer, HfTokenizer):
        from kit.training.sft_data import end_of_turn

        end_of_turn(tokenizer)


def _check_memory(config: Config, warnings: list[str]) -> None:
    """Memory for the longest row, and whether rows as long as `align` may write are trained on."""
    from kit.training import plan

    written = config.align.sampling.max_new_tokens
    if method_of(config.method).continued and written > config.train.max_seq_tokens:
        warnings.append(
            f"align may write {written} tokens, but rows over train.max_seq_tokens="
            f"{config.train.max_seq_tokens} are not trained on: lower the one or raise the other."
        )
    model = config.student.model
    if isinstance(resolve(model), Path) and model not in SHAPES:
        # It would be converted for its plan, which takes minutes.
        warnings.append(f"whether training on {model} fits the memory is not checked for a GGUF.")
        return
    plan.check_longest(config)


def _check_eval(config: Config, todo: list[str], notes: list[str]) -> None:
    """The evaluated model takes the adapter, and is asked in the way of the training."""
    asked = config.eval
    _open_tokenizer(asked, notes)
    student = config.student
    if (asked.system, asked.thinking) != (student.system, student.thinking) and "train" in todo:
        hint = "Match eval.system and eval.thinking to the student's."
        message = "Evaluation would use another system message or thinking mode than training."
        raise KitError(message, hint)
