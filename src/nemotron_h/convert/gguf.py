"""A checkpoint as one GGUF file, which llama.cpp reads.

    backbone.layers.7.mixer.A_log   (heads)                blk.7.ssm_a             (heads, 1), -exp(A_log)
    backbone.layers.7.mixer.D       (heads)                blk.7.ssm_d             (heads, 1)
    ...mixer.conv1d.weight          (channels, 1, kernel)  blk.7.ssm_conv1d.weight (channels, kernel)
    ...mixer.norm.weight            (inner)                blk.7.ssm_norm.weight   (groups, inner / groups)

Other shapes stay. Matrices are stored in the type asked for, all else in float32. The tensors go one at a time, and a
portion of rows at once, from the mapped files into the open one.
Format: ggml's `docs/gguf.md`; names and shapes: llama.cpp's `src/llama-arch.cpp` and `src/models/nemotron-h.cpp`.
"""

import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from nemotron_h.checkpoint.card import LICENCE_KEYS, front_matter
from nemotron_h.checkpoint.companions import Companions, end_ids, read_companions
from nemotron_h.checkpoint.files import new_file
from nemotron_h.checkpoint.load import Source, checkpoint_folder, open_source
from nemotron_h.checkpoint.names import EMBEDDING, HEAD
from nemotron_h.checkpoint.save import FLOATS
from nemotron_h.config.generation import GENERATION_FILE, STEERING, Generation
from nemotron_h.config.gguf import ARCHITECTURE, GgufType, GgufValue, to_gguf
from nemotron_h.config.model import MambaConfig, ModelConfig
from nemotron_h.convert.gguf_vocabulary import FAMILY, no_vocabulary, vocabulary
from nemotron_h.errors import MissingExtraError, UnsupportedError
from nemotron_h.text.tokenizer import TOKENIZER_FILE, Tokenizer, check_fits

NAMES = {EMBEDDING: "token_embd.weight", "backbone.norm_f.weight": "output_norm.weight", HEAD: "output.weight"}
LAYER = "backbone.layers."
LAYER_NAMES = {
    "norm.weight": "attn_norm.weight",  # so for layers of every kind
    "mixer.in_proj.weight": "ssm_in.weight",
    "mixer.conv1d.weight": "ssm_conv1d.weight",
    "mixer.conv1d.bias": "ssm_conv1d.bias",
    "mixer.dt_bias": "ssm_dt.bias",
    "mixer.A_log": "ssm_a",
    "mixer.D": "ssm_d",
    "mixer.norm.weight": "ssm_norm.weight",
    "mixer.out_proj.weight": "ssm_out.weight",
    "mixer.q_proj.weight": "attn_q.weight",
    "mixer.k_proj.weight": "attn_k.weight",
    "mixer.v_proj.weight": "attn_v.weight",
    "mixer.o_proj.weight": "attn_output.weight",
    "mixer.up_proj.weight": "ffn_up.weight",
    "mixer.down_proj.weight": "ffn_down.weight",
}
F32, BF16, Q8_0 = "F32", "BF16", "Q8_0"  # as the package names the formats of tensors; it knows more
AT_ONCE = 2**21  # weights in work at a time: 8 MB in float32, and some times that in the quantiser


@dataclass(frozen=True)
class Stored:
    """One tensor of the file."""

    source: str  # its published name
    name: str
    shape: tuple[int, ...]
    format: str
    size_bytes: int


def write_gguf(
    folder: str | Path,
    path: str | Path,
    *,
    matrices: GgufType = GgufType.BF16,
    with_tokenizer: bool = True,
    progress: Callable[[float, str], None] | None = None,
) -> None:
    """Write a checkpoint folder as a new GGUF file, whole or not at all.

    matrices: how they are stored; one whose rows are no multiple of a block stays in bfloat16, and is said.
    with_tokenizer: False, or a folder without one, writes a file that takes and gives token ids alone.
    progress: told the fraction written, and the tensor at hand.
    Raises: UnsupportedError naming what llama.cpp cannot represent; MissingExtraError; CheckpointError where the folder
    is damaged or the file exists; CapacityError where the disk is too small.
    """
    gguf = package()
    folder = checkpoint_folder(folder)
    source = open_source(folder)
    companions = read_companions(folder)
    tokenizer = Tokenizer.load(folder) if with_tokenizer and (folder / TOKENIZER_FILE).exists() else None
    keys = {
        **general_keys(gguf, companions, matrices),
        **to_gguf(source.config),
        **vocabulary_keys(source.config, companions, tokenizer),
    }
    tensors = [stored(gguf, name, source, matrices) for name in source.names]
    source.check_head(torch.bfloat16)
    say_what_differs(tensors, matrices, companions, keys, folder if tokenizer is None and with_tokenizer else None)
    total = sum(tensor.size_bytes for tensor in tensors)
    with new_file(Path(path), need_bytes=total) as file:
        alignment = begin(gguf, file, keys, tensors)
        done = 0
        for tensor in tensors:
            for portion in portions(gguf, tensor, source):
                file.write(portion)
                done += len(portion)
                if progress is not None:
                    progress(done / total, tensor.name)
            file.write(bytes(-tensor.size_bytes % alignment))


def package() -> Any:
    """The gguf package. Raises: MissingExtraError."""
    try:
        return import_module("gguf")
    except ModuleNotFoundError as error:
        if error.name != "gguf":
            raise
        raise MissingExtraError(
            "gguf: must be installed to write GGUF files; found no such package; pip install nemotron-h[gguf]"
        ) from None


def name_of(source_name: str) -> str | None:
    """llama.cpp's name of a parameter; None: it has none."""
    if not source_name.startswith(LAYER):
        return NAMES.get(source_name)
    number, _, rest = source_name.removeprefix(LAYER).partition(".")
    return f"blk.{number}.{LAYER_NAMES[rest]}" if rest in LAYER_NAMES else None


def stored(gguf: Any, source_name: str, source: Source, matrices: GgufType) -> Stored:
    """What becomes of a parameter. Raises: UnsupportedError where it is a part of a matrix, and no plain weight."""
    shape, name = tuple(source.wanted[source_name].shape), name_of(source_name)
    number = source_name.removeprefix(LAYER).partition(".")[0]
    layer = source.config.layers[int(number)] if source_name.startswith(LAYER) else None
    if name is None:
        raise UnsupportedError(
            f"{source_name}: must be a plain weight for a GGUF file, FP8 or NVFP4; got a matrix in another format; "
            "convert the checkpoint before quantisation"
        )
    format = F32
    if len(shape) == 2:
        quantised = matrices != GgufType.BF16
        format = Q8_0 if quantised and source_name in (EMBEDDING, HEAD) else matrices.upper()
        format = format if shape[1] % block_of(gguf, format)[0] == 0 else BF16
    elif isinstance(layer, MambaConfig):
        by_name = {
            "A_log": (layer.num_heads, 1),
            "D": (layer.num_heads, 1),
            "conv1d.weight": (layer.conv_channels, layer.conv_kernel),
            "mixer.norm.weight": (layer.num_groups, layer.inner_size // layer.num_groups),
        }
        shape = next((new for end, new in by_name.items() if source_name.endswith(end)), shape)
    block, block_bytes = block_of(gguf, format)
    return Stored(source_name, name, shape, format, math.prod(shape) // block * block_bytes)


def portions(gguf: Any, tensor: Stored, source: Source) -> Iterator[bytes]:
    """The bytes of a tensor, some rows at a time."""
    if tensor.format in (F32, BF16):
        values = source.read(tensor.source, torch.float32 if tensor.format == F32 else torch.bfloat16)
    else:  # as stored where it can be, so that no second copy of it is made
        own = source.weights.tensor(tensor.source).dtype
        values = source.read(tensor.source, own if own in FLOATS else torch.float32)
    rows = values.reshape(tensor.shape)
    for some in rows.split(max(1, AT_ONCE // math.prod(tensor.shape[1:]))):
        yield encoded(gguf, -torch.exp(some) if tensor.source.endswith("A_log") else some, tensor.format)


def encoded(gguf: Any, rows: Tensor, format: str) -> bytes:
    """Rows as they lie in the file, little-endian."""
    if format == BF16:
        return rows.contiguous().view(torch.int16).numpy().astype("<i2", copy=False).tobytes()
    values = rows.float().numpy()
    if format == F32:
        return values.astype("<f4", copy=False).tobytes()
    content: bytes = gguf.quants.quantize(values, gguf.GGMLQuantizationType[format]).tobytes()
    return content


def block_of(gguf: Any, format: str) -> tuple[int, int]:
    """Weights of a row that are stored together, and their bytes."""
    block, size_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[format]]
    return block, size_bytes


def begin(gguf: Any, file: BinaryIO, keys: Mapping[str, GgufValue], tensors: Sequence[Stored]) -> int:
    """Write all that stands before the tensors into an open file. Returns: what their places are a multiple of."""
    writer = gguf.GGUFWriter(None, ARCHITECTURE)
    for key, value in keys.items():
        add(gguf, writer, key, value)
    for tensor in tensors:
        format = gguf.GGMLQuantizationType[tensor.format]
        writer.add_tensor_info(tensor.name, tensor.shape, None, tensor.size_bytes, raw_dtype=format)
    writer.write_header_to_file(Path(file.name))
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    place = file.seek(0, os.SEEK_END)
    file.write(bytes(-place % writer.data_alignment))
    alignment: int = writer.data_alignment
    return alignment


def add(gguf: Any, writer: Any, key: str, value: GgufValue) -> None:
    """One key, in the type that llama.cpp asks for."""
    if isinstance(value, list):
        writer.add_key_value(key, value, gguf.GGUFValueType.ARRAY)  # of int32 or strings
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        (writer.add_uint32 if value >= 0 else writer.add_int32)(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_key_value(key, value, gguf.GGUFValueType.STRING)


def general_keys(gguf: Any, companions: Companions, matrices: GgufType) -> Mapping[str, GgufValue]:
    """What the file is, what it was made from and under which licence, and how its tokens are drawn by default."""
    values: dict[str, GgufValue] = {
        "type": "model",
        "file_type": int(gguf.LlamaFileType[f"MOSTLY_{matrices.upper()}"]),
        "quantization_version": gguf.GGML_QUANT_VERSION,
    }
    if companions.parent is not None:
        values["name"] = companions.parent.rpartition("/")[2]
    stated = front_matter(companions.parent_card) if companions.parent_card is not None else {}
    for key in LICENCE_KEYS:
        if key in stated:
            said = stated[key]
            values[key.replace("_", ".")] = ", ".join(said) if isinstance(said, list) else said
    values |= {f"sampling.{key}": value for key, value in sampling_keys(companions.generation).items()}
    return {f"general.{key}": value for key, value in values.items()}


def sampling_keys(drawn: Generation) -> Mapping[str, GgufValue]:
    """How tokens are drawn by default, where the checkpoint says anything of it: what it leaves open as `sampling` has
    it, else llama.cpp's own defaults would stand there."""
    penalties: dict[str, GgufValue] = {}
    if drawn.repetition_penalty is not None:
        penalties = {"penalty_repeat": drawn.repetition_penalty, "penalty_last_n": -1}  # -1: of all tokens, as here
    if not drawn.do_sample:
        return {"temp": 0.0, **penalties} if penalties else {}
    return {
        "temp": 1.0 if drawn.temperature is None else drawn.temperature,
        "top_k": drawn.top_k or 0,  # 0: all of them
        "top_p": 1.0 if drawn.top_p is None else drawn.top_p,
        "min_p": drawn.min_p or 0.0,
        **penalties,
    }


def vocabulary_keys(
    config: ModelConfig, companions: Companions, tokenizer: Tokenizer | None
) -> Mapping[str, GgufValue]:
    """Of the checkpoint's tokenizer, where it is wanted and there."""
    if tokenizer is None:
        return no_vocabulary()
    check_fits(tokenizer, config.vocab_size)
    return vocabulary(
        tokenizer,
        config.vocab_size,
        bos=config.bos_token_id,
        ends=end_ids(companions.generation, config, tokenizer),
        pad=config.pad_token_id,
        chat_template=companions.chat_template,
    )


def say_what_differs(
    tensors: Sequence[Stored],
    matrices: GgufType,
    companions: Companions,
    keys: Mapping[str, GgufValue],
    without_tokenizer: Path | None,
) -> None:
    """A warning for each thing that the file has otherwise than its reader may expect."""
    plain = [tensor for tensor in tensors if tensor.format == BF16 and matrices != GgufType.BF16]
    said = []
    if plain:
        said.append(
            f"{plain[0].name}: stays in bfloat16, as {len(plain)} matrices do whose rows are no multiple of a block; "
            f"this one's are {plain[0].shape[1]} long"
        )
    if without_tokenizer is not None:
        said.append(f"{without_tokenizer}: has no {TOKENIZER_FILE}; the file takes and gives token ids alone")
    if keys.get("tokenizer.ggml.pre") == FAMILY.name:
        said.append(
            f"{TOKENIZER_FILE}: llama.cpp cuts words at combining marks, where this tokenizer does not; "
            "texts with them may get other tokens there"
        )
    drawn = companions.generation
    without = [key for key in ("presence_penalty", "frequency_penalty") if getattr(drawn, key)]
    without += [key for key in STEERING if drawn.others.get(key) is not None]
    if without:
        said.append(f"{GENERATION_FILE}: {', '.join(without)}: has no key in a GGUF file; give it to llama.cpp")
    if companions.legal:
        said.append(f"{', '.join(companions.legal)}: binds this file too and is not in it; pass it on beside it")
    for line in said:
        warnings.warn(line, stacklevel=3)
