"""A run's folder: its lock, its manifest, and which stages are done, resumed, or run again.

A stage is known by the config keys it depends on, by a digest of its input and by fingerprints of
the models and the adapter that it uses. Equal: it is skipped or resumed. Different: what differs is
named, the old files are moved to `stale/`, and the stage runs again; rows made under two configs
are never in one file. Nothing here reads data.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from kit import Json, __version__
from kit.core.config import Config, dump, expand, flat, read_yaml
from kit.core.errors import KitError
from kit.core.fingerprints import adapter_hash, check_trained
from kit.core.progress import Progress
from kit.core.records import Row
from kit.core.stages import STAGE_TABLE, STAGES, STUDENTS_ADAPTER
from kit.core.storage import RowFile, as_line, write_atomic

FORMAT = 2  # of the run folder; a newer kit refuses older ones by this number
# Those that affect numbers.
PACKAGES = "torch transformers peft bitsandbytes accelerate llama-cpp-python math-verify".split()
R = TypeVar("R", bound=Row)


class _Entry(BaseModel):
    """What a manifest says of a stage, as far as its reading depends on it."""

    done: bool = False
    keys: Json = {}
    summary: Json = {}


class _Manifest(BaseModel):
    """What makes a JSON file a run's manifest."""

    format: int
    stages: dict[str, _Entry]


class Run:
    """An open, locked run folder.

    Of several processes that train together (accelerate launch) the first one holds the lock and
    writes.

    Args:
        command: written into the lock, so that a second run can name who holds it.

    Raises:
        KitError: another process holds the folder, it cannot be written, or it has another format.
    """

    def __init__(self, config: Config, progress: Progress, command: str = "run") -> None:
        if command != "train" and os.environ.get("WORLD_SIZE", "1") != "1":
            message = f"Only `train` can use several processes, not `{command}`."
            raise KitError(message, "Run `accelerate launch palign.py train`.")
        self.config = config
        self.progress = progress
        self.folder = config.folder
        self.is_main_process = os.environ.get("RANK", "0") == "0"
        if self.is_main_process:
            self._take_lock()
            progress.log = self.folder / "run.log"
        # Not before the lock: another process may be writing it.
        before = read_manifest(self.folder)
        self.manifest = {"stages": {}, "machine": {}, **before}
        self.record(
            format=FORMAT,
            palign=__version__,
            process=f"palign {command}, process {os.getpid()} on {socket.gethostname()}",
            versions=versions(),
        )
        # What stages were made under stays, until one begins under this config.
        if not before.get("stages"):
            self._settle()

    def _settle(self) -> None:
        """From here on, the folder is of this config."""
        # After the manifest, which shows that the folder is a run's.
        self.record(name=self.config.name, seed=self.config.seed)
        self._write("config.yaml", dump(self.config))

    def path(self, name: str) -> Path:
        """A file of this run. A folder inside the run's is created; the run's own is not."""
        path = self.folder / name
        if path.parent != self.folder:
            path.parent.mkdir(exist_ok=True)
        return path

    def rows(self, name: str, kind: type[R]) -> list[R]:
        """A stage's rows; damaged lines are set aside with a warning."""
        file = RowFile(self.folder / name, kind)
        rows = file.read()
        for line in file.damaged:
            self.progress.warn(f"{line}; moved to {name}.damaged, the row will be regenerated")
        return rows

    def require(self, stage: str) -> None:
        """Raise KitError unless a stage is done, under this config."""
        entry = self.manifest["stages"].get(stage, {})
        hint = f"Run `palign.py {stage}` with the same config first, or `palign.py run`."
        if not entry.get("done") or entry.get("is_outdated"):
            raise KitError(f"{self.folder} has no finished stage {stage} yet.", hint)
        changes = other_config(stage, entry, self.config)
        if changes:
            raise KitError(f"{self.folder}: {stage} is of another config: {changes}.", hint)

    def begin(
        self,
        stage: str,
        source: str,
        output: Callable[[], str],
        fingerprints: Callable[[], dict[str, str]] = dict,
    ) -> bool:
        """Open a stage.

        Args:
            source: the digest of its input.
            output: computes the digest of what it has written, now and when it has finished.
            fingerprints: of the models and adapters that its rows depend on, as those of
                kit.models; asked again at the end for a model that was fetched meanwhile.

        Returns:
            Whether there is work to do. False: it is done, and its output intact.
        """
        self._settle()
        about = STAGE_TABLE[stage]
        entry = self.manifest["stages"].get(stage, {})
        # What the stage depends on now, and what it depended on when its files were written.
        self._output = output
        self._fingerprints = fingerprints
        keys = {**about.dependencies(flat(self.config)), **fingerprints(), "input": source}
        changes = about.changes(recorded_keys(stage, entry), keys)
        if entry and not changes:
            # The files are of this config: go on, or find that they are complete.
            if not entry["done"]:
                self.progress.say(f"{stage}: resuming")
            elif output() == entry["output"]:
                self.progress.say(f"{stage}: already done, skipped")
                # An older kit recorded no fingerprints: from now on a change is seen.
                entry["keys"] = {**keys, **entry.get("keys", {})}
                entry.pop("is_outdated", None)
                self.record()
                return False
            else:
                self.progress.warn(f"{stage}: output missing or modified; regenerating")
        else:
            # Rows made under two configs are never in one file.
            names = [name.split("/")[0] for name in (*about.rows, *about.files)]
            old_files = self.set_aside(map(self.folder.joinpath, names))
            if entry:
                self.progress.say(f"rerunning {stage}: {changes}")
            elif old_files:
                self.progress.warn(f"{stage}: files not in the manifest; moved to stale/")
            entry = {}
            # What later stages made stands on other rows, until they have looked at it.
            for later in STAGES[STAGES.index(stage) + 1 :]:
                if later in self.manifest["stages"]:
                    self.manifest["stages"][later]["is_outdated"] = True
        entry.pop("is_outdated", None)
        self.manifest["stages"][stage] = {**entry, "keys": keys, "done": False}
        self.record()
        self.started = time.perf_counter()
        return True

    def finish(self, stage: str, rows_in: int, rows_out: int, **summary: Any) -> None:
        """Mark a stage done; rejected.jsonl then lists every row that any stage rejected.

        Args:
            summary: what else the manifest records about it.
        """
        entry = self.manifest["stages"][stage]
        # The seconds of several sessions add up.
        seconds = entry.get("seconds", 0.0) + time.perf_counter() - self.started
        entry.update(
            done=True,
            keys={**self._fingerprints(), **entry["keys"]},
            output=self._output(),
            rows_in=rows_in,
            rows_out=rows_out,
            summary=summary,
            seconds=round(seconds, 3),
        )
        self.record(machine={**self.manifest["machine"], **machine()})
        self.write_rejected()

    def write_rejected(self) -> None:
        """rejected.jsonl: every row that the data or a stage rejected."""
        lines = [as_line(json.dumps(row, ensure_ascii=False)) for row in self.rejected()]
        self._write("rejected.jsonl", "".join(lines))

    def record(self, **entries: Any) -> None:
        """Put entries (fingerprints, hashes, devices) into the manifest, and write it."""
        self.manifest.update(entries)
        text = json.dumps(self.manifest, indent=1, ensure_ascii=False)
        self._write("manifest.json", f"{text}\n")

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        if self.is_main_process:
            self._lock.close()

    def _write(self, name: str, text: str) -> None:
        if self.is_main_process:
            write_atomic(self.folder / name, text)

    def set_aside(self, paths: Iterable[Path]) -> bool:
        """Move files and folders of the run to stale/. Returns whether there were any."""
        existing = [path for path in paths if path.exists()]
        # microseconds, since stages may be quick
        stamp = f"{datetime.now():%Y%m%d-%H%M%S-%f}"
        for path in existing if self.is_main_process else ():
            path.rename(self.path(f"stale/{stamp}-{path.name}"))
        return bool(existing)

    def rejected(self) -> Iterator[Json]:
        """Every row that the data or a stage rejected, with the reason."""
        for row in self.manifest.get("rejected", ()):
            yield {"stage": "data", **row}
        for name, stage in STAGE_TABLE.items():
            for pattern, kind in stage.rows.items():
                for path in sorted(self.folder.glob(pattern)):
                    for row in RowFile(path, kind).read(repair=False):
                        if row.rejected:
                            fields = {"id": row.id, "reason": row.rejected, "detail": row.detail}
                            yield {"stage": name, **fields}

    def _take_lock(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.folder / ".lock", "a", encoding="utf-8")  # noqa: SIM115
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            holder = read_manifest(self.folder).get("process", "another process")
            message = f"The run folder {self.folder} is in use by {holder}."
            raise KitError(message, "Wait for it, stop it, or choose another out=DIR.") from None
        except OSError as error:
            message = f"The run folder {self.folder} cannot be written: {error.strerror}."
            raise KitError(
                message, "Choose another with out=DIR, or fix its permissions."
            ) from None


def read_manifest(folder: Path) -> Json:
    """A run folder's manifest, {} where there is none.

    Raises:
        KitError: it is damaged, or of another format than this version's; the folder holds a
            config.yaml or manifest.json that no run wrote.
    """
    path = folder / "manifest.json"
    config = folder / "config.yaml"
    if not path.exists():
        # Whose manifest was deleted; a person's own config has not every section.
        if config.exists() and not _is_resolved(config):
            hint = "Nothing was changed. Choose another folder: out=DIR."
            raise KitError(
                f"{config} was not written by a run; running here would overwrite it.", hint, 2
            )
        return {}
    content = path.read_bytes()
    try:
        _Manifest.model_validate_json(content)
    except ValidationError as error:
        hint = (
            "Nothing was changed. Choose another folder: out=DIR. If a run wrote it, fix it or "
            "delete it: the stages' files are then moved to stale/ and regenerated."
        )
        reason = error.errors()[0]["msg"]
        raise KitError(f"{path} is no run's manifest ({reason}).", hint, 2) from None
    manifest: Json = json.loads(content)
    check_format(folder, manifest)
    return manifest


def recorded_keys(stage: str, entry: Json) -> Json:
    """What a stage was made under; a key that an older kit did not know had its default."""
    return {**STAGE_TABLE[stage].dependencies(flat(Config())), **entry.get("keys", {})}


def other_config(stage: str, entry: Json, config: Config) -> str:
    """What of a config is another than a stage was made under, in words; empty: nothing."""
    about = STAGE_TABLE[stage]
    known = recorded_keys(stage, entry)
    values = flat(config)
    now = about.dependencies(values)
    for key, value in known.items():
        if key == "input" or " of " in key or key.endswith(".model"):
            # not looked at: their content tells, and a model may have moved
            now[key] = value
        elif key in values:
            # those that only some methods depend on, as the share of step-entropy
            now[key] = values[key]
    if config.student.adapter:
        # of a folder that is gone, nothing is known: the recorded content stands
        adapter = adapter_hash(expand(config.student.adapter) / "adapter")
        now[STUDENTS_ADAPTER] = adapter or known.get(STUDENTS_ADAPTER)
    return about.changes(known, now)


def stage_entry(folder: Path, stage: str) -> Json:
    """What a run folder's manifest says of a stage, {} where it has not begun; raises likewise."""
    return read_manifest(folder).get("stages", {}).get(stage, {})


def trained_adapter(folder: Path) -> Path:
    """The adapter that a run's training wrote.

    Raises:
        KitError: it has not trained, or its adapter is another one now.
    """
    trained = stage_entry(folder, "train").get("output")
    if not trained:
        raise KitError(
            f"student.adapter={folder} has never trained an adapter.",
            "Run it first, or name another run's folder.",
            2,
        )
    check_trained(folder / "adapter", trained)
    return folder / "adapter"


def _is_resolved(config: Path) -> bool:
    """Whether a config has every section, as `dump` writes them."""
    try:
        keys = read_yaml(config.read_bytes())
    except (ValueError, RecursionError, yaml.YAMLError):
        return False
    return isinstance(keys, dict) and keys.keys() == Config.model_fields.keys()


def check_format(folder: Path, manifest: Json) -> None:
    """Refuse (KitError) a run folder of another format than this version's."""
    version = manifest["format"]
    if version == FORMAT:
        return
    message = (
        f"{folder} was made by palign {manifest.get('palign')} in run format {version}; "
        f"this version reads {FORMAT}."
    )
    hint = f"Run its config again: palign.py run {folder}/config.yaml out=NEW (old keys work)."
    if version > FORMAT:
        hint = "Upgrade palign, or choose another out=DIR."
    raise KitError(message, hint)


def versions() -> dict[str, str]:
    """Installed versions of the packages that affect numbers; absent ones are left out."""
    installed = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            installed[name] = metadata.version(name)
    return installed


def machine() -> Json:
    """What the run runs on; the card's name once torch has been loaded for some stage."""
    about: Json = {"system": platform.platform(), "cores": os.cpu_count()}
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available():
        about["gpu"] = torch.cuda.get_device_name()
    return about
