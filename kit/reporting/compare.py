"""Runs side by side: one table, paired tests on the same problems, and a page like the report's.

Runs that differ only in their seed form one group: a problem's score in a group is its mean over
the group's runs, so seeds make a problem's own score more certain but never count as more problems.
How much runs differ from seed to seed widens the interval of a difference between groups.
Nothing is graded again here.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import chain, combinations, islice, zip_longest
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from kit.core.config import expand, flat, load
from kit.core.errors import KitError
from kit.core.fingerprints import ADAPTER, adapter_hash
from kit.core.records import AlignedRow, EvalRow, PrefixRow
from kit.core.stages import NEUTRAL, file_name
from kit.core.storage import write_atomic
from kit.grading import stats
from kit.grading.scores import accuracy_by_problem, compare_rows, score
from kit.judging.baselines import long_and_short
from kit.judging.sentences import ends
from kit.prompts import target
from kit.reporting.metrics import Files, Json, numbers
from kit.reporting.report import pieces, render

DISAGREEMENTS = 6  # problems shown on which groups disagree
BUDGETS = 80  # points of a curve
LABEL_CHARACTERS = 30  # of what is said of a group beside its method
NAMES = {"name", "out", "stop_after", "rounds"}  # config keys that change no number of a run

Groups = dict[str, list[Files]]  # runs by label
Rows = list[EvalRow]
Key = tuple[str, str]  # a trace: its id and text


@dataclass
class Answers:
    """What the runs of one group answered to one dataset."""

    seeds: list[int] = field(default_factory=list)
    by_run: list[Rows] = field(default_factory=list)

    @cached_property
    def rows(self) -> Rows:
        """Of all runs."""
        return list(chain(*self.by_run))

    @cached_property
    def accuracies(self) -> list[float]:
        """Of each run, over its problems."""
        return [fmean(accuracy_by_problem(rows).values()) for rows in self.by_run]

    @cached_property
    def by_seed(self) -> dict[int, float]:
        """Accuracy by seed, in order; a seed that was run twice counts once, by its mean."""
        accuracies = defaultdict(list)
        for seed, accuracy in sorted(zip(self.seeds, self.accuracies, strict=True)):
            accuracies[seed].append(accuracy)
        return {seed: fmean(values) for seed, values in accuracies.items()}


def compare(folders: Sequence[Path], out: Path, judge: Callable[..., Any] | None = None) -> Json:
    """Compare runs and write the page `out`.

    Args:
        judge: compares the reasoning of two runs' eval rows (kit/reporting/pairwise.py); asked for
            the first two groups.

    Returns:
        runs [see `metrics.numbers`]; groups [{label, seeds}]; page
        scores [{group, dataset, runs, by_run, spread over seeds, and a `Score`}]
        pairs [{dataset, a, b, words, over_seeds: whether the interval covers other training runs,
            and the `PairedTest` of b against a}]
        different [see `_disagreements`]; within {dataset: see `accuracy_within`}
        quality {dataset: {a, b, and a `ReasoningTest`}}; lesson: see `_lesson`
        differs {config key: each run's value}
        budget (tokens of an answer), student and teacher: of the first run

    Raises:
        KitError: fewer than two folders, one without a run, or scores of another adapter than the
            run's own.
    """
    # one folder under two names is one run
    unique = {folder.resolve(): folder for folder in folders}
    if len(unique) < 2:
        raise KitError(
            "compare needs two runs or more.",
            "Name their folders: palign.py compare runs/a runs/b.",
            2,
        )
    if out.is_dir():
        raise KitError(f"{out} is a folder.", "Name the page's file: --out compare.html.", 2)
    files = list(map(Files, unique.values()))
    for run in files:
        _check_adapter(run)
    groups = _groups(files)
    labels = []
    for label, group in groups.items():
        labels.append({"label": label, "seeds": [run.config["seed"] for run in group]})
    config = files[0].config
    runs = {run.folder: numbers(run) for run in files}
    result = {
        "runs": list(runs.values()),
        "page": str(out),
        "groups": labels,
        **_on_datasets(groups, judge),
        "lesson": _lesson({label: group[0] for label, group in groups.items()}, runs),
        "differs": differing_keys(files),
        "budget": config["eval"]["sampling"]["max_new_tokens"],
        "student": config["student"]["model"],
        "teacher": files[0].teacher,
    }
    write_atomic(out, render("compare.html.j2", result=result, groups=groups))
    return result


def _on_datasets(groups: Groups, judge: Callable[..., Any] | None) -> Json:
    """What is compared dataset by dataset: see `compare`."""
    compared: Json = {"scores": [], "pairs": [], "different": [], "within": {}, "quality": {}}
    for dataset, answers in answers_by_dataset(groups).items():
        rows = {label: own.rows for label, own in answers.items()}
        compared["scores"] += _scores(dataset, answers)
        compared["pairs"] += _pairs(dataset, answers)
        compared["different"] += _disagreements(dataset, rows)
        compared["within"][dataset] = accuracy_within(rows)
        if judge and len(answers) > 1:
            a, b, *_ = answers
            test = judge(answers[a].by_run[0], answers[b].by_run[0])
            compared["quality"][dataset] = {"a": a, "b": b, **asdict(test)}
    return compared


def show(result: Json) -> None:
    """Print a comparison for a person."""
    print(render("compare.txt.j2", result=result))


def _check_adapter(run: Files) -> None:
    """Refuse (KitError) a run whose scores are of another adapter than it holds now."""
    scored = run.keys("eval").get(ADAPTER)
    now = adapter_hash(run.folder / "adapter")
    if scored and now and scored != now:
        raise KitError(
            f"The scores in {run.folder} are of another adapter than its adapter/ is now.",
            f"Evaluate it again: palign.py run {run.folder}/config.yaml.",
        )


def _model(run: Files) -> dict[str, str]:
    """Fingerprints of the model that was evaluated: equal names may stand for other weights."""
    keys = run.keys("eval").items()
    return {key: value for key, value in keys if key.endswith(" of eval.model")}


def _groups(files: list[Files]) -> Groups:
    """Runs with equal configs, seed and names aside; labelled by method and what is their own."""
    by_config = defaultdict(list)
    for run in files:
        by_config[repr({**_setting(run.config), **_model(run)})].append(run)
    firsts = [runs[0] for runs in by_config.values()]
    groups: Groups = {}
    for first, runs in zip(firsts, by_config.values(), strict=True):
        label = first.config["method"]
        alike = [run for run in firsts if run.config["method"] == label]
        if len(alike) > 1:
            label += f" ({_words(alike, first) or first.config['name']})"
        if label in groups:
            label = f"{label} in {first.folder}"
        groups[label] = runs
    return groups


def _words(alike: list[Files], run: Files) -> str:
    """What sets a run apart from others of its method; empty if that is much or nothing."""
    words = []
    for key, values in differing_keys(alike).items():
        if key != "seed":
            words.append(f"{key.split('.')[-1]}={values[alike.index(run)]}")
    text = ", ".join(words)
    return text if len(text) <= LABEL_CHARACTERS else ""


def _setting(config: Json) -> Json:
    """A run's dotted keys without its names, its seed and those that change no number.

    Another run that it names, whose adapter it has on or to which it is matched, counts by its own
    setting: each seed has one of its own.
    """
    setting = {}
    for key, value in flat(config).items():
        if key not in NAMES | {"seed"} and key.split(".")[-1] not in NEUTRAL:
            setting[key] = value
    named = {"student.adapter": config["student"]["adapter"]}
    # in a sweep every run has the key, also the one that it names
    if config["method"] == "fixed-prefix-matched":
        named["baseline.matched_run"] = config["baseline"]["matched_run"]
    for key, folder in named.items():
        file = expand(str(folder).replace("{seed}", str(config["seed"]))) / "config.yaml"
        is_here = folder and file.exists()
        setting[key] = _setting(load(file).model_dump(mode="json")) if is_here else folder
    return setting


def answers_by_dataset(groups: Groups) -> dict[str, dict[str, Answers]]:
    """What each run's last model (the tuned one, if any) answered: by dataset, then by group."""
    answers: dict[str, dict[str, Answers]] = defaultdict(lambda: defaultdict(Answers))
    for label, runs in groups.items():
        for run in runs:
            # The base model's scores stand first, so the tuned model's replace them.
            last = {score["dataset"]: score for score in run.summary("eval").get("scores", [])}
            for dataset, entry in last.items():
                file = file_name(entry["model"], entry["which"], dataset)
                rows = run.rows(file, EvalRow)
                _check_whole(run.folder / file, rows, entry["n"])
                if rows:
                    answers[dataset][label].seeds.append(run.config["seed"])
                    answers[dataset][label].by_run.append(rows)
    return answers


def _check_whole(file: Path, rows: Rows, scored: int) -> None:
    """Refuse (KitError) a file of answers that has lost some since it was scored."""
    left = len({(row.id, row.question) for row in rows})
    if left < scored:
        raise KitError(
            f"{file} has {left} of the {scored} problems that were scored: the others were deleted "
            "or edited.",
            f"Make them again: palign.py run {file.parents[1]}/config.yaml.",
        )


def _scores(dataset: str, answers: dict[str, Answers]) -> list[Json]:
    """Each group's pooled score, its runs' accuracies, and their standard deviation over seeds."""
    scores = []
    for label, own in answers.items():
        scores.append(
            {
                "group": label,
                "dataset": dataset,
                "runs": len(own.by_run),
                "by_run": own.accuracies,
                "spread": stdev(own.by_seed.values()) if len(own.by_seed) > 1 else None,
                **asdict(score(own.rows)),
            }
        )
    return scores


def _pairs(dataset: str, answers: dict[str, Answers]) -> list[Json]:
    """Each later group against each earlier one, with the test's result in words."""
    pairs = []
    for a, b in combinations(answers, 2):
        test = compare_rows(answers[a].rows, answers[b].rows)
        if not test:
            continue
        first = answers[a].by_seed
        second = answers[b].by_seed
        # runs of the same seeds are paired
        noise = stats.seed_noise([*first.values()], [*second.values()], [*first] == [*second])
        if noise:
            test = stats.over_seeds(test, *noise)
        better = b if test.difference > 0 else a
        if test.p_value >= 0.05 or test.ci_low <= 0 <= test.ci_high:
            words = "within the noise"
        elif abs(test.difference) >= test.min_detectable_difference:
            words = f"{better} is better"
        else:
            words = f"{better} is slightly ahead"
        about = {"dataset": dataset, "a": a, "b": b, "over_seeds": noise is not None}
        pairs.append({**about, **asdict(test), "words": words})
    return pairs


def _disagreements(dataset: str, answers: dict[str, Rows]) -> list[Json]:
    """Problems on which groups disagree most, in turn from those where each group is ahead.

    Returns:
        {dataset, id, question, gold, answers [{group, share of correct samples, of, sample}]}
    """
    accuracies = {label: accuracy_by_problem(rows) for label, rows in answers.items()}
    ahead: dict[str, list[Any]] = {label: [] for label in answers}
    # A problem belongs to the group with the highest accuracy on it; wide gaps come first.
    for problem in set.intersection(*map(set, accuracies.values())):
        shares = {label: accuracies[label][problem] for label in answers}
        best = max(shares, key=shares.__getitem__)
        gap = shares[best] - min(shares.values())
        if gap:
            ahead[best].append((-gap, problem))
    turns = chain(*zip_longest(*map(sorted, ahead.values())))
    disagreements = []
    for _, problem in islice(filter(None, turns), DISAGREEMENTS):
        shown = []
        for label, rows in answers.items():
            own = [row for row in rows if (row.id, row.question) == problem]
            shown.append(
                {
                    "group": label,
                    "share": accuracies[label][problem],
                    "of": sum(len(row.samples) for row in own),
                    "sample": own[0].samples[0].model_dump() if own[0].samples else None,
                }
            )
        row = own[0]
        about = {"dataset": dataset, "id": row.id, "question": row.question, "gold": row.answer}
        disagreements.append({**about, "answers": shown})
    return disagreements


def accuracy_within(answers: dict[str, Rows]) -> list[tuple[str, list[tuple[int, float]]]]:
    """Each group's accuracy by token budget: [(group, [(tokens, accuracy), ...]), ...].

    A correct answer counts from the token at which it ended, though it may have given its result
    before; every problem weighs the same.
    """
    every = chain(*answers.values())
    longest = max((sample.tokens for row in every for sample in row.samples), default=0)
    budgets = sorted({round(longest * i / BUDGETS) for i in range(BUDGETS + 1)})
    curves = []
    for label, rows in answers.items():
        points = []
        for budget in budgets:
            points.append((budget, fmean(accuracy_by_problem(rows, budget).values())))
        curves.append((label, points))
    return curves


def _lesson(runs: dict[str, Files], described: dict[Path, Json]) -> Json | None:
    """What each group's first run learned from, and one problem that all of them learned from.

    Args:
        described: the `numbers` of each run's folder.

    Returns:
        targets [{group, method, rows, characters: median, lengthened: rows, used_share of the
        trace: median}]; question, gold and trace of the
        problem; shown {group: what the student learns to write}; search: how the first group that
        judged the trace cut it {group, judge, threshold, lengthened, row, and `pieces`}. Without
        such a problem shown is empty and search None; None where nothing was learned.
    """
    targets = []
    learned = {}
    cuts: dict[Key, tuple[str, PrefixRow]] = {}
    for label, run in runs.items():
        for row in run.prefixes:
            if row.verdicts:
                cuts.setdefault((row.id, row.trace), (label, row))
        if run.train:
            learned[label] = _learned(run)
            about = described[run.folder]
            targets.append(
                {
                    "group": label,
                    "method": run.config["method"],
                    "rows": len(run.train),
                    "characters": median(len(row["output"]) for row in run.train),
                    "lengthened": about["lengthened"],
                    "used_share": about["lengths"]["used_share"]["p50"],
                }
            )
    if not learned:
        return None
    lesson: Json = {"targets": targets, "shown": {}, "search": None}
    shared = set.intersection(*map(set, learned.values()))
    if not shared:
        return lesson

    # A typical problem: of the median length, among those that a judge cut where there are any.
    candidates = sorted(shared & cuts.keys() or shared, key=lambda key: (len(key[1]), key))
    key = candidates[len(candidates) // 2]

    # What each method makes of it, and how it was cut.
    for label, rows in learned.items():
        aligned = rows[key]
        method = runs[label].config["method"]
        lesson["shown"][label] = target(method, aligned, aligned.continuation)
    if key in cuts:
        label, cut = cuts[key]
        lesson["search"] = {
            "group": label,
            "judge": runs[label].config["judge"],
            "threshold": runs[label].summary("truncate").get("threshold"),
            "lengthened": learned[label][key].lengthened if label in learned else 0,
            "row": cut.model_dump(),
            **pieces(cut),
        }
    return {**lesson, "question": aligned.question, "gold": aligned.answer, "trace": key[1]}


def _learned(run: Files) -> dict[Key, AlignedRow]:
    """The rows that a run's student learned from, by their trace."""
    keys = {}
    for trace in run.traces:
        for whole in trace.whole(ends):
            # of the two rows of mix-long-short, the short one, which comes last
            for row in (whole, *long_and_short(whole)):
                keys[row.id] = (whole.id, whole.trace)
    return {keys[row.id]: row for row in run.aligned if row.id in keys and not row.rejected}


def differing_keys(files: list[Files]) -> dict[str, list[Any]]:
    """Each run's value of every config key in which the runs differ."""
    configs = []
    for run in files:
        config = {**flat(run.config), **_model(run)}
        # in a sweep every run has it, and one method reads it
        if run.config["method"] != "fixed-prefix-matched":
            config["baseline.matched_run"] = None
        configs.append(config)
    differing = {}
    for key in dict.fromkeys(chain(*configs)):
        values = [config.get(key) for config in configs]
        if key not in NAMES and values.count(values[0]) < len(values):
            differing[key] = values
    return differing
