"""Documents to a shard: each one `<s> text </s>`, in the order of the file."""

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from nemotron_h.data.corpus import documents
from nemotron_h.data.shards import ShardWriter
from nemotron_h.errors import DataError
from nemotron_h.text.tokenizer import Tokenizer

TOGETHER = 256  # documents encoded on all cores at a time


def encode_documents(
    source: Path, tokenizer: Tokenizer, name: Path, *, progress: Callable[[float], None] = lambda fraction: None
) -> int:
    """Write NAME.bin and NAME.idx from a file of JSON lines. Returns how many tokens.

    progress: called with the fraction of documents done.
    """
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    if bos is None or eos is None:
        raise DataError("tokenizer: must have <s> and </s> to mark a document's ends; got a tokenizer without")
    with source.open("rb") as lines:
        total = sum(1 for _ in lines)
    done, tokens = 0, 0
    with ShardWriter(name, vocab_size=tokenizer.vocab_size) as writer:
        for texts in _batches(source):
            for ids in tokenizer.encode_batch(texts):
                writer.add_document([bos, *ids, eos])
                tokens += len(ids) + 2
            done += len(texts)
            progress(done / total)
    return tokens


def _batches(source: Path) -> Iterator[list[str]]:
    texts = (document.text for document in documents(source))
    while batch := list(islice(texts, TOGETHER)):
        yield batch
