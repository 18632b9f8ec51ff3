#!/usr/bin/env python3
"""palign: reproduce, study and teach P-ALIGN on one card. The command line: stages wired, nothing computed."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import traceback
from pathlib import Path
from typing import Any

from kit import __version__
from kit.core.errors import KitError

STAGES = ("teach", "truncate", "align", "train", "eval", "report")
ABOUT = {
    "run": "run all stages, skipping what is done",
    "teach": "a trace for every problem, from a model, a file or the problem itself",
    "truncate": "cut each trace at the shortest prefix that the student judges sufficient",
    "align": "let the student continue from each prefix; keep the right ones as training rows",
    "train": "QLoRA on the training rows",
    "eval": "grade the student before and after, on problems it never saw",
    "report": "metrics.json and report.html of a run",
}


def parser() -> argparse.ArgumentParser:
    """The whole command line; nothing heavy is imported for it."""
    top = argparse.ArgumentParser(
        prog="palign.py", description=__doc__.split(".")[0] + ".", epilog=_epilog()
    )
    top.add_argument("--version", action="version", version=f"palign {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    shared = _shared()

    def command(name: str, about: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name, help=about, description=about[0].upper() + about[1:] + ".", parents=[shared]
        )

    for name, about in ABOUT.items():
        _config_arguments(command(name, about))
    grade = command(
        "grade", "grade the outputs in any JSONL: accuracy, pass@k, agreement with its labels"
    )
    grade.add_argument("file", metavar="FILE", help="rows with an answer and one or more outputs")
    grade.add_argument("--verifier", choices=("math", "number", "choice", "text"), default="math")
    _grade_arguments(grade)
    data = command("data", "show what a file, a preset or a hub set becomes: rows, reasons, problems")
    data.add_argument("source", metavar="SOURCE", help="a file, a preset (kit/presets.yaml), a hub id")
    data.add_argument(
        "overrides", nargs="*", metavar="key=value", help="e.g. preset=svamp fields={question: q}"
    )
    data.add_argument("--all", action="store_true", help="show all problems, not the first three")
    _judge_arguments(command("judge", "look at verdicts along the traces of a JSONL"))
    _bench_arguments(
        command("bench", "measure side by side in one run: judge, generate, train or grade")
    )
    compare = command("compare", "put runs side by side: one table, paired tests, one page")
    compare.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    compare.add_argument(
        "--out", default="compare.html", metavar="FILE", help="the page (default: compare.html)"
    )
    compare.add_argument(
        "--pairwise-judge",
        metavar="CONFIG",
        help="compare two runs' reasoning with this config's teacher",
    )
    _config_arguments(command("plan", "will it fit, how long will it take; no weights are loaded"))
    command("doctor", "check this machine; each finding with the command that fixes it")
    export = command("export", "merge a run's adapter, or turn it into a GGUF file")
    export.add_argument("run", metavar="RUN", help="run folder")
    export.add_argument("--to", choices=("merged", "gguf"), default="merged")
    export.add_argument("--out", metavar="DIR", help="default: RUN/export")
    prompt = command("prompt", "show a rendered prompt, as the model sees it, with its token count")
    _config_arguments(prompt)
    prompt.add_argument("--of", choices=("solve", "judge", "draft"), default="solve")
    return top


def main(argv: list[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0 done, 1 failed, 2 bad usage or config, 130 interrupted."""
    args = _parse(argv)
    from kit.core import interrupts
    from kit.core.progress import Progress, tame_libraries, visible

    tame_libraries(args.verbose or args.debug)
    interrupts.watch()
    progress = Progress(quiet=args.quiet)
    try:
        return (
            globals()[f"_{args.command}"](args, progress)
            if args.command not in ABOUT
            else _stages(args, progress)
        )
    except KitError as error:
        if args.debug:
            traceback.print_exc()
        print(visible(f"palign: {error}"), file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        interrupts.leave()
        return 130
    except BrokenPipeError:  # the reader of our output has gone
        return 1
    except Exception as error:
        if args.debug:
            raise
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        print(
            f"palign: a defect, not your mistake: {type(error).__name__}: {visible(str(error))} (at {where}). "
            "Finished rows are safe. Run again with --debug for the traceback, and please report it.",
            file=sys.stderr,
        )
        return 1


def _parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse; key=value may stand before and after flags alike, which argparse alone does not take."""
    top = parser()
    args, extra = top.parse_known_args(argv)
    if any(text.startswith("-") for text in extra) or (extra and not hasattr(args, "overrides")):
        top.error(f"unrecognized: {' '.join(extra)}")
    if extra:
        args.overrides += extra
    return args


def _stages(args: argparse.Namespace, progress: Any) -> int:
    from kit.core import config as configs
    from kit.core.run import Run
    from kit.data import problems_of

    config = configs.load(args.config, args.overrides)
    if args.command == "run":
        wanted = STAGES[: STAGES.index(config.stop_after) + 1]
        wanted = wanted if "report" in wanted else (*wanted, "report")  # a short run has a page too
    else:
        wanted = (args.command,)
    with Run(config, progress, args.command) as run:
        if args.command == "run":
            problems_of(
                run
            )  # read before any work: a mistake in the data shows at once and not after hours
        try:
            for stage in wanted:
                _stage(stage)(run)
        except KitError:
            with contextlib.suppress(
                KitError
            ):  # a run that cannot go on has a page that shows why, where it can
                if args.command == "run":
                    _stage("report")(run)
            raise
        if not run.is_main_process:
            return 0
        from kit.reporting import metrics, report

        numbers = metrics.numbers(metrics.Files(run.folder))
        if args.json:
            print(json.dumps(numbers, ensure_ascii=False))
        elif not args.quiet:
            report.show(numbers)
    return 0


def _stage(name: str) -> Any:
    if name == "teach":
        from kit.pipeline.teach import teach as stage
    elif name == "truncate":
        from kit.pipeline.truncate import truncate as stage
    elif name == "align":
        from kit.pipeline.align import align as stage
    elif name == "train":
        from kit.pipeline.train import train as stage
    elif name == "eval":
        from kit.pipeline.evaluate import evaluate as stage
    else:
        from kit.reporting.report import report as stage
    return stage


def _grade(args: argparse.Namespace, progress: Any) -> int:
    from kit.grading.files import Source, grade_file
    from kit.grading.outputs import Keys

    keys = Keys(args.answer, args.outputs, args.labels)
    gold = Path(args.gold) if args.gold else None
    return _print(args, grade_file(Source(Path(args.file), keys, gold, args.on, args.bare), args.verifier))


def _data(args: argparse.Namespace, progress: Any) -> int:
    from kit import data
    from kit.core import config as configs

    keys = [f"data.train.{text}" for text in args.overrides]
    config = configs.load(None, [f"data.train.path={json.dumps(args.source)}", *keys])
    return _print(args, data.describe(config.data.train, args.all))


def _judge(args: argparse.Namespace, progress: Any) -> int:
    from kit import interactive
    from kit.core import config as configs
    from kit.pipeline import truncate
    from kit.reporting import report

    given = {
        "judge.search": args.search,
        "judge.kind": args.kind,
        "judge.threshold": args.threshold,
    }
    given |= {
        "student.backend": args.backend,
        "student.model": args.model,
        "student.dtype": args.dtype,
    }
    given |= {"student.url": args.url, "teacher.backend": "file", "teacher.path": args.file}
    given |= {"data.train.limit": args.limit}
    keys = [
        f"{key}={json.dumps(value, ensure_ascii=False)}"
        for key, value in given.items()
        if value is not None
    ]
    config = configs.load(args.config, keys)
    return (
        interactive.walk(config)
        if args.interactive
        else _print(args, truncate.judge_file(config, progress), report.show_judged)
    )


def _bench(args: argparse.Namespace, progress: Any) -> int:
    from kit import bench

    return _print(args, bench.run(args, progress))


def _compare(args: argparse.Namespace, progress: Any) -> int:
    from kit.reporting import compare

    judge = _quality(args.pairwise_judge) if args.pairwise_judge else None
    return _print(
        args, compare.compare([Path(run) for run in args.runs], Path(args.out), judge), compare.show
    )


def _quality(path: str) -> Any:
    """What compares reasoning: the teacher of a config, as a judge."""
    from kit.backends import open_backend
    from kit.core import config as configs
    from kit.reporting.pairwise import compare_reasoning

    config = configs.load(path)
    backend = open_backend(config.teacher)
    return lambda first, second: compare_reasoning(backend, config.prompts, first, second)


def _plan(args: argparse.Namespace, progress: Any) -> int:
    from kit.core import config as configs
    from kit.training import plan

    return _print(args, plan.plan(configs.load(args.config, args.overrides)))


def _doctor(args: argparse.Namespace, progress: Any) -> int:
    from kit import doctor

    result = doctor.examine()
    _print(args, result, doctor.show)
    return 0 if result["ok"] else 1


def _export(args: argparse.Namespace, progress: Any) -> int:
    from kit.training import export

    return _print(
        args, export.export(Path(args.run), progress, args.to, Path(args.out) if args.out else None)
    )


def _prompt(args: argparse.Namespace, progress: Any) -> int:
    from kit import interactive as step
    from kit.core import config as configs

    return _print(args, step.prompt(configs.load(args.config, args.overrides), args.of))


def _print(args: argparse.Namespace, result: dict[str, Any], show: Any = None) -> int:
    if args.json:
        print(json.dumps(result, ensure_ascii=False))
    else:
        (show or _show)(result)
    return 0


def _show(result: dict[str, Any]) -> None:
    """Print any result: a line for each value, a table for each list of rows."""
    from rich.console import Console
    from rich.table import Table

    from kit.core.progress import visible

    def text(value: Any) -> str:
        if isinstance(value, dict):
            return ", ".join(f"{key} {text(item)}" for key, item in value.items())
        return f"{value:.4g}" if isinstance(value, float) else visible(str(value))

    console = Console(highlight=False, markup=False, soft_wrap=True)
    for key, value in result.items():
        if not isinstance(value, list):
            console.print(
                f"{key}:{chr(10) if isinstance(value, str) and chr(10) in value else ' '}{text(value)}"
            )
        elif value:
            names = list(dict.fromkeys(name for row in value for name in row))
            table = Table(*names, title=key)
            for row in value:
                table.add_row(*(text(row.get(name, "")) for name in names))
            console.print(table)


def _shared() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--json", action="store_true", help="one machine-readable object on standard output"
    )
    shared.add_argument("--quiet", action="store_true", help="print only warnings and errors")
    shared.add_argument(
        "--verbose", action="store_true", help="say more, the libraries' own messages included"
    )
    shared.add_argument(
        "--debug", action="store_true", help="tracebacks instead of one clear paragraph"
    )
    return shared


def _config_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("config", metavar="CONFIG", help="a YAML file, see configs/")
    command.add_argument(
        "overrides", nargs="*", metavar="key=value", help="e.g. data.train=PATH align.samples=4"
    )


def _judge_arguments(judge: argparse.ArgumentParser) -> None:
    judge.add_argument("file", metavar="FILE", help="rows with a question, an answer and a trace")
    judge.add_argument(
        "--config",
        metavar="CONFIG",
        help="take the student, the judge and the rest from this config",
    )
    judge.add_argument(
        "--model", help="an alias (default: smollm2-135m), a GGUF file, a folder or a hub id"
    )
    judge.add_argument("--backend", choices=("hf", "gguf", "http"), help="default: hf")
    judge.add_argument("--url", help="http: the server's address up to and with /v1")
    judge.add_argument(
        "--dtype", choices=("auto", "fp32", "bf16", "int8", "nf4"), help="default: auto"
    )
    judge.add_argument(
        "--search", choices=("binary", "gallop", "scan", "uncached"), help="default: binary"
    )
    judge.add_argument("--kind", choices=("verbal", "answer"), help="default: verbal")
    judge.add_argument("--threshold", type=float, help="a margin at or above it is ENOUGH")
    judge.add_argument("--limit", type=int, help="only the first N traces")
    judge.add_argument(
        "--interactive", action="store_true", help="walk through a trace interactively"
    )


def _grade_arguments(grade: argparse.ArgumentParser) -> None:
    grade.add_argument("--answer", metavar="KEY", help="the gold answer; a.b goes into a row")
    grade.add_argument("--outputs", metavar="KEY", help="one output or several")
    grade.add_argument("--labels", metavar="KEY", help="the file's own verdicts, to compare with")
    grade.add_argument("--gold", metavar="FILE", help="take the gold answers from this file")
    grade.add_argument("--on", metavar="KEY", help="what both files share, or KEY=KEY_OF_GOLD")
    grade.add_argument("--bare", action="store_true", help="the outputs are extracted answers")


def _bench_arguments(bench: argparse.ArgumentParser) -> None:
    bench.add_argument("subject", choices=("judge", "generate", "train", "grade"))
    bench.add_argument("--traces", metavar="FILE", help="judge: rows with traces")
    bench.add_argument("--limit", type=int, help="how many traces or prompts")
    bench.add_argument("--backend", choices=("hf", "gguf"), default="hf")
    bench.add_argument("--model", default="smollm2-135m")
    bench.add_argument(
        "--verdicts", choices=("early", "middle", "late"), help="judge: force the search's path"
    )
    bench.add_argument("--repeats", type=int, default=3)
    bench.add_argument("--tokens", type=int, default=4096, help="train: length of the row")
    bench.add_argument("--new-tokens", type=int, default=128, help="generate: tokens a prompt")


def _epilog() -> str:
    return "palign.py COMMAND --help tells more. Start with: palign.py run configs/smoke.yaml"


if __name__ == "__main__":
    sys.exit(main())
