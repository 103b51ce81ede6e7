"""Write tiny models with random weights: seconds become milliseconds, shapes stay real.

The tokenizers are cut out of the vocab-only files of the llama.cpp tree, so that they are genuine.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

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
SSM_INNER = 2 * N_EMBD
SSM_STATE = 16
SSM_RANK = 4
SSM_KERNEL = 4
# In the hybrid the first layer is recurrent, the second attends.
HYBRID_HEADS_KV = [0, N_HEAD_KV]
FIM_PIECES = {
    "fim_pre": "<|fim_prefix|>",
    "fim_suf": "<|fim_suffix|>",
    "fim_mid": "<|fim_middle|>",
    "fim_pad": "<|fim_pad|>",
    "fim_rep": "<|repo_name|>",
    "fim_sep": "<|file_sep|>",
}
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
    eos: int | None
    unk: int = 0
    others: Mapping[str, int] = field(default_factory=dict)  # by their names in the metadata


@cache
def spm_tokens(source: Path, *, whole: bool = False) -> Tokens:
    """Return a cut of Llama's SentencePiece vocabulary: specials, bytes, 400 pieces, letters."""
    reader = gguf.GGUFReader(source)
    texts = reader.fields["tokenizer.ggml.tokens"].contents()
    kept = [*range(len(texts))] if whole else [*range(659), *range(29871, 29971)]
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


@cache
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


@cache
def wpm_tokens(source: Path) -> Tokens:
    """Return a cut of BERT's WordPiece vocabulary: specials, single characters, 400 words."""
    reader = gguf.GGUFReader(source)
    texts = reader.fields["tokenizer.ggml.tokens"].contents()
    types = reader.fields["tokenizer.ggml.token_type"].contents()
    specials = [0, 100, 101, 102, 103]
    words = range(1996, 2396)
    single = [i for i in range(999, len(texts)) if re.fullmatch("\u2581?[!-~]", texts[i])]
    kept = list(dict.fromkeys([*specials, *single, *words]))
    pad, unk, cls, sep, mask = range(len(specials))
    return Tokens(
        model="bert",
        pre="bert-bge",
        texts=[texts[i].encode() for i in kept],
        scores=None,
        types=[types[i] for i in kept],
        merges=None,
        bos=cls,
        eos=None,
        unk=unk,
        others={"padding": pad, "seperator": sep, "mask": mask},
    )


def fim_tokens(tokens: Tokens) -> Tokens:
    """Return the vocabulary with the pieces that mark what to fill in added at its end."""
    n = len(tokens.texts)
    return replace(
        tokens,
        texts=[*tokens.texts, *(piece.encode() for piece in FIM_PIECES.values())],
        scores=None if tokens.scores is None else tokens.scores + [0.0] * len(FIM_PIECES),
        types=tokens.types + [int(gguf.TokenType.CONTROL)] * len(FIM_PIECES),
        others={name: n + i for i, name in enumerate(FIM_PIECES)},
    )


def write_model(
    path: Path,
    tokens: Tokens,
    *,
    arch: str = "llama",
    n_split: int = 1,
    seed: int = 0,
    pooling: gguf.PoolingType | None = None,
    rerank_template: str | None = None,
) -> list[Path]:
    """Write a model of 2 layers; return its files, one for each split."""
    rng = np.random.default_rng(seed)
    parts = _tensors(arch, len(tokens.texts), rng)
    if pooling == gguf.PoolingType.RANK:
        parts |= _classifier_tensors(rng)
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
            if pooling is not None:
                writer.add_pooling_type(pooling)
            if pooling == gguf.PoolingType.RANK:
                writer.add_classifier_output_labels(["LABEL_0"])
            if rerank_template is not None:
                writer.add_string("tokenizer.chat_template.rerank", rerank_template)
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


def write_reranker(
    path: Path, tokens: Tokens, *, template: str | None = None, seed: int = 0
) -> Path:
    """Write a BERT that scores a pair of texts: the tokens must be `wpm_tokens`."""
    return write_model(
        *(path, tokens),
        arch="bert",
        seed=seed,
        pooling=gguf.PoolingType.RANK,
        rerank_template=template,
    )[0]


def write_embedder(path: Path, tokens: Tokens, *, pooling: str = "mean", seed: int = 0) -> Path:
    """Write a model that embeds: a BERT for a WordPiece vocabulary, else a causal Llama."""
    arch = "bert" if tokens.model == "bert" else "llama"
    kind = gguf.PoolingType[pooling.upper()]
    return write_model(path, tokens, arch=arch, seed=seed, pooling=kind)[0]


def write_fim(path: Path, tokens: Tokens, *, seed: int = 0) -> Path:
    """Write a Llama whose vocabulary has the special tokens for filling in the middle."""
    return write_model(path, fim_tokens(tokens), seed=seed)[0]


def write_recurrent(path: Path, tokens: Tokens, *, seed: int = 0) -> Path:
    """Write a Mamba: its memory is one state per sequence, which cannot be cut."""
    return write_model(path, tokens, arch="mamba", seed=seed)[0]


def write_hybrid(path: Path, tokens: Tokens, *, seed: int = 0) -> Path:
    """Write a Jamba of one recurrent layer and one that attends."""
    return write_model(path, tokens, arch="jamba", seed=seed)[0]


def write_mtp(path: Path, tokens: Tokens, *, reads: str, seed: int = 0) -> Path:
    """Write a GLM-4 MoE of 2 dense layers with one MTP layer, whose draft is known.

    The MTP layer attends to nothing and passes on one of its two inputs: the embedding of the last
    ``"token"``, or the ``"hidden"`` state of the token before it.
    """
    rng = np.random.default_rng(seed)
    parts = {
        "token_embd.weight": 2 * _normal(rng, len(tokens.texts), N_EMBD),
        "output_norm.weight": np.ones(N_EMBD, np.float32),
        "output.weight": 4 * _normal(rng, len(tokens.texts), N_EMBD),
    }
    for layer in range(N_LAYER):
        parts |= _glm_layer(f"blk.{layer}.", rng) | _feed_forward(f"blk.{layer}.", rng)
        del parts[f"blk.{layer}.ffn_norm.weight"]
    p = f"blk.{N_LAYER}."
    parts |= _glm_layer(p, rng) | _no_experts(p, rng)
    parts[p + "attn_output.weight"][:] = 0
    eye, zero = np.eye(N_EMBD, dtype=np.float32), np.zeros((N_EMBD, N_EMBD), np.float32)
    halves = [eye, zero] if reads == "token" else [zero, eye]
    parts[p + "nextn.eh_proj.weight"] = np.concatenate(halves, 1)
    for name in ("enorm", "hnorm", "shared_head_norm"):
        parts[f"{p}nextn.{name}.weight"] = np.ones(N_EMBD, np.float32)
    writer = gguf.GGUFWriter(path, "glm4moe")
    _add_shape(writer, N_LAYER + 1)
    writer.add_leading_dense_block_count(N_LAYER)
    writer.add_nextn_predict_layers(1)
    writer.add_expert_count(2)
    writer.add_expert_used_count(1)
    writer.add_expert_shared_count(1)
    writer.add_expert_feed_forward_length(N_FF)
    return _finish(writer, path, tokens, parts)


def write_eagle3(
    path: Path, tokens: Tokens, target: Path, *, mapped: bool = False, width: int = N_EMBD
) -> Path:
    """Write an EAGLE3 head for a model of `write_model` that says what the input of layer 1 says.

    It attends to nothing and has the target's output matrix; `mapped`: its rows in another order,
    with the map of their tokens.
    """
    rng = np.random.default_rng(1)
    read = {tensor.name: tensor.data for tensor in gguf.GGUFReader(target).tensors}
    output = np.array(read["output.weight"])
    n_kv = N_HEAD_KV * N_EMBD // N_HEAD
    zero = np.zeros((N_EMBD, width), np.float32)
    second = np.eye(N_EMBD, width, dtype=np.float32)
    p = "blk.0."
    parts: dict[str, npt.NDArray[Any]] = {
        "fc.weight": np.concatenate([zero, second, zero], 1),
        "token_embd.weight": np.array(read["token_embd.weight"]),
        "output_norm.weight": np.ones(N_EMBD, np.float32),
        "output.weight": output,
        **_attention(p, rng),
        **_feed_forward(p, rng),
        p + "attn_norm_2.weight": np.ones(N_EMBD, np.float32),
        p + "attn_q.weight": _normal(rng, N_EMBD, 2 * N_EMBD),
        p + "attn_k.weight": _normal(rng, n_kv, 2 * N_EMBD),
        p + "attn_v.weight": _normal(rng, n_kv, 2 * N_EMBD),
    }
    for name in ("attn_output", "ffn_down"):
        parts[f"{p}{name}.weight"][:] = 0
    if mapped:
        order = rng.permutation(len(output)).astype(np.int64)
        parts |= {"output.weight": output[order], "d2t": order}
    writer = gguf.GGUFWriter(path, "eagle3")
    _add_shape(writer, 1)
    writer.add_array("eagle3.target_layers", [0, 1, 1])
    writer.add_uint32("eagle3.target_hidden_size", width)
    return _finish(writer, path, tokens, parts)


def write_quiet_end(path: Path, tokens: Tokens, *, seed: int = 0) -> Path:
    """Write a Llama whose last layer adds nothing: its output says what that layer's input says."""
    rng = np.random.default_rng(seed)
    parts = _tensors("llama", len(tokens.texts), rng)
    for name in ("attn_output", "ffn_down"):
        parts[f"blk.1.{name}.weight"][:] = 0
    writer = gguf.GGUFWriter(path, "llama")
    _add_shape(writer, N_LAYER)
    return _finish(writer, path, tokens, parts)


def _add_shape(writer: gguf.GGUFWriter, n_layer: int) -> None:
    head = N_EMBD // N_HEAD
    writer.add_name("tiny")
    writer.add_block_count(n_layer)
    writer.add_context_length(N_CTX_TRAIN)
    writer.add_embedding_length(N_EMBD)
    writer.add_feed_forward_length(N_FF)
    writer.add_head_count(N_HEAD)
    writer.add_head_count_kv(N_HEAD_KV)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(head)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_file_type(0)


def _finish(
    writer: gguf.GGUFWriter, path: Path, tokens: Tokens, parts: Mapping[str, npt.NDArray[Any]]
) -> Path:
    add_tokenizer(writer, tokens)
    for name, data in parts.items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _glm_layer(p: str, rng: np.random.Generator) -> dict[str, Array]:
    return {
        **_attention(p, rng),
        p + "post_attention_norm.weight": np.ones(N_EMBD, np.float32),
    }


def _no_experts(p: str, rng: np.random.Generator) -> dict[str, Array]:
    found = {
        p + "ffn_gate_inp.weight": _normal(rng, 2, N_EMBD),
        p + "exp_probs_b.bias": np.zeros(2, np.float32),
    }
    for kind, shape in (("exps", (2,)), ("shexp", ())):
        found[f"{p}ffn_gate_{kind}.weight"] = _normal(rng, *shape, N_FF, N_EMBD)
        found[f"{p}ffn_up_{kind}.weight"] = _normal(rng, *shape, N_FF, N_EMBD)
        found[f"{p}ffn_down_{kind}.weight"] = np.zeros((*shape, N_EMBD, N_FF), np.float32)
    return found


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
    found = {"token_embd.weight": 2 * _normal(rng, n_vocab, N_EMBD)}
    if arch == "bert":
        found |= {
            "position_embd.weight": _normal(rng, N_CTX_TRAIN, N_EMBD),
            "token_types.weight": _normal(rng, 2, N_EMBD),
            **_layer_norm("token_embd_norm"),
        }
    else:
        output = 4 * _normal(rng, n_vocab, N_EMBD)
        found["output_norm.weight"] = np.ones(N_EMBD, np.float32)
        if arch != "gemma3":
            found["output.weight"] = output
    for layer in range(N_LAYER):
        p = f"blk.{layer}."
        if arch == "bert":
            found |= _encoder_layer(p, rng)
        elif arch == "mamba":
            found |= _mamba_layer(p, rng)
        elif arch == "jamba" and HYBRID_HEADS_KV[layer] == 0:
            found |= _mamba_layer(p, rng) | _mamba_norms(p) | _feed_forward(p, rng)
        else:
            found |= _attention(p, rng) | _feed_forward(p, rng)
        if arch == "gemma3":
            found |= _gemma3_norms(p)
    return found


def _attention(p: str, rng: np.random.Generator) -> dict[str, Array]:
    n_embd_kv = N_HEAD_KV * N_EMBD // N_HEAD
    return {
        p + "attn_norm.weight": np.ones(N_EMBD, np.float32),
        p + "attn_q.weight": _normal(rng, N_EMBD, N_EMBD),
        p + "attn_k.weight": _normal(rng, n_embd_kv, N_EMBD),
        p + "attn_v.weight": _normal(rng, n_embd_kv, N_EMBD),
        p + "attn_output.weight": _normal(rng, N_EMBD, N_EMBD),
    }


def _feed_forward(p: str, rng: np.random.Generator) -> dict[str, Array]:
    return {
        p + "ffn_norm.weight": np.ones(N_EMBD, np.float32),
        p + "ffn_gate.weight": _normal(rng, N_FF, N_EMBD),
        p + "ffn_up.weight": _normal(rng, N_FF, N_EMBD),
        p + "ffn_down.weight": _normal(rng, N_EMBD, N_FF),
    }


def _gemma3_norms(p: str) -> dict[str, Array]:
    head = np.ones(N_EMBD // N_HEAD, np.float32)
    row = np.ones(N_EMBD, np.float32)
    return {
        p + "attn_q_norm.weight": head,
        p + "attn_k_norm.weight": head,
        p + "post_attention_norm.weight": row,
        p + "post_ffw_norm.weight": row,
    }


def _encoder_layer(p: str, rng: np.random.Generator) -> dict[str, Array]:
    shapes = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (N_EMBD, N_EMBD))
    shapes |= {"ffn_up": (N_FF, N_EMBD), "ffn_down": (N_EMBD, N_FF)}
    found = _layer_norm(p + "attn_output_norm") | _layer_norm(p + "layer_output_norm")
    for name, shape in shapes.items():
        found[f"{p}{name}.weight"] = _normal(rng, *shape)
        found[f"{p}{name}.bias"] = _normal(rng, shape[0])
    return found


def _layer_norm(name: str) -> dict[str, Array]:
    return {
        f"{name}.weight": np.ones(N_EMBD, np.float32),
        f"{name}.bias": np.zeros(N_EMBD, np.float32),
    }


def _classifier_tensors(rng: np.random.Generator) -> dict[str, Array]:
    return {
        "cls.weight": _normal(rng, N_EMBD, N_EMBD),
        "cls.bias": _normal(rng, N_EMBD),
        "cls.output.weight": 4 * _normal(rng, 1, N_EMBD),
        "cls.output.bias": np.zeros(1, np.float32),
    }


def _mamba_layer(p: str, rng: np.random.Generator) -> dict[str, Array]:
    decay = -np.arange(1, SSM_STATE + 1, dtype=np.float32)
    return {
        p + "attn_norm.weight": np.ones(N_EMBD, np.float32),
        p + "ssm_in.weight": _normal(rng, 2 * SSM_INNER, N_EMBD),
        p + "ssm_conv1d.weight": _normal(rng, SSM_INNER, SSM_KERNEL),
        p + "ssm_conv1d.bias": _normal(rng, SSM_INNER),
        p + "ssm_x.weight": _normal(rng, SSM_RANK + 2 * SSM_STATE, SSM_INNER),
        p + "ssm_dt.weight": _normal(rng, SSM_INNER, SSM_RANK),
        # Time steps of about 0.05, so that the state remembers tens of tokens.
        p + "ssm_dt.bias": _normal(rng, SSM_INNER) - 3,
        p + "ssm_a": np.tile(decay, (SSM_INNER, 1)),
        p + "ssm_d": np.ones(SSM_INNER, np.float32),
        p + "ssm_out.weight": _normal(rng, N_EMBD, SSM_INNER),
    }


def _mamba_norms(p: str) -> dict[str, Array]:
    return {
        p + "ssm_dt_norm.weight": np.ones(SSM_RANK, np.float32),
        p + "ssm_b_norm.weight": np.ones(SSM_STATE, np.float32),
        p + "ssm_c_norm.weight": np.ones(SSM_STATE, np.float32),
    }


def _add_metadata(writer: gguf.GGUFWriter, arch: str, tokens: Tokens) -> None:
    writer.add_name("tiny")
    writer.add_block_count(N_LAYER)
    writer.add_context_length(N_CTX_TRAIN)
    writer.add_embedding_length(N_EMBD)
    writer.add_feed_forward_length(0 if arch == "mamba" else N_FF)
    writer.add_head_count(0 if arch == "mamba" else N_HEAD)
    if arch == "bert":
        writer.add_layer_norm_eps(1e-12)
        writer.add_causal_attention(False)
        writer.add_token_type_count(2)
    elif arch in ("mamba", "jamba"):
        if arch == "jamba":
            writer.add_head_count_kv(HYBRID_HEADS_KV)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_ssm_conv_kernel(SSM_KERNEL)
        writer.add_ssm_inner_size(SSM_INNER)
        writer.add_ssm_state_size(SSM_STATE)
        writer.add_ssm_time_step_rank(SSM_RANK)
    else:
        head = N_EMBD // N_HEAD
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
    add_tokenizer(writer, tokens)


def add_tokenizer(writer: gguf.GGUFWriter, tokens: Tokens) -> None:
    """Write the tokenizer part."""
    writer.add_tokenizer_model(tokens.model)
    writer.add_tokenizer_pre(tokens.pre)
    writer.add_token_list(tokens.texts)
    if tokens.scores is not None:
        writer.add_token_scores(tokens.scores)
    writer.add_token_types(tokens.types)
    if tokens.merges is not None:
        writer.add_token_merges(tokens.merges)
    writer.add_bos_token_id(tokens.bos)
    if tokens.eos is not None:
        writer.add_eos_token_id(tokens.eos)
    writer.add_unk_token_id(tokens.unk)
    for name, token in tokens.others.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token)
    writer.add_add_bos_token(True)
    if tokens.model != "bert":
        writer.add_chat_template(CHAT_TEMPLATE)
