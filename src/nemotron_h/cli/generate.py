"""`nemotron-h generate`: text, or token ids, out of a checkpoint."""

import json
import logging
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated

import typer

from nemotron_h.cli.process import HELP_DRAFTS, HELP_KEYS_VALUES, HELP_PRECISION
from nemotron_h.errors import RequestError

AT_ONCE = 16  # prompts of a batch
LOG = logging.getLogger(__name__)


def generate(
    path: Annotated[str, typer.Argument(help="A checkpoint folder, or org/name[@revision] on the Hub.")],
    prompt: Annotated[str | None, typer.Argument(help="The text to go on from.")] = None,
    ids: Annotated[str | None, typer.Option(help="Token ids instead of a prompt: 5,9,13.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="PROMPT is a message, to be answered.")] = False,
    system: Annotated[str | None, typer.Option(help="With --chat: the system message before it.")] = None,
    prompt_file: Annotated[str | None, typer.Option(help="A UTF-8 file with the prompt.")] = None,
    max_tokens: Annotated[int, typer.Option(help="How many tokens at most.")] = 128,
    temperature: Annotated[float | None, typer.Option(help="0 takes the likeliest token each time.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw among the likeliest tokens of this probability.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw among so many of the likeliest tokens; 0: all.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="Stop before this text (may be given several times).")] = None,
    precision: Annotated[str, typer.Option(help=HELP_PRECISION)] = "auto",
    keys_values: Annotated[str, typer.Option(help=HELP_KEYS_VALUES)] = "auto",
    drafts: Annotated[str, typer.Option(help=HELP_DRAFTS)] = "auto",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    ignore_end: Annotated[bool, typer.Option("--ignore-end", help="Go on after an end token.")] = False,
    ignore_defaults: Annotated[
        bool, typer.Option("--ignore-defaults", help="Draw by these options alone, not by the checkpoint's defaults.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object: text, or ids.")] = False,
    batch: Annotated[str | None, typer.Option(help="Many prompts: a file with one JSON object a line.")] = None,
    output: Annotated[str | None, typer.Option(help="With --batch: where the answers go.")] = None,
    at_once: Annotated[
        int | None, typer.Option(help="With --batch: prompts computed at once; 1: one by one.", show_default="16")
    ] = None,
) -> None:
    """Go on from a prompt, streaming; or from each prompt of a file.

    A line of --batch is {"prompt": "..."} or {"ids": [5, 9]}, with "max_tokens" if wanted; its answer is a line of
    --output; without it, those of a.jsonl go to a.answers.jsonl. Stopped, the same command goes on.

    Where --temperature, --top-p or --top-k is not given, the checkpoint's generation_config.json decides; where that
    does not ask for drawing (do_sample), the likeliest token is taken each time.
    """
    from nemotron_h.config.engine import EngineConfig
    from nemotron_h.config.generation import Generation

    check_ways({"PROMPT": prompt, "--prompt-file": prompt_file, "--ids": ids, "--batch": batch})
    check_flags(ids, stop, chat, system, ignore_end)
    check_batch_flags(batch, {"output": output, "at_once": at_once}, as_json=as_json)
    for name, count in (("max_tokens", max_tokens), ("at_once", at_once)):
        if count is not None and count < 1:
            raise RequestError(f"{name}: must be 1 or above; got {count}")
    sampling = Generation().sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    engine = EngineConfig(max_running=at_once or AT_ONCE if batch is not None else 1, drafts=drafts)
    numbers = read_ids(ids) if ids is not None else []
    text = read_prompt(prompt_file) if prompt_file is not None else prompt or ""
    # after the checks: they import torch
    from nemotron_h.cli.batch import answer_batch
    from nemotron_h.cli.process import settle
    from nemotron_h.cli.pull import folder_of
    from nemotron_h.inference.batch import read_prompts
    from nemotron_h.inference.load import check_keys_values, check_precision, load, usable

    prompts = read_prompts(Path(batch)) if batch is not None else []
    check_precision(precision)
    check_keys_values(keys_values)
    usable(device)
    settle()
    model = load(folder_of(path), precision=precision, keys_values=keys_values, device=device, engine_config=engine)
    if not ignore_defaults:
        defaults = model.companions.generation
        sampling = defaults.sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    if batch is not None:
        asked = {"path": path, "chat": chat, "system": system, "stop": stop or [], "ignore_end": ignore_end}
        answers = Path(output) if output is not None else Path(batch).with_suffix(".answers.jsonl")
        answer_batch(model, prompts, answers, max_tokens, sampling, asked)
        return
    if ids is not None:
        new = list(model.tokens(numbers, max_tokens=max_tokens, sampling=sampling, ignore_end=ignore_end))
        print(json.dumps({"ids": new}) if as_json else ",".join(map(str, new)))
    elif chat:
        messages = [{"role": "system", "content": system}] if system is not None else []
        messages.append({"role": "user", "content": text})
        show(model.chat(messages, max_tokens=max_tokens, sampling=sampling, stop=stop or ()), as_json=as_json)
    else:
        pieces = model.stream(text, max_tokens=max_tokens, sampling=sampling, stop=stop or (), ignore_end=ignore_end)
        show(pieces, as_json=as_json)
    if (counts := model.engine.counts).drafted_tokens:
        LOG.info("%s", f"{counts.accepted_tokens:,} of {counts.drafted_tokens:,} drafted tokens came")


def check_ways(ways: Mapping[str, str | None]) -> None:
    """Refuse no prompt, and several."""
    given = [way for way, value in ways.items() if value is not None]
    if len(given) != 1:
        raise RequestError(f"prompt: must be given once, as {', '.join(ways)}; got {' and '.join(given) or 'none'}")


def check_flags(
    ids: str | None,
    stop: list[str] | None,
    chat: bool,
    system: str | None,
    ignore_end: bool,
) -> None:
    """Refuse what does not go together."""
    from nemotron_h.text.stream import StopStrings

    StopStrings(stop or ())  # refuses an empty one
    if ids is not None and stop:
        raise RequestError("stop: needs a text prompt; got --ids; cut the ids yourself")
    if system is not None and not chat:
        raise RequestError("system: needs --chat; got a system message for a text to go on from")
    for flag, given_too in (("--ids", ids is not None), ("--ignore-end", ignore_end)):
        if chat and given_too:
            raise RequestError(
                f"chat: must not be given with {flag}; a reply is text, and ends where the model ends it"
            )


def check_batch_flags(batch: str | None, given: Mapping[str, object], *, as_json: bool) -> None:
    """Refuse what only a file of prompts takes, and what one does not take."""
    for name, value in given.items():
        if value is not None and batch is None:
            raise RequestError(f"{name}: needs --batch; got {value} for one answer; leave it out")
    if as_json and batch is not None:
        raise RequestError("json: must not be given with --batch, whose answers are JSON lines; leave it out")


def show(pieces: Iterable[str], *, as_json: bool) -> None:
    """Text as it comes, or whole as JSON."""
    from nemotron_h.cli.summary import printable

    if as_json:
        print(json.dumps({"text": "".join(pieces)}))
        return
    for piece in pieces:
        print(printable(piece) if sys.stdout.isatty() else piece, end="", flush=True)
    print()


def read_ids(text: str) -> list[int]:
    """`5,9,13` as numbers."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise RequestError(f"ids: must be whole numbers with commas between, such as 5,9,13; got {text!r}") from None


def read_prompt(path: str) -> str:
    """A prompt file's text."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"{path}: must be UTF-8 text; got other bytes at place {error.start}") from None
    except OSError as error:
        raise RequestError(f"{path}: must be a readable file; got {error.strerror}") from None
