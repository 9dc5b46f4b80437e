"""The whole model where numba is not installed: the torch definitions run, say so once, and keep every promise."""

import subprocess
import sys

PROGRAM = """
import sys, warnings
sys.modules["numba"] = None  # as if it were not installed
import torch
from nemotron_h.config.presets import PRESETS
from nemotron_h.inference.quantize import quantize
from nemotron_h.model.hybrid import Hybrid
from nemotron_h.model.init import initialise
from nemotron_h.ops.loss import cross_entropy

with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    model = Hybrid(PRESETS["3m"], dtype=torch.bfloat16)
    initialise(model, 0)
    tokens = torch.randint(4096, (1, 70), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole, state = model(tokens), model.empty_state(1)
        cut = torch.cat([model(piece, state) for piece in (tokens[:, :60], *tokens[:, 60:].split(1, dim=1))], dim=1)
        integers = Hybrid(PRESETS["3m"], dtype=torch.bfloat16)
        initialise(integers, 0)
        quantize(integers, "int4", tokens)
        integers.row_multiple, integers.keys_values = 1, torch.int8
        some, state = integers(tokens[:, :40]), integers.empty_state(1)
        parts = torch.cat([integers(piece, state) for piece in (tokens[:, :30], *tokens[:, 30:40].split(1, 1))], dim=1)
    segments = model.segments(tokens)
    loss = cross_entropy(model.hidden(tokens.flatten(), segments)[:70], model.head_weight, tokens.flatten())
    loss.backward()
print(torch.equal(whole, cut), torch.equal(some, parts))
print(all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters()))
print(len([w for w in said if "numba is not installed" in str(w.message)]))
"""


def test_bits_do_not_depend_on_cuts_and_gradients_reach_every_weight() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True", "True", "1"]
