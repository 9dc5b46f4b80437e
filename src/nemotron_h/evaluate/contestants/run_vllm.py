"""vLLM as a contestant, in an environment of its own (`peers.sh`). Arguments: a checkpoint folder, a precision."""

import os
import random
import sys
import time

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")  # GiB; unasked it takes most of the machine's memory
os.environ.setdefault("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")  # the family has no positions: any prompt may be longer

import vllm
from contest import serve
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    model = LLM(
        sys.argv[1],
        skip_tokenizer_init=True,
        dtype=sys.argv[2],
        enforce_eager=True,  # its compiler asks for a C++ one, takes a minute, and made nothing faster where we tried
        enable_prefix_caching=False,  # with it vLLM 0.32 ends at a prompt of 2,048; and no prompt here comes twice
        max_model_len=40_000,
        max_num_seqs=16,
    )
    rng, vocab = random.Random(0), model.llm_engine.model_config.get_vocab_size()

    def serving(count: int, length: int, new: int) -> float:
        """Tokens per second that come out, of so many prompts at once."""
        prompts = [{"prompt_token_ids": [rng.randrange(vocab) for _ in range(length)]} for _ in range(count)]
        settings = SamplingParams(temperature=0, max_tokens=new, detokenize=False, ignore_eos=True)
        began = time.perf_counter()
        answers = model.generate(prompts, settings, use_tqdm=False)
        seconds = time.perf_counter() - began
        assert all(len(answer.outputs[0].token_ids) == new for answer in answers)
        return count * new / seconds

    def prefill(length: int) -> float:
        """Tokens per second of a prompt, its first new token included."""
        prompt = {"prompt_token_ids": [rng.randrange(vocab) for _ in range(length)]}
        began = time.perf_counter()
        model.generate([prompt], SamplingParams(temperature=0, max_tokens=1, detokenize=False), use_tqdm=False)
        return length / (time.perf_counter() - began)

    answers_to = {"serving": serving, "prefill": prefill}
    serve({"version": f"vLLM {vllm.__version__}"}, answers_to)
