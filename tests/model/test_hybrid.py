"""The whole model: against its float64 definition, documents packed or alone, and the parameters of every preset."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_h.config import cost
from nemotron_h.config.presets import PRESETS
from nemotron_h.errors import ShapeError
from nemotron_h.model.hybrid import Hybrid
from nemotron_h.model.init import initialise
from nemotron_h.ops.segments import Segments
from tests.compare import assert_near
from tests.model.reference import float64_weights, reference_logits
from tests.model.shapes import FAMILY, VOCAB, model, random_tokens

LENGTHS = [1, 3, 70, 131]  # of the documents of one packed row
# float32 rounding through a dozen products; the attention of packed documents is then one masked call or several
ROUNDING = 5e-5


def packed(lengths: list[int], seed: int) -> tuple[Tensor, Tensor]:
    """One row of documents (1, l), and the number of each token's document."""
    tokens = random_tokens(1, sum(lengths), seed=seed)
    return tokens, torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]


def parts(values: Tensor, lengths: list[int]) -> tuple[Tensor, ...]:
    return values.split(lengths, dim=1)


@pytest.mark.parametrize("name", FAMILY)
def test_logits_and_every_gradient_equal_the_float64_definition(name: str) -> None:
    net, config = model(name), FAMILY[name]
    tokens, documents = packed(LENGTHS, seed=16)
    targets = random_tokens(sum(LENGTHS), seed=2)
    logits = net(tokens, documents=documents)[0]
    assert logits.dtype == torch.float32
    parameters = dict(net.named_parameters())
    got = torch.autograd.grad(F.cross_entropy(logits, targets), list(parameters.values()))

    weights = float64_weights(net)
    want = torch.cat([reference_logits(config, weights, part[0]) for part in parts(tokens, LENGTHS)])
    assert_near(logits.detach(), want.detach(), ROUNDING, "logits")
    wanted = torch.autograd.grad(F.cross_entropy(want, targets), list(weights.values()))
    for parameter, value, exact in zip(parameters, got, wanted, strict=True):
        # where a group of the gated norm is all small its slope is steep, and groups of 16 channels often are (torch's
        # own operators are as far there); one number a head is a sum that cancels
        few = parameter.endswith(("A_log", "dt_bias", "mixer.D"))
        assert_near(value, exact, 1e-2 if few or name == "47b" else 2e-4, parameter)
    with torch.no_grad():
        assert_near(net(tokens, documents=documents)[0], want.detach(), ROUNDING, "logits without gradients")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILY)
@torch.no_grad()
def test_packed_equals_alone_to_the_bit(name: str, dtype: torch.dtype) -> None:
    net, lengths = model(name, dtype), [1, 63, 300, 64, 5]
    tokens, documents = packed(lengths, seed=3)
    together = parts(net(tokens, documents=documents), lengths)
    for document, logits in zip(parts(tokens, lengths), together, strict=True):
        assert torch.equal(net(document), logits)
    rows = net(tokens.view(-1)[:432].view(3, 144))  # a batch of rows is documents too
    for index in range(3):
        assert torch.equal(net(tokens[:, 144 * index : 144 * (index + 1)])[0], rows[index])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILY)
@torch.no_grad()
def test_what_a_document_says_and_how_long_it_is_leaves_the_next_alone(name: str, dtype: torch.dtype) -> None:
    net, second = model(name, dtype), random_tokens(1, 90, seed=4)
    want = None
    for length, seed in ((64, 5), (64, 6), (63, 7), (1, 8), (130, 9)):
        tokens = torch.cat((random_tokens(1, length, seed=seed), second), dim=1)
        documents = torch.tensor([[7] * length + [9] * 90])
        logits = net(tokens, documents=documents)[:, length:]
        want = logits if want is None else want
        assert torch.equal(logits, want), length


@pytest.mark.parametrize("name", FAMILY)
def test_packed_gradients_are_the_sum_of_each_documents(name: str) -> None:
    net, lengths = model(name), [65, 130, 64]
    tokens, documents = packed(lengths, seed=10)
    factor = torch.randn(1, sum(lengths), VOCAB, generator=torch.Generator().manual_seed(11))
    parameters = list(net.parameters())
    together = torch.autograd.grad((net(tokens, documents=documents) * factor).sum(), parameters)
    alone = [torch.zeros_like(p) for p in parameters]
    for document, part in zip(parts(tokens, lengths), parts(factor, lengths), strict=True):
        own = torch.autograd.grad((net(document) * part).sum(), parameters)
        alone = [total + value for total, value in zip(alone, own, strict=True)]
    for (parameter, _), value, total in zip(net.named_parameters(), together, alone, strict=True):
        assert_near(value, total.double(), 1e-4, parameter)


@pytest.mark.parametrize("name", FAMILY)
@torch.no_grad()
def test_no_token_reads_a_later_one(name: str) -> None:
    net, tokens = model(name), random_tokens(1, 300, seed=12)
    want = net(tokens)
    for place in (0, 1, 64, 255, 256, 299):
        changed = tokens.clone()
        changed[0, place] = (tokens[0, place] + 1) % VOCAB
        got = net(changed)
        assert torch.equal(got[:, :place], want[:, :place])
        assert not torch.equal(got[:, place], want[:, place])


def test_float32_weights_with_bfloat16_products() -> None:
    """How it is trained: what a checkpoint saved in bfloat16 computes, and gradients in float32."""
    config, wide = FAMILY["8b"], model("8b")
    master, narrow = Hybrid(config, compute_dtype=torch.bfloat16), Hybrid(config, dtype=torch.bfloat16)
    for net in (master, narrow):
        net.load_state_dict(wide.state_dict())
    tokens = random_tokens(2, 70, seed=13)
    with torch.no_grad():
        want = narrow(tokens)
        assert torch.equal(master(tokens), want)
        assert not torch.equal(wide(tokens), want)
        assert_near(want, wide(tokens).double(), 0.05)  # eight bits through seven layers
    F.cross_entropy(master(tokens).flatten(0, 1), tokens.flatten()).backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in master.parameters())


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds_and_has_the_parameters_its_cost_says(name: str) -> None:
    config = PRESETS[name]
    net = Hybrid(config, dtype=torch.bfloat16, device="meta")
    assert sum(p.numel() for p in net.parameters()) == sum(cost.parameters(config).values())
    for index, layer in enumerate(config.layers):
        size = sum(p.numel() for p in net.backbone.layers[index].parameters())
        assert size == cost.layer_parameters(layer, config.hidden_size)
    for parameter, value in net.named_parameters():
        small = parameter.endswith(("mixer.A_log", "mixer.D", "mixer.dt_bias"))
        assert value.dtype == (torch.float32 if small else torch.bfloat16), parameter
    assert sum(p.nbytes for p in net.parameters()) == sum(cost.weight_bytes(config, "bfloat16").values())


def test_names_and_shapes_are_the_published_ones() -> None:
    net = Hybrid(PRESETS["8b"], device="meta")
    shapes = {name: tuple(p.shape) for name, p in net.named_parameters()}
    wanted = {
        "backbone.embeddings.weight": (131072, 4096),
        "backbone.layers.0.norm.weight": (4096,),
        "backbone.layers.0.mixer.in_proj.weight": (18560, 4096),
        "backbone.layers.0.mixer.conv1d.weight": (10240, 1, 4),
        "backbone.layers.0.mixer.conv1d.bias": (10240,),
        "backbone.layers.0.mixer.dt_bias": (128,),
        "backbone.layers.0.mixer.A_log": (128,),
        "backbone.layers.0.mixer.D": (128,),
        "backbone.layers.0.mixer.norm.weight": (8192,),
        "backbone.layers.0.mixer.out_proj.weight": (4096, 8192),
        "backbone.layers.1.norm.weight": (4096,),
        "backbone.layers.1.mixer.up_proj.weight": (21504, 4096),
        "backbone.layers.1.mixer.down_proj.weight": (4096, 21504),
        "backbone.layers.7.norm.weight": (4096,),
        "backbone.layers.7.mixer.q_proj.weight": (4096, 4096),
        "backbone.layers.7.mixer.k_proj.weight": (1024, 4096),
        "backbone.layers.7.mixer.v_proj.weight": (1024, 4096),
        "backbone.layers.7.mixer.o_proj.weight": (4096, 4096),
        "backbone.norm_f.weight": (4096,),
        "lm_head.weight": (131072, 4096),
    }
    for name, shape in wanted.items():
        assert shapes[name] == shape, name
    layers = {0, 1, 7}
    kept = {name for name in shapes if ".layers." not in name or int(name.split(".")[2]) in layers}
    assert kept == set(wanted)


def test_a_tied_head_is_the_embedding() -> None:
    net = Hybrid(FAMILY["tied"])
    initialise(net, seed=0)
    assert net.head_weight is net.backbone.embeddings.weight
    assert not any("lm_head" in name for name, _ in net.named_parameters())


def test_wrong_calls_are_refused_by_name() -> None:
    net, tokens = model("8b"), random_tokens(2, 8, seed=14)
    with pytest.raises(ShapeError, match=r"^documents: must not be given with a state"):
        net(tokens, net.empty_state(2), documents=torch.zeros_like(tokens))
    with pytest.raises(ShapeError, match=r"^documents: must have shape \(2, 8\); got \(2, 7\)"):
        net(tokens, documents=torch.zeros(2, 7, dtype=torch.int64))
    with pytest.raises(ShapeError, match=r"^tokens: must hold one row for each sequence of the state; got 2, 3"):
        net(tokens, net.empty_state(3))
    with torch.no_grad(), pytest.raises(ShapeError, match=r"^state: must be of the model's own layers"):
        model("ssm")(tokens, model("t-8b").empty_state(2))


def test_segments_of_a_call() -> None:
    net, tokens = model("8b"), random_tokens(2, 8, seed=15)
    multiple = net.row_multiple
    assert net.segments(tokens) == Segments((0, 0), (8, 8), multiple)
    documents = torch.tensor([[0] * 8, [1] * 3 + [2] * 5])
    assert net.segments(tokens, documents=documents) == Segments((0, 0, 0), (8, 3, 5), multiple)
    state = net.empty_state(2)
    with torch.no_grad():
        net(tokens, state)
    assert net.segments(tokens, state) == Segments((8, 8), (8, 8), multiple)
