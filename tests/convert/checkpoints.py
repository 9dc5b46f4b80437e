"""Small checkpoints with tokenizers whose text is cut as in other programs."""

import inspect
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers

from nemotron_h.checkpoint.save import save
from nemotron_h.config.model import AttentionConfig, MambaConfig, MlpConfig, ModelConfig
from nemotron_h.convert.gguf_vocabulary import PATTERNS
from nemotron_h.model.hybrid import Hybrid
from nemotron_h.model.init import initialise
from nemotron_h.text.tokenizer import Tokenizer

CONTROL = ["<unk>", "<s>", "</s>", "<SPECIAL_3>"]
PROSE = "Schöne Grüße aus Köln. 你好, 世界! Привет. 🙂👩‍👩‍👧 It's HTTPServer's 2024, we'll see.\n"
DOCUMENTS = [inspect.getsource(textwrap), PROSE * 40]
REGEX = {pieces.name: regex for regex, pieces in PATTERNS.items()}

CONFIG = ModelConfig.from_pattern(
    "M-*M",
    hidden_size=64,
    vocab_size=704,
    mamba=MambaConfig(num_heads=4, head_dim=32, state_size=16, num_groups=2),
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=32),
    mlp=MlpConfig(intermediate_size=96),
    max_positions=4096,
    norm_epsilon=1e-4,
    bos_token_id=1,
    eos_token_ids=(2,),
    pad_token_id=0,
)


def tokenizer_of(pieces: str = "tekken", documents: Sequence[str] = DOCUMENTS, **settings: Any) -> Tokenizer:
    """A trained tokenizer of 700 ids, whose text is cut as llama.cpp does by that name."""
    engine = tokenizers.Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pieces not in REGEX)
    split = [pre_tokenizers.Split(tokenizers.Regex(REGEX[pieces]), behavior="isolated")] if pieces in REGEX else []
    engine.pre_tokenizer = pre_tokenizers.Sequence([*split, byte_level])
    engine.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=CONTROL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    engine.train_from_iterator(documents, trainer)
    return Tokenizer(engine.to_str().encode(), json.dumps(settings).encode() if settings else None)


def changed(tokenizer: Tokenizer, folder: Path, change: Any) -> Tokenizer:
    """The same after change(the content of its tokenizer.json)."""
    tokenizer.save(folder)
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    return Tokenizer.load(folder)


def model_of(config: ModelConfig = CONFIG, dtype: torch.dtype = torch.bfloat16) -> Hybrid:
    """Weights of a fixed seed, none of them alike: conv biases and norms too."""
    model = Hybrid(config, dtype=dtype)
    initialise(model, seed=4)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            if name.endswith(("proj.weight", "lm_head.weight")):
                parameter.mul_(3)  # so that every layer matters
    return model


def checkpoint_of(folder: Path, model: Hybrid, tokenizer: Tokenizer | None, dtype: torch.dtype) -> Path:
    save(model, folder, tokenizer=tokenizer, dtype=dtype)
    return folder
