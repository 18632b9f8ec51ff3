"""Answers found and graded: the verdicts of a careful person, and a worker that never outlives its
limit.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter

import psutil
import pytest

from kit.grading.answers import LONGEST, Grader, Item
from kit.grading.extract import find, last_box
from kit.grading.math_worker import GRACE_SECONDS
from kit.grading.normalize import normalize
from kit.grading.quantities import read_quantity
from tests.answer_grammar import pair
from tests.conftest import EXCERPTS, ROOT, SHARED
from tests.grading_cases import PAIRS

TOWER = r"\boxed{9^{9^{9^{9}}}}"


def workers_of(pid: int) -> list[psutil.Process]:
    """Living grading workers below a process."""
    return [
        p
        for p in psutil.Process(pid).children(recursive=True)
        if "spawn_main" in " ".join(p.cmdline())
    ]


@pytest.fixture(scope="module")
def warm():
    """One grader for all tests that need no limits of their own."""
    with Grader(timeout_seconds=20) as grader:
        yield grader


@pytest.fixture
def started(warm):
    """A function for the living workers that were started since the test began."""
    known = workers_of(os.getpid())
    return lambda: [worker for worker in workers_of(os.getpid()) if worker not in known]


@pytest.fixture(scope="module")
def graded(warm):
    return warm.grade([Item(gold, output, verifier) for gold, output, verifier, _ in PAIRS])


def test_pairs_are_many_and_distinct():
    assert len(PAIRS) >= 150 and len(set(PAIRS)) == len(PAIRS)


@pytest.mark.parametrize("number", range(len(PAIRS)), ids=lambda n: f"{PAIRS[n][2]}-{n}")
def test_verdict_of_pair(graded, number):
    assert graded[number].verdict == PAIRS[number][3], (PAIRS[number], graded[number])


def test_how_names_the_place_and_the_method(warm):
    items = [
        Item("8000", "\\boxed{8,000}", "number"),
        Item("8", "#### 8", "number"),
        Item("8", "The answer is 8.", "number"),
        Item("1/2", "\\boxed{\\frac12}"),
        Item("\\text{east}", "\\boxed{east}"),
        Item("B", "\\boxed{B}", "choice"),
        Item("Paris", "\\boxed{Paris}", "text"),
        Item("8", "nothing"),
    ]
    grades = warm.grade(items)
    assert [grade.how for grade in grades] == [
        "boxed:decimal",
        "hashes:decimal",
        "phrase:decimal",
        "boxed:math",
        "boxed:string",
        "boxed:choice",
        "boxed:text",
        "none",
    ]
    assert [grade.answer for grade in grades[:3]] == ["8,000", "8", "8"] and grades[
        -1
    ].answer is None


def test_answer_is_recorded_as_it_stands_in_the_text():
    assert find(r"so \boxed{\frac{1}{2}}") == (r"\frac{1}{2}", "boxed")
    assert find("The answer is 12 apples.", "number") == ("12", "phrase")
    # a judge model reads words
    assert find("So the answer is a mammal.", "judge") == ("a mammal", "phrase")
    assert find("He ate.\n#### a warm meal", "judge") == ("a warm meal", "hashes")
    assert last_box(r"\boxed{a {b} \{ c}") == r"a {b} \{ c"
    assert find("") == (None, "none")


def test_decimals_are_exact_and_never_guess():
    assert read_quantity("0.1").value != read_quantity("0.10000000000000000001").value
    assert read_quantity("20%").value == read_quantity("20").value
    assert read_quantity("20%").percent and not read_quantity("20").percent
    for text in ("1/2", "3x", "2^3", "3,4", "1e5x", "", "--3", ".", "3 4"):
        assert read_quantity(normalize(text), words=True) is None, text


def test_plain_numbers_start_no_worker(started):
    with Grader() as grader:
        grader.grade([Item(str(n), f"\\boxed{{{n}}}", "number") for n in range(100)])
        assert started() == []


def test_tower_of_powers_times_out_and_the_rest_is_graded(started):
    items = [Item("1/2", f"\\boxed{{{n}/{2 * n}}}") for n in range(1, 9)]
    with Grader(timeout_seconds=1.0) as grader:
        grader.grade(items[:1])  # warm
        begun = time.monotonic()
        grades = grader.grade([*items[:4], Item("5", TOWER), *items[4:]])
        seconds = time.monotonic() - begun
        assert (grades[4].verdict, grades[4].how) == ("timeout", "boxed:time")
        assert [g.verdict for g in grades[:4] + grades[5:]] == ["correct"] * 8
        assert seconds > 1.0 and len(started()) == 1
        assert grader.grade([Item("3", r"\boxed{\sqrt{9}}")])[0].verdict == "correct"
    assert started() == []


def test_a_worker_outlives_its_thread_and_is_replaced_after_a_crash_and_at_its_memory_limit(
    started,
):
    root = Item("3", r"\boxed{\sqrt{9}}")
    with Grader(timeout_seconds=20, memory_bytes=160 << 20) as grader:
        thread = threading.Thread(target=lambda: grader.grade([root]))
        thread.start()
        thread.join()
        [first] = started()
        assert grader.grade([root])[0].verdict == "correct" and started() == [first]
        os.kill(first.pid, signal.SIGSEGV)
        for item, how in (
            (root, "crash"),
            (root, "math"),
            (Item("5", r"\boxed{\lfloor 2^{3000000000} \rfloor}"), "memory"),
            (root, "math"),
        ):
            grade = grader.grade([item])[0]
            assert grade.how == f"boxed:{how}" and grade.verdict == (
                "correct" if how == "math" else "timeout"
            )


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{" + "9" * 1_000_000 + "}",
        "\\boxed{" * 140_000,
        "{" * 1_000_000 + "\\boxed{",
        "\\boxed{" + "(" * (LONGEST + 1) + "}",
        "answer is answer " * 60_000,
        "#### " + "8" * 1_000_000,
    ],
    ids=["digits", "boxes", "braces", "brackets", "phrases", "hashes"],
)
def test_a_megabyte_is_refused_cheaply(text, started):
    with Grader() as grader:
        begun = time.monotonic()
        grade = grader.grade([Item("8", text)])[0]
        assert grade.verdict == "unparsed" and time.monotonic() - begun < 5
        assert grade.answer is None and grade.how in ("oversized", "none")
        assert started() == []


def test_grading_from_threads_leaves_signals_alone(warm):
    before = [signal.getsignal(s) for s in (signal.SIGALRM, signal.SIGCHLD, signal.SIGINT)]
    found: list[list[str]] = []

    def work(shift: int) -> None:
        items = [Item(f"{n + 1}/7", f"\\boxed{{\\frac{{{n + 1 + shift}}}{{7}}}}") for n in range(5)]
        found.append([grade.verdict for grade in warm.grade(items)])

    n_threads = [threading.Thread(target=work, args=(shift,)) for shift in (0, 0, 1)]
    for thread in n_threads:
        thread.start()
    for thread in n_threads:
        thread.join()
    assert sorted(found) == [["correct"] * 5, ["correct"] * 5, ["wrong"] * 5]
    assert [signal.getsignal(s) for s in (signal.SIGALRM, signal.SIGCHLD, signal.SIGINT)] == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_an_answer_is_not_lost_where_other_work_takes_the_processor(started):
    """The worker stands still for longer than an answer may compute: only its own time counts."""
    with Grader(timeout_seconds=1.0) as grader:
        grader.grade([Item("3", r"\boxed{\sqrt{9}}")])
        [worker] = started()
        worker.suspend()
        resumed = threading.Timer(2.5, worker.resume)
        resumed.start()
        [grade] = grader.grade([Item("5", r"\boxed{\sqrt{25}}")])
        resumed.join()
        assert (grade.verdict, grade.how, started()) == ("correct", "boxed:math", [worker])


def test_an_answer_that_computes_too_long_ends_by_its_own_time_not_by_the_clock():
    code = (
        "from kit.grading.math_worker import _timed\n"
        "def busy(gold, answer):\n    while True: pass\n"
        "_timed(busy, '', '', 0.5)"
    )
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60)
    assert process.returncode == -signal.SIGPROF


def test_workers_end_when_their_parent_is_killed():
    code = (
        "from kit.grading.answers import Grader, Item\n"
        "g = Grader(timeout_seconds=2)\n"
        "g.grade([Item('3', r'\\boxed{\\sqrt{9}}')]); print('busy', flush=True)\n"
        "g.grade([Item('5', r'\\boxed{9^{9^{9^9}}}')])\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT, text=True
    )
    try:
        assert parent.stdout.readline() == "busy\n"
        time.sleep(0.5)
        workers = workers_of(parent.pid)
        assert len(workers) == 1
    finally:
        parent.kill()
        parent.communicate()
    _, alive = psutil.wait_procs(workers, timeout=2 + GRACE_SECONDS + 3)
    assert alive == [], "a worker outlived its limit"


@pytest.mark.parametrize("moment", ["comparing", "starting"])
def test_ctrl_c_ends_a_grading_call_at_once(moment):
    """While math-verify computes, and while a worker is being started after a kill: neither is
    waited for.
    """
    code = r"""
import os, signal, multiprocessing.popen_spawn_posix, threading, time
from kit.grading.answers import Grader, Item

# a shell's background jobs begin with it ignored
signal.signal(signal.SIGINT, signal.default_int_handler)
Popen = multiprocessing.popen_spawn_posix.Popen
starts, start = [], Popen._launch

def interrupted(*args, **options):
    starts.append(1)
    if len(starts) == 2:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)
    return start(*args, **options)

if MOMENT == "starting":
    Popen._launch = interrupted
towers = [Item("5", r"\boxed{9^{9^{9^9}} + %d}" % n) for n in range(9)]
try:
    with Grader(timeout_seconds=0.5 if MOMENT == "starting" else 60) as grader:
        grader.grade([Item("3", r"\boxed{\sqrt{9}}")])
        print("busy", flush=True)
        grader.grade(towers)
except KeyboardInterrupt:
    print("ended", threading.active_count(), flush=True)
"""
    code = code.replace("MOMENT", repr(moment))
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT, text=True
    )
    try:
        assert process.stdout.readline() == "busy\n"
        if moment == "comparing":
            time.sleep(0.5)
            process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=20)  # a tower alone takes 60 seconds
        assert out == "ended 1\n"
    finally:
        process.kill()


def test_an_idle_worker_ends_with_its_parent():
    code = (
        "import time\n"
        "from kit.grading.answers import Grader, Item\n"
        "Grader().grade([Item('3', r'\\boxed{\\sqrt{9}}')]); print('idle', flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT, text=True
    )
    try:
        assert parent.stdout.readline() == "idle\n"
        workers = workers_of(parent.pid)
        assert len(workers) == 1
    finally:
        parent.kill()
        parent.communicate()
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert alive == [], "a worker outlived its parent"


FUZZ_PAIRS = int(os.environ.get("PALIGN_FUZZ", "300"))
SEEDS_THAT_FAILED = (102, 5899, 9853)  # of tests/answer_grammar.py, on the way


def test_pairs_from_a_grammar_are_graded_as_constructed(warm):
    """Unequal answers never pass, equal ones mostly do."""
    seeds = [*SEEDS_THAT_FAILED, *range(FUZZ_PAIRS)]
    refused = equals = 0
    for seed in seeds:
        gold, answer, equal = pair(seed)
        [grade] = warm.grade([Item(gold, f"\\boxed{{{answer}}}")])
        assert equal or grade.verdict != "correct", (seed, gold, answer, grade)
        equals += equal
        refused += equal and grade.verdict != "correct"
    assert refused <= 0.02 * equals


def test_pairs_accept_nothing_wrong_and_nearly_all_that_is_right(warm):
    whole = SHARED / "grading_cases.jsonl"
    path = whole if whole.exists() else EXCERPTS / "grading_pairs.jsonl"
    cases = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    grades = warm.grade([Item(case["gold"], case["output"], case["verifier"]) for case in cases])
    accepted = [grade.verdict == "correct" for grade in grades]
    wrong = [case for case, yes in zip(cases, accepted, strict=True) if yes and not case["right"]]
    right = sum(case["right"] for case in cases)
    assert wrong == [] and sum(accepted) >= 0.95 * right


KINDS = [
    json.loads(line) for line in (EXCERPTS / "grading_cases.jsonl").read_text("utf-8").splitlines()
]


@pytest.mark.parametrize("kind", sorted({case["kind"] for case in KINDS}))
def test_each_kind_of_answer_is_graded_as_a_person_would(warm, kind):
    cases = [case for case in KINDS if case["kind"] == kind]
    assert min(Counter(case["right"] for case in cases).values()) >= 5
    grades = warm.grade([Item(case["gold"], case["output"], case["verifier"]) for case in cases])
    for case, grade in zip(cases, grades, strict=True):
        assert (grade.verdict == "correct") == case["right"], (case, grade)


def test_a_script_without_a_main_guard_is_not_run_again_by_the_worker():
    """Neither from standard input, which cannot be read twice: its answers are still compared."""
    script = (
        "from kit.grading.answers import Grader, Item\nprint('once')\n"
        "with Grader() as grader:\n"
        "    print(grader.grade([Item('1/2', r'\\boxed{\\frac{2}{4}}')])[0].verdict)\n"
    )
    finished = subprocess.run(
        [sys.executable, "-"], input=script, cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert finished.stdout.split() == ["once", "correct"], finished.stderr
