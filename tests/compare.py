"""How far a result is from its definition, in units of the definition's largest value."""

import torch
from torch import Tensor


def distance(got: Tensor, want: Tensor) -> float:
    """The largest difference over the largest value wanted. What is not finite is infinitely far."""
    assert got.shape == want.shape, (got.shape, want.shape)
    if not got.isfinite().all():
        return float("inf")
    scale = want.abs().max().item() if want.numel() else 0.0
    return (got.double() - want.double()).abs().max().item() / (scale or 1.0) if want.numel() else 0.0


def assert_near(got: Tensor, want: Tensor, fraction: float, what: str = "result") -> None:
    far = distance(got, want)
    assert far <= fraction, f"{what}: {far:.2e} of the largest value away, allowed {fraction:.0e}"


def double(tensor: Tensor) -> Tensor:
    """A float64 leaf of the same values, for the definition's gradients."""
    return tensor.detach().double().requires_grad_()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
