"""Train a small hybrid on this folder's own Python files for a few steps, save it, load it, and let it write.

python examples/train_and_write.py [FOLDER WITH TEXTS] [FOLDER OF THE RUN]
"""

import sys
from pathlib import Path

from nemotron_h import AttentionConfig, MambaConfig, MlpConfig, ModelConfig, load
from nemotron_h.config.data import CorpusConfig
from nemotron_h.config.tokenizer import TokenizerConfig
from nemotron_h.config.train import TrainConfig
from nemotron_h.data.batches import Batches, windows
from nemotron_h.data.corpus import collect, documents
from nemotron_h.data.encode import encode_documents
from nemotron_h.data.shards import Shard
from nemotron_h.text.bpe import train as train_tokenizer
from nemotron_h.training.loop import train

source = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
folder = Path(sys.argv[2] if len(sys.argv) > 2 else "runs/train_and_write")  # run again, it goes on there

collect(CorpusConfig(validation_fraction=0.2), source, folder)
texts = (document.text for document in documents(folder / "train.jsonl"))
tokenizer = train_tokenizer(texts, TokenizerConfig(vocab_size=320))
for side in ("train", "validation"):
    encode_documents(folder / f"{side}.jsonl", tokenizer, folder / side)

model = ModelConfig.from_pattern(
    "M-*-",
    hidden_size=64,
    vocab_size=320,
    mamba=MambaConfig(num_heads=4, head_dim=32, state_size=32, num_groups=2),
    attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=32),
    mlp=MlpConfig(intermediate_size=128),
)
settings = TrainConfig(steps=20, sequence_length=128, batch_size=4, learning_rate=5e-3, warmup_fraction=0.1)
held_out = Shard(folder / "validation")
trained = train(
    model,
    settings,
    Batches(Shard(folder / "train"), settings.sequence_length, settings.batch_size, seed=0),
    lambda limit: windows(held_out, settings.sequence_length, settings.batch_size, limit=limit),
    folder / "run",
    tokenizer=tokenizer,
    watch=lambda progress: print(f"step {progress.step:3d}  loss {progress.loss:.3f}"),
)
print("checkpoint:", trained.checkpoint)
print(load(trained.checkpoint).generate("def", max_tokens=40, temperature=0.8))
