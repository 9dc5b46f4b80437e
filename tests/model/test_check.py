"""The checks pass where one arithmetic holds, and each turns red where it is broken."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor

from nemotron_h.model import check as room
from nemotron_h.model import mamba
from nemotron_h.model.check import Finding, check
from nemotron_h.model.linear import Linear
from nemotron_h.ops.linear import linear
from tests.model.shapes import FAMILY, VOCAB, model

SCAN = "chunked scan against the float64 recurrence"


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.what: finding for finding in findings}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILY)
def test_every_member_passes(name: str, dtype: torch.dtype, packed: bool) -> None:
    net = deepcopy(model(name, dtype))
    if packed:
        net.pack()
    findings = list(check(net))
    assert [finding for finding in findings if not finding.holds] == []
    assert (SCAN in by_name(findings)) == (name != "t-8b")
    assert len(findings) == 4 + (name != "t-8b")


def test_products_that_depend_on_their_rows_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Linear, x: Tensor) -> Tensor:
        return linear(x, self.weight) * (1 + 2**-20 * (len(x) % 64 == 4))

    monkeypatch.setattr(Linear, "forward", broken)
    finding = room.products(model("8b"))
    assert not finding.holds
    assert "97 x 64 at 4 rows" in finding.number


def test_logits_that_depend_on_the_cut_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Linear, x: Tensor) -> Tensor:
        return linear(x, self.weight) * (1 + 2**-20 * (len(x) == 4 and len(self.weight) == VOCAB))  # the head alone

    monkeypatch.setattr(Linear, "forward", broken)
    found = by_name(list(check(model("8b"))))
    assert found[SCAN].holds
    for what in ("logits, prompt cut in pieces", "logits, one token at a time", "logits, in a batch"):
        assert not found[what].holds, what
        assert " numbers differ, by " in found[what].number


def test_a_scan_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **options: object) -> tuple[Tensor, None]:
        y, after = mamba.ssd(*arguments, **options)
        return y * 1.001, after

    monkeypatch.setattr(room, "ssd", broken)
    finding = by_name(list(check(model("8b"))))[SCAN]
    assert not finding.holds
    assert finding.number == "1.0e-03 of the largest output"
