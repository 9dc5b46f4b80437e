"""Fingerprints change with whatever bits depend on, and with nothing else."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from nemotron_h import machine
from nemotron_h.config.settings import first_difference
from nemotron_h.model import fingerprint
from nemotron_h.model.fingerprint import WORDS, Versions, arithmetic, multipliers, run_sums, shape, weights
from nemotron_h.model.hybrid import Hybrid
from nemotron_h.model.init import initialise
from nemotron_h.model.linear import Linear
from nemotron_h.ops.linear import Blocks, FewRows
from tests.model.shapes import FAMILY, model, random_tokens


def net(dtype: torch.dtype = torch.bfloat16) -> Hybrid:
    return deepcopy(model("8b", dtype))


@pytest.mark.parametrize("length", [1, 2, 3, WORDS - 1, WORDS, WORDS + 1, 2 * WORDS + 3, 40 * WORDS + 7])
def test_sums_are_those_of_the_definition(length: int) -> None:
    words = torch.randint(-(2**31), 2**31, (length,), generator=torch.Generator().manual_seed(length))
    numbers = multipliers().tolist()
    want = []
    for first in range(0, length, WORDS):
        run = words[first : first + WORDS].tolist()
        want.append(sum(word * number for word, number in zip(run, numbers, strict=False)) % 2**64)
    got = [number % 2**64 for number in run_sums(words.int().view(torch.float32)).tolist()]
    assert got == want


def test_multipliers_are_odd_and_differ_in_their_lower_halves() -> None:
    numbers = multipliers()
    assert (numbers % 2 == 1).all()
    assert len(set((numbers % 2**32).tolist())) == WORDS
    assert len(set((numbers >> 32).tolist())) > 0.999 * WORDS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_contents_count(dtype: torch.dtype) -> None:
    plain = net(dtype)
    digest = weights(plain)
    assert len(digest) == 64
    assert weights(deepcopy(plain)) == digest
    plain.pack()
    assert weights(plain) == digest
    values = torch.arange(10).to(dtype)
    for begin, end in ((0, 9), (1, 10), (1, 9), (0, 10)):  # beside a word's beginning or end
        assert torch.equal(run_sums(values[begin:end]), run_sums(values[begin:end].clone()))


def changed(place: Tensor, bit: int) -> None:
    """Flip one bit of a one-element view."""
    kind = {torch.float32: torch.int32, torch.bfloat16: torch.int16}[place.dtype]
    place.copy_((place.view(kind) ^ torch.tensor(1).bitwise_left_shift(bit).to(kind)).view(place.dtype))


@torch.no_grad()
def test_every_flipped_bit_is_noticed() -> None:
    plain = net()
    seen = {weights(plain)}
    generator = torch.Generator().manual_seed(0)
    for parameter in plain.parameters():
        assert parameter.is_contiguous()
        flat = parameter.view(-1)
        for place in (0, len(flat) - 1, int(torch.randint(len(flat), (), generator=generator))):
            bit = int(torch.randint(8 * flat.element_size(), (), generator=generator))
            changed(flat[place : place + 1], bit)
            seen.add(weights(plain))
            changed(flat[place : place + 1], bit)
    assert len(seen) == 1 + 3 * len(list(plain.parameters()))
    assert weights(plain) in seen


@pytest.mark.parametrize("bit", range(32))
def test_a_bit_counts_wherever_it_lies_in_a_word(bit: int) -> None:
    values = torch.randn(3 * WORDS + 5, generator=torch.Generator().manual_seed(0))
    before = run_sums(values)
    for place in (0, WORDS - 1, WORDS, 2 * WORDS + 7, len(values) - 1):
        changed(values[place : place + 1], bit)
        after = run_sums(values)
        assert (after != before).nonzero().flatten().tolist() == [place // WORDS]
        changed(values[place : place + 1], bit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("one", "other"), [(0, 1), (0, 2), (1, 2), (1, 2 * WORDS - 2), (5, 2 * WORDS + 3)])
@pytest.mark.parametrize("values", [(1.0, -1.0), (0.0, 2.0), (1.0, 1.0078125), (float("inf"), 3.0)])
def test_values_that_changed_places_are_noticed(
    dtype: torch.dtype, one: int, other: int, values: tuple[float, float]
) -> None:
    tensor = torch.zeros(4 * WORDS, dtype=dtype)
    tensor[one], tensor[other] = values
    before = run_sums(tensor)
    tensor[other], tensor[one] = values
    assert not torch.equal(run_sums(tensor), before)


@torch.no_grad()
def test_tensors_that_changed_places_or_dtype_or_shape_are_noticed() -> None:
    plain = net()
    digest, (first, second) = weights(plain), (plain.layers[i].mixer.up_proj for i in (1, 4))
    first.weight, second.weight = second.weight, first.weight
    assert weights(plain) != digest
    first.weight, second.weight = second.weight, first.weight
    assert weights(plain) == digest
    first.weight = nn.Parameter(first.weight.view(first.weight.shape[::-1]))
    assert weights(plain) != digest

    zero = [Hybrid(FAMILY["8b"], dtype=dtype) for dtype in (torch.bfloat16, torch.float32)]
    for each in zero:
        for parameter in each.parameters():
            parameter.zero_()
    assert weights(zero[0]) != weights(zero[1])


def test_versions_hold_until_weights_change() -> None:
    plain = net(torch.float32)
    before = Versions(plain)
    plain(random_tokens(1, 5, seed=0)).sum().backward()
    weights(plain)
    assert before.hold
    net(torch.float32)  # another model's parameters are none of it
    assert before.hold
    norm = plain.backbone.norm_f
    before_norm, norm.weight = norm.weight, nn.Parameter(norm.weight.detach().clone())
    assert norm.weight._version == before_norm._version
    assert not before.hold
    norm.weight = before_norm
    assert before.hold
    replaced = Versions(plain)
    torch.optim.SGD(plain.parameters(), lr=0.1).step()
    assert not replaced.hold
    replaced = Versions(plain)
    plain.lm_head = Linear(*reversed(plain.head_weight.shape), dtype=torch.float32, device=torch.device("cpu"))
    assert not replaced.hold
    replaced = Versions(plain)
    plain.pack()
    assert not replaced.hold
    assert Versions(plain).hold


@torch.inference_mode()
def test_weights_that_torch_does_not_count_have_a_version_too() -> None:
    plain = Hybrid(FAMILY["4b"])
    initialise(plain, seed=0)
    assert Versions(plain).hold


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def test_the_arithmetic_is_plain_values_and_its_first_difference_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = net()
    before = arithmetic(plain)
    assert json.loads(json.dumps(before)) == before
    assert first_difference(before, arithmetic(net())) is None
    count = torch.get_num_threads()
    with threads(count + 1):
        assert first_difference(before, arithmetic(plain)) == ("machine.threads", count, count + 1)
    found = plain.row_multiple
    plain.row_multiple = 2 * found
    assert first_difference(before, arithmetic(plain)) == ("row_multiple", found, 2 * found)
    plain.row_multiple = found
    wide = arithmetic(net(torch.float32))
    assert first_difference(before, wide) == ("compute_dtype", "bfloat16", "float32")
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert first_difference(before, arithmetic(plain)) == ("torch.version", before["torch"]["version"], "9.9")


def test_the_arithmetic_says_how_each_shape_is_read() -> None:
    plain = net()
    matrices = [module for module in plain.modules() if isinstance(module, Linear)]
    before = arithmetic(plain)["matrices"]
    assert before == {"{} x {}".format(*matrix.shape): "plain" for matrix in matrices}
    plain.pack()
    after = arithmetic(plain)["matrices"]
    assert set(after) == set(before)
    for matrix in matrices:
        read = after["{} x {}".format(*matrix.shape)]
        assert read.startswith("packed") == matrix.weight.is_mkldnn
        assert ("few rows" in read) == isinstance(matrix.kernel, FewRows)
        assert (read == "in blocks") == isinstance(matrix.kernel, Blocks)
    matrices[0].kernel = FewRows(matrices[0].weight, None, 999)
    name = "{} x {}".format(*matrices[0].shape)
    assert first_difference(after, arithmetic(plain)["matrices"]) == (
        name, after[name], "packed, few rows in chains of 999"
    )  # fmt: skip


def test_changed_code_is_another_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint.code()
    path = type(fingerprint.Path())
    read = path.read_bytes
    monkeypatch.setattr(path, "read_bytes", lambda self: read(self) + b"#" * (self.name == "norm.py"))
    assert fingerprint.code() != before


def test_a_config_has_the_digest_of_its_values() -> None:
    config = FAMILY["8b"]
    assert shape(replace(config)) == shape(config)
    digests = {shape(each) for each in FAMILY.values()}
    digests |= {shape(replace(config, layers=config.layers[::-1])), shape(replace(config, norm_epsilon=1e-6))}
    mamba = replace(config.layers[0], time_step_limit=(0.0, 0.1))
    digests.add(shape(replace(config, layers=(mamba, *config.layers[1:]))))
    assert len(digests) == len(FAMILY) + 3


@pytest.mark.slow
def test_instructions_that_a_library_was_told_not_to_use_show() -> None:
    program = "import torch; from nemotron_h.model.fingerprint import products; print(products(torch.device('cpu')))"
    told = [{}, {"ONEDNN_MAX_CPU_ISA": "AVX2"}, {"MKL_CBWR": "COMPATIBLE"}]
    found = [
        subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=os.environ | environment
        ).stdout
        for environment in (*told, *told)
    ]
    assert found[:3] == found[3:]
    if "avx512bf16" in machine.cpu_features():
        assert len(set(found)) == 3
