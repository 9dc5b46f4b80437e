import pytest

from nemotron_h.ops import activation, attention, conv, loss, norm, rows, ssd, steps
from tests.kernels import need_kernels


@pytest.fixture(params=["kernel", "torch"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both forms of every op that has two: the kernel, and the torch form that runs where no kernel can."""
    if request.param == "kernel":
        need_kernels()
        return "kernel"
    with_kernels = [
        room for room in (activation, attention, conv, loss, norm, rows, ssd, steps) if "runs" in vars(room)
    ]
    assert with_kernels
    for room in with_kernels:
        monkeypatch.setattr(room, "runs", lambda *tensors: False)
    return "torch"
