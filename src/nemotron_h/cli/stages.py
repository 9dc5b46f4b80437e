"""The stages of a recipe: each calls public functions of its room and returns plain values for the record.

A stage reads what earlier ones left in the run's folder:
    corpus/{train,validation}.jsonl    tokenizer/    shards/{train,validation}.{bin,idx}    training/
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from nemotron_h.cli.watch import Watch
from nemotron_h.config.recipe import Recipe

Stage = Callable[[Recipe, Path, Watch], dict[str, Any]]
ORDER = 6  # of the longest byte n-grams: more gains nothing on tens of megabytes


def corpus(recipe: Recipe, folder: Path, watch: Watch) -> dict[str, Any]:
    """Collect documents, some of them held out."""
    from dataclasses import asdict

    from nemotron_h.data.corpus import collect, standard_library

    source = standard_library() if recipe.corpus.source is None else recipe.corpus.source
    report = collect(recipe.corpus, source, folder / "corpus", progress=watch.fraction)
    megabytes = (report.train_bytes + report.validation_bytes) / 1e6
    watch.say(
        f"{report.train_documents + report.validation_documents:,} documents, {megabytes:.1f} MB of {source}; "
        f"{report.validation_documents} held out, {len(report.near_copies)} of them with a near copy in training"
    )
    return {**asdict(report), "source": str(source)}


def tokenizer(recipe: Recipe, folder: Path, watch: Watch) -> dict[str, Any]:
    """Learn a byte-level BPE from the training documents."""
    from nemotron_h.data.corpus import documents
    from nemotron_h.text.bpe import train

    texts = (document.text for document in documents(folder / "corpus" / "train.jsonl"))
    learned = train(texts, recipe.tokenizer)
    learned.save(folder / "tokenizer")
    watch.say(f"{learned.vocab_size:,} tokens")
    return {"vocab_size": learned.vocab_size}


def shards(recipe: Recipe, folder: Path, watch: Watch) -> dict[str, Any]:
    """Encode both sides into token shards."""
    from nemotron_h.data.encode import encode_documents
    from nemotron_h.text.tokenizer import Tokenizer

    learned = Tokenizer.load(folder / "tokenizer")
    tokens = {}
    for side in ("train", "validation"):
        source = folder / "corpus" / f"{side}.jsonl"
        tokens[side] = encode_documents(source, learned, folder / "shards" / side, progress=watch.fraction)
    watch.say(f"{tokens['train']:,} tokens to train on, {tokens['validation']:,} held out")
    return {"tokens": tokens}


def baselines(recipe: Recipe, folder: Path, watch: Watch) -> dict[str, Any]:
    """What tables of counts and a compressor make of the held-out bytes."""
    from concurrent.futures import ThreadPoolExecutor

    from nemotron_h.data.ngram import Ngrams
    from nemotron_h.data.xz import xz_bits_per_byte

    before, held_out = texts(folder, "train"), texts(folder, "validation")
    left = False

    def go_on(done: float) -> None:
        if left:
            raise InterruptedError("the stage was left")

    # xz takes one core and lets other threads run
    with ThreadPoolExecutor(1) as pool:
        try:
            joined = b"".join(before), b"".join(held_out)
            alone = pool.submit(xz_bits_per_byte, None, joined[1], progress=go_on)
            after = pool.submit(xz_bits_per_byte, *joined, progress=go_on)
            counted = Ngrams(before, ORDER, progress=lambda done: watch.fraction(0.6 * done))
            orders = counted.bits_per_byte(held_out, progress=lambda done: watch.fraction(0.6 + 0.3 * done))
            bits = {f"byte {n}-gram": value for n, value in enumerate(orders, 1)}
            bits |= {"xz": alone.result(), "xz after the training bytes": after.result()}
        finally:
            left = True  # an interrupted stage does not wait for xz
    watch.say(f"best n-gram {min(orders):.4f} bits per byte")
    return {"bits_per_byte": bits, "best_ngram": min(orders)}


def texts(folder: Path, side: str) -> list[bytes]:
    """The documents of one side of the corpus, as bytes."""
    from nemotron_h.data.corpus import documents

    return [document.text.encode() for document in documents(folder / "corpus" / f"{side}.jsonl")]


def train(recipe: Recipe, folder: Path, watch: Watch) -> dict[str, Any]:
    """Train the model, from its newest checkpoint where there is one."""
    import math

    from nemotron_h.cli.train import run_training

    trained = run_training(
        recipe.model_config, recipe.train, folder / "shards" / "train", folder / "shards" / "validation",
        folder / "tokenizer", folder / "training", watch,
    )  # fmt: skip
    held_out = sum(map(len, texts(folder, "validation")))
    bits_per_byte = trained.validation_nats / math.log(2) / held_out
    watch.say(f"{bits_per_byte:.4f} bits per byte on {held_out:,} held-out bytes")
    return {"bits_per_byte": bits_per_byte, "checkpoint": str(trained.checkpoint), "steps": trained.step}


def samples(recipe: Recipe, folder: Path, watch: Watch) -> dict[str, Any]:
    """Let the model write."""
    from nemotron_h.checkpoint.resume import newest_step
    from nemotron_h.errors import CheckpointError
    from nemotron_h.inference.load import load

    checkpoint = newest_step(folder / "training" / "checkpoints")
    if checkpoint is None:
        raise CheckpointError(f"{folder}: must hold a checkpoint to write samples with; got none; run the train stage")
    model = load(checkpoint)
    settings, written = recipe.samples, {}
    for number, prompt in enumerate(settings.prompts):
        pieces = model.stream(prompt, max_tokens=settings.max_tokens, sampling=settings.sampling(number))
        written[prompt] = "".join(pieces)
        watch.fraction((number + 1) / len(settings.prompts))
    return {"texts": written}


STAGES: dict[str, Stage] = {
    "corpus": corpus,
    "tokenizer": tokenizer,
    "shards": shards,
    "baselines": baselines,
    "train": train,
    "samples": samples,
}
