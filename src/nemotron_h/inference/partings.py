"""Places in a prompt where another one may part from it: a request names them, and the engine keeps a snapshot there.

    where the first message begins    the end of the system part, and of the documents in it
    where the last message begins     for another message in its place
    where the next prompt parts       before the thinking, or after the prompt where nothing is stripped

Each turn's prompt is rendered whole, by the template, which may write an earlier turn otherwise than it was read:
without its thinking. So each place is the common beginning of the prompt and another rendering. The last depends on how
the reply begins, where the tokenizer joins that to what stands before it: two beginnings are tried, and after any other
the message is read again.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from nemotron_h.errors import CheckpointError, RequestError
from nemotron_h.inference.prefix import common

if TYPE_CHECKING:
    from nemotron_h.text.template import ChatTemplate, Message

FIRST_LETTERS = ("A", "")  # of replies; one that was stopped in its thinking has none


def partings(
    template: "ChatTemplate",
    messages: "Sequence[Message]",
    ids: Sequence[int],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> list[int]:
    """Of the prompt that the template makes of messages, whose ids these are."""
    first = [place for place, message in enumerate(messages) if message["role"] != "system"][:1]
    places = {*first, len(messages) - 1}
    others = [[*messages[:place], unlike(messages[place])] for place in places]
    others += [[*messages, {"role": "assistant", "content": said}, user("a")] for said in FIRST_LETTERS]
    found, keys = set(), np.array(ids)
    for other in others:
        with suppress(RequestError, CheckpointError):  # what a template does not take, no prompt will be
            prompt = template.encode(other, tools=tools, variables=variables, add_generation_prompt=True)
            found.add(common(keys, np.array(prompt.ids)))
    return sorted(found)


def user(text: str) -> "Message":
    return {"role": "user", "content": text}


def unlike(message: "Message") -> "Message":
    """One of that role that begins otherwise."""
    text = message.get("content")
    return {"role": message["role"], "content": "b" if isinstance(text, str) and text.lstrip().startswith("a") else "a"}
