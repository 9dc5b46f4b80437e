"""What benchmarks/where.py tells of a model: each kind of work that it has, with its share of the time."""

from pathlib import Path

import pytest
import torch

from nemotron_h.checkpoint.save import save
from tests.benchmarks import script
from tests.kernels import need_kernels
from tests.model import shapes

need_kernels()
script("results")
where = script("where")


@pytest.mark.filterwarnings("ignore:.*has no tokenizer")
@pytest.mark.parametrize("precision", ["bfloat16", "int4"])
def test_each_kind_of_work_has_its_share(tmp_path: Path, precision: str) -> None:
    save(shapes.weighted("8b", torch.bfloat16), tmp_path / "model")
    rows = where.measured(tmp_path / "model", precision, 70, 1)
    prompt = f"{precision}, prompt of 70 tokens"
    steps = [f"{precision}, token after about 70", f"{precision}, tokens of 16 after about 512 each"]
    assert [one.what for one in rows if one.unit == "ms"] == [prompt, *steps]
    shares = {one.what: one.ours for one in rows if one.unit == "% of it"}
    assert all(share > 0 for share in shares.values())
    assert sum(share for what, share in shares.items() if what.startswith(prompt)) == pytest.approx(100)  # none is lost
    for what in (prompt, *steps):
        kinds = {name.removeprefix(f"{what}: ") for name in shares if name.startswith(what)}
        assert kinds >= {"products", "scan", "attention", "convolution", "norms"}
        assert ("rounding of rows" in kinds) == (precision == "int4")
