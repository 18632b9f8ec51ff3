"""workshop: a leader's page and one page per participant, made from real runs, and the check of
the exercises (sections 3.2 and 3.3 of the paper, in people's hands).

All words are in templates/, the exercises' rules in exercises.yaml. Nothing is run here but
kit/walkthrough.py, whose output the leader's page shows.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import yaml
from jinja2 import Environment

from kit.core.errors import KitError
from kit.core.records import EvalRow
from kit.core.storage import write_atomic
from kit.grading.scores import compare_rows
from kit.judging.sentences import split
from kit.reporting.compare import answers_by_dataset, compare, differing_keys
from kit.reporting.metrics import Files, Json, numbers
from kit.reporting.report import TEMPLATES, render

ROOT = Path(__file__).parents[2]
READABLE_SENTENCES = range(8, 41)  # of a trace on a participant's page
SHORT_RATIO = 0.8  # of the token limit, within which the last exercise counts answers


def workshop(folders: Sequence[Path], out: Path, participants: int) -> Json:
    """Write the pages of a workshop.

    Args:
        folders: finished runs, among them one of method palign and one of a fixed cut.
        out: the folder for leader.html, participant-N.html and compare.html.
        participants: how many pages; each has a trace of its own while there are enough.

    Returns:
        {leader: path; participants: paths; compare: see `compare`}.

    Raises:
        KitError: a run is missing or has no judged trace, or the walkthrough does not run.
    """
    palign, fixed = _roles(folders)
    judged = [row for row in palign.prefixes if row.verdicts and not row.rejected]
    rows = [row for row in judged if row.sentences_total in READABLE_SENTENCES] or judged
    if not rows:
        raise KitError(f"{palign.folder} has no judged trace.", "Run it to its end first.")
    out.mkdir(parents=True, exist_ok=True)
    compared = compare(folders, out / "compare.html")
    fields = {
        "seats": [rows[number % len(rows)] for number in range(1, participants + 1)],
        "row": rows[0],
        "palign": numbers(palign),
        "fixed": numbers(fixed),
        "compared": compared,
        "threshold": palign.summary("truncate").get("threshold", 0.0),
        "wordiness": palign.config["teacher"]["wordiness"],
        "limit": _short(palign),
        "runs": " ".join(map(str, folders)),
        "walkthrough": _walkthrough(),
        "split": split,
    }
    write_atomic(out / "leader.html", render("workshop.html.j2", **fields))
    pages = []
    for number in range(1, participants + 1):
        pages.append(str(out / f"participant-{number}.html"))
        write_atomic(Path(pages[-1]), render("participant.html.j2", **fields, number=number))
    return {"leader": str(out / "leader.html"), "participants": pages, "compare": compared}


def check(folders: Sequence[Path], solutions: Sequence[Path]) -> Json:
    """Say of each participant's run which exercises it solves.

    Returns:
        {checked: [{run, exercise, solved, other_keys: changed though they are not the exercise's,
        numbers: what decides, in words}]}.

    Raises:
        KitError: a folder holds no run, or the workshop's own runs are not among `folders`.
    """
    palign, fixed = _roles(folders)
    limit = _short(palign)
    exercises = yaml.safe_load((TEMPLATES / "exercises.yaml").read_text(encoding="utf-8"))
    texts = Environment()  # noqa: S701 (plain text, for the terminal)
    checked = []
    for folder in solutions:
        run = Files(folder)
        fields = {
            "limit": limit,
            "test": compare_rows(_answers(fixed), _answers(run), limit),
            "run": {**run.config, **numbers(run)},
            "palign": {**palign.config, **numbers(palign)},
        }
        differing = [key for key in differing_keys([palign, run]) if " of " not in key]
        for exercise in exercises:
            other = [key for key in differing if not key.startswith(tuple(exercise["keys"]))]
            solved = texts.compile_expression(exercise["solved"])(fields)
            checked.append(
                {
                    "run": str(folder),
                    "exercise": exercise["name"],
                    "solved": bool(solved) and not other,
                    "other_keys": other,
                    "numbers": texts.from_string(exercise["numbers"]).render(fields),
                }
            )
    return {"checked": checked}


def show(result: Json) -> None:
    """Print where the pages are, or what was checked."""
    print(render("workshop.txt.j2", result=result))


def _roles(folders: Sequence[Path]) -> list[Files]:
    """The runs of P-ALIGN and of a fixed cut."""
    runs = list(map(Files, folders))
    roles = []
    for method in ("palign", "ratio-"):
        matching = [run for run in runs if run.config["method"].startswith(method)]
        if not matching:
            raise KitError(
                f"None of these runs is of the method {method}.",
                "Make them: palign.py run configs/workshop.yaml method=palign out=runs/w-palign, "
                "and method=ratio-0.5 out=runs/w-ratio-0.5.",
                2,
            )
        roles.append(matching[0])
    return roles


def _answers(run: Files) -> list[EvalRow]:
    """What a run's last model answered, on all data."""
    answers = answers_by_dataset({"": [run]}).values()
    return list(chain(*(by_group[""].rows for by_group in answers)))


def _walkthrough() -> str:
    """What kit/walkthrough.py prints."""
    command = [sys.executable, "-m", "kit.walkthrough"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise KitError(f"The walkthrough failed: {done.stderr[-400:]}", "Ask palign.py doctor.")
    return done.stdout.strip()


def _short(run: Files) -> int:
    return int(SHORT_RATIO * run.config["eval"]["sampling"]["max_new_tokens"])
