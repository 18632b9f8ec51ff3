"""llama.cpp in this process: a GGUF model, its tokenizer, and contexts of several sequences.

Generation (gguf_generate.py) and judging (section 3.2 of the paper) work on a `Context`, through
the low-level API of llama-cpp-python. An adapter is a GGUF LoRA, applied unmerged. No server.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kit.backends.base import (
    MAX_TAILS,
    Generation,
    Ids,
    Logprobs,
    Request,
    ScoreRequest,
    Tail,
    TrunkSession,
    check_requests,
    common_prefix_len,
    slug,
)
from kit.core.config import ModelConfig
from kit.core.errors import KitError
from kit.core.memory import is_out_of_memory
from kit.core.threads import Threads
from kit.models import cached_copy, gguf_file, refuse_without_default

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
FILE_TYPES = {"f16": 1, "q8_0": 7, "q4_k_m": 15}  # llama.cpp's numbers
SLOW_FILE_TYPES = {3, 9}  # Q4_1 and Q5_1, for which llama.cpp has no fast CPU kernels
# By file type, F32 and F16: only rounding moves a cached margin. The largest moves seen are 0.00002
# and 0.011: what 16-bit weights are multiplied with is rounded to 16 bits too.
ROUNDING_NATS = {0: 0.001, 1: 0.02}
CHECK_TOKENS = 96  # of the prompts that measure what a cache moves
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


def quantize(gguf: Path, out: Path, file_type: str) -> None:
    """Write a model with other weights, by llama.cpp's own quantizer; OSError: it fails.

    Args:
        file_type: a key of FILE_TYPES.
    """
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = FILE_TYPES[file_type]
    params.allow_requantize = True
    if llama_cpp.llama_model_quantize(str(gguf).encode(), str(out).encode(), params):
        out.unlink(missing_ok=True)
        raise OSError(" ".join(last_errors))


def f16_copy(gguf: Path) -> Path:
    """The same model with 16-bit weights (equal to one part in 2,000), cached."""

    def write(path: Path) -> None:
        quantize(gguf, path, "f16")
        llama_cpp.llama_model_free(load(path))  # KitError: it is not whole

    return cached_copy(gguf, ".f16.gguf", write)


class GgufTokenizer:
    """The tokenizer inside a loaded llama_model; see kit.backends.base.Tokenizer."""

    def __init__(self, model: Any) -> None:
        self._vocab = vocab = llama_cpp.llama_model_get_vocab(model)
        self._piece = cache(self._read_piece)
        self.size = llama_cpp.llama_vocab_n_tokens(vocab)
        self.template = (llama_cpp.llama_model_chat_template(model, None) or b"").decode() or None
        if not self.template:
            refuse_without_default(_named_templates(model))
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
        # the BOS or EOS of a model that has none; a server's id that llama.cpp would abort on
        if not 0 <= token < self.size:
            return b""
        buffer = ctypes.create_string_buffer(1024)
        size = llama_cpp.llama_token_to_piece(self._vocab, token, buffer, 1024, 0, True)
        return buffer.raw[: max(size, 0)]


def _named_templates(model: Any) -> list[str]:
    """The chat templates of a model that have a name."""
    key = ctypes.create_string_buffer(256)
    names = []
    for number in range(llama_cpp.llama_model_meta_count(model)):
        llama_cpp.llama_model_meta_key_by_index(model, number, key, len(key))
        _, is_template, name = key.value.decode().partition("tokenizer.chat_template.")
        if is_template:
            names.append(name)
    return names


class UncuttableError(Exception):
    """Recurrent states refuse to be cut; sliding windows have lost the tokens before."""


class BatchToken(NamedTuple):
    """A token to append to a sequence of a context."""

    sequence: int
    id: int
    wanted: bool  # whether the logits after it are needed


class Context:
    """Several sequences, with caches of their own or (unified) in the cells of one.

    With caches of their own, each token lies in the cell that it would have alone: sums run in the
    same order, and attention is cheaper. Generation uses this. Unified, sequences share the cells
    of a common beginning, and those that branch off it go through the model in one pass. Judging
    uses this.

    Args:
        backend: the model.
        tokens: room of each sequence; of all together where they are unified.
        sequences: how many.
        unified: one cache for all sequences. Without it flash attention is always on: it is faster,
            and moves judging margins by up to some tenths.

    Raises:
        KitError: no memory for it.
    """

    def __init__(
        self, backend: GgufBackend, tokens: int, sequences: int, unified: bool = False
    ) -> None:
        self._backend = backend
        self.tokens = -(-tokens // 256) * 256
        self.cached: list[list[int]] = [[] for _ in range(sequences)]  # token ids by sequence
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = self.tokens if unified else self.tokens * sequences
        params.n_seq_max = sequences
        params.kv_unified = unified
        params.n_batch = params.n_ubatch = backend.batch_tokens
        params.flash_attn_type = int(backend.flash_attention or not unified)
        self._context = llama_cpp.llama_init_from_model(backend.model, params)
        if not self._context:
            raise KitError(
                f"llama.cpp has no memory for {sequences} sequences of {tokens} tokens: "
                f"{' '.join(last_errors)}",
                "Set a smaller context_tokens, max_num_seqs or max_new_tokens.",
            )
        if backend.adapter_enabled:
            adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(backend.adapter)
            llama_cpp.llama_set_adapters_lora(self._context, adapters, 1, (ctypes.c_float * 1)(1))
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._batch = llama_cpp.llama_batch_init(backend.batch_tokens, 0, 1)

    def reuse(self, sequence: int, ids: Sequence[int]) -> int:
        """Make a sequence hold the longest beginning of `ids` that any sequence has cached.

        Whatever else the sequence held is dropped.

        Returns:
            The beginning's length in tokens; 0 where the cache cannot be cut, which is noted.
        """
        lengths = [common_prefix_len(cached, ids) for cached in self.cached]
        source = int(np.argmax(lengths))
        length = lengths[sequence]
        if lengths[source] >= length + MIN_COPY_TOKENS:
            length = lengths[source]
            self.cut(sequence, 0)
            llama_cpp.llama_memory_seq_cp(self._memory, source, sequence, -1, -1)
            self.cached[sequence] = self.cached[source].copy()
        if length < len(self.cached[sequence]):
            try:
                self.cut(sequence, length)
            except UncuttableError:
                self.cut(sequence, 0)
        return len(self.cached[sequence])

    def cut(self, sequence: int, length: int) -> None:
        """Drop a sequence's tokens from `length` on; UncuttableError: not all others are left."""
        del self.cached[sequence][length:]
        llama_cpp.llama_memory_seq_rm(self._memory, sequence, length, -1)
        self._check(sequence, length)

    def branch(self, sequence: int, length: int) -> None:
        """Make an empty sequence share the first tokens of sequence 0; UncuttableError: as `cut`.

        For a unified cache only: it copies nothing.
        """
        self.cached[sequence] = self.cached[0][:length]
        llama_cpp.llama_memory_seq_cp(self._memory, 0, sequence, 0, length)
        self._check(sequence, length)

    def _check(self, sequence: int, length: int) -> None:
        """Raise UncuttableError, and note it, unless a sequence has exactly its first tokens."""
        first = llama_cpp.llama_memory_seq_pos_min(self._memory, sequence)
        last = llama_cpp.llama_memory_seq_pos_max(self._memory, sequence)
        # both are -1 in an empty sequence
        if last != length - 1 or first != min(last, 0):
            if UNCUTTABLE not in self._backend.notes:
                self._backend.notes.append(UNCUTTABLE)
            raise UncuttableError

    def prefill(
        self, sequence: int, ids: Sequence[int], wanted: Collection[int]
    ) -> Iterator[np.ndarray]:
        """Append what of `ids` a sequence does not hold; yields logits (V,) at the wanted indices.

        Each is valid until the next is taken.
        """
        start = len(self.cached[sequence])
        while start < len(ids):
            end = min(start + self._backend.batch_tokens, len(ids))
            # no single token is left over: see GgufSession
            if end == len(ids) - 1:
                end -= 1
            chunk = range(start, end)
            yield from self.decode([BatchToken(sequence, ids[i], i in wanted) for i in chunk])
            start = end

    def decode(self, tokens: Sequence[BatchToken]) -> list[np.ndarray]:
        """Append tokens, at most the backend's `batch_tokens`, in one pass.

        Returns:
            The logits (V,) after each wanted token, valid until the next pass.
        """
        n_threads = self._backend.threads.now()
        llama_cpp.llama_set_n_threads(self._context, n_threads, n_threads)
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            cached = self.cached[token.sequence]
            batch.token[i] = token.id
            batch.pos[i] = len(cached)
            batch.logits[i] = token.wanted
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = token.sequence
            cached.append(token.id)
        status = llama_cpp.llama_decode(self._context, batch)
        if status:
            raise KitError(
                f"llama.cpp cannot evaluate {len(cached)} tokens (status {status}).",
                "Set judge.limit_tokens or a smaller context_tokens.",
            )
        rows = []
        for i, token in enumerate(tokens):
            if token.wanted:
                pointer = llama_cpp.llama_get_logits_ith(self._context, i)
                rows.append(np.ctypeslib.as_array(pointer, (self._backend.tokenizer.size,)))
        return rows

    def close(self) -> None:
        """Free the memory."""
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(self._context)


class GgufBackend:
    """A GGUF model; see kit.backends.base.Backend.

    Args:
        engine: names the model and the limits.
        adapter: a GGUF LoRA's file; `adapter_enabled` says whether new contexts apply it.

    Raises:
        KitError: no llama-cpp-python, no such file, or a file that llama.cpp cannot read.
    """

    def __init__(self, engine: ModelConfig, adapter: str | None = None) -> None:
        path = gguf_file(engine.model)
        self.engine = engine
        self.name = slug(engine.model)
        self.notes: list[str] = []
        self.threads = Threads(engine.n_threads)
        self.model = load(path, engine.n_gpu_layers)
        self.on_card = bool(engine.n_gpu_layers) and llama_cpp.llama_supports_gpu_offload()
        self.batch_tokens = CARD_BATCH_TOKENS if self.on_card else BATCH_TOKENS
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
        self.adapter_enabled = adapter is not None
        if adapter:
            # freed with the model
            self.adapter = llama_cpp.llama_adapter_lora_init(self.model, adapter.encode())
            if not self.adapter:
                raise KitError(
                    f"llama.cpp cannot load {adapter} on {path.name}: {' '.join(last_errors)}",
                    "Name the GGUF of the model that the adapter was trained on.",
                )

    def generate(self, requests: Sequence[Request]) -> Iterator[Generation]:
        """See kit/backends/gguf_generate.py."""
        from kit.backends.gguf_generate import generate

        return generate(self, requests)

    def session(self, uncached: bool = False) -> GgufSession:
        """Open a judging session; uncached=True evaluates every prompt from its first token."""
        return GgufSession(self, uncached)

    @cached_property
    def cache_error(self) -> float:
        """See kit.backends.base.Backend; measured once, by random prompts that branch.

        Weights in 16 bits give the same logits, up to rounding, whatever is evaluated together.
        Quantized ones do not: llama.cpp takes other kernels for another number of tokens.
        """
        rounding = ROUNDING_NATS.get(llama_cpp.llama_model_ftype(self.model))
        if rounding and not self.flash_attention:
            return rounding
        length = min(CHECK_TOKENS, self.context_tokens - 6)
        requests = check_requests(self.tokenizer.size, length)
        scores = []
        for uncached in (True, False):
            with closing(self.session(uncached)) as session:
                scores.append(np.asarray(session.score(requests)))
        moves = scores[1] - scores[0]
        # of a log-odds: between any two candidates
        move = float((moves.max(-1) - moves.min(-1)).max())
        self.notes.append(
            f"judging cache: it moves margins by up to {move:.2g}; verdicts closer to the "
            "threshold are asked again without it"
        )
        return move

    def close(self) -> None:
        """Free the weights; a second call does nothing."""
        if self.model is not None:
            llama_cpp.llama_model_free(self.model)
            self.model = None


class GgufSession(TrunkSession):
    """Sequence 0 holds the trunk; each tail has a sequence that shares the trunk's beginning.

    A tail's cells lie after the trunk's, not where they would lie alone: sums run in another order,
    which moves margins by up to a hundredth with weights in 16 bits. `cache_error` has more.

    Args:
        backend: the model.
        uncached: evaluate every prompt from its first token. It becomes true, and a note says so,
            where the cache cannot be cut.
    """

    def __init__(self, backend: GgufBackend, uncached: bool = False) -> None:
        super().__init__(backend.batch_tokens - 1, uncached)
        self.backend = backend
        self._context: Any = None

    def score(self, requests: Sequence[ScoreRequest]) -> list[Logprobs]:
        """Read log-probabilities; KitError: a prompt is longer than the model's context."""
        self._make_room(max(len(request.ids) for request in requests))
        before = replace(self.cost)
        try:
            return super().score(requests)
        except UncuttableError:
            self.cost = before
            self.uncached = True
            return super().score(requests)

    def close(self) -> None:
        """Free the context."""
        if self._context is not None:
            self._context.close()
            self._context = None
            self.trunk = self.trunk[:0]

    def _score_uncached(self, request: ScoreRequest) -> Logprobs:
        self._context.cut(0, 0)
        rows = self._context.prefill(0, request.ids, dict(request.reads))
        return [_logprobs(*row) for row in zip(rows, request.reads, strict=True)]

    def _cut_cache(self, tokens: int) -> None:
        self._context.cut(0, tokens)

    def _extend(self, piece: Tail) -> Logprobs:
        return self._decode([piece], [0])[0]

    def _score_tails(self, tails: Sequence[Tail]) -> list[Logprobs]:
        sequences = range(1, len(tails) + 1)
        for sequence, tail in zip(sequences, tails, strict=True):
            self._context.branch(sequence, tail.cut)
        results = self._decode(tails, sequences)
        for sequence in sequences:
            self._context.cut(sequence, 0)
        return results

    def _decode(self, tails: Sequence[Tail], sequences: Sequence[int]) -> list[Logprobs]:
        """Evaluate tails in one pass, each after what its sequence holds."""
        tokens = []
        for sequence, tail in zip(sequences, tails, strict=True):
            wanted = dict(tail.reads)
            tokens += [BatchToken(sequence, id, i in wanted) for i, id in enumerate(tail.ids)]
        rows = iter(self._context.decode(tokens))
        results = []
        for tail in tails:
            results.append([_logprobs(next(rows), read) for read in tail.reads])
        return results

    def _make_room(self, tokens: int) -> None:
        """Have a context of so many tokens and one pass of tails; a larger one begins empty."""
        backend = self.backend
        tokens += backend.batch_tokens
        if self._context is None or self._context.tokens < tokens:
            self.close()
            most_tokens = backend.context_tokens + backend.batch_tokens
            room_tokens = min(max(2 * tokens, MIN_ROOM_TOKENS), most_tokens)
            self._context = Context(backend, room_tokens, 1 + MAX_TAILS, unified=True)


def _logprobs(logits: np.ndarray, read: tuple[int, Ids]) -> list[float]:
    """Log-probabilities of a read's candidates from logits (V,)."""
    _, candidates = read
    shifted = logits - logits.max().astype(np.float64)
    return (shifted[list(candidates)] - np.log(np.exp(shifted).sum())).tolist()
