"""Runs in llama.cpp's own environment: token ids and texts come by stdin; logits, greedy tokens and ids go back.

ask_llama.py FILE.gguf LOGITS.npz: for prompt number i, `logits_i` has a row for each of its tokens, read at once, and
one for each token that was generated after them, one by one, but the last.
"""

import json
import sys
from ctypes import c_int8

import llama_cpp as api
import numpy as np


def main() -> None:
    asked = json.loads(sys.stdin.read())
    api.llama_backend_init()
    model = api.llama_model_load_from_file(sys.argv[1].encode(), api.llama_model_default_params())
    if not model:
        sys.exit("the model does not load")
    vocabulary = api.llama_model_get_vocab(model)
    answer = {
        "ids": [tokenized(vocabulary, text, False) for text in asked["texts"]],
        "begun": [tokenized(vocabulary, text, True) for text in asked["texts"]],
        "pieces": [pieces(vocabulary, ids) for ids in asked["decoded"]],
        "ends": [i for i in range(api.llama_vocab_n_tokens(vocabulary)) if api.llama_vocab_is_eog(vocabulary, i)],
        "keys": keys(model),
        "template": (api.llama_model_chat_template(model, None) or b"").decode(),
        "attributes": attributes(vocabulary),
        "tokens": [],
    }
    logits = {}
    for number, ids in enumerate(asked["prompts"]):
        tokens, rows = greedy(model, vocabulary, ids, asked["new"])
        answer["tokens"].append(tokens)
        logits[f"logits_{number}"] = np.stack(rows)
    np.savez(sys.argv[2], **logits)
    sys.stdout.write(f"answer {json.dumps(answer)}\n")


def attributes(vocabulary: object) -> list[int]:
    """Of each token, where tokens have any."""
    if api.llama_vocab_type(vocabulary) == api.LLAMA_VOCAB_TYPE_NONE:
        return []
    return [api.llama_vocab_get_attr(vocabulary, i) for i in range(api.llama_vocab_n_tokens(vocabulary))]


def keys(model: object) -> dict[str, str]:
    """Every key of the file but lists, as it has read it, in words."""
    found = {}
    room = api.ctypes.create_string_buffer(2**16)
    for index in range(api.llama_model_meta_count(model)):
        api.llama_model_meta_key_by_index(model, index, room, len(room))
        key = room.value.decode()
        api.llama_model_meta_val_str_by_index(model, index, room, len(room))
        found[key] = room.value.decode()
    return found


def tokenized(vocabulary: object, text: str, begun: bool) -> list[int]:
    """Of text alone, or as a prompt begins; names of control tokens are text."""
    content = text.encode()
    room = (api.llama_token * (len(content) + 8))()
    count = api.llama_tokenize(vocabulary, content, len(content), room, len(room), begun, False)
    assert count >= 0, count
    return list(room[:count])


def pieces(vocabulary: object, ids: list[int]) -> list[list[int]]:
    """The bytes of each token; none of those that are not shown."""
    found = []
    for token in ids:
        room = (c_int8 * 256)()
        count = api.llama_token_to_piece(vocabulary, token, api.ctypes.cast(room, api.ctypes.c_char_p), 256, 0, False)
        assert count >= 0, count
        found.append([byte % 256 for byte in room[:count]])
    return found


def greedy(model: object, vocabulary: object, ids: list[int], new: int) -> tuple[list[int], list[np.ndarray]]:
    settings = api.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = len(ids) + new
    settings.n_threads = settings.n_threads_batch = 2
    settings.type_k = settings.type_v = api.GGML_TYPE_F32
    context = api.llama_init_from_model(model, settings)
    assert context
    size = api.llama_vocab_n_tokens(vocabulary)
    batch = api.llama_batch_init(len(ids), 0, 1)
    tokens: list[int] = []
    rows: list[np.ndarray] = []
    some, place = ids, 0
    while True:
        batch.n_tokens = len(some)
        for i, token in enumerate(some):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, place + i, 1, True
            batch.seq_id[i][0] = 0
        assert api.llama_decode(context, batch) == 0
        rows += [np.ctypeslib.as_array(api.llama_get_logits_ith(context, i), (size,)).copy() for i in range(len(some))]
        tokens.append(int(rows[-1].argmax()))
        place += len(some)
        if len(tokens) >= new:
            break
        some = tokens[-1:]
    api.llama_batch_free(batch)
    api.llama_free(context)
    return tokens, rows


if __name__ == "__main__":
    main()
