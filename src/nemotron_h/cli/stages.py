"""The stages of a recipe: each calls one public function of its room and returns plain values for the record.

A stage reads what earlier ones left in the run's folder:
    corpus/{train,validation}.jsonl    tokenizer/    shards/{train,validation}.{bin,idx}    training/
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from nemotron_h.cli.watch import Watch
from nemotron_h.config.recipe import Recipe

Stage = Callable[[Recipe, Path, Watch], dict[str, Any]]


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


def train(recipe: Recipe, folder: Path, watch: Watch) -> dict[str, Any]:
    """Train the model, from its newest checkpoint where there is one."""
    import math

    from nemotron_h.cli.train import run_training

    trained = run_training(
        recipe.model_config, recipe.train, folder / "shards" / "train", folder / "shards" / "validation",
        folder / "tokenizer", folder / "training", watch,
    )  # fmt: skip
    held_out = validation_bytes(folder)
    nats = trained.validation_nats
    bits_per_byte = nats / math.log(2) / held_out
    watch.say(f"{bits_per_byte:.4f} bits per byte on {held_out:,} held-out bytes")
    return {"bits_per_byte": bits_per_byte, "checkpoint": str(trained.checkpoint), "steps": trained.step}


def validation_bytes(folder: Path) -> int:
    """UTF-8 bytes of the held-out documents."""
    from nemotron_h.data.corpus import documents

    return sum(len(document.text.encode()) for document in documents(folder / "corpus" / "validation.jsonl"))


def samples(recipe: Recipe, folder: Path, watch: Watch) -> dict[str, Any]:
    """Let the model write."""
    from nemotron_h.checkpoint.resume import newest_step
    from nemotron_h.errors import CheckpointError
    from nemotron_h.inference.load import load

    checkpoint = newest_step(folder / "training" / "checkpoints")
    if checkpoint is None:
        raise CheckpointError(f"{folder}: must hold a checkpoint to write samples with; got none; run the train stage")
    model = load(checkpoint)
    settings, texts = recipe.samples, {}
    for number, prompt in enumerate(settings.prompts):
        texts[prompt] = model.generate(
            prompt,
            max_tokens=settings.max_tokens,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            seed=settings.seed + number,
        )
        watch.fraction((number + 1) / len(settings.prompts))
    return {"texts": texts}


STAGES: dict[str, Stage] = {
    "corpus": corpus,
    "tokenizer": tokenizer,
    "shards": shards,
    "train": train,
    "samples": samples,
}
