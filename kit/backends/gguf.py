"""llama.cpp in this process: a GGUF model, its tokenizer, and contexts of several sequences.

Generation (gguf_generate.py) and judging (section 3.2 of the paper) work on a `Context`, through
the low-level API of llama-cpp-python. No server, no adapter.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

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
from kit.core.memory import is_out_of_memory
from kit.core.threads import Threads
from kit.models import cached_copy, gguf_file

# nothing imports this module before a GGUF is opened
try:
    import llama_cpp
except (ImportError, OSError, RuntimeError) as error:
    raise KitError(
        f"backend gguf needs llama-cpp-python, which does not load ({error}).",
        "pip install llama-cpp-python==0.3.36 (compiles for about 8 minutes), or set backend=hf.",
    ) from None

BATCH_TOKENS = 256  # of one llama_decode; Ctrl-C takes effect between two of them
CARD_BATCH_TOKENS = 2048  # where layers are offloaded, and a pass is quick
MIN_COPY_TOKENS = 8  # a shared beginning is copied when it saves this many
MIN_ROOM_TOKENS = 8192  # of a judging context, where the model has them: growing loses the cache
SLOW_FILE_TYPES = {3, 9}  # Q4_1 and Q5_1, for which llama.cpp has no fast CPU kernels
MAX_COPY_PARAMETERS = 1 << 29  # a 16-bit copy of a model up to this size is at most 1 GiB
SPECIAL_TOKEN = 8 | 1  # token attributes: control or unknown
UNCUTTABLE = (
    "the judge's cache cannot be cut for this architecture: "
    "every verdict evaluates its whole prompt"
)
last_errors: deque[str] = deque(maxlen=3)  # that llama.cpp logged


@llama_cpp.llama_log_callback
def keep_errors(level: int, text: bytes, _: Any) -> None:
    """Take llama.cpp's log, so that it stays out of the terminal."""
    if level in (3, 4):  # warnings and errors
        last_errors.append(text.decode("utf-8", "replace").strip())


def load(path: Path, n_gpu_layers: int = 0, vocab_only: bool = False) -> Any:
    """A llama_model; KitError: a file that llama.cpp cannot read."""
    llama_cpp.llama_log_set(keep_errors, None)
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = n_gpu_layers
    params.vocab_only = vocab_only
    params.check_tensors = True  # NaN and infinity
    last_errors.clear()
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    if model:
        return model
    reason = " ".join(last_errors)
    if is_out_of_memory(reason):
        raise KitError(
            f"There is no memory for {path}: {reason}",
            "Close other programs, set n_gpu_layers lower, or name a smaller quantization.",
        )
    raise KitError(
        f"llama.cpp cannot load {path}: {reason}",
        "Is the download complete? Compare its size with the source's, or name another GGUF.",
    )


def f16_copy(gguf: Path) -> Path:
    """The same model with 16-bit weights (equal to one part in 2,000), cached."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = 1  # F16
    params.allow_requantize = True

    def write(path: Path) -> None:
        if llama_cpp.llama_model_quantize(str(gguf).encode(), str(path).encode(), params):
            raise OSError(" ".join(last_errors))
        llama_cpp.llama_model_free(load(path))  # KitError: it is not whole

    return cached_copy(gguf, ".f16.gguf", write)


class GgufTokenizer:
    """The tokenizer inside a loaded llama_model; see kit.backends.base.Tokenizer."""

    def __init__(self, model: Any) -> None:
        self._vocab = vocab = llama_cpp.llama_model_get_vocab(model)
        self._piece = cache(self._read_piece)
        self.size = llama_cpp.llama_vocab_n_tokens(vocab)
        self.template = (llama_cpp.llama_model_chat_template(model, None) or b"").decode() or None
        self.bos = self.decode([llama_cpp.llama_vocab_bos(vocab)])
        self.eos = self.decode([llama_cpp.llama_vocab_eos(vocab)])
        tokens = range(self.size)
        self.eos_ids = frozenset(i for i in tokens if llama_cpp.llama_vocab_is_eog(vocab, i))
        special = [i for i in tokens if llama_cpp.llama_vocab_get_attr(vocab, i) & SPECIAL_TOKEN]
        self.special = tuple(self.decode([i]) for i in special)

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Ids of a text, no BOS or EOS added; special=False keeps special tokens' names text."""
        data = text.encode("utf-8", "replace")
        size = len(data) + 8
        ids = (ctypes.c_int32 * size)()
        count = llama_cpp.llama_tokenize(self._vocab, data, len(data), ids, size, False, special)
        return ids[:count]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens by their names; incomplete UTF-8 becomes U+FFFD."""
        return b"".join(map(self._piece, ids)).decode("utf-8", "replace")

    def _read_piece(self, token: int) -> bytes:
        if token < 0:  # the BOS or EOS of a model that has none
            return b""
        buffer = ctypes.create_string_buffer(1024)
        size = llama_cpp.llama_token_to_piece(self._vocab, token, buffer, 1024, 0, True)
        return buffer.raw[: max(size, 0)]


class BatchToken(NamedTuple):
    """A token to append to a sequence of a context."""

    sequence: int
    id: int
    wanted: bool  # whether the logits after it are needed


class Context:
    """Several sequences with caches of their own.

    Their caches are apart (not llama.cpp's unified one). So a token lies in the cell that it would
    have had alone, sums run in the same order, and a copied beginning gives the logits of a fresh
    prompt. Attention is cheaper, too.

    Args:
        backend: the model.
        tokens: room of each sequence.
        sequences: how many.
        flash_attention: faster; moves judging margins by up to some tenths.

    Raises:
        KitError: no memory for it.
    """

    def __init__(
        self, backend: GgufBackend, tokens: int, sequences: int, flash_attention: bool
    ) -> None:
        self._backend = backend
        self.batch_tokens = CARD_BATCH_TOKENS if backend.on_card else BATCH_TOKENS
        self.n_threads = backend.threads.now()
        self.tokens = -(-tokens // 256) * 256
        self.cached: list[list[int]] = [[] for _ in range(sequences)]  # token ids by sequence
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = self.tokens * sequences
        params.n_seq_max = sequences
        params.kv_unified = False
        params.n_batch = params.n_ubatch = self.batch_tokens
        params.n_threads = params.n_threads_batch = self.n_threads
        params.flash_attn_type = int(flash_attention)
        self._context = llama_cpp.llama_init_from_model(backend.model, params)
        if not self._context:
            raise KitError(
                f"llama.cpp has no memory for {sequences} sequences of {tokens} tokens: "
                f"{' '.join(last_errors)}",
                "Set a smaller context_tokens, max_num_seqs or max_new_tokens.",
            )
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._batch = llama_cpp.llama_batch_init(self.batch_tokens, 0, 1)

    def reuse(self, sequence: int, ids: Sequence[int]) -> int:
        """Make a sequence hold the longest beginning of `ids` that any sequence has cached.

        Whatever else the sequence held is dropped.

        Returns:
            The beginning's length in tokens; 0 where the cache cannot be cut, which is noted:
            recurrent states refuse, sliding windows have lost the tokens before.
        """
        lengths = [common_prefix_len(cached, ids) for cached in self.cached]
        source = int(np.argmax(lengths))
        length = lengths[sequence]
        if lengths[source] >= length + MIN_COPY_TOKENS:
            length = lengths[source]
            self._cut(sequence, 0)
            llama_cpp.llama_memory_seq_cp(self._memory, source, sequence, -1, -1)
            self.cached[sequence] = self.cached[source].copy()
        if length < len(self.cached[sequence]) and not self._cut(sequence, length):
            self._cut(sequence, 0)
            if UNCUTTABLE not in self._backend.notes:
                self._backend.notes.append(UNCUTTABLE)
        return len(self.cached[sequence])

    def _cut(self, sequence: int, length: int) -> bool:
        """Drop a sequence's tokens from `length` on; whether exactly the others are left."""
        del self.cached[sequence][length:]
        removed = llama_cpp.llama_memory_seq_rm(self._memory, sequence, length, -1)
        first = llama_cpp.llama_memory_seq_pos_min(self._memory, sequence)
        last = llama_cpp.llama_memory_seq_pos_max(self._memory, sequence)
        # both are -1 in an empty sequence
        return removed and last == length - 1 and first == min(last, 0)

    def prefill(
        self, sequence: int, ids: Sequence[int], wanted: Collection[int]
    ) -> Iterator[np.ndarray]:
        """Append what of `ids` a sequence does not hold; yields logits (V,) at the wanted indices.

        Each is valid until the next is taken.
        """
        start = len(self.cached[sequence])
        while start < len(ids):
            end = min(start + self.batch_tokens, len(ids))
            # no single token is left over: see GgufSession
            if end == len(ids) - 1:
                end -= 1
            chunk = range(start, end)
            yield from self.decode([BatchToken(sequence, ids[i], i in wanted) for i in chunk])
            start = end

    def decode(self, tokens: Sequence[BatchToken]) -> Iterator[np.ndarray]:
        """Append tokens, at most `batch_tokens`, in one pass; yields as `prefill`."""
        n_threads = self._backend.threads.now()
        if n_threads != self.n_threads:
            self.n_threads = n_threads
            llama_cpp.llama_set_n_threads(self._context, n_threads, n_threads)
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, (sequence, token, wanted) in enumerate(tokens):
            cached = self.cached[sequence]
            batch.token[i] = token
            batch.pos[i] = len(cached)
            batch.logits[i] = wanted
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            cached.append(token)
        status = llama_cpp.llama_decode(self._context, batch)
        if status:
            raise KitError(
                f"llama.cpp cannot evaluate {len(cached)} tokens (status {status}).",
                "Set judge.limit_tokens or a smaller context_tokens.",
            )
        for i, (_, _, wanted) in enumerate(tokens):
            if wanted:
                pointer = llama_cpp.llama_get_logits_ith(self._context, i)
                yield np.ctypeslib.as_array(pointer, (self._backend.tokenizer.size,))

    def close(self) -> None:
        """Free the memory."""
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(self._context)


class GgufBackend:
    """A GGUF model; see kit.backends.base.Backend.

    Raises:
        KitError: no llama-cpp-python, no such file, or a file that llama.cpp cannot read.
    """

    def __init__(self, engine: ModelConfig) -> None:
        path = gguf_file(engine.model)
        self.engine = engine
        self.name = slug(engine.model)
        self.notes: list[str] = []
        self.threads = Threads(engine.n_threads)
        self.model = load(path, engine.n_gpu_layers)
        self.on_card = bool(engine.n_gpu_layers) and llama_cpp.llama_supports_gpu_offload()
        self.max_rows = engine.rows(self.on_card)  # at a time; fewer once memory ran out
        is_slow = llama_cpp.llama_model_ftype(self.model) in SLOW_FILE_TYPES
        is_small = llama_cpp.llama_model_n_params(self.model) <= MAX_COPY_PARAMETERS
        if is_slow and is_small and not self.on_card:
            self.close()
            self.model = load(f16_copy(path))
        self.flash_attention = engine.flash_attention or self.on_card
        self.tokenizer = GgufTokenizer(self.model)
        trained_tokens = llama_cpp.llama_model_n_ctx_train(self.model)
        self.context_tokens = min(engine.context_tokens or trained_tokens, trained_tokens)

    def generate(self, requests: Sequence[Request]) -> Iterator[Generation]:
        """See kit/backends/gguf_generate.py."""
        from kit.backends.gguf_generate import generate

        return generate(self, requests)

    def session(self, uncached: bool = False) -> GgufSession:
        """Open a judging session; uncached=True evaluates every prompt from its first token."""
        return GgufSession(self, uncached)

    def close(self) -> None:
        """Free the weights; a second call does nothing."""
        if self.model is not None:
            llama_cpp.llama_model_free(self.model)
            self.model = None


class GgufSession:
    """See kit.backends.base.ScoringSession.

    Sequence 0 holds the longest prompt so far, the trunk. Shorter ones are scored in sequence 1,
    which copies the trunk's beginning. Many requests go longest first: one copy serves them all.
    """

    def __init__(self, backend: GgufBackend, uncached: bool = False) -> None:
        self.backend = backend
        self.uncached = uncached
        self.cost = TokenUsage()
        self._context: Context | None = None

    def score(self, requests: Sequence[ScoreRequest]) -> list[Logprobs]:
        """Read log-probabilities; KitError: a prompt is longer than the model's context."""
        longest_first = sorted(requests, key=lambda request: len(request.ids), reverse=True)
        logprobs = {request: self._score(request) for request in longest_first}
        return [logprobs[request] for request in requests]

    def close(self) -> None:
        """Free the context."""
        if self._context is not None:
            self._context.close()
            self._context = None

    def _score(self, request: ScoreRequest) -> Logprobs:
        ids = request.ids
        candidates = dict(request.reads)
        context = self._context_for(len(ids))
        is_trunk = self.uncached or len(ids) >= len(context.cached[0])
        sequence = 0 if is_trunk else 1
        # Never taken from the cache: tokens whose logits are read, and the last two. llama.cpp
        # evaluates a single token with other kernels, which moved logits by up to 0.4.
        reusable = 0 if self.uncached else min([*candidates, len(ids) - 2])
        cached_tokens = context.reuse(sequence, ids[:reusable])
        self.cost.add(TokenUsage(len(ids) - cached_tokens, cached_tokens))
        logprobs = []
        rows = context.prefill(sequence, ids, candidates)
        for logits, tokens in zip(rows, candidates.values(), strict=True):
            shifted = logits - logits.max().astype(np.float64)
            logprobs.append((shifted[list(tokens)] - np.log(np.exp(shifted).sum())).tolist())
        return logprobs

    def _context_for(self, tokens: int) -> Context:
        """The session's context, replaced by a larger one where it has too few tokens."""
        if self._context is None or self._context.tokens < tokens:
            self.close()
            backend = self.backend
            room = min(max(2 * tokens, MIN_ROOM_TOKENS), backend.context_tokens)
            sequences = 1 if self.uncached else 2
            self._context = Context(backend, room, sequences, backend.flash_attention)
        return self._context
