import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_h.errors import ShapeError
from nemotron_h.ops import loss
from nemotron_h.ops.loss import IGNORED, cross_entropy, cross_entropy_definition
from tests.compare import assert_near, double, seeded

ROWS, VOCAB, WIDTH = 37, 53, 12


@pytest.fixture(params=["at once", "in pieces"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small pieces of rows and slices of the vocabulary, neither of which divides the sizes."""
    if request.param == "in pieces":
        monkeypatch.setattr(loss, "PIECE_BYTES", 4 * VOCAB * 5)
        monkeypatch.setattr(loss, "SLICE_WEIGHTS", 10 * WIDTH + 3)


def random(dtype: torch.dtype = torch.float32, weight_dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    generator = seeded(0)
    hidden = torch.randn(ROWS, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, WIDTH, generator=generator).to(weight_dtype).requires_grad_()
    targets = torch.randint(VOCAB, (ROWS,), generator=generator)
    targets[[0, 5, ROWS - 1]] = IGNORED
    return hidden, weight, targets


@pytest.mark.usefixtures("pieces", "form")
def test_value_and_gradients_equal_the_definition() -> None:
    hidden, weight, targets = random()
    exact = [double(hidden), double(weight)]
    want = cross_entropy_definition(*exact, targets)
    got = cross_entropy(hidden, weight, targets)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(want.item(), rel=1e-6)
    gradients = torch.autograd.grad(got * 0.3, (hidden, weight))
    wanted = torch.autograd.grad(want * 0.3, exact)
    for name, value, exact_value in zip(("hidden", "weight"), gradients, wanted, strict=True):
        assert value.dtype == torch.float32
        assert_near(value, exact_value, 2e-6, name)
    assert (gradients[0][targets == IGNORED] == 0).all()


def test_the_definition_is_the_formula() -> None:
    hidden, weight, targets = (t.detach() for t in random())
    total = 0.0
    for row, target in zip(hidden.double(), targets.tolist(), strict=True):
        if target != IGNORED:
            logits = [float((row * column).sum()) for column in weight.double()]
            total += float(torch.tensor(logits, dtype=torch.float64).exp().sum().log()) - logits[target]
    assert cross_entropy_definition(hidden.double(), weight.double(), targets).item() == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("pieces", "form")
def test_bfloat16_products(weight_dtype: torch.dtype) -> None:
    hidden, weight, targets = random(torch.bfloat16, weight_dtype)
    exact = [double(hidden), double(weight.bfloat16())]  # the head is rounded to the dtype of the products
    want = cross_entropy_definition(*exact, targets)
    got = cross_entropy(hidden, weight, targets)
    assert got.item() == pytest.approx(want.item(), rel=2**-9)  # logits of eight bits, errors that average out
    gradients = torch.autograd.grad(got, (hidden, weight))
    for leaf, value, exact_value in zip((hidden, weight), gradients, torch.autograd.grad(want, exact), strict=True):
        assert value.dtype == leaf.dtype
        assert_near(value, exact_value, 2**-6)  # softmax of logits up to 10 that have eight bits


@pytest.mark.usefixtures("pieces", "form")
def test_a_tied_head_gets_both_gradients() -> None:
    _, weight, targets = random()
    tokens = torch.randint(VOCAB, (ROWS,), generator=seeded(1))
    got = torch.autograd.grad(cross_entropy(torch.tanh(F.embedding(tokens, weight)), weight, targets), weight)[0]
    exact = double(weight)
    hidden = torch.tanh(F.embedding(tokens, exact))
    want = torch.autograd.grad(cross_entropy_definition(hidden, exact, targets), exact)[0]
    assert_near(got, want, 2e-6)


@pytest.mark.usefixtures("pieces", "form")
def test_only_one_gradient_wanted() -> None:
    hidden, weight, targets = random()
    for frozen in (hidden, weight):
        frozen.requires_grad_(False)
        (live,) = {hidden, weight} - {frozen}
        got = torch.autograd.grad(cross_entropy(hidden, weight, targets), live)[0]
        assert_near(got, torch.autograd.grad(cross_entropy_definition(hidden, weight, targets), live)[0], 2e-6)
        frozen.requires_grad_()
    with torch.no_grad():
        assert not cross_entropy(hidden, weight, targets).requires_grad


@pytest.mark.usefixtures("pieces", "form")
def test_nothing_to_learn_costs_nothing() -> None:
    hidden, weight, targets = random()
    value = cross_entropy(hidden, weight, torch.full_like(targets, IGNORED))
    assert value.item() == 0
    for gradient in torch.autograd.grad(value, (hidden, weight)):
        assert (gradient == 0).all()


@pytest.mark.usefixtures("pieces", "form")
def test_large_logits_stay_finite() -> None:
    hidden, weight, targets = random()
    exact = [double(hidden), double(weight)]
    got = cross_entropy(hidden * 1e4, weight, targets)
    want = cross_entropy_definition(exact[0] * 1e4, exact[1], targets)
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
    for value, exact_value in zip(
        torch.autograd.grad(got, (hidden, weight)), torch.autograd.grad(want, exact), strict=True
    ):
        assert_near(value, exact_value, 1e-3)  # logits of 10,000s have an absolute rounding near 0.005


def test_wrong_shapes_are_refused_by_name() -> None:
    hidden, weight, targets = random()
    with pytest.raises(ShapeError, match=r"^targets: must have shape"):
        cross_entropy(hidden, weight, targets[:-1])
    with pytest.raises(ShapeError, match=r"^targets: must be torch\.int64"):
        cross_entropy(hidden, weight, targets.int())
    with pytest.raises(ShapeError, match=r"^weight: must have shape"):
        cross_entropy(hidden, weight[:, :-1], targets)


@pytest.mark.parametrize("beyond", [-1, -101, None])
def test_targets_outside_the_vocabulary_are_refused(beyond: int | None) -> None:
    hidden, weight, targets = random()
    targets[1] = len(weight) if beyond is None else beyond
    with pytest.raises(
        ShapeError, match=rf"^targets: must lie in 0\.\.{len(weight) - 1}, or be -100; got {targets[1]}$"
    ):
        cross_entropy(hidden, weight, targets)


# Peak of resident memory over what is resident before, in a process of its own. The peak is set back before: compiling
# the kernels, the first time on a machine, takes more memory than they do.
MEASURE = """
import sys, torch
from nemotron_h.ops import loss
compute, tokens = getattr(loss, sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(2)
small = torch.randn(8, 256).bfloat16().requires_grad_()
compute(small, torch.randn(64, 256, requires_grad=True).to(small.dtype), torch.zeros(8, dtype=torch.int64)).backward()
hidden = torch.randn(tokens, 256).bfloat16().requires_grad_()
weight = torch.randn(131072, 256).requires_grad_()
targets = torch.randint(131072, (tokens,))
def kibibytes(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(name))

with open("/proc/self/clear_refs", "w") as peak:
    peak.write("5")
before = kibibytes("VmRSS")
compute(hidden, weight if sys.argv[1] == "cross_entropy" else weight.to(hidden.dtype), targets).backward()
gradients = hidden.grad.nbytes + weight.grad.nbytes
print((kibibytes("VmHWM") - before) * 1024 - gradients)
"""


def extra_bytes(function: str, tokens: int) -> int:
    command = [sys.executable, "-c", MEASURE, function, str(tokens)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
@pytest.mark.parametrize("tokens", [1024, pytest.param(4096, marks=pytest.mark.slow)])
def test_memory_at_the_familys_vocabulary(tokens: int) -> None:
    """All logits of 131,072 words and their gradient would be 1.07 GB at 1,024 tokens, 4.3 GB at 4,096."""
    assert extra_bytes("cross_entropy", tokens) < 600e6


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_the_measurement_sees_the_definitions_memory() -> None:
    assert extra_bytes("cross_entropy_definition", 4096) > 2e9
