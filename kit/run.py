"""A run's folder: its lock, its manifest, and which stages are done, resumed, or redone.

A stage is known by the config keys it depends on and by a digest of its input rows. Equal: it is skipped
or resumed. Different: the differing key is named, the old files are set aside under `stale/`, and the
stage is made anew; rows made under two configs never stand in one file.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import platform
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from kit import __version__
from kit.config import Config, dump, flat
from kit.errors import KitError
from kit.progress import Progress
from kit.records import AlignedRow, EvalRow, PrefixRow, Row, RowFile, TraceRow, digest, write_atomic

FORMAT = 1  # of the run folder; a newer kit opens older formats or refuses them by this number
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "llama-cpp-python", "math-verify")
KEYS = {  # what each stage's rows depend on, besides its input
    "teach": ("teacher", "prompts.instruction", "seed", "method"),
    "truncate": ("method", "student", "judge", "prompts.judge", "prompts.forced"),
    "align": ("method", "student", "align", "prompts.instruction", "prompts.draft", "seed"),
    "train": ("method", "student.model", "student.system", "student.thinking", "train", "prompts.instruction", "seed"),
    "eval": ("method", "eval", "prompts.instruction", "seed"),
    "report": (),
}
NEUTRAL = {"threads", "timeout_seconds", "retries", "url", "api_key_env", "memory_gib", "save_steps", "overfit"}
FILES = {
    "teach": ("traces.jsonl",),
    "truncate": ("prefixes.jsonl",),
    "align": ("aligned.jsonl", "train.jsonl"),
    "train": ("adapter", "checkpoints", "train_log.jsonl"),
    "eval": ("eval",),
    "report": (),
}
ROWS: tuple[tuple[str, str, Any], ...] = (
    ("teach", "traces.jsonl", TraceRow),
    ("truncate", "prefixes.jsonl", PrefixRow),
    ("align", "aligned.jsonl", AlignedRow),
    ("eval", "eval/*.jsonl", EvalRow),
)
R = TypeVar("R", bound=Row)
T = TypeVar("T")


class Run:
    """An open, locked run folder. `command` is written into the lock, so that a second run can say who holds it.

    Raises:
        KitError: another process holds the folder, it cannot be written, or it is of a newer format.
    """

    def __init__(self, config: Config, progress: Progress, command: str = "run") -> None:
        self.config, self.progress, self.folder = config, progress, config.folder
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.folder / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 (held for the run's life)
        except OSError as error:
            raise KitError(
                f"The run folder {self.folder} cannot be written: {error.strerror}.",
                "Choose another with out=DIR, or mend its permissions.",
            ) from None
        self._take_lock(command)
        progress.log = self.folder / "run.log"
        self.manifest = self._read_manifest()
        self.manifest |= {"format": FORMAT, "palign": __version__, "name": config.name, "seed": config.seed}
        self.manifest |= {"versions": versions(), "machine": {**self.manifest.get("machine", {}), **machine()}}
        self.manifest.setdefault("stages", {})
        write_atomic(self.folder / "config.yaml", dump(config))
        self.save()

    def path(self, name: str) -> Path:
        """A file of this run; its folder is made."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def rows(self, name: str, kind: type[R]) -> list[R]:
        """A stage's rows; damaged lines are set aside and said."""
        file = RowFile(self.folder / name, kind)
        rows = file.read()
        for line in file.damaged:
            self.progress.warn(f"{line}; set aside in {name}.damaged, the row will be made again")
        return rows

    @functools.cached_property
    def data(self) -> Any:
        """The problems (`kit.data.Loaded`), read once; their fingerprints go into the manifest."""
        from kit.data import load_all

        loaded = load_all(self.config)
        self.record(data=loaded.facts, rejected=loaded.rejected)
        return loaded

    def require(self, stage: str) -> None:
        """Raise unless a stage is done."""
        if not self.manifest["stages"].get(stage, {}).get("done"):
            raise KitError(
                f"{self.folder} has no finished stage {stage} yet.",
                f"Run `palign.py {stage}` with the same config first, or `palign.py run`.",
            )

    def begin(self, stage: str, source: str, output: Callable[[], str]) -> bool:
        """Open a stage whose input has the digest `source`; `output` computes the digest of what it has written.

        Returns:
            Whether there is work to do. False: it is done and whole.
        """
        now = {**self.stage_keys(stage), "input": source}
        old = self.manifest["stages"].get(stage)
        if old is not None:
            changed = sorted(k for k in {*now, *old["keys"]} if now.get(k) != old["keys"].get(k))
            if changed:
                shown = ", ".join(f"{k}: {_short(old['keys'].get(k))} -> {_short(now.get(k))}" for k in changed[:4])
                self.progress.say(f"{stage}: redone, for {shown} changed" + (" ..." if len(changed) > 4 else ""))
                self._set_aside(stage)
                old = None
        elif any((self.folder / name).exists() for name in FILES[stage]):
            self.progress.warn(f"{stage}: files of unknown origin in {self.folder}; set aside under stale/")
            self._set_aside(stage)
        if old is not None and old.get("done"):
            if output() == old.get("output"):
                self.progress.say(f"{stage}: done before, skipped")
                return False
            self.progress.warn(f"{stage}: what it wrote was deleted or changed since; the missing part is made again")
        elif old is not None:
            self.progress.say(f"{stage}: resumed")
        self.manifest["stages"][stage] = {**(old or {}), "keys": now, "done": False}
        self.save()
        return True

    def finish(self, stage: str, output: str, rows_in: int, rows_out: int, seconds: float, **summary: Any) -> None:
        """Mark a stage done. `seconds` adds up over resumed sittings."""
        entry = self.manifest["stages"][stage]
        entry |= {"done": True, "output": output, "rows_in": rows_in, "rows_out": rows_out}
        entry["seconds"] = round(entry.get("seconds", 0.0) + seconds, 3)
        entry["summary"] = summary
        self.manifest["machine"] = {**self.manifest.get("machine", {}), **machine()}
        self.save()
        self._write_rejections()

    def record(self, **facts: Any) -> None:
        """Put facts (fingerprints, hashes, devices) into the manifest."""
        self.manifest |= facts
        self.save()

    def save(self) -> None:
        """Write manifest.json."""
        text = json.dumps(self.manifest, indent=1, ensure_ascii=False) + "\n"
        for name in ("manifest.json", ".manifest.json"):  # the second is read where the first is damaged
            write_atomic(self.folder / name, text)

    def stage_keys(self, stage: str) -> dict[str, Any]:
        """The config keys that a stage depends on, with their values."""
        chosen = {k: v for k, v in flat(self.config).items() if f"{k}.".startswith(tuple(f"{w}." for w in KEYS[stage]))}
        return {k: v for k, v in chosen.items() if k.split(".")[-1] not in NEUTRAL}

    def close(self) -> None:
        """Release the folder."""
        self._lock.close()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write_rejections(self) -> None:
        """rejected.jsonl: every row that left, with its stage and reason, gathered from the stages' own files."""
        lines = [json.dumps({"stage": "data", **row}, ensure_ascii=False) for row in self.manifest.get("rejected", ())]
        for stage, name, kind in ROWS:
            for path in sorted(self.folder.glob(name)):
                for row in RowFile(path, kind).read():
                    if row.rejected:
                        gone = {"stage": stage, "id": row.id, "reason": row.rejected, "detail": row.detail}
                        lines.append(json.dumps(gone, ensure_ascii=False))
        write_atomic(self.folder / "rejected.jsonl", "".join(line + "\n" for line in lines))

    def _take_lock(self, command: str) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.seek(0)
            holder = self._lock.read().strip() or "another process"
            self._lock.close()
            raise KitError(
                f"The run folder {self.folder} is in use by {holder}.",
                "Wait for it, stop it, or choose another out=DIR.",
            ) from None
        self._lock.truncate(0)
        self._lock.write(f"palign {command}, process {os.getpid()} on {socket.gethostname()}\n")
        self._lock.flush()

    def _read_manifest(self) -> dict[str, Any]:
        manifest: dict[str, Any] = {}
        for name in ("manifest.json", ".manifest.json"):
            path = self.folder / name
            if not path.exists():
                continue
            try:
                manifest = json.loads(path.read_text(encoding="utf-8"))
                break
            except (json.JSONDecodeError, UnicodeDecodeError):
                path.rename(path.with_name(f"{name}.damaged"))
                self.progress.warn(f"{name} was not JSON; kept as {name}.damaged, its copy is used")
        if manifest.get("format", 0) > FORMAT:
            raise KitError(
                f"{self.folder} was made by palign {manifest.get('palign')} (run format {manifest['format']}; "
                f"this palign reads up to {FORMAT}).",
                "Upgrade palign, or choose another out=DIR.",
            )
        return manifest

    def _set_aside(self, stage: str) -> None:
        for name in FILES[stage]:
            path = self.folder / name
            if path.exists():
                aside = self.folder / "stale" / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{name}"
                aside.parent.mkdir(exist_ok=True)
                shutil.move(path, aside)
        self.manifest["stages"].pop(stage, None)


def work_through(
    run: Run,
    stage: str,
    file: RowFile[R],
    units: Sequence[tuple[str, T]],
    size: int,
    work: Callable[[list[T]], Iterator[R]],
    unit: str = "rows",
) -> list[R]:
    """Make one row for every unit, resuming where the file ends.

    Batches are planned from all units, so that a resumed batch has the neighbours it would have had: a batch with a
    missing row runs whole, and rows that are already written stay as they are.

    Args:
        units: pairs (row id, item), in order.
        size: units a batch.
        work: yields a row (its id among the batch's) as each is finished.

    Returns:
        All rows in the order of `units`.
    """
    rows = {row.id: row for row in run.rows(file.path.relative_to(run.folder).as_posix(), file.kind)}
    with run.progress.bar(stage, len(units), unit, done=sum(id in rows for id, _ in units)) as bar:
        for start in range(0, len(units), size):
            batch = units[start : start + size]
            if all(id in rows for id, _ in batch):
                continue
            for row in work([item for _, item in batch]):
                if row.id not in rows:
                    file.append(row)
                    rows[row.id] = row
                    bar.advance(tokens=row_tokens(row))
    return [rows[id] for id, _ in units]


def row_tokens(row: Row) -> int:
    """Tokens that a row cost, for rates."""
    samples = sum(sample.tokens for sample in getattr(row, "samples", ()))
    return samples or getattr(row, "evaluated_tokens", 0)


def file_digest(run: Run, name: str, kind: type[R]) -> str:
    """Digest of a stage file's rows as they stand."""
    return digest(run.rows(name, kind))


@contextlib.contextmanager
def stopwatch() -> Iterator[Callable[[], float]]:
    """Seconds since entering."""
    begun = time.perf_counter()
    yield lambda: time.perf_counter() - begun


def versions() -> dict[str, str]:
    """Installed versions of the packages that shape numbers; absent ones are left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def machine() -> dict[str, Any]:
    """What the run ran on; the card's name once torch has been loaded for some stage."""
    facts: dict[str, Any] = {"system": platform.platform(), "cores": os.cpu_count()}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."
