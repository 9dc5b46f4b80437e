"""This project as a contestant: reads prompts, generates, trains. Arguments: a checkpoint folder, a precision, threads
(torch's own number without)."""

import resource
import sys
import time

import torch
import torch.nn.functional as F
from contest import serve

import nemotron_h
from nemotron_h.config.engine import EngineConfig
from nemotron_h.inference import naive
from nemotron_h.inference.load import load
from nemotron_h.machine import tune_memory

tune_memory()  # as the command does
for threads in sys.argv[3:]:
    torch.set_num_threads(int(threads))
# drafts off: of random weights the text goes round, which no text does
language = load(sys.argv[1], precision=sys.argv[2], engine_config=EngineConfig(drafts="off"))
model = language.model


def prompt(length: int) -> list[int]:
    return torch.randint(model.config.vocab_size, (length,), generator=torch.Generator().manual_seed(0)).tolist()


def prefill(length: int) -> float:
    """Tokens per second of a prompt, its last logits included."""
    ids, state, began = prompt(length), model.empty_state(1), time.perf_counter()
    naive.next_logits(model, ids, state)
    return length / (time.perf_counter() - began)


def decode(length: int, after: int) -> float:
    """Tokens per second, one at a time, from the second on, after a prompt that is not counted."""
    told = language.tokens(prompt(after), max_tokens=length + 1, ignore_end=True)
    next(told)
    began = time.perf_counter()
    count = sum(1 for _ in told)
    return count / (time.perf_counter() - began)


def serving(count: int, length: int, new: int) -> float:
    """New tokens per second of so many requests that come at once, prompts that nobody has seen counted in the time."""
    generator = torch.Generator().manual_seed(time.time_ns())
    prompts = torch.randint(model.config.vocab_size, (count, length), generator=generator).tolist()
    began = time.perf_counter()
    for prompt in prompts:
        language.engine.add(language.request(prompt, max_tokens=new, ignore_end=True))
    language.engine.run()
    return count * new / (time.perf_counter() - began)


@torch.no_grad()
def loss(windows: list[list[int]]) -> float:
    """Nats per token, of windows of one length, after the first of each."""
    tokens = torch.tensor(windows)
    of_each = [F.cross_entropy(model(ids[None])[0, :-1], ids[1:]).item() for ids in tokens]
    return sum(of_each) / len(of_each)


def peak(length: int) -> int:
    """Peak bytes of the process after a prompt of that length."""
    prefill(length)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


serve(
    {"version": f"nemotron-h {nemotron_h.__version__}"},
    {"prefill": prefill, "decode": decode, "serving": serving, "loss": loss, "peak": peak},
)
