"""Writing with drafts and without, on prompts whose text the answer repeats: a trained checkpoint, greedy, in turns.

    python benchmarks/drafts.py FOLDER [--precision int8] [--n 5]

FOLDER: of `make run`. Each prompt is code of this Python's own library. To summarise: a file, and its first words
again. To edit: a function, and the beginning of it again under another name. The answers are the same token by token.
"""

import argparse
import inspect
import statistics as module
import textwrap
import time
from pathlib import Path

from results import commit, write

from nemotron_h import EngineConfig
from nemotron_h.checkpoint.resume import newest_step
from nemotron_h.evaluate.rows import Row, row
from nemotron_h.inference.engine import Engine
from nemotron_h.inference.load import LanguageModel, load
from nemotron_h.inference.request import Answer

TOKENS = 256


def prompts() -> dict[str, str]:
    """By what is asked for."""
    code = inspect.getsource(module)[:6000]
    edited = inspect.getsource(textwrap.TextWrapper._wrap_chunks)
    return {
        "summarising a file": f'{code}\n\n"""In short.\n\n' + code[:120],
        "editing a function": f"{edited}\n\n    # the same, renamed\n"
        + edited.replace("_wrap_chunks", "_wrap", 1)[:200],
    }


def written(engine: Engine, language: LanguageModel, prompt: str) -> tuple[float, Answer]:
    """Tokens per second from the second on, and the answer."""
    request = language.request(language.prompt_ids(prompt), max_tokens=TOKENS, ignore_end=True)
    (answer,) = engine.add(request)
    while len(answer.ids) < 1:
        engine.step()
    first, began = len(answer.ids), time.perf_counter()
    engine.run()
    return (len(answer.ids) - first) / (time.perf_counter() - began), answer


def drafts(folder: Path, precision: str, n: int) -> list[Row]:
    language = load(newest_step(folder / "training" / "checkpoints"), precision=precision)
    engines = {mode: Engine(language.model, language.tokenizer, EngineConfig(drafts=mode)) for mode in ("auto", "off")}
    rows = []
    for what, prompt in prompts().items():
        rates: dict[str, list[float]] = {mode: [] for mode in engines}
        accepted = []
        for _ in range(n + 1):
            answers = {}
            for mode, engine in engines.items():
                rate, answers[mode] = written(engine, language, prompt)
                rates[mode].append(rate)
            assert answers["auto"].ids == answers["off"].ids
            accepted.append(answers["auto"].accepted / TOKENS)
        name = f"{folder.name}, {precision}, {what}"
        rows += [
            row(name, "tokens/s", rates["auto"][1:], rates["off"][1:], "without drafts", higher=True),
            row(f"{name}: share of tokens that a draft had", "of 1", accepted[1:], higher=True),
        ]
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--n", type=int, default=5)
    given, checked_out = parser.parse_args(), commit()
    write("drafts", drafts(given.folder, given.precision, given.n), checked_out)
