"""Read a prompt once, then go on from it in several ways: a state can be copied, and a copy is exact.

python examples/fork_a_state.py
"""

import torch

from nemotron_h import PRESETS, Hybrid
from nemotron_h.model.init import initialise

model = Hybrid(PRESETS["3m"], dtype=torch.bfloat16)
initialise(model, seed=0)

prompt = torch.randint(0, 4096, (1, 200), generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    state = model.empty_state(batch=1)
    model(prompt, state)
    fork = state.select([0, 0, 0])  # three sequences with the same past

    choices = torch.tensor([[11], [12], [13]])
    together = model(choices, fork)
    alone = model(torch.cat((prompt, choices[1:2]), dim=1))[:, -1]

print("positions:", fork.positions, "bytes:", f"{fork.size_bytes:,}")
print("the second fork has the bits of its own sequence read at once:", torch.equal(together[1], alone[0]))
