"""Write tiny models with random weights: seconds become milliseconds, shapes stay real.

The tokenizers are cut out of the vocab-only files of the llama.cpp tree, so that they are genuine.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

N_EMBD = 64
N_HEAD = 4
N_HEAD_KV = 2
N_FF = 128
N_LAYER = 2
N_CTX_TRAIN = 512
SWA_WINDOW = 16
CHAT_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Tokens:
    """The tokenizer part of a GGUF."""

    model: str
    pre: str
    texts: list[bytes]
    scores: list[float] | None
    types: list[int]
    merges: list[str] | None
    bos: int
    eos: int


def spm_tokens(source: Path) -> Tokens:
    """Return a cut of Llama's SentencePiece vocabulary: specials, bytes, 400 pieces, letters."""
    reader = gguf.GGUFReader(source)
    kept = [*range(659), *range(29871, 29971)]
    texts = reader.fields["tokenizer.ggml.tokens"].contents()
    scores = reader.fields["tokenizer.ggml.scores"].contents()
    types = reader.fields["tokenizer.ggml.token_type"].contents()
    return Tokens(
        model="llama",
        pre="default",
        texts=[texts[i].encode() for i in kept],
        scores=[scores[i] for i in kept],
        types=[types[i] for i in kept],
        merges=None,
        bos=1,
        eos=2,
    )


def bpe_tokens(source: Path) -> Tokens:
    """Return a cut of a byte-level BPE vocabulary: 256 bytes, 300 merges, two specials."""
    reader = gguf.GGUFReader(source)
    texts = reader.fields["tokenizer.ggml.tokens"].contents()[:256]
    merges = reader.fields["tokenizer.ggml.merges"].contents()[:300]
    texts += ["".join(merge.split(" ")) for merge in merges]
    texts = [*dict.fromkeys(texts), "<|begin|>", "<|end|>"]
    normal, control = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL
    return Tokens(
        model="gpt2",
        pre="gpt-2",
        texts=[text.encode() for text in texts],
        scores=None,
        types=[int(normal)] * (len(texts) - 2) + [int(control)] * 2,
        merges=merges,
        bos=len(texts) - 2,
        eos=len(texts) - 1,
    )


def write_model(
    path: Path, tokens: Tokens, *, arch: str = "llama", n_split: int = 1, seed: int = 0
) -> list[Path]:
    """Write a model of 2 layers; return its files, one for each split."""
    parts = _tensors(arch, len(tokens.texts), np.random.default_rng(seed))
    names = list(parts)
    files = [path]
    if n_split > 1:
        stem = path.name.removesuffix(".gguf")
        files = [
            path.with_name(f"{stem}-{i:05d}-of-{n_split:05d}.gguf") for i in range(1, n_split + 1)
        ]
    for index, file in enumerate(files):
        writer = gguf.GGUFWriter(file, arch)
        if index == 0:
            _add_metadata(writer, arch, tokens)
        if n_split > 1:
            writer.add_uint16("split.no", index)
            writer.add_uint16("split.count", n_split)
            writer.add_int32("split.tensors.count", len(names))
        for name in names[index::n_split]:
            writer.add_tensor(name, parts[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return files


def write_lora(path: Path, *, arch: str = "llama", rank: int = 4, seed: int = 1) -> Path:
    """Write a LoRA adapter for the query and output projections of `write_model`'s models."""
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(rank))
    writer.add_name("tiny adapter")
    for layer in range(N_LAYER):
        for name in ("attn_q", "attn_output"):
            base = f"blk.{layer}.{name}.weight"
            writer.add_tensor(f"{base}.lora_a", _normal(rng, rank, N_EMBD))
            writer.add_tensor(f"{base}.lora_b", _normal(rng, N_EMBD, rank))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _normal(rng: np.random.Generator, *shape: int) -> Array:
    values: Array = (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)
    return values


def _tensors(arch: str, n_vocab: int, rng: np.random.Generator) -> dict[str, Array]:
    head = N_EMBD // N_HEAD
    ones = np.ones(N_EMBD, np.float32)
    found = {
        "token_embd.weight": 2 * _normal(rng, n_vocab, N_EMBD),
        "output_norm.weight": ones,
        "output.weight": 4 * _normal(rng, n_vocab, N_EMBD),
    }
    if arch == "gemma3":
        del found["output.weight"]
    for layer in range(N_LAYER):
        p = f"blk.{layer}."
        found |= {
            p + "attn_norm.weight": ones,
            p + "attn_q.weight": _normal(rng, N_EMBD, N_EMBD),
            p + "attn_k.weight": _normal(rng, N_HEAD_KV * head, N_EMBD),
            p + "attn_v.weight": _normal(rng, N_HEAD_KV * head, N_EMBD),
            p + "attn_output.weight": _normal(rng, N_EMBD, N_EMBD),
            p + "ffn_norm.weight": ones,
            p + "ffn_gate.weight": _normal(rng, N_FF, N_EMBD),
            p + "ffn_up.weight": _normal(rng, N_FF, N_EMBD),
            p + "ffn_down.weight": _normal(rng, N_EMBD, N_FF),
        }
        if arch == "gemma3":
            found |= {
                p + "attn_q_norm.weight": np.ones(head, np.float32),
                p + "attn_k_norm.weight": np.ones(head, np.float32),
                p + "post_attention_norm.weight": ones,
                p + "post_ffw_norm.weight": ones,
            }
    return found


def _add_metadata(writer: gguf.GGUFWriter, arch: str, tokens: Tokens) -> None:
    head = N_EMBD // N_HEAD
    writer.add_name("tiny")
    writer.add_block_count(N_LAYER)
    writer.add_context_length(N_CTX_TRAIN)
    writer.add_embedding_length(N_EMBD)
    writer.add_feed_forward_length(N_FF)
    writer.add_head_count(N_HEAD)
    writer.add_head_count_kv(N_HEAD_KV)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_key_length(head)
    writer.add_value_length(head)
    if arch == "gemma3":
        writer.add_sliding_window(SWA_WINDOW)
    else:
        writer.add_rope_dimension_count(head)
        writer.add_vocab_size(len(tokens.texts))
    writer.add_file_type(0)
    writer.add_tokenizer_model(tokens.model)
    writer.add_tokenizer_pre(tokens.pre)
    writer.add_token_list(tokens.texts)
    if tokens.scores is not None:
        writer.add_token_scores(tokens.scores)
    writer.add_token_types(tokens.types)
    if tokens.merges is not None:
        writer.add_token_merges(tokens.merges)
    writer.add_bos_token_id(tokens.bos)
    writer.add_eos_token_id(tokens.eos)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_chat_template(CHAT_TEMPLATE)
