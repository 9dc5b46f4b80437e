"""Runs in vLLM's own environment: token ids come by stdin, greedy tokens and the prompt's log-probabilities go back."""

import json
import sys

from vllm import LLM, SamplingParams

if __name__ == "__main__":
    asked = json.loads(sys.stdin.read())
    model = LLM(sys.argv[1], skip_tokenizer_init=True, dtype="bfloat16", enforce_eager=True, max_model_len=512)
    settings = SamplingParams(
        temperature=0, max_tokens=asked["max_tokens"], prompt_logprobs=0, detokenize=False, ignore_eos=True
    )
    answers = []
    for ids in asked["prompts"]:
        out = model.generate({"prompt_token_ids": ids}, settings, use_tqdm=False)[0]
        scores = [position[token].logprob for token, position in zip(ids[1:], out.prompt_logprobs[1:], strict=True)]
        answers.append({"tokens": list(out.outputs[0].token_ids), "logprobs": scores})
    sys.stdout.write(f"answer {json.dumps(answers)}\n")
