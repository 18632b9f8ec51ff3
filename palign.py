#!/usr/bin/env python3
"""palign: reproduce, study and teach P-ALIGN on one GPU. The command line: commands are wired here.

Nothing is computed here, and nothing heavy is imported before a command runs.
"""

import contextlib
import json
import os
import sys
import traceback
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

if __name__ == "__main__":
    # Also where Python is told not to look beside the script (-P).
    sys.path.insert(0, str(Path(__file__).resolve().parent))

from kit import Json, __version__
from kit.core.errors import KitError, machine_fault

# Adds an argument to a command: its name, what stands for its value, its meaning, and what else
# argparse's add_argument takes.
Option = Callable[..., None]
PATHS = ("FILE", "DIR", "RUN")  # what stands for a path
STAGE_COMMANDS = {
    "run": "run all stages, skipping what is done",
    "teach": "a trace for every problem, from a model, a file or the problem itself",
    "truncate": "cut each trace at the shortest prefix that the student judges sufficient",
    "align": "let the student continue from each prefix; keep correct ones as training rows",
    "train": "QLoRA on the training rows",
    "eval": "grade the student before and after, on problems it never saw",
    "report": "metrics.json and report.html of a run",
}
SHARED_OPTIONS = {
    "--json": "print one machine-readable object on standard output",
    "--quiet": "print only warnings and errors",
    "--verbose": "print the libraries' own messages too",
    "--debug": "print tracebacks instead of one clear paragraph",
}
# Flags of `judge`: the config key that each sets, which the config then checks.
JUDGE_FLAGS = {
    "--model": ("student.model", "smollm2-135m (default), a GGUF file, a folder or a hub id"),
    "--backend": ("student.backend", "hf (default), gguf or http"),
    "--url": ("student.url", "http: the server's address, ending in /v1"),
    "--dtype": ("student.dtype", "auto (default), fp32, bf16, int8 or nf4"),
    "--search": ("judge.search", "binary (default), gallop, sweep, scan or uncached"),
    "--kind": ("judge.kind", "verbal (default), answer or success"),
    "--threshold": ("judge.threshold", "a margin at or above it is ENOUGH"),
    "--calibration": ("judge.calibration", "none (default), content-free or a file"),
    "--limit": ("data.train.limit", "only the first N traces"),
}


def parser() -> ArgumentParser:
    """The whole command line; nothing heavy is imported for it."""
    top = ArgumentParser(
        prog="palign.py",
        description="Reproduce, study and teach P-ALIGN on one GPU.",
        epilog="palign.py COMMAND --help shows more. Start with: palign.py run configs/smoke.yaml",
    )
    top.add_argument("--version", action="version", version=f"palign {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, run: Callable[..., int], about: str, config: bool = False) -> Option:
        description = f"{about[0].upper()}{about[1:]}."
        added = commands.add_parser(name, help=about, description=description)
        added.set_defaults(run=run)

        def option(name: str, metavar: str = "", meaning: str = "", **more: Any) -> None:
            if metavar:
                more.update(metavar=metavar, help=meaning)
            if metavar in PATHS:
                more.setdefault("type", _path)
            added.add_argument(name, **more)

        for flag, meaning in SHARED_OPTIONS.items():
            option(flag, action="store_true", help=meaning)
        if config:
            option("config", "CONFIG", "a YAML file, see configs/")
            option("overrides", "key=value", "e.g. data.train=PATH align.samples=4", nargs="*")
        return option

    for name, about in STAGE_COMMANDS.items():
        command(name, _stages, about, config=True)
    about = "runs of several methods and seeds, e.g. method=palign,ratio-0.5 seed=1,2, compared"
    command("sweep", _sweep, about, config=True)
    option = command("grade", _grade, "grade the outputs in any JSONL: accuracy, pass@k, agreement")
    option("file", "FILE", "rows with an answer and one or more outputs")
    option("--verifier", choices=("math", "number", "choice", "text"), default="math")
    _grade_options(option)
    option = command("data", _data, "show how a file, a preset or a hub dataset is read")
    option("source", "SOURCE", "a file, a preset (kit/presets.yaml) or a hub id")
    option("overrides", "key=value", "e.g. fields={question: q}", nargs="*")
    option("--all", action="store_true", help="show all problems, not the first three")
    _judge_options(command("judge", _judge, "show the verdicts along the traces of a JSONL"))
    _bench_options(command("bench", _bench, "measure alternatives side by side in one run"))
    option = command("compare", _compare, "runs side by side: one table, paired tests, one page")
    option("runs", "RUN", "run folders", nargs="+")
    option("--reference", "RUN", "the run that all others are compared with")
    option("--out", "FILE", "the page", default="compare.html")
    option("--pairwise-judge", "CONFIG", "compare reasoning with its teacher")
    about = "a leader's and participants' pages from finished runs; check their exercises"
    option = command("workshop", _workshop, about)
    option("runs", "RUN", "of palign and of a fixed cut", nargs="+")
    option("--out", "DIR", "the pages' folder", default="workshop")
    option("--participants", "N", "a page each", type=int, default=8)
    option("--check", "RUN", "write nothing, check these", nargs="+")
    command("check", _check, "find what would stop a run, before it starts", config=True)
    command("plan", _plan, "will it fit, how long will it take; no weights are loaded", config=True)
    about = "check this machine; each finding with the command that fixes it"
    option = command("doctor", _doctor, about)
    option("--full", action="store_true", help="measure generation, judging and training too")
    _export_options(command("export", _export, "a run's adapter for llama.cpp, Ollama, the hub"))
    option = command("prompt", _prompt, "show a prompt as the model sees it", config=True)
    option("--of", choices=("solve", "judge", "draft"), default="solve")
    return top


def _path(text: str) -> Path:
    return Path(os.path.expanduser(text))


def _grade_options(option: Option) -> None:
    option("--answer", "KEY", "key of the gold answer; a.b for a nested one")
    option("--outputs", "KEY", "key of one output or several")
    option("--labels", "KEY", "key of the file's own verdicts, to compare with")
    option("--gold", "FILE", "take the gold answers from this file")
    option("--on", "KEY", "the key that both files share, or KEY=KEY_OF_GOLD")
    option("--bare", action="store_true", help="the outputs are extracted answers")


def _judge_options(option: Option) -> None:
    # as written: ./NAME is a file, and NAME may be a dataset of the hub
    option("teacher.path", "FILE", "rows with a question, an answer and a trace", type=str)
    option("--config", "CONFIG", "take everything else from this config")
    option("--interactive", action="store_true", help="walk through a trace interactively")
    option(
        "--validate",
        action="store_true",
        help="compare each judge's verdicts with the student's success",
    )
    option("--out", "DIR", "--validate: its files", default="validation")
    for flag, (key, meaning) in JUDGE_FLAGS.items():
        option(flag, "VALUE", meaning, dest=key)


def _bench_options(option: Option) -> None:
    option("subject", choices=("judge", "generate", "train", "overhead"))
    option("--traces", "FILE", "judge: rows with traces")
    option("--limit", type=int, help="how many traces or prompts")
    option("--backend", choices=("hf", "gguf"), default="hf", help="judge: default hf")
    option("--model", default="smollm2-135m")
    option(
        "--verdicts",
        nargs="+",
        choices=("early", "middle", "late"),
        help="judge: steer the search to keep 1, half or all sentences",
    )
    option("--repeats", type=int, default=3)
    option(
        "--neighbour", action="store_true", help="repeat beside a process that keeps a core busy"
    )
    option("--new-tokens", type=int, default=128, help="generate: new tokens per prompt")


def _export_options(option: Option) -> None:
    targets = ("merged", "gguf-lora", "gguf", "ollama", "hub")
    option("folder", "RUN", "run folder")
    option("--to", choices=targets, default="merged")
    option("--out", "DIR", "default: RUN/export")
    option("--base", help="the base model's GGUF (gguf-lora, ollama) or hub id (hub)")
    option("--quantize", choices=("q8_0", "q4_k_m"), help="gguf, ollama: default f16")
    option("--repo", "OWNER/NAME", "hub: upload to it, private, with OWNER/NAME-data")
    option(
        "--update", action="store_true", help="hub: allow an existing repository; keep its README"
    )
    option("--dry-run", action="store_true", help="hub: show everything, upload nothing")


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 0 done, 1 failed, 2 bad usage or config, 130 interrupted.
    """
    args = _parse(argv)
    from kit.core import interrupts
    from kit.core.progress import Progress, tame_libraries, visible

    tame_libraries(args.verbose or args.debug)
    interrupts.watch()
    try:
        args.progress = Progress(quiet=args.quiet)
        return args.run(args)
    except KeyboardInterrupt:
        interrupts.leave()
        return 130
    except BrokenPipeError:
        # The reader of our output has gone.
        return 1
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        known = error if isinstance(error, KitError) else machine_fault(error)
        print(visible(f"palign: {known or _defect(error)}"), file=sys.stderr)
        return known.code if known else 1


def _parse(argv: list[str] | None) -> Namespace:
    """Parse; key=value may come before and after flags, which argparse alone does not allow."""
    top = parser()
    args, extra = top.parse_known_args(argv)
    if any(text.startswith("-") for text in extra) or (extra and not hasattr(args, "overrides")):
        top.error(f"unrecognized: {' '.join(extra)}")
    if extra:
        args.overrides += extra
    return args


def _defect(error: Exception) -> str:
    """A paragraph about an error that nothing here expects."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return (
        f"a defect, not your mistake: {type(error).__name__}: {error} "
        f"(at {Path(last.filename).name}:{last.lineno}). Finished rows are safe. "
        "Run again with --debug for the traceback, and please report it."
    )


def _stages(args: Namespace) -> int:
    from kit.reporting import report

    carry_out = _run_rounds if args.command == "run" else _run_stages
    numbers = carry_out(_config(args), args.progress, args.command)
    if numbers and (args.json or not args.quiet):
        _print(args, numbers, report.show)
    return 0


def _run_stages(config: Any, progress: Any, command: str) -> Json:
    """One stage; or all of them up to `stop_after`, and the report.

    Returns:
        The run's numbers; none in a process that only helps to train.
    """
    from kit import preflight
    from kit.core.run import Run
    from kit.core.stages import STAGE_TABLE
    from kit.data import problems_of
    from kit.reporting import metrics, report
    from kit.training import trackers

    names = preflight.stages_of(config, command)
    # Some trackers print; standard output is for the result.
    with (
        Run(config, progress, command) as run,
        contextlib.redirect_stdout(sys.stderr),
        trackers.opened(run),
    ):
        # What can be known is reported at once, not after hours.
        progress.tell(preflight.refuse(config, partial(problems_of, run), command))
        progress.stages = len(names)
        try:
            for number, name in enumerate(names):
                progress.stages_done = number
                before = run.manifest["stages"].get(name)
                resolve_name(STAGE_TABLE[name].entry_point)(run)
                if run.manifest["stages"].get(name) is not before:
                    trackers.report(run, name)
        except Exception:
            # One that fails gets a report too; what keeps it from being written hides no error.
            if command == "run":
                try:
                    report.report(run)
                except Exception as second:
                    progress.warn(f"no report: {second}")
            raise
        if not run.is_main_process:
            return {}
        return metrics.numbers(metrics.Files(run.folder))


def _run_rounds(config: Any, progress: Any, command: str) -> Json:
    """The command `run`: all stages of all rounds; returns the first round's numbers."""
    from kit.pipeline import rounds

    return rounds.run_rounds(config, progress, _run_stages)


def _sweep(args: Namespace) -> int:
    from kit.pipeline import sweep
    from kit.reporting import compare

    result = sweep.sweep(args.config, args.overrides, args.progress, _run_rounds)
    show = compare.show if result["compare"] else _show
    _print(args, result, lambda result: show(result["compare"] or {"runs": result["runs"]}))
    return int(any(run["error"] for run in result["runs"]))


def _grade(args: Namespace) -> int:
    from kit.grading.files import Source, grade_file
    from kit.grading.outputs import Keys

    keys = Keys(args.answer, args.outputs, args.labels)
    source = Source(args.file, keys, args.gold, args.on, args.bare)
    return _print(args, grade_file(source, args.verifier))


def _data(args: Namespace) -> int:
    from kit import data
    from kit.core import config as configs

    path = f"data.train.path={json.dumps(args.source)}"
    overrides = [path, *(f"data.train.{text}" for text in args.overrides)]
    return _print(args, data.describe(configs.load(None, overrides).data.train, args.all))


def _judge(args: Namespace) -> int:
    from kit import interactive
    from kit.pipeline import truncate
    from kit.reporting import report, validate

    overrides = ["teacher.backend=file"]
    for key, value in vars(args).items():
        if "." in key and value is not None:
            overrides.append(f"{key}={json.dumps(value, ensure_ascii=False)}")
    args.overrides = overrides
    config = _config(args)
    if args.interactive:
        return interactive.walk(config)
    if args.validate:
        return _print(args, validate.validate(config, args.out, args.progress), validate.show)
    return _print(args, truncate.judge_file(config, args.progress), report.show_judged)


def _bench(args: Namespace) -> int:
    from kit import bench

    return _print(args, bench.run(args, args.progress))


def _compare(args: Namespace) -> int:
    from kit.backends import open_backend
    from kit.core import config as configs
    from kit.reporting import compare, pairwise

    judge = None
    if args.pairwise_judge:
        config = configs.load(args.pairwise_judge)
        if config.teacher.backend in ("file", "reference"):
            message = f"teacher.backend={config.teacher.backend} has no model that could judge."
            raise KitError(message, "Name a config whose teacher is a model.", 2)
        backend = open_backend(config.teacher)
        judge = partial(pairwise.compare_reasoning, backend, config.prompts)
    # the first run's group is what the others are compared with
    folders = [args.reference or args.runs[0], *args.runs]
    return _print(args, compare.compare(folders, args.out, judge), compare.show)


def _workshop(args: Namespace) -> int:
    from kit.reporting import workshop

    if args.check:
        return _print(args, workshop.check(args.runs, args.check), workshop.show)
    return _print(args, workshop.workshop(args.runs, args.out, args.participants), workshop.show)


def _plan(args: Namespace) -> int:
    from kit.training import plan

    return _print(args, plan.plan(_config(args)), lambda result: _show(plan.in_words(result)))


def _check(args: Namespace) -> int:
    from kit import preflight

    result = preflight.check(args.config, args.overrides)
    _print(args, result, preflight.show)
    return 0 if result["ok"] else 2


def _doctor(args: Namespace) -> int:
    from kit import doctor

    def tell(check: Json) -> None:
        # at once: a check takes up to a minute
        if not (args.json and args.quiet):
            stream = sys.stderr if args.json else sys.stdout
            print(doctor.in_words(check), file=stream, flush=True)

    result = doctor.examine(args.full, tell)
    _print(args, result, doctor.show)
    return 0 if result["ok"] else 1


def _export(args: Namespace) -> int:
    from kit.training import export

    keys = ("folder", "to", "out", "base", "quantize", "repo", "update", "dry_run")
    job = export.Export(progress=args.progress, **{key: getattr(args, key) for key in keys})
    return _print(args, export.export(job))


def _prompt(args: Namespace) -> int:
    from kit import interactive

    return _print(args, interactive.prompt(_config(args), args.of))


def _config(args: Namespace) -> Any:
    from kit.core import config

    return config.load(args.config, args.overrides)


def _print(args: Namespace, result: Json, show: Any = None) -> int:
    """Print a result for programs, or with `show` for people."""
    if args.json:
        print(json.dumps(result))
    else:
        (show or _show)(result)
    return 0


def _show(result: Json) -> None:
    """Print any result: a line for each value, a table for each list of rows."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False, soft_wrap=True)
    for key, value in result.items():
        if not isinstance(value, list):
            text = _text(value)
            console.print(f"{key}:\n{text}" if "\n" in text else f"{key}: {text}")
        elif value:
            columns = list(dict.fromkeys(name for row in value for name in row))
            table = Table(*columns, title=key)
            for row in value:
                table.add_row(*(_text(row.get(name, "")) for name in columns))
            console.print(table)


def _text(value: Any) -> str:
    from kit.core.progress import visible

    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    return f"{value:.4g}" if isinstance(value, float) else visible(str(value))


if __name__ == "__main__":
    # A terminal without our characters shows their codes.
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    sys.exit(main())
