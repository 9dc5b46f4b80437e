"""How fast a model reads and writes here, in each precision, beside other programs that have it.

    race = Race(folder, cache, peers)
    for question, rows in race.run([prefill("int8", length=512), decode("int8", after=512)]):
        ...
    race.absent     who could not be asked what, and why

Whoever is compared takes turns with the others in one run (`contestants/contest.py`), so that they share the machine's
moods. The machine takes its turn too: beside each figure stands the roof, which is what it would allow at the best
rates of memory and of products that it showed meanwhile. Peers get the same weights; llama.cpp gets them as a GGUF
file, written once.
"""

import hashlib
import importlib.util
import logging
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import torch

from nemotron_h import machine
from nemotron_h.checkpoint.save import save
from nemotron_h.config import cost
from nemotron_h.config.gguf import GgufType
from nemotron_h.config.keys import CONFIG_FILE
from nemotron_h.config.model import ModelConfig
from nemotron_h.config.plan import Work, prompt_flops, read_bytes
from nemotron_h.config.presets import PRESETS
from nemotron_h.config.published import read_config
from nemotron_h.convert.gguf import write_gguf
from nemotron_h.errors import CapacityError, NemotronError, RequestError
from nemotron_h.evaluate.contestants.contest import Contestant, Failed, turns
from nemotron_h.evaluate.here import peaks
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


@dataclass(frozen=True)
class Question:
    """What is measured of whom: `prefill`, `decode` or `serving` (`contestants/`), with its details."""

    kind: str
    precision: str
    what: str
    details: Mapping[str, int] = field(hash=False)


def prefill(precision: str, length: int) -> Question:
    """Reading a prompt of that length, up to its first new token."""
    return Question("prefill", precision, f"{precision}, prompt of {length:,} tokens", {"length": length})


def decode(precision: str, after: int) -> Question:
    """Writing token by token after a context of that length."""
    what = f"{precision}, decoding after {after:,} tokens"
    return Question("decode", precision, what, {"length": DECODED, "after": after})


def together(precision: str, count: int, length: int, new: int) -> Question:
    """So many requests at once, their prompts counted in the time; tokens that come out."""
    what = f"{precision}, {count} requests of {length:,} tokens in, {new:,} out, at once"
    return Question("serving", precision, what, {"count": count, "length": length, "new": new})


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
    """A checkpoint, how its contestants are started, and who could not be asked."""

    def __init__(self, folder: Path, cache: Path, peers: Mapping[str, str], n: int = 5) -> None:
        """cache: where the GGUF files are, and stay. peers: the Python of each of MODULES that takes part."""
        self.folder, self.cache, self.peers, self.n = folder, cache, peers, n
        self.config = read_config(folder / CONFIG_FILE)
        # by name, and by what was asked: why not
        self.absent = {peer: "no Python that has it was named" for peer in MODULES if peer not in peers}

    def run(self, questions: Iterable[Question]) -> Iterator[tuple[Question, list[Row]]]:
        """Each with its rows, once it is measured; those of one precision are asked of the same processes."""
        for precision, some in groupby(questions, lambda question: question.precision):
            with self.contestants(precision) as contestants:
                for question in some:
                    yield question, self.answers(question, contestants)

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
                ours = self._started("ours", precision)
            except Failed as error:
                raise RequestError(
                    f"{precision}: must be measured here first; got {error.words}; leave this precision out"
                ) from None
            stack.callback(ours.close)
            found = {precision: ours}
            for peer in peers:
                if peer not in self.peers:
                    continue
                if precision not in TYPES if peer == "llama" else precision in BITS:
                    self.absent[f"{peer}, {precision}"] = "has nothing like it"
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

    def _leave_out(self, peer: str, what: str, error: Exception) -> None:
        words = error.words if isinstance(error, Failed) else getattr(error, "strerror", None) or str(error)
        self.absent[f"{peer}, {what}"] = words
        LOG.warning("%s does not take part in %s: %s", peer, what, words)

    def _started(self, who: str, precision: str) -> Contestant:
        threads = str(torch.get_num_threads())
        given = [str(self.folder), precision]
        python = self.peers.get(who, sys.executable)
        if who in self.peers:
            check_has(python, MODULES[who])  # before a file is written for it
            self._check_memory(precision)
        if who == "llama":
            given = [str(self.gguf(TYPES[precision])), threads]
        return Contestant(SCRIPTS / f"run_{who}.py", given, python, {"OMP_NUM_THREADS": threads})

    def _check_memory(self, precision: str) -> None:
        """All of them hold the weights at the same time. Raises: CapacityError where those of one more do not fit."""
        needed, memory = sum(cost.weight_bytes(self.config, precision).values()), machine.memory()
        if needed > memory.available_bytes:
            raise CapacityError(f"its weights need {needed:,} bytes of memory; {memory.available_bytes:,} are free")

    def answers(self, question: Question, contestants: Mapping[str, Contestant]) -> list[Row]:
        """Ours, the first of the contestants, against each of the others that can be asked this, in turns. Who ends
        meanwhile is left out from then on."""
        able: dict[str, Contestant] = {}
        for name, one in contestants.items():
            if question.kind not in one.about["answers"]:
                self.absent[f"{name}, {question.what}"] = "cannot be asked this"
            elif not one.ended:
                able[name] = one
        while True:
            try:
                *runs, roofs = turns(
                    [*able.values(), Roof(self.config, question)], question.kind, self.n, **question.details
                )
                break
            except Failed as error:
                gone = next(name for name, one in able.items() if one.ended)
                if gone == question.precision:
                    raise RequestError(f"{question.what}: must be measured here first; got {error.words}") from None
                self._leave_out(gone, question.what, error)
                del able[gone]
        roof = max(roofs)
        found = []
        for name, own in zip(list(able)[1:], runs[1:], strict=True):
            version = contestants[name].about["version"] + (f" {TYPES[question.precision]}" if name == "llama" else "")
            version += " float32" if name.endswith("float32") else ""
            found.append(row(question.what, "tokens/s", runs[0], own, version, higher=True, roof=roof))
        return found or [row(question.what, "tokens/s", runs[0], higher=True, roof=roof)]


class Roof:
    """The machine, which takes its turn as a contestant does. It answers a question by the tokens per second that its
    rates of the moment would allow.

    A prompt is bound by products, a token by what it reads: weights, state, keys and values. Requests at once are bound
    by one after the other.
    """

    def __init__(self, config: ModelConfig, question: Question) -> None:
        self.config, self.precision = config, question.precision
        self.work = Work(weights=question.precision)

    def ask(self, question: str, **details: int) -> float:
        answers: dict[str, Callable[..., float]] = {
            "prefill": self.prefill,
            "decode": self.decode,
            "serving": self.serving,
        }
        return answers[question](**details)

    def prefill(self, length: int) -> float:
        return peaks()[self.precision] / prompt_flops(self.config, length)

    def decode(self, length: int, after: int) -> float:
        return machine.bandwidth() / read_bytes(self.config, self.work, 1, after)

    def serving(self, count: int, length: int, new: int) -> float:
        products, memory = peaks()[self.precision], machine.bandwidth()
        reading = count * length * prompt_flops(self.config, length) / products
        flops = sum(cost.decode_flops(self.config, length + new // 2).values())
        step = max(read_bytes(self.config, self.work, count, length + new // 2) / memory, count * flops / products)
        return count * new / (reading + (new - 1) * step)
