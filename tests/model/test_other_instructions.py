"""The model as a laptop without AVX-512 runs it: the same machine told to use AVX2 alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "NUMBA_CPU_FEATURES": "+fma,+avx2",
    "NUMBA_CPU_NAME": "haswell",
}
PROGRAM = """
import json, sys, warnings
import torch
from nemotron_h.inference.load import load
from nemotron_h.model.check import check

with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    chosen = load(sys.argv[1])
    named = load(sys.argv[1], precision="bfloat16")
warnings.simplefilter("ignore")  # that there is no tokenizer
found = {str(one.model.compute_dtype): one.model for one in (chosen, named)}
found |= {name: load(sys.argv[1], precision=name, keys_values="int8").model for name in ("int8", "int4")}
prompt = torch.randint(97, (150,), generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    wide = load(sys.argv[1], precision="float32").model(prompt[None])[0]
    eight = found["int8"](prompt[None])[0]
print(json.dumps({
    "chosen": str(chosen.model.compute_dtype),
    "said": [str(one.message) for one in said],
    "holds": {name: [f.number for f in check(model) if not f.holds] for name, model in found.items()},
    "top": [[row.argmax().item(), (row.topk(2).values[0] - row.topk(2).values[1]).item()] for row in wide],
    "eight": [row.argmax().item() for row in eight],
}))
"""


def run(folder: Path, environment: dict[str, str]) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder)],
        capture_output=True, text=True, check=False, env=os.environ | environment, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_avx2_alone(tmp_path: Path) -> None:
    from nemotron_h.checkpoint.save import save
    from tests.model.shapes import model

    folder = tmp_path / "model"
    save(model("8b"), folder)
    here, there = run(folder, {}), run(folder, AVX2)
    assert there["chosen"] == here["chosen"] == "torch.bfloat16"
    assert there["said"] == []
    assert there["holds"] == {name: [] for name in there["holds"]}
    assert here["holds"] == {name: [] for name in here["holds"]}
    sure = 0
    for (mine, gap), (theirs, other) in zip(here["top"], there["top"], strict=True):
        if min(gap, other) > 1e-3:
            sure += 1
            assert mine == theirs
    assert sure > 100
    assert len(here["holds"]) == 3  # bfloat16, int8, int4
    same = sum(mine == theirs for mine, theirs in zip(here["eight"], there["eight"], strict=True))
    assert same > 130  # of 150: what is between the products is rounded otherwise
