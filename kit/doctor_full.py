"""doctor --full: the parts of a run on the packaged model, on this card or, smaller, on this CPU.

Each check runs in a process of its own and measures what reading alone cannot prove: memory, speed,
and that two ways of computing the same agree. What people paste into a bug report.
"""

import gc
from contextlib import closing
from functools import partial
from typing import Any

MODEL = "smollm2-135m"
TEXT = "Tom has 3 apples and buys 4. Then he eats 2 of them. " * 6
ROWS = (1, 8, 32)  # side by side
# nats between a cached log-probability and a fresh one: 16 bits and NF4 round by a pass's shape
MARGIN = 0.5
SLOWEST = 0.5  # of transformers' own speed, over all rows
PEAK_RATIO = 0.25  # that a measured peak may be off from plan's
# ok (None: absent, but not every run needs it) and what was found
Finding = tuple[bool | None, str]


def cache() -> Finding:
    """Cached verdicts against fresh ones, in 16 bits and in NF4."""
    import numpy as np

    from kit.backends.base import check_requests

    worst = {}
    half = "auto" if _cuda() else "bf16"
    for dtype in (half, "nf4"):
        with _open(dtype) as backend:
            requests = check_requests(backend.model.config.vocab_size, 64)
            scores = []
            for uncached in (True, False):
                with closing(backend.session(uncached)) as session:
                    scores.append(np.array(session.score(requests)))
            worst[f"{dtype} ({backend.cache_kind})"] = np.abs(scores[0] - scores[1]).max()
    said = ", ".join(f"{name} {value:.3f}" for name, value in worst.items())
    found = f"cached log-probabilities are off from fresh ones by {said} nats"
    return bool(max(worst.values()) <= MARGIN), found


def generation() -> Finding:
    """Tokens a second of a batch beside those of transformers' own `generate`."""
    import torch

    from kit.bench import measure
    from kit.core.progress import Progress
    from kit.training.canary import answer

    new_tokens = 64 if _cuda() else 8
    said = []
    seconds = {"palign": 0.0, "transformers": 0.0}
    with _open() as backend:
        prompt = backend.tokenizer.encode(TEXT)
        answer(backend, [prompt], max_new_tokens=2)  # the first call allocates
        for rows in ROWS:
            prompts = [prompt] * rows
            ids = torch.tensor(prompts, device=backend.device)
            options = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
            ways = {
                "palign": partial(answer, backend, prompts, max_new_tokens=new_tokens),
                "transformers": partial(backend.model.generate, ids, **options),
            }
            for name, timing in measure(ways, 1, Progress(quiet=True)).items():
                seconds[name] += timing.seconds
                tokens = sum(map(len, timing.results[0]))
                if name == "transformers":
                    tokens -= ids.numel()
                said.append(f"{rows} rows {name} {tokens / timing.seconds:.0f}")
    ok = seconds["palign"] * SLOWEST <= seconds["transformers"]
    return ok, f"tokens/s: {', '.join(said)}"


def out_of_memory() -> Finding:
    """A batch that does not fit: it must go on with fewer rows and end with the same answers.

    On a card its memory is limited; on a CPU a forward pass of more than two rows raises.
    """
    import torch

    from kit.training.canary import answer

    with _open() as backend:
        prompt = backend.tokenizer.encode(TEXT * 8 if _cuda() else TEXT)
        rows = 32 if _cuda() else 6
        expected = answer(backend, [prompt] * rows, max_new_tokens=6)

        def refuse(_module: Any, _args: Any, inputs: dict[str, Any]) -> None:
            if len(inputs["input_ids"]) > 2:
                raise torch.OutOfMemoryError("imitated: more than two rows")

        if _cuda():
            torch.cuda.empty_cache()
            total = torch.cuda.get_device_properties(0).total_memory
            limit = torch.cuda.memory_allocated() + (256 << 20)
            torch.cuda.set_per_process_memory_fraction(limit / total)
        else:
            backend.model.register_forward_pre_hook(refuse, with_kwargs=True)
        answers = answer(backend, [prompt] * rows, max_new_tokens=6)
        notes = [note for note in backend.notes if "memory" in note.lower()]
    equal = sum(one == other for one, other in zip(expected, answers, strict=True))
    # another batch shape may turn a near-tie, on a card
    ok = bool(notes) and (equal == rows or _cuda())
    return ok, f"{equal} of {rows} answers as before; {'; '.join(notes) or 'nothing ran out'}"


def training_peak() -> Finding:
    """The peak of a training step beside plan's."""
    measured, estimated = step_peak(4096 if _cuda() else 512, {})
    off = estimated / measured - 1
    gib = 1 << 30
    found = f"{measured / gib:.2f} GiB, plan says {estimated / gib:.2f} ({off:+.0%})"
    return abs(off) <= PEAK_RATIO, found


def step_peak(tokens: int, keys: dict[str, Any]) -> tuple[int, float]:
    """Bytes that a training step of the packaged model takes, and what plan estimates.

    Args:
        tokens: of the row.
        keys: of the config's section train.
    """
    import torch

    from kit.bench.train import step
    from kit.core import memory
    from kit.core.config import resolve
    from kit.training.plan import training_bytes
    from kit.training.trainer import make_model

    memory.return_at_once()
    memory.reset_peak()
    before = memory.peak_bytes()
    config = resolve({"student": {"model": MODEL}, "train": keys}, "doctor")
    model = make_model(config).train()
    # off the mapped file, whose pages are the system's to take back
    for parameter in model.parameters() if not _cuda() else ():
        parameter.data = parameter.data.clone()
    memory.release()
    memory.reset_peak()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    step(model, tokens)
    optimizer.step()
    estimated = sum(training_bytes(config, tokens, _cuda()))
    return memory.peak_bytes() - before, estimated


def memory_returned() -> Finding:
    """A model that trained and one that generated, in turn, each gone before the next."""
    from kit.bench.train import step
    from kit.core.config import resolve
    from kit.core.memory import release
    from kit.training.canary import answer
    from kit.training.trainer import make_model

    def train() -> None:
        config = resolve({"student": {"model": MODEL}}, "doctor")
        step(make_model(config).train(), 64)

    def infer() -> None:
        with _open("nf4") as backend:
            answer(backend, [backend.tokenizer.encode(TEXT)], max_new_tokens=4)

    release()
    held = [_held()]
    gc.disable()  # what `release` leaves is not collected by chance
    for use in (train, infer):
        use()
        release()
        held.append(_held())
    gc.enable()
    unit = "bytes on the card" if _cuda() else "models in memory"
    return max(held) == held[0], f"{unit} at the start and after each of two: {held}"


def _held() -> int:
    """What is held now: bytes on a card, live models on a CPU."""
    import torch
    from transformers import PreTrainedModel

    if _cuda():
        return torch.cuda.memory_allocated()
    return sum(isinstance(thing, PreTrainedModel) for thing in gc.get_objects())


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _open(dtype: str = "auto") -> Any:
    """A context with the packaged model."""
    from kit.training.canary import engine

    return engine("hf", MODEL, dtype=dtype, max_num_seqs=max(ROWS))


# one package, as pinned
REINSTALL = "python -m pip install --force-reinstall --no-deps -c requirements.txt"
# name: (check, what to do where it fails)
FULL_CHECKS = {
    "cache": (cache, "judge with judge.search=uncached, and report this table"),
    "generation": (generation, f"close what else is busy; then {REINSTALL} transformers torch"),
    "out of memory": (out_of_memory, "run with a smaller student.max_num_seqs, and report this"),
    "training peak": (training_peak, "leave room: a smaller train.max_seq_tokens than plan's"),
    "memory returned": (memory_returned, "run the stages one command at a time, and report this"),
}
