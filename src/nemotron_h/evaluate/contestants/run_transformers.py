"""transformers as a contestant, in whatever environment has it. Arguments: a checkpoint folder, a precision."""

import resource
import sys
import time

import torch
import transformers
from contest import serve

transformers.logging.set_verbosity_error()
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[2])).eval()
ids = torch.randint(model.config.vocab_size, (1, 2**20), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def read(length: int) -> object:
    """The cache after a prompt, only the last logits being computed, as its own `generate` does."""
    return model(ids[:, :length], use_cache=True, logits_to_keep=1).past_key_values


def prefill(length: int) -> float:
    began = time.perf_counter()
    read(length)
    return length / (time.perf_counter() - began)


@torch.no_grad()
def decode(length: int, after: int) -> float:
    cache = read(after)
    began = time.perf_counter()
    for place in range(after, after + length):
        out = model(ids[:, place : place + 1], past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        int(out.logits[0, -1].argmax())
    return length / (time.perf_counter() - began)


def peak(length: int) -> int:
    prefill(length)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@torch.no_grad()
def serving(count: int, length: int, new: int) -> float:
    """Tokens per second that come out, of so many prompts at once: one batch, of equal lengths, without padding."""
    prompts = torch.randint(model.config.vocab_size, (count, length))
    began = time.perf_counter()
    out = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=new, min_new_tokens=new, do_sample=False
    )
    assert out.shape == (count, length + new)
    return count * new / (time.perf_counter() - began)


about = {"version": f"transformers {transformers.__version__}"}
serve(about, {"prefill": prefill, "decode": decode, "peak": peak, "serving": serving})
