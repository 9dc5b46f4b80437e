"""One step: the mean over targets, whatever the passes it takes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nemotron_h.config.model import ModelConfig
from nemotron_h.config.train import TrainConfig
from nemotron_h.data.batches import IGNORED, Batch, Batches
from nemotron_h.data.shards import Shard
from nemotron_h.errors import DataError
from nemotron_h.model.hybrid import Hybrid
from nemotron_h.model.init import initialise
from nemotron_h.training.step import next_token_loss, total_loss, train_step


@pytest.fixture
def model(model_config: ModelConfig) -> Hybrid:
    model = Hybrid(model_config)
    initialise(model, 1)
    return model


def batch_of(tokens: list[int], targets: list[int] | None = None) -> Batch:
    inputs = np.array([tokens])
    wanted = np.array([targets]) if targets is not None else np.roll(inputs, -1, axis=1)
    return Batch(inputs, wanted, np.zeros_like(inputs))


def test_two_passes_of_half_a_batch_are_one(shard: Shard, model_config: ModelConfig, settings: TrainConfig) -> None:
    """SGD at rate 1 shows the gradients themselves."""
    weights, results = [], []
    for size, places in ((4, [8]), (2, [8, 10])):
        model = Hybrid(model_config)
        initialise(model, 1)
        batches = Batches(shard, settings.sequence_length, size, settings.seed)
        sgd = torch.optim.SGD(model.parameters(), lr=1.0)
        results.append(train_step(model, [sgd], map(batches.at, places), next_token_loss, clip_norm=1e9))
        weights.append({name: p.detach() for name, p in model.named_parameters()})
    one, two = results
    assert one.targets == two.targets
    assert two.loss == pytest.approx(one.loss, rel=1e-6)
    assert two.gradient_norm == pytest.approx(one.gradient_norm, rel=1e-5)
    for name, wanted in weights[0].items():
        # float32 sums in another order
        torch.testing.assert_close(weights[1][name], wanted, rtol=1e-5, atol=1e-6)


def test_the_loss_is_the_definition(model: Hybrid) -> None:
    tokens = torch.randint(0, 64, (1, 21), generator=torch.Generator().manual_seed(2))
    targets = torch.roll(tokens, -1, 1)
    targets[0, [3, 20]] = IGNORED
    with torch.no_grad():
        wanted = F.cross_entropy(model(tokens)[0].double(), targets[0], reduction="sum", ignore_index=IGNORED)
        nats, count = total_loss(model, [batch_of(tokens[0].tolist(), targets[0].tolist())] * 2, next_token_loss)
    assert count == 2 * 19
    assert nats == pytest.approx(2 * wanted.item(), rel=1e-6)


def test_the_gradient_is_clipped_to_its_norm(model: Hybrid) -> None:
    before = [p.detach().clone() for p in model.parameters()]
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    result = train_step(model, [sgd], [batch_of(list(range(40)))], next_token_loss, clip_norm=0.5)
    moved = torch.cat([(p.detach() - old).flatten() for p, old in zip(model.parameters(), before, strict=True)])
    assert result.gradient_norm > 0.5  # said before clipping
    assert moved.norm().item() == pytest.approx(0.5, rel=1e-4)
    assert all(p.grad is None for p in model.parameters())


def test_a_loss_that_is_not_finite_is_refused_and_moves_nothing(model: Hybrid) -> None:
    with torch.no_grad():
        model.backbone.norm_f.weight[0] = torch.nan
    before = [p.detach().clone() for p in model.parameters()]
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    with pytest.raises(DataError, match=r"loss: must be finite; got nan .*lower the learning rate"):
        train_step(model, [sgd], [batch_of([1, 2, 3])], next_token_loss, clip_norm=1.0)
    assert all(torch.equal(p, old) or old.isnan().any() for p, old in zip(model.parameters(), before, strict=True))


def test_a_batch_without_targets_is_refused(model: Hybrid) -> None:
    with pytest.raises(DataError, match="batch: must hold at least one target"):
        train_step(model, [], [batch_of([1, 2], [IGNORED, IGNORED])], next_token_loss, clip_norm=1.0)


@pytest.mark.parametrize(("tokens", "got"), [([1, 64, 2], 64), ([1, -5, 2], -5)])
def test_tokens_beyond_the_vocabulary_are_refused(model: Hybrid, tokens: list[int], got: int) -> None:
    with pytest.raises(DataError, match=rf"tokens: must lie in 0..63; got {got}"):
        next_token_loss(model, batch_of(tokens))


def test_weights_that_share_a_tensor(model_config: ModelConfig) -> None:
    """A tied model's one matrix gets the gradients of both its uses."""
    model = Hybrid(replace(model_config, tied_embeddings=True))
    initialise(model, 1)
    batch = batch_of(list(range(1, 30)))
    loss, _ = next_token_loss(model, batch)
    loss.backward()
    weight = model.head_weight
    wanted = weight.grad.clone()
    tokens, targets = torch.from_numpy(batch.inputs), torch.from_numpy(batch.targets)
    weight.grad = None
    F.cross_entropy(model(tokens)[0], targets[0], reduction="sum").backward()
    torch.testing.assert_close(wanted, weight.grad, rtol=1e-4, atol=1e-5)
