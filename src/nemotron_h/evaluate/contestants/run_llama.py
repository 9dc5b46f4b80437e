"""llama.cpp as a contestant, through llama-cpp-python. Arguments: a GGUF file, threads."""

import importlib.metadata
import sys
import time
from collections.abc import Sequence

import llama_cpp as api
import numpy as np
from contest import serve

PORTION = 2048  # tokens handed over at a time; it cuts them into its own portions of 512


@api.llama_log_callback
def silent(level: int, text: bytes, data: object) -> None:
    """It logs hundreds of lines."""


api.llama_log_set(silent, None)
api.llama_backend_init()
model = api.llama_model_load_from_file(sys.argv[1].encode(), api.llama_model_default_params())
if model is None:
    raise SystemExit(f"{sys.argv[1]}: llama.cpp cannot read it")
threads = int(sys.argv[2])
vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
ids = np.random.default_rng(0).integers(vocab, size=2**20).tolist()
Row = tuple[int, int, int, bool]  # token, its position, its sequence, whether its logits are wanted


class Context:
    """Room for so many sequences of so many tokens, and for no other ones at the same time."""

    def __init__(self, sequences: int, tokens: int) -> None:
        settings = api.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max = sequences * tokens, sequences
        settings.n_batch = max(PORTION, sequences)
        settings.n_threads = settings.n_threads_batch = threads
        self.context = api.llama_init_from_model(model, settings)
        if self.context is None:
            raise SystemExit(f"llama.cpp makes no room for {sequences} times {tokens:,} tokens")
        self.batch = api.llama_batch_init(settings.n_batch, 0, 1)

    def read(self, rows: Sequence[Row]) -> None:
        for first in range(0, len(rows), PORTION):
            some = rows[first : first + PORTION]
            self.batch.n_tokens = len(some)
            for place, (token, position, sequence, wanted) in enumerate(some):
                self.batch.token[place], self.batch.pos[place] = token, position
                self.batch.n_seq_id[place], self.batch.logits[place] = 1, wanted
                self.batch.seq_id[place][0] = sequence
            if api.llama_decode(self.context, self.batch):
                raise SystemExit("llama.cpp could not read a batch")
            api.llama_synchronize(self.context)

    def clear(self) -> None:
        api.llama_memory_clear(api.llama_get_memory(self.context), True)

    def close(self) -> None:
        api.llama_batch_free(self.batch)
        api.llama_free(self.context)


kept: dict[tuple[int, int], Context] = {}  # the last one


def room(sequences: int, tokens: int) -> Context:
    """An empty context, the last one's where it is as large: its buffers have been written to before."""
    if (sequences, tokens) not in kept:
        while kept:
            kept.popitem()[1].close()
        kept[sequences, tokens] = Context(sequences, tokens)
    context = kept[sequences, tokens]
    context.clear()
    return context


def prompt_of(length: int, sequence: int = 0) -> list[Row]:
    return [(ids[place], place, sequence, place == length - 1) for place in range(length)]


def prefill(length: int) -> float:
    """Tokens per second of a prompt, its last logits included."""
    context = room(1, length)
    began = time.perf_counter()
    context.read(prompt_of(length))
    return length / (time.perf_counter() - began)


def decode(length: int, after: int) -> float:
    """Tokens per second, one at a time, after a prompt that is not counted."""
    context = room(1, after + length)
    context.read(prompt_of(after))
    began = time.perf_counter()
    for place in range(after, after + length):
        context.read([(ids[place], place, 0, True)])
    return length / (time.perf_counter() - began)


def serving(count: int, length: int, new: int) -> float:
    """New tokens per second of so many requests that come at once, greedy, their prompts counted in the time."""
    context = room(count, length + new)
    began = time.perf_counter()
    rows = [row for sequence in range(count) for row in prompt_of(length, sequence)]
    context.read(rows)
    for place in range(length, length + new - 1):
        context.read([(ids[place], place, sequence, True) for sequence in range(count)])
    return count * new / (time.perf_counter() - began)


def loss(windows: list[list[int]]) -> float:
    """Nats per token, of windows of one length, after the first of each. It keeps the logits of one batch."""
    if len(windows[0]) > PORTION:
        raise SystemExit(f"windows: must be of {PORTION} tokens or fewer; got {len(windows[0])}")
    nats = []
    for tokens in windows:
        context = room(1, len(tokens))
        context.read([(token, place, 0, True) for place, token in enumerate(tokens)])
        logits = np.ctypeslib.as_array(api.llama_get_logits(context.context), (len(tokens), vocab))[:-1]
        top = logits.max(1)
        whole = top + np.log(np.exp(logits - top[:, None], dtype=np.float64).sum(1))
        nats.append((whole - logits[np.arange(len(tokens) - 1), tokens[1:]]).mean())
    return float(np.mean(nats))


about = {"version": f"llama-cpp-python {importlib.metadata.version('llama-cpp-python')}"}
serve(about, {"prefill": prefill, "decode": decode, "serving": serving, "loss": loss})
