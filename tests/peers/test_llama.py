"""llama.cpp reads a file that we wrote: our logits to the format's error, our greedy tokens, our token ids of a text.

It lives in an environment of its own, whose Python NEMOTRON_H_LLAMA names: `benchmarks/peers.sh` makes it.
"""

import json
import os
import subprocess
import sys
import textwrap
import tokenize
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_h.checkpoint.load import load
from nemotron_h.checkpoint.save import save
from nemotron_h.config.gguf import GgufType
from nemotron_h.convert.gguf import name_of, write_gguf
from nemotron_h.convert.gguf_vocabulary import BYTE_LEVEL, PATTERNS
from nemotron_h.model.hybrid import Hybrid
from nemotron_h.text.tokenizer import Tokenizer
from tests.convert.checkpoints import CONTROL, DOCUMENTS, model_of, tokenizer_of
from tests.convert.test_gguf import keys_of
from tests.model import shapes

PYTHON = os.environ.get("NEMOTRON_H_LLAMA", "")
NEW = 48
LENGTHS = (1, 7, 300)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.parity,
    pytest.mark.skipif(not PYTHON, reason="NEMOTRON_H_LLAMA names no Python that has llama.cpp"),
]


@dataclass
class Answer:
    ids: list[list[int]]  # of each text alone
    begun: list[list[int]]  # of each text as a prompt
    pieces: list[list[list[int]]]  # the bytes of each token of what was to be decoded
    ends: list[int]
    keys: dict[str, str]  # every key of the file but lists, in llama.cpp's words
    template: str
    attributes: list[int]  # of each token
    tokens: list[list[int]]  # greedy, of each prompt
    logits: list[Tensor]  # float32, of each prompt's tokens and of what was generated but the last


def llama_on(
    file: Path, *, prompts: list[list[int]] | None = None, texts: tuple[str, ...] = (), decoded: tuple[int, ...] = ()
) -> Answer:
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    arrays = file.with_suffix(".npz")
    asked = {"prompts": prompts or [], "new": NEW, "texts": texts, "decoded": [decoded]}
    done = subprocess.run(
        [PYTHON, str(Path(__file__).with_name("ask_llama.py")), str(file), str(arrays)],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=600,
    )
    answers = [line for line in done.stdout.splitlines() if line.startswith("answer ")]
    assert answers, done.stderr[-3000:]
    held = np.load(arrays)
    logits = [torch.from_numpy(held[f"logits_{i}"]) for i in range(len(asked["prompts"]))]
    return Answer(**json.loads(answers[0].removeprefix("answer ")), logits=logits)


@cache
def learnt() -> tuple[Hybrid, Tokenizer, Tensor]:
    """A model that has seen some Python, whose next tokens are not alike; its tokenizer; ids it has not seen."""
    tokenizer = tokenizer_of()
    ids = torch.tensor(tokenizer.encode(Path(tokenize.__file__).read_text()))
    seen, unseen = ids[:-2000], ids[-2000:]
    model = model_of(dtype=torch.float32).train()
    generator = torch.Generator().manual_seed(6)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        starts = torch.randint(len(seen) - 129, (8, 1), generator=generator)
        batch = seen[starts + torch.arange(129)]
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 4, loss  # the vocabulary's evenness is 6.5
    return model.eval(), tokenizer, unseen


def as_stored(folder: Path, file: Path) -> Hybrid:
    """Our model with the matrices that the file holds."""
    model = load(folder, dtype=torch.float32)
    held = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                tensor = held[name_of(name) or name]
                values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
                parameter.copy_(torch.from_numpy(values))
    return model


# Root mean square of the difference, as a share of the logits' spread: against our model, and against our model with
# the file's own matrices. What is left of the latter are activations, which llama.cpp rounds to bfloat16 or to 8 bits.
@pytest.mark.parametrize(
    ("type", "far", "far_as_stored"),
    [(GgufType.BF16, 0.01, 0.01), (GgufType.Q8_0, 0.04, 0.03), (GgufType.Q4_0, 0.3, 0.03)],
)
def test_logits_and_greedy_tokens(type: GgufType, far: float, far_as_stored: float, tmp_path: Path) -> None:
    model, tokenizer, unseen = learnt()
    save(model, tmp_path / "m", tokenizer=tokenizer)
    file = tmp_path / "m.gguf"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_gguf(tmp_path / "m", file, matrices=type)
    prompts = [[1, *unseen[:length].tolist()] for length in LENGTHS]
    answer = llama_on(file, prompts=prompts)
    for what, ours, bound in (
        ("ours", load(tmp_path / "m", dtype=torch.float32), far),
        ("ours with the file's matrices", as_stored(tmp_path / "m", file), far_as_stored),
    ):
        read, led, same = [], 0, 0
        for ids, tokens, theirs in zip(prompts, answer.tokens, answer.logits, strict=True):
            assert len(tokens) == NEW
            with torch.no_grad():
                logits = ours(torch.tensor([ids + tokens[:-1]]))[0]
            assert (theirs - logits).square().mean().sqrt() <= bound * logits.std(), what
            read.append((theirs - logits)[: len(ids)].abs().max())
            # what leads by more than twice the error of any logit that was read is what is generated
            top = logits[len(ids) - 1 :].topk(2)
            lead = top.values[:, 0] - top.values[:, 1] > 2 * max(read)
            chosen = top.indices[:, 0] == torch.tensor(tokens)
            assert chosen[lead].all(), what
            led, same = led + int(lead.sum()), same + int(chosen.sum())
        error = (theirs - logits).square().mean().sqrt() / logits.std()
        sys.stdout.write(
            f"{type} against {what}: rms {error:.4f} of the spread, at most {max(read):.3f}; of {len(prompts) * NEW} "
            f"tokens {same} are ours, and all {led} that lead by more than twice that\n"
        )
        # of 4 bits against none so much is lost that no lead may be large enough
        assert led >= (0 if bound > 0.1 else 0.3) * len(prompts) * NEW


TEXTS = (
    "",
    " ",
    "Hello, world!  It's HTTPServer's 2024: we'll see; don't.",
    textwrap.dedent.__doc__ or "",
    Path(textwrap.__file__).read_text()[:3000],
    "def f(x):\n    return x ** 2\n\n\n\tif a:\r\n\r\n        b()   \n",
    "path/to//file\n///\n--- +++ === ;;; 1234567890 3.14 0x1F",
    "你好, 世界! Привет мир. 🙂👩‍👩‍👧 Grüße\u00a0aus Köln",
    "</s><SPECIAL_3><unk> <s>",
    "\x00\x01\x7f",
)


@pytest.mark.parametrize("name", [*(pieces.name for pieces in PATTERNS.values()), BYTE_LEVEL.name])
def test_ids_of_a_text(name: str, tmp_path: Path) -> None:
    """Names of control tokens stay text; bytes come back; a text ends where ours does."""
    tokenizer = tokenizer_of(name)
    save(model_of(), tmp_path / "m", tokenizer=tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_gguf(tmp_path / "m", tmp_path / "m.gguf")
    shown = tuple(range(len(CONTROL), tokenizer.vocab_size))
    answer = llama_on(tmp_path / "m.gguf", texts=TEXTS, decoded=(*range(len(CONTROL)), *shown))
    ids = tokenizer.encode_batch(TEXTS)
    for text, ours, theirs, begun in zip(TEXTS, ids, answer.ids, answer.begun, strict=True):
        assert theirs == ours, text
        assert begun == [1, *ours], text
    assert [bytes(piece) for piece in answer.pieces[0]] == [b""] * len(CONTROL) + [*map(tokenizer.token_bytes, shown)]
    assert answer.ends == [2]


def test_what_is_said_of_the_familys_pattern_is_so(tmp_path: Path) -> None:
    """A warning names the texts that llama.cpp cuts otherwise. Once it does not, the warning goes."""
    text = "cafe\u0301s"
    tokenizer = tokenizer_of(documents=[*DOCUMENTS, f" {text}" * 1000])
    save(model_of(), tmp_path / "m", tokenizer=tokenizer)
    with pytest.warns(UserWarning, match="cuts words at combining marks, where this tokenizer does not"):
        write_gguf(tmp_path / "m", tmp_path / "m.gguf")
    [theirs] = llama_on(tmp_path / "m.gguf", texts=(text,)).ids
    assert theirs != tokenizer.encode(text)
    assert tokenizer.decode(theirs) == text


def test_without_a_tokenizer(tmp_path: Path) -> None:
    model, _, unseen = learnt()
    save(model, tmp_path / "m")
    with pytest.warns(UserWarning, match=r"has no tokenizer\.json"):
        write_gguf(tmp_path / "m", tmp_path / "m.gguf")
    [tokens] = llama_on(tmp_path / "m.gguf", prompts=[unseen[:20].tolist()]).tokens
    assert len(tokens) == NEW


CONTROL_TOKEN = 1 << 3  # llama.h: LLAMA_TOKEN_ATTR_CONTROL


def test_every_key_is_read_as_it_is_meant(tmp_path: Path) -> None:
    """Ends, how tokens are drawn, the template, which tokens are control ones; and each single value of the file."""
    model, tokenizer = model_of(), tokenizer_of()
    save(model, tmp_path / "m", tokenizer=tokenizer)
    stated = {"eos_token_id": [2, 3], "do_sample": True, "temperature": 0.5, "repetition_penalty": 1.25}
    (tmp_path / "m" / "generation_config.json").write_text(json.dumps(stated))
    (tmp_path / "m" / "chat_template.jinja").write_text("{{ messages }}")
    file = tmp_path / "m.gguf"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_gguf(tmp_path / "m", file)
    answer, written = llama_on(file), keys_of(file)
    for key, value in written.items():
        theirs = answer.keys.get(key)
        if isinstance(value, list):
            continue
        assert theirs is not None, key
        if isinstance(value, bool):
            assert theirs == str(value).lower(), key
        elif isinstance(value, str):
            assert theirs == value, key
        else:
            assert float(theirs) == pytest.approx(value, abs=1e-6), key
    assert (answer.ends, answer.template) == ([2, 3], "{{ messages }}")
    control = [token for token, own in enumerate(answer.attributes) if own & CONTROL_TOKEN]
    assert control == list(range(len(CONTROL)))
    assert float(answer.keys["general.sampling.temp"]) == 0.5
    assert answer.keys["general.sampling.penalty_last_n"] == "-1"


@pytest.mark.parametrize("name", ["8b", "4b", "nano", "47b", "56b", "tied"])
def test_every_shape_of_the_family(name: str, tmp_path: Path) -> None:
    """Widths that are no multiple of a block, many groups, a tied head, an attention wider than the stream."""
    model = shapes.model(name)
    save(model, tmp_path / "m")
    prompts = [shapes.random_tokens(1, length, seed=length)[0].tolist() for length in (1, 70)]
    for type in GgufType:
        file = tmp_path / f"{type}.gguf"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            write_gguf(tmp_path / "m", file, matrices=type, with_tokenizer=False)
        answer, ours = llama_on(file, prompts=prompts), load(tmp_path / "m", dtype=torch.float32)
        if type != GgufType.BF16:
            ours = as_stored(tmp_path / "m", file)
        for ids, tokens, theirs in zip(prompts, answer.tokens, answer.logits, strict=True):
            with torch.no_grad():
                logits = ours(torch.tensor([ids + tokens[:-1]]))[0]
            far = (theirs - logits).square().mean().sqrt() / logits.std()
            sys.stdout.write(f"{name}, {type}, {len(ids)} tokens: rms {far:.4f} of the spread\n")
            assert far < (0.02 if type == GgufType.BF16 else 0.08)
