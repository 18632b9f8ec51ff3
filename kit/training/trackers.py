"""Each stage's numbers for TensorBoard, Weights & Biases or Trackio (train.report_to).

Training's own curves come from the Trainer's callbacks. The libraries are optional, their keys and
offline modes their own: WANDB_MODE=offline; Trackio and TensorBoard write local files.
"""

from __future__ import annotations

import os
from importlib import import_module
from importlib.util import find_spec

from kit.core.errors import KitError
from kit.core.run import Run

PROJECT = "palign"
FOLDER = "tensorboard"  # in the run's


def report(run: Run, stage: str) -> None:
    """Send a finished stage's rows, seconds, scalars and accuracies; raises as `send`."""
    entry = run.manifest["stages"][stage]
    numbers = {**entry, **entry["summary"]}
    for score in entry["summary"].get("scores", ()):
        numbers[f"{score['dataset']}/{score['which']}"] = score["accuracy"]
    scalars = {key: value for key, value in numbers.items() if type(value) in (int, float)}
    send(run, {f"{stage}/{key}": value for key, value in scalars.items()})


def send(run: Run, numbers: dict[str, float]) -> None:
    """Send numbers to the run's trackers; sent first, the seed proves that they take some.

    Raises:
        KitError: a tracker is not installed or takes none: no key, no network, no folder.
    """
    os.environ["WANDB_DIR"] = str(run.folder)
    for name in run.config.train.report_to if run.is_main_process else ():
        if not find_spec(name):
            message = f"train.report_to names {name}, which is not installed."
            raise KitError(message, f"pip install {name}, or leave it out.", 2)
        try:
            _send(name, run, numbers)
        except Exception as error:  # each library raises its own types
            raise KitError(
                f"{name} takes no numbers: {type(error).__name__}: {str(error)[:300]}",
                f"Log in to {name}, set its offline mode (WANDB_MODE=offline), fix the folder, or "
                "leave it out of train.report_to. Finished stages are safe.",
            ) from None


def _send(name: str, run: Run, numbers: dict[str, float]) -> None:
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(run.folder / FOLDER)) as writer:
            for key, value in numbers.items():
                writer.add_scalar(key, value)
        return
    # Both go on with the run that is open under this name; the Trainer's callbacks do, too.
    tracker = import_module(name)
    # a sweep and rounds train several runs in one process
    if name == "wandb" and tracker.run and tracker.run.name != run.config.name:
        tracker.finish()
    tracker.init(project=PROJECT, name=run.config.name, resume="allow")
    tracker.log(numbers)
    if name == "trackio":
        tracker.finish()
