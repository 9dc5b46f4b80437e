"""One training step of transformers as a contestant. Arguments: a checkpoint folder, a precision of the products."""

import resource
import sys
import time

import torch
import transformers
from contest import serve

transformers.logging.set_verbosity_error()
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).train()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=True)


def step(batch: int, length: int) -> float:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (batch, length), generator=generator)
    began = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=sys.argv[2] == "bfloat16"):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
    optimizer.step()
    optimizer.zero_grad()
    loss.item()
    return batch * length / (time.perf_counter() - began)


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


serve({"version": f"transformers {transformers.__version__}"}, {"step": step, "peak": peak})
