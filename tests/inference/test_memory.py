"""What loading and reading take of private memory: files that are mapped are not counted, they can be dropped."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import json, os, sys, threading, time
from pathlib import Path
import torch
from nemotron_h.inference import naive
from nemotron_h.inference.load import load

def private():
    fields = dict(line.split(":") for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    return 1024 * (int(fields["Private_Dirty"].split()[0]) + int(fields["Private_Clean"].split()[0])) - mapped()

def mapped():
    # pages of the weights' file that only this process maps count as private and clean
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0] and ":" not in line.split(" ")[0]:
            inside = line.endswith(".safetensors")
        elif inside and line.startswith("Private_Clean"):
            total += 1024 * int(line.split()[1])
    return total

torch.ones(100) @ torch.ones(100)
before, peak, done = private(), 0, threading.Event()
def watch():
    global peak
    while not done.is_set():
        peak = max(peak, private())
        time.sleep(0.005)
thread = threading.Thread(target=watch)
thread.start()
model = load(sys.argv[1], precision=sys.argv[2]).model
done.set()
thread.join()
weights = sum(p.numel() * p.element_size() for p in model.parameters())
print(json.dumps({"peak": peak - before, "weights": weights}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells what is private")
@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_loading_takes_under_a_fifth_more_than_the_weights(tmp_path: Path, precision: str) -> None:
    import torch

    from nemotron_h import PRESETS, Hybrid, save
    from nemotron_h.model.init import initialise

    model = Hybrid(PRESETS["256m"], dtype=torch.bfloat16)
    initialise(model, seed=0)
    save(model, tmp_path / "model")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "model"), precision], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    assert found["peak"] <= 1.2 * found["weights"], found
