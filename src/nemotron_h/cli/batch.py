"""`nemotron-h generate --batch`: a file of prompts, a file of answers."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from nemotron_h.errors import NemotronError
from nemotron_h.signals import SIGNALLED, stop_signals

if TYPE_CHECKING:
    from nemotron_h.config.sampling import Sampling
    from nemotron_h.inference.batch import Prompt
    from nemotron_h.inference.load import LanguageModel
    from nemotron_h.inference.request import Request


def answer_batch(
    model: "LanguageModel",
    prompts: "Sequence[Prompt]",
    output: Path,
    max_tokens: int,
    sampling: "Sampling",
    asked: Mapping[str, Any],
) -> None:
    """Answer those prompts that the output has no answers to yet. asked: path, chat, system, stop and ignore_end.

    Leaves with 130 or 143 where a signal asked it to stop: the answers up to the first that is not whole are written.
    Leaves with 1 where some have an error for an answer.
    """
    from rich.console import Console

    from nemotron_h.cli.watch import Watch
    from nemotron_h.config.settings import to_mapping
    from nemotron_h.inference.batch import Output, answers, as_line
    from nemotron_h.model import fingerprint

    requests = []
    for prompt in prompts:
        try:
            requests.append(as_request(model, prompt, max_tokens, sampling, asked))
            model.engine.check(requests[-1])
        except NemotronError as error:
            raise type(error)(f"{prompt.where}: {error}") from None
    settings = {**asked, "max_tokens": max_tokens, "sampling": to_mapping(sampling)}
    settings |= {"precision": str(model.model.compute_dtype), "prompts": digest(requests)}
    settings |= {"weights": fingerprint.weights(model.model), "keys_values": fingerprint.keys_values(model.model)}
    counts = model.engine.counts
    with (
        closing(Output(output, settings)) as done,
        Watch(Console(stderr=True), "generate") as watch,
        stop_signals() as stopped,
    ):
        before, total = done.count, len(requests)
        if before:
            watch.say(f"{before:,} of {total:,} prompts are answered; going on")

        def show() -> bool:
            new = done.count - before
            left = f"  about {watch.seconds / new * (total - done.count):.0f} s to go" if new else ""
            note = f"{done.count:,} of {total:,} answers  {counts.read_tokens / watch.seconds:,.0f} tokens/s{left}"
            watch.fraction(done.count / total if total else 1.0, note)
            return not stopped

        for answer in answers(model.engine, requests[before:], show):
            done.append(as_line(answer))
        if stopped:
            watch.say(f"stopped after {done.count:,} of {total:,} answers; {watch.again} goes on")
            raise typer.Exit(SIGNALLED + stopped[0])
        reused = f"{counts.reused_tokens:,} of {counts.prompt_tokens:,} tokens of prompts reused"
        watch.say(f"{total:,} answers in {output}; {reused}")
        if counts.drafted_tokens:
            watch.say(f"{counts.accepted_tokens:,} of {counts.drafted_tokens:,} drafted tokens came")
        if done.failed:
            watch.say(f'{done.failed:,} of them could not be given: "error" says why')
            raise typer.Exit(1)


def digest(requests: "Sequence[Request]") -> str:
    """Of what is to be answered."""
    content = json.dumps([[list(request.ids), request.max_tokens] for request in requests])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def as_request(
    model: "LanguageModel", prompt: "Prompt", max_tokens: int, sampling: "Sampling", asked: Mapping[str, Any]
) -> "Request":
    if prompt.ids is not None:
        ids = prompt.ids
    elif asked["chat"]:
        messages = [{"role": "system", "content": asked["system"]}] if asked["system"] is not None else []
        messages.append({"role": "user", "content": prompt.prompt})
        ids = model.template.encode(messages, add_generation_prompt=True).ids
    else:
        assert prompt.prompt is not None
        ids = model.prompt_ids(prompt.prompt)
    return model.request(
        ids,
        max_tokens=prompt.max_tokens or max_tokens,
        sampling=sampling,
        stop=asked["stop"],
        ignore_end=asked["ignore_end"],
        logprobs=0,
    )
