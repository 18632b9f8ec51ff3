"""Rounds: the trained student judges and continues the same traces anew, and trains on them.

Paper: one round; several are its open end. Each round is a run of its own inside the first one's
folder, made and resumed as any other, with the teacher's traces taken over. No number is computed
here; the report of the first run has the curve (kit/reporting/metrics.py).
"""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from kit import Json
from kit.core.config import Config
from kit.core.progress import Progress
from kit.core.run import Run, stage_entry
from kit.pipeline.teach import NAME


def run_rounds(config: Config, progress: Progress, run_stages: Callable[..., Json]) -> Json:
    """All rounds of a config.

    Args:
        run_stages: carries out a command's stages and returns the run's numbers.

    Returns:
        The first round's numbers, with the curve over all rounds.
    """
    numbers = run_stages(config, progress, "run")
    for number in range(2, config.rounds + 1):
        later = config.round(number)
        progress.say(f"round {number} of {config.rounds}: {later.folder}")
        # a log of its own for each run
        own = replace(progress)
        take_over_traces(later, own, config.folder)
        run_stages(later, own, "run")
    # once more, with the curve
    return run_stages(config, progress, "report") if config.rounds > 1 else numbers


def take_over_traces(config: Config, progress: Progress, source: Path) -> None:
    """Copy another run's traces, where this run's are others; its stage teach then decides, by keys
    and digests, whether they are what it would have made.
    """
    entry = stage_entry(source, "teach")
    with Run(config, progress) as run:
        stages = run.manifest["stages"]
        if stages.get("teach", {}).get("output") != entry["output"]:
            # the entry last, so that a kill before it only costs another copy
            shutil.copyfile(source / NAME, run.path(NAME))
            stages["teach"] = entry
            run.record()
