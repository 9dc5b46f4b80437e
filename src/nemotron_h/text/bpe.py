"""Learning a tokenizer: which pairs of neighbours become one token.

Text is cut into pieces, pieces into bytes; the commonest pair of neighbours inside pieces becomes a token, again and
again until the vocabulary is full. Only counts matter, so the same documents in any order give the same file, byte for
byte. More than `sample_bytes` of documents are thinned by content: the ones with the smallest hashes stay.
Source of the algorithm: Sennrich et al. 2016, arXiv:1508.07909; of the pieces: the family's pattern, see PIECES.
"""

import hashlib
import heapq
import json
from collections.abc import Iterable, Iterator

from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Engine

from nemotron_h.config.tokenizer import CONTROL_NAMES, TokenizerConfig
from nemotron_h.errors import DataError
from nemotron_h.text.tokenizer import Tokenizer, utf8

# Letters by case: `HTTPServer` is `HTTPServer`, `parseHeader` is `parse` and `Header`. Marks may go with either case.
UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
LEAD = r"[^\r\n\p{L}\p{N}]?"  # one character before a word goes with it: a space, a dot, an underscore
INDENT = r"(?:[ \t]+(?!\S))?"  # after a newline, all the blanks but the last, which goes with the word

PIECES = "|".join(
    [
        rf"{LEAD}{UPPER}*{LOWER}+",
        rf"{LEAD}{UPPER}+{LOWER}*",
        r"\p{N}",  # each digit alone
        rf" ?[^\s\p{{L}}\p{{N}}]+(?:[\r\n/]+{INDENT})?",  # punctuation with the line it ends
        rf"\s*[\r\n]+{INDENT}",
        r"\s+(?!\S)",
        r"\s+",
    ]
)


def train(documents: Iterable[str], config: TokenizerConfig) -> Tokenizer:
    """Learn a tokenizer from documents.

    Raises: DataError where there is too little text for vocab_size.
    """
    engine = Engine(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    engine.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=config.control_names,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    engine.train_from_iterator(sample(documents, config.sample_bytes), trainer)
    learnt = engine.get_vocab_size()
    if learnt < config.vocab_size:
        raise DataError(
            f"vocab_size: must be at most what the documents teach, {learnt}; got {config.vocab_size}; "
            f"give more text or ask for {learnt}"
        )
    unk, bos, eos = CONTROL_NAMES
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": unk,
        "bos_token": bos,
        "eos_token": eos,
        "clean_up_tokenization_spaces": False,
    }
    return Tokenizer(engine.to_str(pretty=True).encode(), json.dumps(settings, indent=2).encode())


def sample(documents: Iterable[str], limit_bytes: int) -> Iterator[str]:
    """Documents in the order of their content's hash, up to the one that reaches limit_bytes.

    Holds no more than that in memory, and one document beside.
    """
    kept: list[tuple[int, bytes]] = []  # a heap: the largest hash first, by its negative
    total = 0
    for document in documents:
        content = utf8(document)
        key = -int.from_bytes(hashlib.blake2b(content, digest_size=16).digest())
        heapq.heappush(kept, (key, content))
        total += len(content)
        while total - len(kept[0][1]) >= limit_bytes:
            total -= len(heapq.heappop(kept)[1])
    return (content.decode() for _, content in sorted(kept, reverse=True))
