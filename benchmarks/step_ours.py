"""One training step of this project as a contestant. Arguments: a checkpoint folder, a precision of the products."""

import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch
from contest import serve

import nemotron_h
from nemotron_h.checkpoint.load import load
from nemotron_h.data.batches import Batch
from nemotron_h.machine import tune_memory
from nemotron_h.training.step import next_token_loss, train_step

tune_memory()  # as the command does
model = load(Path(sys.argv[1]), dtype=torch.float32, compute_dtype=getattr(torch, sys.argv[2])).train()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=True)


def step(batch: int, length: int) -> float:
    """Tokens per second."""
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (batch, length + 1))
    documents = np.zeros((batch, length), np.int64)
    made = Batch(ids[:, :-1].copy(), ids[:, 1:].copy(), documents)
    began = time.perf_counter()
    train_step(model, [optimizer], [made], next_token_loss, clip_norm=1.0)
    return batch * length / (time.perf_counter() - began)


def peak() -> int:
    """Peak bytes of the process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


serve({"version": f"nemotron-h {nemotron_h.__version__}"}, {"step": step, "peak": peak})
