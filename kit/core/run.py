"""A run's folder: its lock, its manifest, and which stages are done, resumed, or redone.

A stage is known by the config keys it depends on and by a digest of its input rows. Equal: it is skipped
or resumed. Different: the differing key is named, the old files are set aside under `stale/`, and the
stage is made anew; rows made under two configs never stand in one file.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import shutil
import socket
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import yaml

from kit import __version__
from kit.core.config import Config, dump, flat
from kit.core.errors import KitError
from kit.core.progress import Progress
from kit.core.records import Row
from kit.core.stages import FILES, KEYS, NEUTRAL
from kit.core.storage import RowFile, write_atomic

FORMAT = 2  # of the run folder; a newer kit refuses older ones by this number
PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "accelerate",
    "llama-cpp-python",
    "math-verify",
)
R = TypeVar("R", bound=Row)


class Run:
    """An open, locked run folder. `command` is written into the lock, so that a second run can say who holds it.

    Of several processes that train together (accelerate launch) the first one holds the lock and writes.

    Raises:
        KitError: another process holds the folder, it cannot be written, or it is of a newer format.
    """

    def __init__(self, config: Config, progress: Progress, command: str = "run") -> None:
        self.config, self.progress, self.folder = config, progress, config.folder
        self.is_main_process = os.environ.get("RANK", "0") == "0"
        if command != "train" and os.environ.get("WORLD_SIZE", "1") != "1":
            raise KitError(
                f"Several processes can train together, not {command}.",
                "accelerate launch palign.py train",
            )
        if self.is_main_process:
            self._take_lock(command)
            progress.log = self.folder / "run.log"
        facts = {"format": FORMAT, "palign": __version__, "name": config.name, "seed": config.seed}
        self.manifest = {
            "stages": {},
            "machine": {},
            **self._read_manifest(),
            **facts,
            "versions": versions(),
        }
        if self.is_main_process:
            write_atomic(self.folder / "config.yaml", dump(config))
        self.record(machine=self.manifest["machine"] | machine())

    def path(self, name: str) -> Path:
        """A file of this run; a folder inside the run's is made, the run's own is not when it has vanished."""
        path = self.folder / name
        if path.parent != self.folder:
            path.parent.mkdir(exist_ok=True)
        return path

    def rows(self, name: str, kind: type[R]) -> list[R]:
        """A stage's rows; damaged lines are set aside and said."""
        file = RowFile(self.folder / name, kind)
        rows = file.read()
        for line in file.damaged:
            self.progress.warn(f"{line}; set aside in {name}.damaged, the row will be made again")
        return rows

    def require(self, stage: str) -> None:
        """Raise unless a stage is done."""
        if not self.manifest["stages"].get(stage, {}).get("done"):
            hint = f"Run `palign.py {stage}` with the same config first, or `palign.py run`."
            raise KitError(f"{self.folder} has no finished stage {stage} yet.", hint)

    def begin(self, stage: str, source: str, output: Callable[[], str]) -> bool:
        """Open a stage whose input has the digest `source`; `output` computes the digest of what it has written.

        Returns:
            Whether there is work to do. False: it is done and whole.
        """
        wanted, leaves = tuple(f"{key}." for key in KEYS[stage]), flat(self.config).items()
        now = {
            k: v
            for k, v in leaves
            if f"{k}.".startswith(wanted) and k.split(".")[-1] not in NEUTRAL
        }
        now["input"], usual = source, flat(Config())
        files = [
            path for name in FILES[stage] if (path := self.folder / name.split("/")[0]).exists()
        ]
        entry, say = self.manifest["stages"].get(stage), self.progress.say
        before = (
            {key: usual.get(key) for key in now} | entry["keys"] if entry else now
        )  # an older kit knew fewer keys
        changed = sorted(key for key in {*now, *before} if now.get(key) != before.get(key))
        if changed:
            shown = ", ".join(
                f"{key}: {before.get(key)!s:.40} -> {now.get(key)!s:.40}" for key in changed[:4]
            )
            say(f"{stage}: redone, for {shown} changed" + (" ..." if len(changed) > 4 else ""))
        elif not entry and files:
            self.progress.warn(
                f"{stage}: files of unknown origin in {self.folder}; set aside under stale/"
            )
        elif entry and not entry["done"]:
            say(f"{stage}: resumed")
        elif entry and output() == entry["output"]:
            say(f"{stage}: done before, skipped")
            return False
        elif entry:
            self.progress.warn(
                f"{stage}: what it wrote was deleted or changed since; the missing part is made again"
            )
        if changed or not entry:
            entry = {}
            for path in files if self.is_main_process else ():
                shutil.move(
                    path,
                    self.path(f"stale/{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{path.name}"),
                )
        self.manifest["stages"][stage] = {**entry, "keys": now, "done": False}
        self.record()
        self.begun = time.perf_counter()
        return True

    def finish(self, stage: str, output: str, rows_in: int, rows_out: int, **summary: Any) -> None:
        """Mark a stage done; seconds since `begin` add up over sittings. rejected.jsonl gathers every row that left."""
        if not self.is_main_process:
            return
        entry = self.manifest["stages"][stage]
        entry |= {
            "done": True,
            "output": output,
            "rows_in": rows_in,
            "rows_out": rows_out,
            "summary": summary,
        }
        entry["seconds"] = round(entry.get("seconds", 0.0) + time.perf_counter() - self.begun, 3)
        self.record(machine=self.manifest["machine"] | machine())
        gone = [{"stage": "data", **row} for row in self.manifest.get("rejected", ())]
        for name, pattern, kind in (
            (name, *file) for name, files in FILES.items() for file in files.items()
        ):
            for path in sorted(self.folder.glob(pattern)) if kind else ():
                rows = [row for row in RowFile(path, kind).read(mend=False) if row.rejected]
                gone += [
                    {"stage": name, "id": row.id, "reason": row.rejected, "detail": row.detail}
                    for row in rows
                ]
        write_atomic(
            self.folder / "rejected.jsonl",
            "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in gone),
        )

    def record(self, **facts: Any) -> None:
        """Put facts (fingerprints, hashes, devices) into the manifest, and write it."""
        self.manifest |= facts
        if self.is_main_process:
            write_atomic(
                self.folder / "manifest.json",
                json.dumps(self.manifest, indent=1, ensure_ascii=False) + "\n",
            )

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        if self.is_main_process:
            self._lock.close()

    def _take_lock(self, command: str) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.folder / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 (held for the run's life)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.seek(0)
            what = f"The run folder {self.folder} is in use by {self._lock.read().strip() or 'another process'}."
            self._lock.close()
            raise KitError(what, "Wait for it, stop it, or choose another out=DIR.") from None
        except OSError as error:
            what = f"The run folder {self.folder} cannot be written: {error.strerror}."
            raise KitError(what, "Choose another with out=DIR, or mend its permissions.") from None
        with contextlib.suppress(OSError):  # a full disk: the lock holds without a name
            os.ftruncate(self._lock.fileno(), 0)
            os.write(
                self._lock.fileno(),
                f"palign {command}, process {os.getpid()} on {socket.gethostname()}".encode(),
            )

    def _read_manifest(self) -> dict[str, Any]:
        path = self.folder / "manifest.json"
        try:
            manifest = json.loads(path.read_bytes()) if path.exists() else {}
        except ValueError as error:
            hint = "Mend it, or delete it: the stages' files are then set aside under stale/ and made anew."
            raise KitError(f"{path} is not JSON ({error}).", hint) from None
        if manifest:
            check_format(self.folder, manifest)
        return manifest


def check_format(folder: Path, manifest: dict[str, Any]) -> None:
    """Refuse (KitError) a run folder of another format than this version's."""
    version = manifest.get("format", 0)
    if version == FORMAT:
        return
    what = f"{folder} was made by palign {manifest.get('palign')} in run format {version}; this version reads {FORMAT}."
    if version > FORMAT:
        raise KitError(what, "Upgrade palign, or choose another out=DIR.")
    if version == 1 and _trained_nf4_on_cpu(folder, manifest):
        what += (
            " Its adapter was trained in NF4 on a CPU by a version that dropped most of the gradient"
            " on CPUs with AVX512-BF16: it may have learned next to nothing."
        )
    raise KitError(
        what,
        f"Run its config anew: palign.py run {folder}/config.yaml out=NEW (old keys are understood).",
    )


def _trained_nf4_on_cpu(folder: Path, manifest: dict[str, Any]) -> bool:
    trained = (folder / "adapter").exists() and "gpu" not in manifest.get("machine", {})
    config = folder / "config.yaml"
    keys = yaml.safe_load(config.read_text(encoding="utf-8")) if config.exists() else None
    train = (keys or {}).get("train") or {}
    return trained and train.get("dtype", "nf4") == "nf4"


def versions() -> dict[str, str]:
    """Installed versions of the packages that shape numbers; absent ones are left out."""
    found = {
        name: package.version for name in PACKAGES for package in metadata.distributions(name=name)
    }
    return {"python": platform.python_version(), **found}


def machine() -> dict[str, Any]:
    """What the run ran on; the card's name once torch has been loaded for some stage."""
    torch = sys.modules.get("torch")
    card = {"gpu": torch.cuda.get_device_name()} if torch and torch.cuda.is_available() else {}
    return {"system": platform.platform(), "cores": os.cpu_count(), **card}
