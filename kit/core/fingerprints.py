"""What a model or an adapter is: SHA-256 of the content of its files.

Each file is hashed whole, and again when its path, size, inode or a time of change is another. A
program can set a modification time back, but not the time of that change (ctime): a file that is
replaced or edited in place is always seen. Bytes that decay on the disk while the file system
reports no change are not. Nothing here loads a model.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

from kit.core.config import expand
from kit.core.errors import KitError
from kit.core.storage import text_digest, write_atomic

BASE = "base.json"  # beside an adapter: fingerprints of the base that it was trained on
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", BASE)
ADAPTER = "content of adapter/"  # the adapter's key among what a stage depends on
RACY_SECONDS = 2.0  # a file as young as this may change again within one tick of its clock

# The files of a model's folder by what they are. tokenizer_config.json is split: it may hold a
# chat template.
TOKENIZER_CONFIG = "tokenizer_config.json"
PARTS = {
    "weights": ("*.safetensors", "*.safetensors.index.json"),
    "architecture": ("config.json", "generation_config.json"),
    "tokenizer": (
        "tokenizer.json",
        "vocab.*",
        "merges.txt",
        "special_tokens_map.json",
        "added_tokens.json",
        "*.model",
        "*.tiktoken",
    ),
    "chat template": ("chat_template*", "additional_chat_templates/*"),
}
FILES = [TOKENIZER_CONFIG, *chain(*PARTS.values())]  # all that from_pretrained needs


def cache_folder() -> Path:
    """Where converted models and hashes are kept: PALIGN_CACHE, or else ~/.cache/palign."""
    return expand(os.environ.get("PALIGN_CACHE") or "~/.cache/palign")


def file_hash(path: Path) -> str:
    """SHA-256 of a whole file, from the cache where nothing about the file has changed."""
    stat = path.stat()
    about = (path.resolve(), stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns)
    note = cache_folder() / "hashes" / text_digest(repr(about), 32)
    if note.is_file():
        return note.read_text()
    with path.open("rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    if time.time() - stat.st_ctime > RACY_SECONDS:
        # a cache that cannot be written costs the hashing again
        with contextlib.suppress(OSError, KitError):
            note.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(note, content)
    return content


def content_hash(paths: Iterable[Path], *texts: str) -> str:
    """One hash (32 hex digits) of files, by name and content, and of texts."""
    names = [f"{path.name} {file_hash(path)}" for path in sorted(paths) if path.is_file()]
    return text_digest("\n".join([*names, *texts]), 32)


def folder_hash(folder: Path) -> str:
    """One hash of a file, or of all files in a folder."""
    return content_hash([folder, *folder.glob("**/*")])


def adapter_hash(folder: Path) -> str:
    """One hash of an adapter; empty where there is none."""
    if not folder.is_dir():
        return ""
    return content_hash(folder / name for name in ADAPTER_FILES)


def is_complete(folder: Path) -> bool:
    """Whether a folder has weights, and every file that their index names."""
    weights = {path.name for path in folder.glob("*.safetensors")}
    wanted: set[str] = set()
    for index in folder.glob("*.safetensors.index.json"):
        wanted.update(json.loads(index.read_bytes())["weight_map"].values())
    return bool(weights) and wanted <= weights


def model_hashes(folder: Path) -> dict[str, str]:
    """A hash for each of `PARTS` of a folder as from_pretrained takes it."""
    settings: dict[str, object] = {}
    path = folder / TOKENIZER_CONFIG
    if path.is_file():
        settings = json.loads(path.read_bytes())
    template = settings.pop("chat_template", None)
    texts = {"tokenizer": settings, "chat template": template}
    hashes = {}
    for part, patterns in PARTS.items():
        paths = {path for pattern in patterns for path in folder.glob(pattern)}
        text = json.dumps(texts.get(part), sort_keys=True)
        hashes[part] = content_hash(paths, text)
    return hashes


def check_trained(folder: Path, trained: str) -> None:
    """Refuse (KitError) an adapter that is not the one a run's training wrote.

    Args:
        folder: the adapter's.
        trained: its hash, as the stage train recorded it.
    """
    if adapter_hash(folder) != trained:
        raise KitError(
            f"{folder} is not the adapter that this run's training wrote: "
            "a file was changed, damaged or replaced.",
            "Restore it, or run train again: it goes on from the last checkpoint.",
        )
