"""What a format costs: held-out loss and bits per weight, ours beside llama.cpp's of as many bits, of a trained model.

    python benchmarks/loss.py FOLDER [--llama PYTHON]

FOLDER: of `make run`, whose held-out shard is read: the beginnings of documents, as one window each. Losses have one
value: nothing is drawn. Integers are rounded for the weights alone, or by error feedback on documents of the training
shard; keys and values in int8 are read as such from the first token on. Bits per weight are those of the layers'
matrices and the head; the embedding is counted on neither side.
"""

import argparse
import subprocess
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path

import gguf
from results import commit, write

from nemotron_h.checkpoint.resume import newest_step
from nemotron_h.convert.gguf import name_of
from nemotron_h.data.shards import Shard
from nemotron_h.evaluate.contestants.contest import Contestant
from nemotron_h.evaluate.rows import Row, row
from nemotron_h.evaluate.speed import SCRIPTS, TYPES, Race
from nemotron_h.inference.load import load
from nemotron_h.model.linear import Linear, QuantizedLinear
from nemotron_h.text.tokenizer import Tokenizer

UNIT = "thousandths of a nat"
DOCUMENTS = 200  # of the training shard, more text than error feedback reads
WIDTH = 512  # tokens of a window: llama.cpp reads so many at a time


def beginnings(shard: Shard, most: int) -> list[list[int]]:
    """Of the first documents that are long enough."""
    long = (index for index in range(len(shard)) if len(shard[index]) >= WIDTH)
    return [shard[index][:WIDTH].tolist() for index, _ in zip(long, range(most), strict=False)]


def bits_of_gguf(path: Path, matrices: Collection[str]) -> float:
    names = {name_of(f"{name}.weight") for name in matrices}
    found = [one for one in gguf.GGUFReader(path).tensors if one.name in names]
    assert len(found) == len(matrices)
    return 8 * sum(int(one.n_bytes) for one in found) / sum(int(one.n_elements) for one in found)


def bits_of_ours(matrices: Mapping[str, Linear | QuantizedLinear]) -> float:
    stored = sum(parameter.nbytes for one in matrices.values() for parameter in one.parameters())
    return 8 * stored / sum(one.shape[0] * one.shape[1] for one in matrices.values())


def asked(contestant: Contestant, windows: list[list[int]]) -> float:
    return 1000 * contestant.ask("loss", windows=windows)  # type: ignore[no-any-return]


def measured(race: Race, windows: list[list[int]], trained_on: Shard) -> list[Row]:
    found = []
    for precision, kind in TYPES.items():
        matrices = load(race.folder, precision=precision).model.matrices
        with race.contestants(precision, peers=("llama",)) as some:
            losses, bits, version = [asked(one, windows) for one in some.values()], [bits_of_ours(matrices)], None
            if "llama" in some:
                version = f"{some['llama'].about['version']} {kind}"
                bits.append(bits_of_gguf(race.gguf(kind), matrices))
        found += both(precision, losses, bits, version, len(windows))
    with tempfile.TemporaryDirectory() as scratch:
        small, text = Path(scratch) / "fed", Path(scratch) / "text"
        tokenizer = Tokenizer.load(race.folder)
        text.write_text("\n".join(tokenizer.decode(trained_on[index].tolist()) for index in range(DOCUMENTS)))
        verb = ["nemotron-h", "quantize", race.folder, "--to", "int4", "--feedback", "--text", text, "--out", small]
        subprocess.run([*verb, "--json"], check=True, stdout=subprocess.DEVNULL)
        fed = Race(small, race.cache, {}, n=1)
        with fed.contestants("int4", peers=()) as some:
            losses[0] = asked(some["int4"], windows)
    found += both("int4 with error feedback", losses, bits, version, len(windows))
    kept = Contestant(SCRIPTS / "run_ours.py", [str(race.folder), "bfloat16", "int8"])
    try:
        return found + both("bfloat16 with keys and values in int8", [asked(kept, windows)], [], None, len(windows))
    finally:
        kept.close()


def both(what: str, losses: list[float], bits: list[float], version: str | None, count: int) -> list[Row]:
    """Ours, and the peer's where it takes part."""
    return [
        row(f"{what}, {name}", unit, values[:1], values[1:], version, higher=False)
        for name, unit, values in (
            (f"loss of {count} windows held out", UNIT, losses),
            ("bits per weight, head included", "bits", bits),
        )
        if values
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--llama", help="the Python that has it")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "nemotron_h" / "race")
    parser.add_argument("--windows", type=int, default=64)
    given, checked_out = parser.parse_args(), commit()
    checkpoint = newest_step(given.folder / "training" / "checkpoints")
    race = Race(checkpoint, given.cache, {"llama": given.llama} if given.llama else {}, n=1)
    shards = given.folder / "shards"
    windows = beginnings(Shard(shards / "validation"), given.windows)
    write("loss", measured(race, windows, Shard(shards / "train")), checked_out)
