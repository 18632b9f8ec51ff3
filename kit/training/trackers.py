"""Each stage's numbers for TensorBoard, Weights & Biases or Trackio (train.report_to).

Training's own curves come from the Trainer's callbacks. The libraries are optional, their keys and
offline modes their own: WANDB_MODE=offline; Trackio and TensorBoard write local files.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec

from kit.core.errors import KitError
from kit.core.run import Run

PROJECT = "palign"
FOLDER = "tensorboard"  # in the run's


@contextmanager
def opened(run: Run) -> Iterator[None]:
    """Prove by the seed that the trackers take numbers (raises as `send`); close them at the end.

    At the process's end wandb would print to standard output, and a later run would go on in it;
    a run that fails is closed as failed.
    """
    send(run, {"seed": run.config.seed})
    exit_code = 1
    try:
        yield
        exit_code = 0
    finally:
        if "wandb" in run.config.train.report_to:
            import_module("wandb").finish(exit_code)


def report(run: Run, stage: str) -> None:
    """Send a finished stage's rows, seconds, scalars and accuracies; raises as `send`."""
    entry = run.manifest["stages"][stage]
    numbers = {**entry, **entry["summary"]}
    for score in numbers.get("scores", ()):
        numbers[f"{score['dataset']}/{score['which']}"] = score["accuracy"]
    scalars = {
        f"{stage}/{key}": value for key, value in numbers.items() if type(value) in (int, float)
    }
    send(run, scalars)


def send(run: Run, numbers: dict[str, float]) -> None:
    """Send numbers to the run's trackers.

    Raises:
        KitError: a tracker is not installed or takes none: no key, no network, no folder.
    """
    for name in run.config.train.report_to if run.is_main_process else ():
        if not find_spec(name):
            message = f"train.report_to names {name}, which is not installed."
            raise KitError(message, f"pip install {name}, or leave it out.", 2)
        try:
            _send(name, run, numbers)
        except Exception as error:  # each library raises its own types
            raise KitError(
                f"{name} rejected the numbers: {type(error).__name__}: {str(error)[:300]}",
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
    # The Trainer's callbacks go on with the run that is open, or under this name.
    tracker = import_module(name)
    if name == "trackio":
        tracker.init(project=PROJECT, name=run.config.name, resume="allow")
    elif not tracker.run:
        tracker.init(project=PROJECT, name=run.config.name, dir=str(run.folder))
    tracker.log(numbers)
    if name == "trackio":
        tracker.finish()
