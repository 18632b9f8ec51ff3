"""eval: the student before and after training, on problems it never saw (section 4).

Every score has its denominator, its interval, and how many samples ran into the token limit or into
a loop. A problem that could not be asked, a sample that could not be read and one that took too
long to grade count as not correct, and are counted by name. Nothing is trained or drawn here.
"""

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from itertools import chain, product

from kit.core.errors import KitError
from kit.core.fingerprints import ADAPTER, adapter_hash, check_trained
from kit.core.records import EvalRow, Problem
from kit.core.run import Run
from kit.core.stages import file_digest, file_name, tallies
from kit.core.storage import digest
from kit.data import problems_of
from kit.grading.answers import Item
from kit.grading.scores import compare_rows, score
from kit.models import check_base, gguf_file
from kit.prompts import template_hash
from kit.sampling import PROBLEM_FIELDS, Sampler, model_fingerprints, rejection
from kit.training import canary
from kit.training.gguf_lora import convert

Rows = dict[str, dict[str, list[EvalRow]]]  # by dataset, then by model: base or tuned


def evaluate(run: Run) -> None:
    """The stage: `eval/MODEL-WHICH-DATASET.jsonl`, an `EvalRow` per problem; WHICH: base or tuned.

    The stage's summary in the manifest holds `scores`, each a `Score` with {model, dataset, which},
    and `comparisons` of tuned against base, each a `PairedTest` with {dataset, a, b}.

    Raises:
        KitError: nothing to evaluate on, no finished training, or prompts rendered in another way
            than the adapter was trained with; or, on llama.cpp and servers, answers that are not
            the adapter's (kit/training/canary.py).
    """
    config = run.config.eval
    loaded = problems_of(run)
    datasets = loaded.evals
    if not datasets:
        raise KitError(
            "There is nothing to evaluate on.",
            "Name data.eval, and let stop_after be eval or report.",
            2,
        )
    # The tuned model goes first, so that an adapter that cannot be used costs no work on the base.
    sides = ["base"]
    adapter = run.folder / "adapter"
    if run.config.method != "zero-shot":
        run.require("train")
        # Elsewhere the base has another name and form, and the canary compares answers.
        if config.backend == "hf":
            check_base(adapter, config.model)
        check_trained(adapter, run.manifest["stages"]["train"]["output"])
        sides = ["tuned", "base"] if config.base else ["tuned"]
    files = [file_name(config.model, *side) for side in product(sides, datasets)]

    # What the answers depend on: the problems, how many answers each gets, model and adapter.
    problems = list(chain.from_iterable(datasets.values()))
    source = " ".join(map(digest, datasets.values()))
    samples = loaded.samples

    def content() -> dict[str, str]:
        return {**model_fingerprints(run.config, "eval", problems), ADAPTER: adapter_hash(adapter)}

    def output() -> str:
        return " ".join(file_digest(run, file, EvalRow) for file in files)

    if not run.begin("eval", f"{source} {samples}", output, content):
        return

    # One model at a time, over all datasets.
    rows: Rows = {dataset: {} for dataset in datasets}
    for which in sides:
        on_top = _on_top(run) if which == "tuned" else None
        with Sampler(run, config, config, on_top) as student:
            if on_top and config.backend in ("gguf", "http"):
                proof = canary.check(run.folder, run.config, student.backend, run.progress)
                run.record(adapter_check=proof)
            for dataset, asked in datasets.items():
                file = file_name(config.model, which, dataset)
                work = partial(answers, student, samples[dataset])
                rows[dataset][which] = student.write_rows("eval", file, EvalRow, asked, work)
    _finish(run, rows)


def _on_top(run: Run) -> str:
    """What the evaluation's backend opens: a PEFT folder, a GGUF LoRA, or a served name."""
    config = run.config.eval
    folder = run.folder / "adapter"
    if config.backend == "gguf":
        return str(convert(folder, gguf_file(config.model), folder / "lora.gguf"))
    name = config.served_adapter if config.backend == "http" else None
    return name or str(folder)


def answers(
    student: Sampler, samples_each: int | None, problems: list[Problem]
) -> Iterator[EvalRow]:
    """Graded rows of a batch of problems, as they finish, asked in the way of the training."""
    run = student.run
    template = template_hash(student.backend.tokenizer, run.config.prompts, student.engine)
    trained = run.manifest.get("template_hash", template)
    if run.config.method != "zero-shot" and trained != template:
        raise KitError(
            f"The adapter was trained on prompts of template {trained}; these have {template}.",
            "Match eval.system, eval.thinking, eval.model and prompts.instruction to training's, "
            "or train again.",
        )
    # A problem that could not be asked has a row too, with the reason.
    for problem, samples, generation in student.sample(problems, samples=samples_each):
        # The paper's grader is a second opinion, never the verdict.
        items = [Item(problem.answer, sample.text) for sample in samples]
        yield EvalRow(
            published=tuple(student.grader.as_published(items)),
            **problem.model_dump(include=PROBLEM_FIELDS | {"level", "subject"}),
            **(rejection(generation, "", samples) if generation.error else {}),
            samples=samples,
            prompt_tokens=generation.prompt_tokens,
            seconds=round(generation.seconds, 3),
        )


def _finish(run: Run, rows: Rows) -> None:
    """Score every model on every dataset, compare tuned with base, and close the stage."""
    scores = []
    comparisons = []
    every: list[EvalRow] = []
    for dataset, by_model in rows.items():
        # base before tuned, as a reader expects them
        for which, answered in reversed(by_model.items()):
            label = {"model": run.config.eval.model, "dataset": dataset, "which": which}
            scores.append(label | asdict(score(answered)))
            every += answered
        test = compare_rows(by_model.get("base", []), by_model.get("tuned", []))
        if test:
            comparisons.append({"dataset": dataset, "a": "base", "b": "tuned", **asdict(test)})
    lost = tallies(every)["rejected"]
    run.finish(
        "eval",
        len(every),
        len(every) - sum(lost.values()),
        scores=scores,
        comparisons=comparisons,
        rejected=lost,
    )
