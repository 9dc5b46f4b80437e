"""The checks pass where one arithmetic holds, and each turns red where it is broken."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor

from nemotron_h.model import check as room
from nemotron_h.model import hybrid, mamba
from nemotron_h.model import linear as linears
from nemotron_h.model.check import Finding, check
from tests.model.shapes import FAMILY, model

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
    def broken(x: Tensor, weight: Tensor) -> Tensor:
        return linears.linear(x, weight) * (1 + 2**-20 * (len(x) % 64 == 4))

    monkeypatch.setattr(room, "linear", broken)
    finding = room.products(model("8b"))
    assert not finding.holds
    assert "97 x 64 at 4 rows" in finding.number


def test_logits_that_depend_on_the_cut_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(x: Tensor, weight: Tensor) -> Tensor:
        return linears.linear(x, weight) * (1 + 2**-20 * (len(x) == 4))

    monkeypatch.setattr(hybrid, "linear", broken)  # of the head
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
