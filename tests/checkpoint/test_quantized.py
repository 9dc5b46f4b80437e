"""Folders whose matrices are in integers: written, read back mapped, and refused where they are damaged."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nemotron_h.checkpoint.check import check_folder
from nemotron_h.checkpoint.load import load
from nemotron_h.checkpoint.names import WEIGHTS_FILE
from nemotron_h.checkpoint.save import save
from nemotron_h.config.cost import weight_bytes
from nemotron_h.config.published import Dialect
from nemotron_h.config.quantization import read_quantization
from nemotron_h.errors import CheckpointError, NemotronError, UnsupportedError
from nemotron_h.model.hybrid import Hybrid
from tests.model import shapes


def in_integers(name: str = "8b", precision: str = "int4") -> Hybrid:
    return shapes.in_integers(deepcopy(shapes.model(name, torch.bfloat16)), precision).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(in_integers(), tmp_path / "m")
    return tmp_path / "m"


@pytest.mark.parametrize("name", ["8b", "nano", "t-8b", "tied"])
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_what_is_saved_comes_back(name: str, precision: str, tmp_path: Path) -> None:
    model = in_integers(name, precision)
    assert model.precision == precision
    save(model, tmp_path / "m")
    assert read_quantization(tmp_path / "m") == {precision}
    again = load(tmp_path / "m")
    assert again.precision == precision
    mine, theirs = dict(model.named_parameters()), dict(again.named_parameters())
    assert mine.keys() == theirs.keys()
    for key, parameter in mine.items():
        assert theirs[key].dtype == parameter.dtype
        assert torch.equal(theirs[key], parameter), key
    tokens = shapes.random_tokens(2, 70, seed=0)
    with torch.no_grad():
        assert torch.equal(again(tokens), model(tokens))
    save(again, tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS_FILE).read_bytes() == (tmp_path / "m" / WEIGHTS_FILE).read_bytes()


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_cost_counts_what_is_stored(precision: str, tmp_path: Path) -> None:
    """Where outputs fill blocks and inputs groups, to the byte; but for a number beside each matrix."""
    for tied in (False, True):
        config = shapes.whole_blocks(tied=tied)
        model = Hybrid(config, dtype=torch.bfloat16)
        torch.nn.init.normal_(model.backbone.embeddings.weight)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter)
        shapes.in_integers(model, precision)
        stored = sum(p.nbytes for p in model.parameters()) - 4 * len(model.matrices)
        assert stored == sum(weight_bytes(config, precision).values())


def test_it_is_mapped_and_not_copied(folder: Path) -> None:
    before = mapped(folder)
    model = load(folder)
    assert mapped(folder) > before
    words = model.matrices["backbone.layers.0.mixer.in_proj"].get_parameter("words")
    assert any(start <= words.data_ptr() < stop for start, stop in mappings(folder))


def mapped(folder: Path) -> int:
    return len(mappings(folder))


def mappings(folder: Path) -> list[tuple[int, int]]:
    lines = Path("/proc/self/maps").read_text().splitlines()
    ranges = [line.split()[0].split("-") for line in lines if str(folder / WEIGHTS_FILE) in line]
    return [(int(start, 16), int(stop, 16)) for start, stop in ranges]


def damaged(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS_FILE).items()}
    change(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)


FIRST = "backbone.layers.0.mixer.in_proj"
WORDS = f"{FIRST}.words"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(f"{FIRST}.groups"), rf"^{FIRST}.groups: missing from"),
        (lambda t: t.update({WORDS: t[WORDS][:, :-1].clone()}), rf"^{WORDS}: must be torch.int32 of shape"),
        (lambda t: t.update({WORDS: t[WORDS].float()}), rf"^{WORDS}: must be torch.int32 of shape"),
        (lambda t: t[f"{FIRST}.scale"].fill_(float("nan")), rf"^{FIRST}.scale: must be finite and not negative"),
        (lambda t: t[f"{FIRST}.scale"].fill_(-1), rf"^{FIRST}.scale: must be finite and not negative"),
        (lambda t: t[f"{FIRST}.row_bits"].fill_(7), rf"^{FIRST}.row_bits: must be 8 or 16; got 7"),
        (lambda t: t.update({f"{FIRST}.weight": torch.zeros(4, 4)}), rf"^{FIRST}.weight: is not a tensor of the model"),
        (lambda t: t.pop("lm_head.words"), r"^lm_head.words: missing from"),
    ],
)  # fmt: skip
def test_damage_is_named(folder: Path, change: Callable[[dict[str, Tensor]], None], said: str) -> None:
    damaged(folder, change)
    with pytest.raises(CheckpointError, match=said):
        load(folder)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("precision", "int3", "precision must be int8 or int4; got 'int3'; take a newer nemotron_h"),
        ("version", 2, "version must be 1; got 2; take a newer nemotron_h, or quantise the checkpoint again"),
        ("version", None, "version must be 1; got None"),
    ],
)
def test_another_version_is_refused(folder: Path, key: str, value: object, said: str) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text())
    values["quantization_config"][key] = value
    path.write_text(json.dumps(values))
    with pytest.raises(UnsupportedError, match=re.escape(said)):
        load(folder)


def test_a_config_that_says_nothing_of_it_is_refused(folder: Path) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text())
    del values["quantization_config"]
    path.write_text(json.dumps(values))
    with pytest.raises(NemotronError):
        load(folder)


def test_other_programs_words_have_no_integers(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"^dialect: must be published for a quantised model; got transformers"):
        save(in_integers(), tmp_path / "m", dialect=Dialect.TRANSFORMERS)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("place", [0, -1])
def test_sums_that_are_not_those_of_the_integers_are_found(folder: Path, place: int) -> None:
    """Kernels add them, the definition does not: with others the two would differ."""
    assert [finding.holds for finding in check_folder(folder, load(folder))] == [True, True, True]
    held = load_file(folder / WEIGHTS_FILE)
    name = next(name for name in held if name.endswith(".totals"))
    held[name][place] += 1
    save_file(held, folder / WEIGHTS_FILE)
    *others, sums = check_folder(folder, load(folder))
    assert all(finding.holds for finding in others)
    assert not sums.holds
    assert sums.number == f"1 differ: {name.removesuffix('.totals')}"


def test_a_model_that_is_half_in_integers_is_not_saved(tmp_path: Path) -> None:
    model = in_integers()
    name, own = next(iter(model.matrices.items()))
    model.put(name, in_integers(precision="int8").matrices[name])  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r": must be plain or in integers as backbone.* is; got another format"):
        save(model, tmp_path / "m")
    assert not (tmp_path / "m").exists()
    model = deepcopy(shapes.model("8b"))
    model.put(name, own)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r": must be plain or in integers as backbone"):
        save(model, tmp_path / "m")


PROGRAM = """
import sys
from tests.checkpoint.test_quantized import in_integers
from nemotron_h.checkpoint import save as room
model = in_integers()
write = room.write_shard
def told(*given):
    found = write(*given)
    print("written", flush=True)  # the files are there, the folder is not
    sys.stdin.readline()
    return found
room.write_shard = told
room.save(model, sys.argv[1], shard_bytes=10_000)
print("whole", flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize("steps", [1, 3, 1000])
def test_what_a_killed_writer_leaves_is_whole_or_nothing(tmp_path: Path, steps: int) -> None:
    """Killed after so many of its files: what it leaves is in nobody's way."""
    target, want = tmp_path / "m", in_integers()
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(target)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        text=True,
    ) as writer:
        assert writer.stdin is not None
        assert writer.stdout is not None
        for step in range(steps):
            line = writer.stdout.readline()
            if step == steps - 1 or line == "whole\n":
                break
            writer.stdin.write("\n")
            writer.stdin.flush()
        writer.kill()
    assert target.exists() == (line == "whole\n") == (steps == 1000)
    if steps < 1000:
        assert [path.name for path in tmp_path.iterdir()] == [".m.partial"]
        save(want, target)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    tokens = shapes.random_tokens(1, 20, seed=0)
    with torch.no_grad():
        assert torch.equal(load(target)(tokens), want(tokens))
