"""llama.cpp in this process: a GGUF model, its tokenizer, and contexts of several sequences.

Generation (gguf_generate.py) and judging (section 3.2 of the paper) work on a `Context`, through the low-level API
of llama-cpp-python. No server, no adapter.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Collection, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from kit.backends.base import (
    Generation,
    Logprobs,
    Request,
    ScoreRequest,
    TokenUsage,
    common_prefix_len,
    slug,
)
from kit.core.config import ModelConfig
from kit.core.errors import KitError
from kit.models import gguf_file

BATCH_TOKENS = 256  # of one llama_decode; between two of them Ctrl-C gets through
WORTH_TOKENS = 8  # a shared beginning is copied when it saves this many
NAMED = 8 | 1  # token attributes (control, unknown) that make a text a special token
SLOW = {3, 9}  # file types Q4_1 and Q5_1, for which llama.cpp has no fast CPU kernels
UNPACK_PARAMETERS = 1 << 29  # a 16-bit copy of a model up to this size is at most 1 GiB
ROOM_TOKENS = 8192  # of a judging trunk at least, where the model has them: growing forgets it
RECOMPUTED = "the judge's cache cannot be cut for this architecture: every verdict evaluates its whole prompt"


@cache
def library() -> Any:
    """llama_cpp, silenced; its last errors are in `.complaints`."""
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError) as error:
        raise KitError(
            f"backend gguf needs llama-cpp-python, which does not load ({error}).",
            "pip install llama-cpp-python==0.3.36 (compiles for some 8 minutes), or set backend=hf.",
        ) from None
    llama_cpp.complaints = complaints = []

    @llama_cpp.llama_log_callback
    def keep(level: int, text: bytes, _: Any) -> None:
        if level == 3:  # errors
            complaints[:] = [*complaints[-2:], text.decode("utf-8", "replace").strip()]

    llama_cpp.complaints_callback = keep  # must outlive every call
    llama_cpp.llama_log_set(keep, None)
    llama_cpp.llama_backend_init()
    return llama_cpp


def load(path: Path, n_gpu_layers: int = 0, vocab_only: bool = False) -> Any:
    """A llama_model; KitError: a file that llama.cpp cannot read."""
    lib = library()
    params = lib.llama_model_default_params()
    params.n_gpu_layers, params.vocab_only = n_gpu_layers, vocab_only
    lib.complaints.clear()
    if model := lib.llama_model_load_from_file(str(path).encode(), params):
        return model
    what = f"llama.cpp cannot load {path}: {' '.join(lib.complaints)}"
    raise KitError(
        what, "Is the download complete? Compare its size with the source's, or name another GGUF."
    )


def unpacked(path: Path) -> Path:
    """A copy with 16-bit weights (equal to one part in 2,000), made once and cached; KitError: it cannot be."""
    lib, stat = library(), path.stat()
    root = Path(os.environ.get("PALIGN_CACHE") or Path.home() / ".cache" / "palign")
    target = root / f"{path.stem}-{stat.st_size}-{stat.st_mtime_ns}.f16.gguf"
    part, params = target.with_suffix(f".{os.getpid()}"), lib.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize = 1, True  # F16
    try:
        root.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            if lib.llama_model_quantize(str(path).encode(), str(part).encode(), params):
                part.unlink(missing_ok=True)
                raise OSError(" ".join(lib.complaints))
            part.rename(target)
    except OSError as error:
        what = f"{path.name} cannot be unpacked for speed into {root}: {error}"
        raise KitError(what, "Make room, or set PALIGN_CACHE.") from None
    return target


class GgufTokenizer:
    """The tokenizer inside a loaded llama_model; see kit.backends.Tokenizer."""

    def __init__(self, model: Any) -> None:
        self._lib, self._vocab = library(), library().llama_model_get_vocab(model)
        lib, vocab = self._lib, self._vocab
        every = range(lib.llama_vocab_n_tokens(vocab))
        self.size = len(every)
        self._piece = cache(self._piece)
        self.template = (lib.llama_model_chat_template(model, None) or b"").decode(
            "utf-8", "replace"
        ) or None
        self.bos, self.eos = (
            self.decode([lib.llama_vocab_bos(vocab)]),
            self.decode([lib.llama_vocab_eos(vocab)]),
        )
        self.eos_ids = frozenset(i for i in every if lib.llama_vocab_is_eog(vocab, i))
        self.special = tuple(
            self.decode([i]) for i in every if lib.llama_vocab_get_attr(vocab, i) & NAMED
        )

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Ids of a text; special=False tokenizes special tokens' names as text. No BOS or EOS is added."""
        data = text.encode("utf-8", "replace")
        ids = (ctypes.c_int32 * (len(data) + 8))()
        return ids[
            : self._lib.llama_tokenize(self._vocab, data, len(data), ids, len(ids), False, special)
        ]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens by their names; bytes that are not (yet) UTF-8 become U+FFFD."""
        return b"".join(map(self._piece, ids)).decode("utf-8", "replace")

    def _piece(self, token: int) -> bytes:
        buffer = ctypes.create_string_buffer(1024)
        size = (
            self._lib.llama_token_to_piece(self._vocab, token, buffer, 1024, 0, True)
            if token >= 0
            else 0
        )
        return buffer.raw[: max(size, 0)]


class Context:
    """So many sequences with room for so many tokens each, and what they hold.

    Their caches are apart (not llama.cpp's unified one): so a token lies in the cell it would have had alone, sums run
    in the same order, and a copied beginning gives the logits of a fresh prompt. Attention is cheaper, too.
    """

    def __init__(
        self, backend: GgufBackend, tokens: int, sequences: int, flash_attention: bool
    ) -> None:
        self._lib = lib = library()
        self.tokens, self._size, self._notes = (
            -(-tokens // 256) * 256,
            backend.tokenizer.size,
            backend.notes,
        )
        self.held: list[list[int]] = [[] for _ in range(sequences)]
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.kv_unified = (
            self.tokens * sequences,
            sequences,
            False,
        )
        params.n_batch = params.n_ubatch = BATCH_TOKENS
        params.n_threads = params.n_threads_batch = backend.n_threads
        params.flash_attn_type = int(flash_attention)
        self._context = lib.llama_init_from_model(backend.model, params)
        if not self._context:
            why = f"llama.cpp has no memory for {sequences} sequences of {tokens} tokens: {' '.join(lib.complaints)}"
            raise KitError(why, "Set a smaller context_tokens, max_num_seqs or max_new_tokens.")
        self._memory = lib.llama_get_memory(self._context)
        self._batch = lib.llama_batch_init(BATCH_TOKENS, 0, 1)

    def keep(self, sequence: int, ids: Sequence[int]) -> int:
        """Make a sequence hold the longest beginning of `ids` that any sequence has, and nothing else.

        Returns its length; 0 where a cache cannot be cut, which is noted: recurrent states refuse, sliding windows have
        lost what comes before.
        """
        lib, memory = self._lib, self._memory
        shared = [common_prefix_len(held, ids) for held in self.held]
        best = int(np.argmax(shared))
        best = best if shared[best] >= shared[sequence] + WORTH_TOKENS else sequence
        length = shared[best]
        if best != sequence:
            lib.llama_memory_seq_rm(memory, sequence, -1, -1)  # a whole sequence: never fails
            lib.llama_memory_seq_cp(memory, best, sequence, -1, -1)
        if 0 < length < len(self.held[best]):
            done = lib.llama_memory_seq_rm(memory, sequence, length, -1)
            left = (
                lib.llama_memory_seq_pos_min(memory, sequence),
                lib.llama_memory_seq_pos_max(memory, sequence),
            )
            if not done or left != (0, length - 1):
                length = 0
                self._notes += [RECOMPUTED] if RECOMPUTED not in self._notes else []
        if not length:
            lib.llama_memory_seq_rm(memory, sequence, -1, -1)
        self.held[sequence] = list(ids[:length])
        return length

    def evaluate(
        self, rows: Sequence[tuple[int, Sequence[int], Collection[int]]]
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Append rows (sequence, token ids, positions whose logits are wanted) to sequences.

        Yields (position, logits (V,)) in the order of the rows; valid until the next is taken.
        """
        lib, batch = self._lib, self._batch
        tokens = [
            (sequence, position, token, position in wanted)
            for sequence, ids, wanted in rows
            for position, token in enumerate(ids, len(self.held[sequence]))
        ]
        while tokens:
            size = BATCH_TOKENS - (
                len(tokens) == BATCH_TOKENS + 1
            )  # one token alone takes other kernels: see read
            chunk, tokens = tokens[:size], tokens[size:]
            batch.n_tokens = len(chunk)
            for i, (sequence, position, token, wanted) in enumerate(chunk):
                batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            if status := lib.llama_decode(self._context, batch):
                what = f"llama.cpp cannot evaluate {len(self.held[sequence]) + len(chunk)} tokens (status {status})."
                raise KitError(what, "Set judge.limit_tokens or a smaller context_tokens.")
            for i, (sequence, position, token, wanted) in enumerate(chunk):
                self.held[sequence].append(token)
                if wanted:
                    pointer = lib.llama_get_logits_ith(self._context, i)
                    yield position, np.ctypeslib.as_array(pointer, (self._size,))

    def close(self) -> None:
        """Free it."""
        self._lib.llama_batch_free(self._batch)
        self._lib.llama_free(self._context)


class GgufBackend:
    """See kit.backends.Backend; KitError: no llama-cpp-python, no such file, a file that llama.cpp cannot read."""

    def __init__(self, engine: ModelConfig) -> None:
        self._lib = lib = library()
        self.engine, self.notes = engine, []
        path = gguf_file(engine.model)
        self.name = slug(engine.model)
        self.n_threads = engine.n_threads or len(os.sched_getaffinity(0))
        self.model = load(path, engine.n_gpu_layers)
        slow = lib.llama_model_ftype(self.model) in SLOW
        slow = slow and not (engine.n_gpu_layers and lib.llama_supports_gpu_offload())
        if slow and lib.llama_model_n_params(self.model) <= UNPACK_PARAMETERS:
            lib.llama_model_free(self.model)
            self.model = load(unpacked(path))
        self.tokenizer = GgufTokenizer(self.model)
        trained = lib.llama_model_n_ctx_train(self.model)
        self.context_tokens = min(engine.context_tokens or trained, trained)

    def generate(self, requests: Sequence[Request]) -> Iterator[Generation]:
        """See kit/backends/gguf_generate.py."""
        from kit.backends.gguf_generate import generate

        return generate(self, requests)

    def session(self, uncached: bool = False) -> GgufSession:
        """Open a judging session; uncached=True evaluates every probe without a cache."""
        return GgufSession(self, uncached)

    def close(self) -> None:
        """Free the weights."""
        self.model = self.model and self._lib.llama_model_free(self.model)


class GgufSession:
    """See kit.backends.Session; uncached=True evaluates every probe from its first token.

    Sequence 0 holds the longest probe so far, the trunk; shorter ones are answered in sequence 1, which takes the
    trunk's beginning over. Many probes go longest first, so one copy serves a whole scan.
    """

    def __init__(self, backend: GgufBackend, uncached: bool = False) -> None:
        self.backend, self.uncached, self.cost = backend, uncached, TokenUsage()
        self._context: Context | None = None

    def score(self, probes: Sequence[ScoreRequest]) -> list[Logprobs]:
        """Read probes; KitError: one is longer than the model's context."""
        context = self._grown(max((len(probe.ids) for probe in probes), default=0))
        found: list[Logprobs] = [[] for _ in probes]
        for i in sorted(range(len(probes)), key=lambda i: -len(probes[i].ids)):
            ids, reads = probes[i].ids, dict(probes[i].reads)
            sequence = 0 if self.uncached or len(ids) >= len(context.held[0]) else 1
            # at least two tokens are evaluated: llama.cpp multiplies one alone otherwise, and logits moved by up to 0.4
            kept = context.keep(
                sequence, () if self.uncached else ids[: min([*reads, len(ids) - 2])]
            )
            for position, logits in context.evaluate([(sequence, ids[kept:], reads)]):
                shifted = logits - logits.max().astype(np.float64)
                found[i].append(
                    (shifted[list(reads[position])] - np.log(np.exp(shifted).sum())).tolist()
                )
            self.cost.add(TokenUsage(len(ids) - kept, kept))
        return found

    def close(self) -> None:
        """Free the context."""
        self._context = self._context and self._context.close()

    def _grown(self, tokens: int) -> Context:
        """The context, made anew where it has no room for a probe of so many tokens."""
        if not self._context or self._context.tokens < tokens:
            self.close()
            room = min(max(2 * tokens, ROOM_TOKENS), self.backend.context_tokens)
            self._context = Context(
                self.backend, room, 2 - self.uncached, self.backend.engine.flash_attention
            )
        return self._context
