"""vLLM serves a folder that we saved, as saved: our greedy tokens, and our log-probabilities to bfloat16's rounding.

It lives in an environment of its own, whose Python NEMOTRON_H_VLLM names: the CPU build needs a torch of its own.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from nemotron_h.checkpoint.save import save
from nemotron_h.config.model import AttentionConfig, MambaConfig, MlpConfig, ModelConfig
from nemotron_h.config.published import Dialect
from nemotron_h.config.sampling import Sampling
from nemotron_h.inference.load import load
from nemotron_h.model.hybrid import Hybrid
from nemotron_h.model.init import initialise

PYTHON = os.environ.get("NEMOTRON_H_VLLM", "")
NEW = 24

pytestmark = [
    pytest.mark.slow,
    pytest.mark.parity,
    pytest.mark.skipif(not PYTHON, reason="NEMOTRON_H_VLLM names no Python that has vLLM"),
]


def small() -> Hybrid:
    config = ModelConfig.from_pattern(
        "M-M*-M-",
        hidden_size=256,
        vocab_size=512,
        mamba=MambaConfig(num_heads=8, head_dim=64, state_size=128, num_groups=2),
        attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=64),
        mlp=MlpConfig(intermediate_size=512),
    )
    model = Hybrid(config)
    initialise(model, seed=3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("proj.weight", "lm_head.weight")):
                parameter.mul_(3)  # so that every layer matters and the likeliest token leads clearly
    return model


def vllm_on(folder: Path, prompts: list[list[int]]) -> list[dict[str, Any]]:
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    asked = json.dumps({"prompts": prompts, "max_tokens": NEW})
    done = subprocess.run(
        [PYTHON, str(Path(__file__).with_name("ask_vllm.py")), str(folder)],
        input=asked,
        capture_output=True,
        text=True,
        check=False,
        env=environment | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        timeout=600,
    )
    answers = [line for line in done.stdout.splitlines() if line.startswith("answer ")]
    assert answers, done.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads(answers[0].removeprefix("answer "))
    return found


@pytest.mark.parametrize("dialect", Dialect)
def test_greedy_tokens_and_log_probabilities_are_ours(dialect: Dialect, tmp_path: Path) -> None:
    save(small(), tmp_path / "model", dialect=dialect)
    language = load(tmp_path / "model", precision="bfloat16")
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(512, (length,), generator=generator).tolist() for length in (9, 70, 200)]
    for ids, theirs in zip(prompts, vllm_on(tmp_path / "model", prompts), strict=True):
        with torch.no_grad():
            logits = language.model(torch.tensor([ids + theirs["tokens"]]))[0]
        ours = logits.log_softmax(-1)
        own = ours[: len(ids) - 1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        # two bfloat16 streams through seven layers; log-probabilities here reach -30
        far = (own - torch.tensor(theirs["logprobs"])).abs()
        assert far.max() < 0.25, far.max()
        assert far.mean() < 0.05, far.mean()
        for place, token in enumerate(theirs["tokens"]):
            at = logits[len(ids) - 1 + place]
            # its choice is ours, but where ours lead by less than bfloat16 tells apart
            assert at.max() - at[token] <= 2**-6 * at.abs().max(), place
        greedy = list(language.tokens(ids, max_tokens=NEW, sampling=Sampling(), ignore_end=True))
        same = next((i for i, (a, b) in enumerate(zip(greedy, theirs["tokens"], strict=True)) if a != b), NEW)
        if same < NEW:  # after the first choice between two that are as likely, texts differ
            at = logits[len(ids) - 1 + same]
            top = at.topk(2).values
            assert top[0] - top[1] <= 2**-6 * at.abs().max()
