"""How fast a model reads and writes here, in each precision, beside other programs that have it.

    race = Race(folder, cache, peers)
    with race.contestants("int8") as some:
        rows = race.prefill(some, length=512)

Whoever is compared takes turns with the others in one run (`contestants/contest.py`), so that they share the machine's
moods. Beside each figure stands its share of the roof: products over the rate of products, or bytes over the rate of
memory, both measured in the same run. Peers get the same weights; llama.cpp gets them as a GGUF file, written once.
"""

import hashlib
import importlib.util
import logging
import subprocess
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
from nemotron_h.errors import CapacityError, NemotronError, RequestError
from nemotron_h.evaluate.contestants.contest import Contestant, Failed, turns
from nemotron_h.evaluate.rows import Row, row
from nemotron_h.model.hybrid import Hybrid
from nemotron_h.model.init import initialise
from nemotron_h.ops.jit.linear import PRODUCTS
from nemotron_h.precision.weights import BITS

LOG = logging.getLogger(__name__)
SCRIPTS = Path(__file__).parent / "contestants"
MODULES = {"llama": "llama_cpp", "vllm": "vllm", "transformers": "transformers"}  # of each peer, in its environment
# of a number of bits: our precision, and llama.cpp's type
TYPES = {"bfloat16": "bf16", "int8": "q8_0", "int4": "q4_0"}
DECODED = 64  # tokens of a run


def untrained(preset: str, parent: Path) -> Path:
    """A checkpoint of that shape with random weights, written where it is not there yet: parent/PRESET.

    Raises: CapacityError where memory is too small for it; RequestError where something else is there.
    """
    folder = parent / preset
    if folder.exists():
        if read_config(folder / CONFIG_FILE) != PRESETS[preset]:
            raise RequestError(f"{folder}: must be what the preset {preset} is; it is another model; remove it")
    else:
        needed, free = sum(cost.weight_bytes(PRESETS[preset], "bfloat16").values()), machine.memory().available_bytes
        if needed > free:
            raise CapacityError(
                f"{preset}: its random weights need {needed:,} bytes of memory; {free:,} are free; take a smaller one"
            )
        model = Hybrid(PRESETS[preset], dtype=torch.bfloat16)
        initialise(model, seed=0)
        save(model, folder)
    return folder


def installed() -> dict[str, str]:
    """The peers that this very environment has, with its Python."""
    return {name: sys.executable for name, module in MODULES.items() if importlib.util.find_spec(module) is not None}


def check_has(python: str, module: str) -> None:
    """Raises: Failed where that Python cannot import it; OSError where it is none."""
    done = subprocess.run([python, "-c", f"import {module}"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failed(python, (done.stderr.strip().splitlines() or ["it ended"])[-1])


class Race:
    """A checkpoint, how its contestants are started, and who could not be."""

    def __init__(self, folder: Path, cache: Path, peers: Mapping[str, str], n: int = 5) -> None:
        """cache: where the GGUF files are, and stay. peers: the Python of each of MODULES that takes part."""
        self.folder, self.cache, self.peers, self.n = folder, cache, peers, n
        self.threads = str(torch.get_num_threads())
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
        """By name: ours in a precision, and the peers that have the like: of llama.cpp the type of as many bits. On a
        CPU without products of bfloat16 the others take part in float32 too, which is faster there."""
        with ExitStack() as stack:
            try:
                ours = Contestant(SCRIPTS / "run_ours.py", [str(self.folder), precision, self.threads])
            except Failed as error:
                raise RequestError(f"{precision}: {error.words}") from None
            stack.callback(ours.close)
            found = {precision: ours}
            for peer in peers:
                if peer not in self.peers or (precision not in TYPES if peer == "llama" else precision in BITS):
                    continue
                widened = precision == "bfloat16" and peer != "llama" and not PRODUCTS
                for name, own in ((peer, precision), *([(f"{peer} float32", "float32")] if widened else [])):
                    try:
                        found[name] = self._started(peer, own)
                    except (Failed, OSError, NemotronError) as error:
                        self._leave_out(name, precision, error)
                    else:
                        stack.callback(found[name].close)
            yield found

    def _leave_out(self, peer: str, precision: str, error: Exception) -> None:
        self.absent[f"{peer}, {precision}"] = str(error)
        LOG.warning("%s does not take part in %s: %s", peer, precision, error)

    def _started(self, peer: str, precision: str) -> Contestant:
        given = [str(self.folder), precision]
        if peer == "llama":
            check_has(self.peers[peer], MODULES[peer])  # before a file is written for it
            given = [str(self.gguf(TYPES[precision])), self.threads]
        return Contestant(SCRIPTS / f"run_{peer}.py", given, self.peers[peer])

    def rows(self, what: str, contestants: Mapping[str, Contestant], question: str, **details: int) -> list[Row]:
        """Ours, the first of the contestants, against each of the others that can be asked this, in turns. Who ends
        meanwhile is left out from then on."""
        precision = next(iter(contestants))
        able = {name: one for name, one in contestants.items() if question in one.about["answers"] and not one.ended}
        while True:
            try:
                runs = turns(list(able.values()), question, self.n, **details)
                break
            except Failed as error:
                gone = next(name for name, one in able.items() if one.ended)
                if gone == precision:
                    raise RequestError(f"{what}: {error.words}") from None
                self._leave_out(gone, precision, error)
                del able[gone]
        names = list(able)[1:]
        found = []
        for name, own in zip(names, runs[1:], strict=True):
            version = contestants[name].about["version"] + (f" {TYPES[precision]}" if name == "llama" else "")
            version += " float32" if name.endswith("float32") else ""
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
        """Tokens per second at the rate of products of bfloat16 or float32. The former may be widened to the latter,
        which is faster where the machine has no products of it."""
        rates = machine.matmul_rates(size=1024, rows=512)
        flops = sum(cost.prefill_flops(self.config, length).values())
        return max(rates[precision], rates["float32"]) / flops

    def decode_roof(self, precision: str, after: int) -> float:
        """Tokens per second at the rate of memory: each reads the weights, the state, and the keys and values."""
        bits = 32 if precision == "float32" else 16
        parts, state = cost.weight_bytes(self.config, precision), cost.state_bytes(self.config, input_bits=bits)
        # a tied head reads the embedding, unless it is in integers and has weights of its own
        head = parts["head"] or parts["embedding"]
        context = sum(state.values()) - state["draft inputs"] + cost.token_bytes(self.config, bits) * after
        return machine.bandwidth() / (parts["matrices"] + head + parts["vectors"] + context)
