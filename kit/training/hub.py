"""An adapter and its training rows for the model hub, each with a card that is made from the run.

Local paths, addresses and names of keys stay out. An upload is one commit a repository, private,
and its files are listed again before it counts as done.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from jinja2 import Environment

from kit import Json
from kit.core.config import Config, flat
from kit.core.errors import KitError
from kit.core.methods import learns, method_of
from kit.core.run import read_manifest
from kit.models import is_hub_id

if TYPE_CHECKING:
    from kit.training.export import Export

TEMPLATES = Path(__file__).parent / "templates"
PRIVATE_KEYS = {"url", "api_key_env", "out", "tokenizer", "served_adapter"}  # not in a card


def to_hub(job: Export) -> Json:
    """Write the folders hub/model and hub/dataset, and upload them where a repository is named.

    Returns:
        {model, dataset: folders; files: {path: bytes}; card, dataset_card: text; uploaded: urls}.

    Raises:
        KitError: no hub id of the base, a card that the hub's library refuses, or no upload.
    """
    from huggingface_hub import DatasetCard, ModelCard

    base = job.base or job.config.student.model
    if not is_hub_id(base):
        raise KitError(
            f"Nobody else can load the base {base!r}.", "Name its hub id: --base OWNER/NAME.", 2
        )
    # the adapter names its base; the rows are alpaca
    model = job.path("hub/model/README.md").parent
    dataset = job.path("hub/dataset/README.md").parent
    adapter = job.folder / "adapter"
    settings = json.loads((adapter / "adapter_config.json").read_bytes())
    settings["base_model_name_or_path"] = base
    (model / "adapter_config.json").write_text(json.dumps(settings, indent=2))
    shutil.copy(adapter / "adapter_model.safetensors", model)
    shutil.copy(job.folder / "train.jsonl", dataset)
    config = job.config
    environment = Environment(trim_blocks=True, autoescape=False)  # noqa: S701 (Markdown)
    environment.filters["without_folders"] = without_folders
    for folder, card_class in ((model, ModelCard), (dataset, DatasetCard)):
        source = (TEMPLATES / f"{folder.name}.md.j2").read_text(encoding="utf-8")
        text = environment.from_string(source).render(
            base=base,
            repo=job.repo,
            licence=_licence(base),
            config=config,
            manifest=read_manifest(job.folder),
            settings=_settings(config),
            learns=learns,
            continued=method_of(config.method).continued,
        )
        try:
            card_class(text).save(folder / "README.md")
        except ValueError as error:
            raise KitError(f"The hub's library refuses the card: {error}") from None
    result: Json = {
        "model": str(model),
        "dataset": str(dataset),
        "files": {str(path): path.stat().st_size for path in model.parent.glob("*/*")},
        "card": (model / "README.md").read_text(encoding="utf-8"),
        "dataset_card": (dataset / "README.md").read_text(encoding="utf-8"),
        "uploaded": [],
    }
    if job.repo and not job.dry_run:
        for folder, repo in ((dataset, f"{job.repo}-data"), (model, job.repo)):
            try:
                result["uploaded"].append(_upload(folder, repo, job.update))
            except KitError as error:
                done = ", ".join(result["uploaded"]) or "nothing"
                raise KitError(f"{error.args[0]} Uploaded before: {done}.", error.hint) from None
    return result


def _settings(config: Config) -> str:
    """The keys that are not the defaults, as YAML: no address, no key's name, no local folder."""
    defaults = flat(Config())
    settings = {
        key: value
        for key, value in flat(config).items()
        if value != defaults.get(key) and key.split(".")[-1] not in PRIVATE_KEYS
    }
    return without_folders(yaml.safe_dump(settings, allow_unicode=True))


def without_folders(text: str) -> str:
    """A text whose paths of this machine are names of files."""
    return re.sub(r"(^|(?<=[\s'\"]))(~|\.{0,2})/\S*/", "", text)


def _licence(base: str) -> str:
    """The base's licence as the hub has it; unknown where the hub is out of reach."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    try:
        card = HfApi().model_info(base, timeout=10).card_data
    except (HTTPError, OSError):
        return "unknown"
    return (card and card.license) or "unknown"


def _upload(folder: Path, repo: str, update: bool) -> str:
    """Upload a folder in one commit, and look that all of it is there; its url.

    Raises:
        KitError: no token or rights, no network, a repository that exists, or a file that is
            missing afterwards.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError

    api = HfApi()
    kind = folder.name
    files = {path.name for path in folder.iterdir()}
    try:
        exists = api.repo_exists(repo, repo_type=kind)
        if exists and not update:
            raise KitError(f"{repo} exists.", "Choose another --repo, or add to it: --update.")
        url = api.create_repo(repo, repo_type=kind, private=True, exist_ok=True)
        before = api.list_repo_files(repo, repo_type=kind) if exists else []
        kept = ["README.md"] if "README.md" in before else []
        api.upload_folder(
            repo_id=repo,
            repo_type=kind,
            folder_path=folder,
            ignore_patterns=kept,
            commit_message="A student of palign",
        )
        missing = files.difference(api.list_repo_files(repo, repo_type=kind))
    except (HTTPError, HFValidationError, OSError) as error:
        raise KitError(
            f"{repo} was not uploaded: {type(error).__name__}: {str(error)[:300]}",
            "Check the network, and log in with a token that may write: hf auth login.",
        ) from None
    if missing:
        raise KitError(f"{repo} misses {', '.join(sorted(missing))}.", "Upload again: --update.")
    return str(url)
