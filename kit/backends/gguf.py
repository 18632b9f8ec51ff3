"""llama.cpp in this process: a GGUF model, its tokenizer, and contexts of several sequences.

Generation is in kit/backends/gguf_generate.py, judging sessions in kit/backends/gguf_session.py; both
work on a `Context` of their own through the low-level API of llama-cpp-python. No server, no adapter.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from kit.backends import Generation, Request, Session
from kit.config import Engine
from kit.errors import KitError
from kit.models import gguf_file

BATCH_TOKENS = 256  # of one llama_decode: about a second on two cores, so that Ctrl-C gets through between two
CONTROL, UNKNOWN = 8, 1  # token attributes that parse_special=False splits


@cache
def library() -> Any:
    """llama_cpp, silenced: its last complaints are kept in `library().complaints` for error messages.

    Raises:
        KitError: llama-cpp-python is not installed or does not load.
    """
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError) as error:
        raise KitError(
            f"backend gguf needs llama-cpp-python, which does not load: {error}.",
            "pip install llama-cpp-python==0.3.36 (it is compiled: a C++ compiler and some 8 minutes), "
            "or set backend=hf.",
        ) from None
    complaints: list[str] = []

    @llama_cpp.llama_log_callback
    def keep(level: int, text: bytes, _: Any) -> None:
        if level == 3:  # errors
            complaints[:] = [*complaints[-5:], text.decode("utf-8", "replace").strip()]

    llama_cpp.llama_log_set(keep, None)
    llama_cpp.llama_backend_init()
    llama_cpp.complaints, llama_cpp.complaints_callback = complaints, keep  # the callback must outlive every call
    return llama_cpp


class GgufTokenizer:
    """The tokenizer inside a GGUF, behind the protocol of kit.backends.

    Args:
        model: a loaded llama_model.
    """

    def __init__(self, model: Any) -> None:
        self._library = lib = library()
        self._vocab = vocab = lib.llama_model_get_vocab(model)
        self.vocabulary: int = lib.llama_vocab_n_tokens(vocab)
        template = lib.llama_model_chat_template(model, None)
        self.template: str | None = template.decode("utf-8", "replace") if template else None
        self.bos, self.eos = self._name(lib.llama_vocab_bos(vocab)), self._name(lib.llama_vocab_eos(vocab))
        every = range(self.vocabulary)
        self.eos_ids = frozenset(i for i in every if lib.llama_vocab_is_eog(vocab, i))
        named = (i for i in every if lib.llama_vocab_get_attr(vocab, i) & (CONTROL | UNKNOWN))
        self.special: tuple[str, ...] = tuple(self._name(i) for i in named)
        self._pieces: dict[int, bytes] = {}

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Ids of a text; special=False tokenizes special tokens' names as text. No BOS or EOS is added."""
        data = text.encode("utf-8", "replace")
        room = len(data) + 8
        ids = (ctypes.c_int32 * room)()
        count = self._library.llama_tokenize(self._vocab, data, len(data), ids, room, False, special)
        return ids[:count]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens by their names; bytes that are not (yet) UTF-8 become U+FFFD."""
        return b"".join(map(self.piece, ids)).decode("utf-8", "replace")

    def piece(self, token: int) -> bytes:
        """A token's bytes."""
        found = self._pieces.get(token)
        if found is None:
            buffer = ctypes.create_string_buffer(512)
            size = self._library.llama_token_to_piece(self._vocab, token, buffer, 512, 0, True)
            found = self._pieces[token] = buffer.raw[: max(size, 0)]
        return found

    def _name(self, token: int) -> str:
        return self._library.llama_vocab_get_text(self._vocab, token).decode("utf-8", "replace") if token >= 0 else ""


@dataclass(frozen=True)
class Piece:
    """Tokens to evaluate: ids (T,) of one sequence from position `start`; `wanted`: positions whose logits are read."""

    sequence: int
    start: int
    ids: Sequence[int]
    wanted: Sequence[int] = ()


class Context:
    """A llama_context with several sequences, and what each of them holds.

    Args:
        backend: the model and its settings.
        tokens: cells of its cache; unified: of all sequences together, shared tokens once; else of each sequence.
        sequences: how many.
        unified: one cache for all (copies cost nothing) or one for each (attention sees its own tokens only).
        flash_attention: -1 where llama.cpp likes it, 0 off, 1 on.

    Raises:
        KitError: there is no memory for it.
    """

    def __init__(self, backend: GgufBackend, tokens: int, sequences: int, unified: bool, flash_attention: int) -> None:
        self._library = lib = library()
        self.tokens, self.sequences, self.unified = -(-tokens // 256) * 256, sequences, unified
        params = lib.llama_context_default_params()
        params.n_ctx = self.tokens if unified else self.tokens * sequences
        params.n_batch = params.n_ubatch = self.batch_tokens = min(BATCH_TOKENS, self.tokens)
        params.n_seq_max, params.kv_unified = sequences, unified
        params.n_outputs_max = self.outputs = min(max(sequences, 32), self.batch_tokens)
        params.n_threads = params.n_threads_batch = backend.threads
        params.flash_attn_type = flash_attention
        self._context = lib.llama_init_from_model(backend.model, params)
        if not self._context:
            raise KitError(
                f"llama.cpp cannot make a context of {params.n_ctx} tokens: {'; '.join(lib.complaints[-2:])}",
                "Set a smaller context_tokens, parallel or max_new_tokens.",
            )
        self._memory = lib.llama_get_memory(self._context)
        self._windows = backend.cuttable  # a recurrent state has one position only: its last
        self._vocabulary = backend.tokenizer.vocabulary
        self._batch = self._buffers()

    def evaluate(self, pieces: Sequence[Piece]) -> Iterator[tuple[int, int, np.ndarray]]:
        """Run tokens through the model, at most `batch_tokens` at a time.

        Returns:
            Triples (index of the piece, position, logits (V,)) for every wanted position, in order. The logits are
            llama.cpp's own memory: valid until the next one is asked for.
        """
        total = sum(len(piece.ids) for piece in pieces)
        table = np.zeros((5, total), np.int32)  # id, position, sequence, wanted, piece
        at = 0
        for number, piece in enumerate(pieces):
            here = table[:, at : at + len(piece.ids)]
            here[0], here[2], here[4] = piece.ids, piece.sequence, number
            here[1] = np.arange(piece.start, piece.start + len(piece.ids))
            here[3, np.asarray(piece.wanted, int) - piece.start] = 1
            at += len(piece.ids)
        start = 0
        while start < total:
            stop = min(start + self.batch_tokens, total)
            over = np.flatnonzero(table[3, start:stop])[self.outputs :]
            stop = start + int(over[0]) if len(over) else stop
            self._decode(table[:, start:stop])
            for i in np.flatnonzero(table[3, start:stop]):
                pointer = self._library.llama_get_logits_ith(self._context, int(i))
                column = table[:, start + i]
                yield int(column[4]), int(column[1]), np.ctypeslib.as_array(pointer, (self._vocabulary,))
            start = stop

    def run(self, pieces: Sequence[Piece]) -> None:
        """Run tokens through the model, reading nothing."""
        for _ in self.evaluate(pieces):
            pass

    def fork(self, source: int, target: int, length: int) -> bool:
        """Make `target` hold the first `length` tokens of `source`; False: this cache cannot, `target` is empty."""
        lib = self._library
        if source != target:
            self.drop(target)
            if length and self.unified:
                lib.llama_memory_seq_cp(self._memory, source, target, 0, length)
            elif length:
                lib.llama_memory_seq_cp(self._memory, source, target, -1, -1)
        first = lib.llama_memory_seq_pos_min(self._memory, target) if self._windows else 0
        cut = lib.llama_memory_seq_rm(self._memory, target, length, -1)
        if cut and first <= 0 and lib.llama_memory_seq_pos_max(self._memory, target) == length - 1:
            return True
        self.drop(target)  # sliding windows have lost the beginning, recurrent states are not cut
        return False

    def drop(self, sequence: int) -> None:
        """Empty a sequence."""
        if not self._library.llama_memory_seq_rm(self._memory, sequence, -1, -1):
            raise KitError("llama.cpp refuses to empty a sequence.", "Report this with the model's name.")

    def save(self, sequence: int) -> np.ndarray:
        """A sequence's state as bytes, for a context of another size."""
        size = self._library.llama_state_seq_get_size(self._context, sequence)
        data = np.empty(size, np.uint8)
        pointer = data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        return data[: self._library.llama_state_seq_get_data(self._context, pointer, size, sequence)]

    def restore(self, sequence: int, data: np.ndarray) -> bool:
        """Take over a saved state; False: it does not fit."""
        pointer = data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        return self._library.llama_state_seq_set_data(self._context, pointer, data.size, sequence) > 0

    def close(self) -> None:
        """Free it."""
        if self._context:
            self._library.llama_free(self._context)
            self._context = None

    def _buffers(self) -> Any:
        """A llama_batch over numpy's memory, so that filling it is array assignment."""
        n = self.batch_tokens
        self._table = np.zeros((3, n), np.int32)
        self._ones, self._flags = np.ones(n, np.int32), np.zeros(n, np.int8)
        self._pointers = np.append(self._table[2].ctypes.data + 4 * np.arange(n, dtype=np.uint64), 0).astype(np.uint64)

        def at(array: np.ndarray, kind: Any) -> Any:
            return ctypes.cast(array.ctypes.data, ctypes.POINTER(kind))

        int32 = ctypes.c_int32
        ids, positions = at(self._table[0], int32), at(self._table[1], int32)
        sequences = at(self._pointers, ctypes.POINTER(int32))
        flags = at(self._flags, ctypes.c_int8)
        return self._library.llama_batch(0, ids, None, positions, at(self._ones, int32), sequences, flags)

    def _decode(self, table: np.ndarray) -> None:
        n = self._batch.n_tokens = table.shape[1]
        self._table[:, :n] = table[:3]
        self._flags[:n] = table[3]
        status = self._library.llama_decode(self._context, self._batch)
        if status != 0:
            why = "no room left in its cache" if status == 1 else "; ".join(self._library.complaints[-2:])
            raise KitError(
                f"llama_decode failed ({status}) on {n} tokens: {why}.",
                "Set a smaller context_tokens or parallel; if memory is not short, try another GGUF of the model.",
            )


class GgufBackend:
    """A GGUF model in this process.

    Args:
        engine: names the model and its settings.

    Raises:
        KitError: no llama-cpp-python, no such file, a file that llama.cpp cannot read.
    """

    concurrent = 1

    def __init__(self, engine: Engine) -> None:
        self._library = lib = library()
        path = gguf_file(engine.model)
        self.engine, self.notes = engine, []
        self.name = re.sub(r"[^\w.-]+", "-", engine.model.removesuffix(".gguf")).strip("-")
        self.threads = engine.threads or physical_cores()
        params = lib.llama_model_default_params()
        params.n_gpu_layers = engine.gpu_layers
        if engine.gpu_layers > 0 and not lib.llama_supports_gpu_offload():
            self.notes.append(f"gpu_layers={engine.gpu_layers}: this llama.cpp was built without a GPU, all on the CPU")
        lib.complaints.clear()
        self.model: Any = lib.llama_model_load_from_file(str(path).encode(), params)
        if not self.model:
            raise KitError(
                f"llama.cpp cannot load {path}: {'; '.join(lib.complaints[-2:]) or 'no reason given'}",
                "Is the download complete? Compare its size with the source's, or name another GGUF.",
            )
        self.tokenizer = GgufTokenizer(self.model)
        trained = lib.llama_model_n_ctx_train(self.model)
        self.context_tokens = min(engine.context_tokens or trained, trained)
        self.cuttable = not (lib.llama_model_is_recurrent(self.model) or lib.llama_model_is_hybrid(self.model))
        self.session_context: Context | None = None  # both are gguf_session's: the context outlives a session
        self.checked = False

    def generate(self, requests: Sequence[Request]) -> Iterator[Generation]:
        """Yield each request's result as it finishes; see kit/backends/gguf_generate.py."""
        from kit.backends.gguf_generate import generate

        return generate(self, requests)

    def session(self, fresh: bool = False) -> Session:
        """Open a judging session; fresh=True evaluates every probe without a cache."""
        from kit.backends.gguf_session import GgufSession

        return GgufSession(self, fresh=fresh)

    def close(self) -> None:
        """Free the contexts and the weights."""
        if self.session_context:
            self.session_context.close()
            self.session_context = None
        if self.model:
            self._library.llama_model_free(self.model)
            self.model = None


def physical_cores() -> int:
    """Cores this process may use, hyperthreads counted once (a second thread on a core only takes turns)."""
    cores = set()
    for cpu in os.sched_getaffinity(0):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(siblings.read_text() if siblings.exists() else str(cpu))
    return max(len(cores), 1)
