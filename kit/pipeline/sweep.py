"""sweep: runs of several methods and seeds from one config, one after the other, then compared.

Each run is a folder of its own in the sweep's, as the command `run` makes and resumes it. Traces
are made once for each seed: a run takes over those of another one, and its own stage teach decides,
by keys and digests, whether they are what it would have made. No number is computed here.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import product
from typing import Any

from kit import Json
from kit.core.config import Config, expand, load, resolve
from kit.core.errors import KitError, machine_fault
from kit.core.progress import Progress
from kit.core.run import stage_entry
from kit.pipeline.rounds import take_over_traces
from kit.reporting import compare


def sweep(
    path: str, overrides: Sequence[str], progress: Progress, run_all: Callable[..., Any]
) -> Json:
    """Carry out every run of a sweep, going on after one that fails, and compare them.

    Args:
        path, overrides: the config; method=a,b and seed=1,2 name the runs.
        run_all: runs all stages of a config and returns its numbers, as the command `run` does.

    Returns:
        runs: [{method, seed, folder, accuracy, n, error}]; compare: see `compare.compare`, of the
        runs without an error, the first one's method as reference; None of fewer than two.

    Raises:
        KitError: (exit 2) a value that no run can have; fewer than two runs.
    """
    configs = plan(path, overrides)
    if len(configs) < 2:
        raise KitError("A sweep has two runs or more.", "Name several: method=a,b seed=1,2.", 2)
    runs = []
    folders = []
    for number, config in enumerate(configs, 1):
        progress.say(f"sweep: run {number} of {len(configs)}, {config.name}")
        numbers: Any = {}
        error = None
        try:
            # a log of its own for each run
            _take_over_traces(config, configs, replace(progress))
            numbers = run_all(config, replace(progress), "run")
            folders.append(config.folder)
        except Exception as failure:
            # a defect of ours stops the sweep, a fault of the machine only this run
            known = failure if isinstance(failure, KitError) else machine_fault(failure)
            if known is None:
                raise
            error = str(known)
            progress.warn(f"{config.name} failed, the sweep goes on: {error}")
        side = "before" if config.method == "zero-shot" else "after"
        runs.append(
            {
                "method": config.method,
                "seed": config.seed,
                "folder": str(config.folder),
                "accuracy": numbers.get(f"accuracy_{side}"),
                "n": numbers.get("n_eval"),
                "error": error,
            }
        )
    page = configs[0].folder.parent / "compare.html"
    compared = compare.compare(folders, page) if len(folders) > 1 else None
    return {"runs": runs, "compare": compared}


def plan(path: str, overrides: Sequence[str]) -> list[Config]:
    """The configs of a sweep's runs: by seed, then by method in the order given.

    fixed-prefix-matched comes after palign, whose run with its seed it is matched to, unless
    baseline.matched_run names another.
    """
    values: dict[str, list[str]] = {}
    shared = []
    for text in overrides:
        key, _, value = text.partition("=")
        if key in ("method", "seed"):
            # seeds 1 and 01 are one
            several = [text.strip() for text in value.split(",")]
            if key == "seed":
                several = [str(int(text)) if text.isdecimal() else text for text in several]
            values[key] = list(dict.fromkeys(several))
        else:
            shared.append(text)
    base = load(path, shared)
    methods = values.get("method", [base.method])
    methods.sort(key=lambda method: method == "fixed-prefix-matched")
    folder = expand(base.out or f"runs/{base.name}-sweep")
    # what is not set stays open, for a preset to set
    raw = base.model_dump(mode="json", exclude_unset=True)
    if base.baseline.matched_run is None and "palign" in methods:
        raw.setdefault("baseline", {})["matched_run"] = str(folder / "palign-seed{seed}")
    configs = []
    for seed, method in product(values.get("seed", [base.seed]), methods):
        name = f"{method}-seed{seed}"
        raw.update(method=method, seed=seed, name=name, out=str(folder / name))
        configs.append(resolve(raw, f"sweep: {name}"))
    return configs


def _take_over_traces(config: Config, configs: list[Config], progress: Progress) -> None:
    """Give a run that has not begun the traces of one with its seed that has them all."""
    if config.method == "zero-shot" or stage_entry(config.folder, "teach"):
        return
    for other in configs:
        entry = {}
        # what is wrong with another run's folder is that run's error
        with suppress(KitError):
            entry = stage_entry(other.folder, "teach")
        if other.seed == config.seed and entry.get("done") and entry["rows_in"]:
            take_over_traces(config, progress, other.folder)
            return
