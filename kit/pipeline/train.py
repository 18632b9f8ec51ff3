"""train: QLoRA on the training rows (section 3.4, Eq. 2).

Rows become token ids in kit/training/sft_data.py; the training itself is kit/training/trainer.py.
"""

from collections import Counter
from functools import partial

from kit.core.card import check_card
from kit.core.errors import KitError
from kit.core.fingerprints import adapter_hash, file_hash
from kit.core.memory import release
from kit.core.run import Run
from kit.models import fingerprints, load_tokenizer
from kit.training.plan import check_fit
from kit.training.sft_data import CUT, prepare, read_rows
from kit.training.trainer import fit


def train(run: Run) -> None:
    """The stage: train.jsonl in; adapter/, checkpoints/ and train_log.jsonl out.

    Raises:
        KitError: no rows, an instruction other than evaluation's, a gradient that is not the loss's
            slope, a loss or gradient that is not finite, a checkpoint of another adapter, a model
            that does not fit.
    """
    if run.config.method == "zero-shot":
        if run.begin("train", "zero-shot", str):
            run.finish("train", rows_in=0, rows_out=0)
        return
    path = run.folder / "train.jsonl"
    adapter = run.folder / "adapter"
    if not path.exists():
        raise KitError(f"{path} does not exist.", "Run the stages before it: palign.py run CONFIG.")
    # whatever asks the student, it is trained with transformers
    content = partial(fingerprints, "student", run.config.student.on_hf)
    if not run.begin("train", file_hash(path)[:16], lambda: adapter_hash(adapter), content):
        return
    # rows to examples, which must fit the memory of this process's card
    check_card()
    rows = read_rows(path)
    if not rows:
        counts = Counter(f"{row['reason']} ({row['stage']})" for row in run.rejected())
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
        raise KitError(
            f"No row is left to train on: {reasons or f'{path} is empty'}.",
            "rejected.jsonl says why, row by row: more problems or samples, or another method.",
        )
    tokenizer = load_tokenizer(run.config.student.model)
    examples, lost = prepare(rows, tokenizer, run.config)
    for reason, names in lost.items():
        listed = "; ".join(names[:8])
        run.progress.warn(f"train: {len(names)} of {len(rows)} rows {reason}: {listed}")
    check_fit(run, max(len(example.ids) for example in examples))
    summary = fit(run, tokenizer, examples)
    release()
    cut = lost.pop(CUT, [])
    run.finish(
        "train",
        len(rows),
        len(examples),
        **summary,
        rows=len(examples),
        cut=cut,
        dropped=lost,
    )
