"""Settings of a corpus, its tokenizer, its shards, and the baselines measured on it."""

from nemotron_h.config.settings import settings


@settings
class CorpusConfig:
    """Which files become documents, and how many are held out."""

    validation_fraction: float = 0.03  # of the documents' bytes, chosen by content
    max_document_bytes: int = 1_000_000  # longer files are tables, not prose; left out and counted
