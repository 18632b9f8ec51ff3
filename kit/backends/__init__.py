"""What runs a model: hf (transformers), gguf (llama.cpp), http (a server), scripted (tests). See base.py."""

from __future__ import annotations

from importlib import import_module

from kit.backends.base import Backend
from kit.core.config import ModelConfig
from kit.core.errors import KitError

BACKENDS = {
    "hf": "HfBackend",
    "gguf": "GgufBackend",
    "http": "HttpBackend",
    "scripted": "ScriptedBackend",
}


def open_backend(engine: ModelConfig, adapter: str | None = None) -> Backend:
    """Load the model that an engine names, a PEFT adapter's folder on top of it (hf only); KitError: it cannot be."""
    if adapter and engine.backend in ("gguf", "http"):
        hint = "Set eval.backend=hf, or export the run (palign.py export RUN --to gguf) and evaluate that."
        raise KitError(f"An adapter runs on backend hf, not {engine.backend}.", hint)
    module = import_module(f"kit.backends.{engine.backend}")
    opened = getattr(module, BACKENDS[engine.backend])
    return opened(engine, adapter) if adapter else opened(engine)
