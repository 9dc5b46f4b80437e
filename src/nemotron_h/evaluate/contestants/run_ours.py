"""This project as a contestant: what its engine does, as whoever serves with it has it. Arguments: a checkpoint folder,
a precision, that of keys and values where it is another."""

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
# drafts off: of random weights the text goes round, which no text does
folder, precision, keys_values = [*sys.argv[1:], "auto"][:3]
language = load(folder, precision=precision, keys_values=keys_values, engine_config=EngineConfig(drafts="off"))
model = language.model


def drawn(count: int, length: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (count, length), generator=generator).tolist()  # type: ignore[no-any-return]


def unseen(count: int, length: int) -> list[list[int]]:
    """Prompts that nobody has read, for what was read is not read again."""
    return drawn(count, length, time.time_ns())


def prefill(length: int) -> float:
    """Tokens per second of a prompt, its first new token included."""
    return length * serving(1, length, 1)


def decode(length: int, after: int) -> float:
    """Tokens per second, one a step, after a prompt that is not counted, and is read once."""
    (answer,) = language.engine.add(language.request(drawn(1, after, 0)[0], max_tokens=length + 2, ignore_end=True))
    while len(answer.ids) < 2:  # a step that has nothing to read gives the first two
        language.engine.step()
    had, began = len(answer.ids), time.perf_counter()
    language.engine.run()
    return (len(answer.ids) - had) / (time.perf_counter() - began)


def serving(count: int, length: int, new: int) -> float:
    """New tokens per second of so many requests that come at once, their prompts counted in the time."""
    prompts, began = unseen(count, length), time.perf_counter()
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
    naive.next_logits(model, drawn(1, length, 0)[0], model.empty_state(1))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


serve(
    {"version": f"nemotron-h {nemotron_h.__version__}"},
    {"prefill": prefill, "decode": decode, "serving": serving, "loss": loss, "peak": peak},
)
