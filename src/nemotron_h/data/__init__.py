"""From files to batches: corpus, token shards, windows in a seeded order, byte n-grams. numpy, no torch."""
