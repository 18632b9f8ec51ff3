"""What runs a model: hf (transformers), gguf (llama.cpp), http (a server) or scripted (tests).

The protocol that all four keep is in base.py.
"""

from importlib import import_module
from pathlib import Path

from kit.backends.base import Backend, Tokenizer
from kit.core.config import ModelConfig, Student, expand
from kit.core.run import trained_adapter

BACKENDS = {
    "hf": "HfBackend",
    "gguf": "GgufBackend",
    "http": "HttpBackend",
    "scripted": "ScriptedBackend",
}


def open_backend(engine: ModelConfig, adapter: str | None = None) -> Backend:
    """Load the model that a config section names.

    Args:
        engine: the section, e.g. `student`.
        adapter: what to put on top: hf: a PEFT adapter's folder; gguf: a GGUF LoRA; http: the
            folder or the name that it is served by.

    A student with an adapter of its own has it merged.

    Raises:
        KitError: no such model or adapter.
    """
    # imported here, so that one backend does not load the libraries of another
    module = import_module(f"kit.backends.{engine.backend}")
    backend_class = getattr(module, BACKENDS[engine.backend])
    if isinstance(engine, Student) and engine.adapter:
        folder = trained_adapter(expand(engine.adapter))
        backend = backend_class(engine, str(folder))
        backend.merge_adapter()
        return backend
    return backend_class(engine, adapter)


def tokenizer_alone(name: str) -> Tokenizer:
    """A model's tokenizer without its weights; llama.cpp's for a GGUF, which is not converted."""
    from kit.models import load_tokenizer, resolve

    path = resolve(name)
    if not isinstance(path, Path):
        return load_tokenizer(name)
    from kit.backends.gguf import GgufTokenizer, load

    return GgufTokenizer(load(path, vocab_only=True))
