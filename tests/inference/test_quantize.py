from collections.abc import Callable

import pytest
import torch

from nemotron_h.errors import RequestError
from nemotron_h.inference import quantize as room
from nemotron_h.inference.load import load
from nemotron_h.inference.quantize import WINDOW, quantize, windows
from nemotron_h.model.hybrid import Hybrid
from nemotron_h.model.linear import Linear, QuantizedLinear
from nemotron_h.text.tokenizer import Tokenizer
from tests.compare import seeded

Build = Callable[..., Hybrid]


def drawn(count: int, length: int = 100, seed: int = 0) -> torch.Tensor:
    return torch.randint(320, (count, length), generator=seeded(seed))


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_every_matrix_is_put_into_integers_and_the_rest_stays(build: Build, precision: str) -> None:
    model, plain = build(precision="bfloat16"), build(precision="bfloat16")
    report = quantize(model, precision, drawn(3))
    assert model.quantized
    assert model.precision == precision
    names = [*plain.matrices]
    assert [one.name for one in report.matrices] == names
    assert [one.bits for one in report.matrices] == [
        8 if name == "lm_head" or precision == "int8" else 4 for name in names
    ]
    left = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        if name.rpartition(".")[0] not in names:
            assert torch.equal(left[name], parameter), name
    for name, linear in plain.matrices.items():
        mine = model.matrices[name]
        assert isinstance(linear, Linear)
        assert isinstance(mine, QuantizedLinear)
        off = (mine.matrix.dense() - linear.weight).norm() / linear.weight.norm()
        assert off < (0.1 if mine.bits == 4 else 0.02)
    assert report.tokens == 300
    assert (report.loss_before, report.loss_after, report.stream_errors) == (None, None, ())


def test_the_report_is_of_the_whole_model(build: Build) -> None:
    """Losses of the model before and after, as it computes them itself, and the stream's error after each layer."""
    model, plain = build(precision="float32"), build(precision="float32")
    held_out = drawn(5, seed=1)
    report = quantize(model, "int4", drawn(3), held_out=held_out)

    def loss(of: Hybrid) -> float:
        logits = of(held_out)[:, :-1].flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, held_out[:, 1:].flatten()).item()

    with torch.no_grad():
        assert report.loss_before == pytest.approx(loss(plain), rel=1e-5)
        assert report.loss_after == pytest.approx(loss(model), rel=1e-5)
    assert len(report.stream_errors) == len(plain.layers)
    assert all(0 < error < 0.3 for error in report.stream_errors)
    assert report.held_out_tokens == 500


def test_error_feedback_brings_the_model_nearer(build: Build) -> None:
    held_out = drawn(8, seed=1)
    plain, fed = (
        quantize(build(), "int4", drawn(40), held_out=held_out, feedback=feedback) for feedback in (False, True)
    )
    assert fed.stream_errors[-1] < plain.stream_errors[-1]
    nearer = [a.weight_error / b.weight_error for a, b in zip(fed.matrices, plain.matrices, strict=True)]
    assert max(nearer) < 1
    assert min(nearer) < 0.8


def test_it_tells_how_far_it_is(build: Build) -> None:
    told: list[tuple[float, str]] = []
    model = build()
    names = [*model.matrices]
    quantize(model, "int8", drawn(2), progress=lambda done, what: told.append((done, what)))
    assert [what for _, what in told] == [*names, ""]
    fractions = [done for done, _ in told]
    assert fractions == sorted(fractions)
    assert (fractions[0], fractions[-1]) == (0.0, 1.0)


def test_only_a_plain_model_is_quantised(build: Build) -> None:
    packed, quantised = build(precision="bfloat16"), build(precision="int8")
    packed.requires_grad_(False)
    packed.pack()
    for model in (packed, quantised):
        with pytest.raises(RequestError, match=r"^model: must be plain, to be quantised; it is packed or quantised"):
            quantize(model, "int4", drawn(1))


def test_what_is_no_number_is_named(build: Build) -> None:
    model, name = build(), "backbone.layers.1.mixer.up_proj"
    model.matrices[name].get_parameter("weight").data[3, 5] = torch.inf
    with pytest.raises(RequestError, match=rf"^{name}\.weight: must hold finite numbers, to be rounded to integers"):
        quantize(model, "int4", drawn(1))
    for feedback in (False, True):
        model = build()
        model.matrices["backbone.layers.0.mixer.out_proj"].get_parameter("weight").data[3, 5] = torch.nan
        with pytest.raises(RequestError, match=r"^backbone\.layers\.0\.mixer\.out_proj\.weight: must hold finite"):
            quantize(model, "int8", drawn(1), feedback=feedback)
        model = build()
        model.layers[1].norm.weight.data[3] = torch.inf
        with pytest.raises(RequestError, match=rf"^{name}\.(rows|products): must be finite"):
            quantize(model, "int8", drawn(1), feedback=feedback)


def test_windows_of_text(build: Build, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    text = "the hybrid writes what it has read\n" * 400
    ids = tokenizer.encode(text)
    found = windows(tokenizer, model, 3, text)
    assert found.shape == (3, WINDOW)
    assert (found[:, 0] == model.config.bos_token_id).all()
    assert found[:, 1:].flatten().tolist() == ids[: 3 * (WINDOW - 1)]
    assert len(windows(tokenizer, model, 1000, text)) == len(ids) // (WINDOW - 1)
    with pytest.raises(RequestError, match=r"^text: must have 511 tokens or more; got 1"):
        windows(tokenizer, model, 3, "a")
    with pytest.raises(RequestError, match=r"^text: needs a tokenizer in the checkpoint folder, and it has none"):
        windows(None, model, 3, text)
    without = windows(None, model, 4)
    assert without.shape == (4, WINDOW)
    assert torch.equal(without, windows(None, model, 4))
    library = windows(tokenizer, model, 4)
    assert library.shape == (4, WINDOW)
    assert torch.equal(library, windows(tokenizer, model, 4))
    monkeypatch.setattr(room, "standard_library", lambda: __import__("pathlib").Path("/nowhere"))
    with pytest.raises(RequestError, match=r"got 0; Python's own library has no source files here: give a text$"):
        windows(tokenizer, model, 4)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_loaded_so_it_answers_as_from_a_folder_that_is_so(folder, precision: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    language = load(folder, precision=precision)
    assert language.model.precision == precision
    answer = language.generate("the hybrid", max_tokens=20, ignore_end=True)
    language.save(tmp_path / "small")
    for asked in ("auto", precision):
        again = load(tmp_path / "small", precision=asked)
        assert again.model.precision == precision
        assert again.generate("the hybrid", max_tokens=20, ignore_end=True) == answer
    for other in ("bfloat16", "int8" if precision == "int4" else "int4"):
        with pytest.raises(RequestError, match=rf"^precision: must be auto or {precision}, in which the weights of"):
            load(tmp_path / "small", precision=other)
