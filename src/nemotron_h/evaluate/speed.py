"""How fast a model reads and writes here, in each precision, beside other programs that have it.

    for figure in Race(folder, cache, peers).figures(): ...

Whoever is compared takes turns with the others in one run (`contestants/contest.py`), so that they share the machine's
moods. Beside each figure stands its share of the roof: products over the rate of products, or bytes over the rate of
memory, both measured in the same run. Peers get the same weights; llama.cpp gets them as a GGUF file, written once.
"""

import hashlib
import importlib.util
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from nemotron_h import machine
from nemotron_h.checkpoint.save import save
from nemotron_h.config import cost
from nemotron_h.config.gguf import GgufType
from nemotron_h.config.keys import CONFIG_FILE
from nemotron_h.config.presets import PRESETS
from nemotron_h.config.published import read_config
from nemotron_h.convert.gguf import write_gguf
from nemotron_h.errors import NemotronError
from nemotron_h.evaluate.contestants.contest import Contestant, Failed, turns
from nemotron_h.evaluate.rows import Row, row
from nemotron_h.model.hybrid import Hybrid
from nemotron_h.model.init import initialise
from nemotron_h.precision.weights import BITS

LOG = logging.getLogger(__name__)
SCRIPTS = Path(__file__).parent / "contestants"
MODULES = {"llama": "llama_cpp", "vllm": "vllm", "transformers": "transformers"}  # of each peer, in its environment
# of a number of bits: our precision, and llama.cpp's type
TYPES = {"bfloat16": "bf16", "int8": "q8_0", "int4": "q4_0"}
DECODED = 64  # tokens of a run


def untrained(preset: str, parent: Path) -> Path:
    """A checkpoint of that shape with random weights, written where it is not there yet: parent/PRESET."""
    if not (parent / preset).exists():
        model = Hybrid(PRESETS[preset], dtype=torch.bfloat16)
        initialise(model, seed=0)
        save(model, parent / preset)
    return parent / preset


def installed() -> dict[str, str]:
    """The peers that this very environment has, with its Python."""
    return {name: sys.executable for name, module in MODULES.items() if importlib.util.find_spec(module) is not None}


class Race:
    """A checkpoint, how its contestants are started, and who could not be."""

    def __init__(self, folder: Path, cache: Path, peers: Mapping[str, str], n: int = 5) -> None:
        """cache: where the GGUF files are, and stay. peers: the Python of each of MODULES that takes part."""
        self.folder, self.cache, self.peers, self.n = folder, cache, peers, n
        self.config = read_config(folder / CONFIG_FILE)
        self.absent: dict[str, str] = {}  # contestants that could not be started, and why

    def gguf(self, kind: str) -> Path:
        """The same weights in a type of llama.cpp's."""
        files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(self.folder.iterdir())]
        made_of = hashlib.sha256(repr((self.folder.resolve(), files)).encode()).hexdigest()[:10]
        path = self.cache / f"{self.folder.name}-{made_of}-{kind}.gguf"
        if not path.exists():
            self.cache.mkdir(parents=True, exist_ok=True)
            write_gguf(self.folder, path, matrices=GgufType(kind), with_tokenizer=False)  # it is asked in token ids
        return path

    @contextmanager
    def contestants(self, precision: str, peers: Sequence[str] = tuple(MODULES)) -> Iterator[dict[str, Contestant]]:
        """By name: ours in a precision, and the peers that have the like: of llama.cpp the type of as many bits."""
        with ExitStack() as stack:
            ours = Contestant(SCRIPTS / "run_ours.py", [str(self.folder), precision])
            stack.callback(ours.close)
            found = {precision: ours}
            for peer in peers:
                if peer not in self.peers or (precision not in TYPES if peer == "llama" else precision in BITS):
                    continue
                try:
                    found[peer] = self._started(peer, precision)
                except (Failed, NemotronError) as error:
                    self.absent[f"{peer}, {precision}"] = str(error)
                    LOG.warning("%s does not take part in %s: %s", peer, precision, error)
                else:
                    stack.callback(found[peer].close)
            yield found

    def _started(self, peer: str, precision: str) -> Contestant:
        given = [str(self.folder), precision]
        if peer == "llama":
            given = [str(self.gguf(TYPES[precision])), str(machine.cores())]
        return Contestant(SCRIPTS / f"run_{peer}.py", given, self.peers[peer])

    def rows(self, what: str, contestants: Mapping[str, Contestant], question: str, **details: int) -> list[Row]:
        """Ours, the first of the contestants, against each of the others that can be asked this, in turns."""
        able = {name: one for name, one in contestants.items() if question in one.about["answers"]}
        (precision, *names), everybody = list(able), list(able.values())
        runs = turns(everybody, question, self.n, **details)
        found = []
        for name, own in zip(names, runs[1:], strict=True):
            version = contestants[name].about["version"] + (f" {TYPES[precision]}" if name == "llama" else "")
            found.append(row(what, "tokens/s", runs[0], own, version, higher=True))
        return found or [row(what, "tokens/s", runs[0], higher=True)]

    def prefill(self, contestants: Mapping[str, Contestant], length: int) -> list[Row]:
        """Reading a prompt of that length."""
        what = f"{next(iter(contestants))}, prompt of {length:,} tokens"
        return self.rows(what, contestants, "prefill", length=length)

    def decode(self, contestants: Mapping[str, Contestant], after: int) -> list[Row]:
        """Writing token by token after a context of that length."""
        what = f"{next(iter(contestants))}, decoding after {after:,} tokens"
        return self.rows(what, contestants, "decode", length=DECODED, after=after)

    def together(self, contestants: Mapping[str, Contestant], count: int, length: int, new: int) -> list[Row]:
        """So many requests at once, their prompts counted in the time; tokens that come out."""
        what = f"{next(iter(contestants))}, {count} requests of {length:,} tokens in, {new:,} out, at once"
        return self.rows(what, contestants, "serving", count=count, length=length, new=new)

    def prefill_roof(self, precision: str, length: int) -> float:
        """Tokens per second at the rate of products of bfloat16 or float32."""
        flops = sum(cost.prefill_flops(self.config, length).values())
        return machine.matmul_rates(size=1024, rows=512)[precision] / flops

    def decode_roof(self, precision: str, after: int) -> float:
        """Tokens per second at the rate of memory: each reads the weights, the state, and the keys and values."""
        parts = cost.weight_bytes(self.config, precision)
        weights = parts["matrices"] + parts["head"] + parts["vectors"]
        context = sum(cost.state_bytes(self.config).values()) + cost.token_bytes(self.config) * after
        return machine.bandwidth() / (weights + context)
