"""Write GGUFs with the shapes of large models and no weights: sparse files that take no room.

Enough for everything that llama.cpp does before it reads tensors, such as saying what it would
allocate. The weights are all zero: nothing can be computed with them.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

import gguf
from gguf import GGMLQuantizationType as Q


def _tiny_gguf():  # in importlib mode `tests` is no package
    name = "llama_crab_tests_tiny_gguf"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            name, Path(__file__).with_name("tiny_gguf.py")
        )
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama; with experts, of a Mixtral."""

    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    n_expert: int = 0
    n_ctx_train: int = 32768


SHAPES = {
    "7B": Shape(32, 4096, 11008, 32, 32),
    "13B": Shape(40, 5120, 13824, 40, 40),
    "70B": Shape(80, 8192, 28672, 64, 8),
    "8x7B": Shape(32, 4096, 14336, 32, 8, n_expert=8),
}


def tensors(shape: Shape, n_vocab: int) -> dict[str, tuple[tuple[int, ...], Q]]:
    """Return each tensor's shape (rows first) and type, in llama.cpp's Q4_K_M mix."""
    n_kv = shape.n_embd // shape.n_head * shape.n_head_kv
    row, embd, ff = (shape.n_embd,), shape.n_embd, shape.n_ff
    found = {
        "token_embd.weight": ((n_vocab, embd), Q.Q4_K),
        "output_norm.weight": (row, Q.F32),
        "output.weight": ((n_vocab, embd), Q.Q6_K),
    }
    eighth = shape.n_layer // 8
    for layer in range(shape.n_layer):
        fine = layer < eighth or layer >= 7 * eighth or (layer - eighth) % 3 == 2
        more = Q.Q6_K if fine else Q.Q4_K
        p = f"blk.{layer}."
        found |= {
            p + "attn_norm.weight": (row, Q.F32),
            p + "attn_q.weight": ((embd, embd), Q.Q4_K),
            p + "attn_k.weight": ((n_kv, embd), Q.Q4_K),
            p + "attn_v.weight": ((n_kv, embd), more),
            p + "attn_output.weight": ((embd, embd), Q.Q4_K),
            p + "ffn_norm.weight": (row, Q.F32),
        }
        if shape.n_expert == 0:
            found |= {
                p + "ffn_gate.weight": ((ff, embd), Q.Q4_K),
                p + "ffn_up.weight": ((ff, embd), Q.Q4_K),
                p + "ffn_down.weight": ((embd, ff), more),
            }
        else:
            n = shape.n_expert
            found |= {
                p + "ffn_gate_inp.weight": ((n, embd), Q.F32),
                p + "ffn_gate_exps.weight": ((n, ff, embd), Q.Q4_K),
                p + "ffn_up_exps.weight": ((n, ff, embd), Q.Q4_K),
                p + "ffn_down_exps.weight": ((n, embd, ff), more),
            }
    return found


def n_bytes(shape: tuple[int, ...], kind: Q) -> int:
    """Return the bytes of a tensor."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    n = 1
    for part in shape:
        n *= part
    return n // block * size


def write(path: Path, shape: Shape, vocab: Path, *, whole_vocab: bool = False) -> Path:
    """Write the model with the tokenizer of `vocab`, a SentencePiece one, or a cut of it."""
    tiny = _tiny_gguf()
    tokens = tiny.spm_tokens(vocab, whole=whole_vocab)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(path.stem)
    writer.add_block_count(shape.n_layer)
    writer.add_context_length(shape.n_ctx_train)
    writer.add_embedding_length(shape.n_embd)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(shape.n_embd // shape.n_head)
    if shape.n_expert:
        writer.add_expert_count(shape.n_expert)
        writer.add_expert_used_count(2)
    writer.add_vocab_size(len(tokens.texts))
    writer.add_file_type(15)
    tiny.add_tokenizer(writer, tokens)
    end = 0
    for name, (rows, kind) in tensors(shape, len(tokens.texts)).items():
        size = n_bytes(rows, kind)
        writer.add_tensor_info(name, rows, "float32", size, raw_dtype=kind)
        end += -(-size // writer.data_alignment) * writer.data_alignment
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    start = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(-(-start // 32) * 32 + end)
    return path


if __name__ == "__main__":  # large_gguf.py VOCAB.gguf FOLDER: the shapes above
    for label, layout in SHAPES.items():
        target = Path(sys.argv[2]) / f"{label}.gguf"
        print(write(target, layout, Path(sys.argv[1]), whole_vocab=True))
