"""Show this build and this machine, and with MODEL what a model is."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .._core import Vocab

NAME = "info"
_SPECIAL = (
    *("bos", "eos", "eot", "sep", "nl", "pad", "mask"),
    *("fim_pre", "fim_suf", "fim_mid", "fim_pad", "fim_rep", "fim_sep"),
)
_LABEL_WIDTH = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("model", nargs="?", help="a GGUF file or owner/name[:quant]")
    parser.add_argument("--json", action="store_true", help="print JSON")


def main(args: argparse.Namespace) -> int:
    """Run the command."""
    facts = build_facts()
    if args.model is not None:
        from ..hub import resolve_model

        facts["model"] = model_facts(resolve_model(args.model))
    if args.json:
        print(json.dumps(facts, ensure_ascii=False, indent=2))
    else:
        print(_as_text(facts))
    return 0


def build_facts() -> dict[str, Any]:
    """Return what is compiled in and what the machine offers, as JSON values."""
    from .. import _core, tuning
    from .._version import __version__

    devices = _core.devices()
    choice = tuning.thread_choice()
    return {
        "version": __version__,
        "llama_cpp": {"version": _core.llama_version(), "commit": _core.build_commit()},
        "backends": sorted({device.backend for device in devices}),
        "devices": [
            {
                "name": device.name,
                "type": device.type,
                "backend": device.backend,
                "description": device.description,
                "memory_free": device.memory_free,
                "memory_total": device.memory_total,
            }
            for device in devices
        ],
        "system_info": _core.system_info(),
        "supports": {
            "gpu_offload": _core.supports_gpu_offload(),
            "mmap": _core.supports_mmap(),
            "mlock": _core.supports_mlock(),
            "rpc": _core.supports_rpc(),
        },
        "threads": {"default": choice.n_threads, "why": choice.why},
        "memory": {"total": tuning.total_memory(), "available": tuning.available_memory()},
    }


def model_facts(path: Path) -> dict[str, Any]:
    """Return what a GGUF says about itself, as JSON values; its weights are not read."""
    from .. import _core

    # vocab_only would leave out the hyperparameters and the quantisation.
    with _core.Model(str(path), no_alloc=True, load_mode="none") as model:
        meta = model.metadata
        vocab = model.vocab
        return {
            "path": str(path),
            "architecture": meta.get("general.architecture", ""),
            "name": meta.get("general.name"),
            "license": meta.get("general.license"),
            "license_link": meta.get("general.license.link"),
            "n_params": model.n_params,
            "size": model.size,
            "quantisation": model.ftype,
            "n_ctx_train": model.n_ctx_train,
            "n_embd": model.n_embd,
            "n_layer": model.n_layer,
            "n_head": model.n_head,
            "n_head_kv": model.n_head_kv,
            "n_swa": model.n_swa,
            "vocab": {"type": vocab.type, "n_tokens": vocab.n_tokens},
            "chat_template": model.chat_template() is not None,
            "special_tokens": _special_tokens(vocab),
        }


def _special_tokens(vocab: Vocab) -> dict[str, dict[str, Any]]:
    ids = {name: getattr(vocab, name) for name in _SPECIAL}
    return {
        name: {"id": token, "text": vocab.text(token)}
        for name, token in ids.items()
        if token is not None
    }


def _as_text(facts: dict[str, Any]) -> str:
    cpp, threads, memory = facts["llama_cpp"], facts["threads"], facts["memory"]
    rows: list[tuple[str, Any]] = [
        ("llama-crab", facts["version"]),
        ("llama.cpp", f"{cpp['version']} (commit {cpp['commit']})"),
        ("backends", ", ".join(facts["backends"])),
    ]
    for device in facts["devices"]:
        room = f"{_gib(device['memory_free'])} of {_gib(device['memory_total'])} free"
        rows.append(("device", f"{device['name']} ({device['description'].strip()}), {room}"))
    able = [name for name, supported in facts["supports"].items() if supported]
    rows += [
        ("ISA", facts["system_info"]),
        ("supports", ", ".join(able) or "none of GPU offload, mmap, mlock, RPC"),
        ("threads", f"{threads['default']} by default: {threads['why']}"),
        ("memory", f"{_gib(memory['available'])} of {_gib(memory['total'])} available"),
    ]
    if "model" in facts:
        rows.append(("", ""))
        rows += _model_rows(facts["model"])
    return "\n".join(f"{label:<{_LABEL_WIDTH}}{value}".rstrip() for label, value in rows)


def _model_rows(model: dict[str, Any]) -> list[tuple[str, Any]]:
    bits = 8 * model["size"] / model["n_params"] if model["n_params"] else 0.0
    heads = f"{model['n_head']}, {model['n_head_kv']} for K and V"
    window = model["n_swa"]
    special = model["special_tokens"].items()
    tokens = ", ".join(f"{name} {token['id']} {token['text']!r}" for name, token in special)
    link = model["license_link"]
    return [
        ("model", model["path"]),
        ("name", model["name"] or "not given"),
        ("architecture", model["architecture"]),
        ("parameters", f"{model['n_params'] / 1e6:,.1f} M"),
        ("size", f"{model['size'] / 1e6:,.1f} MB, {bits:.2f} bits a weight"),
        ("quantisation", model["quantisation"]),
        ("context", f"{model['n_ctx_train']} tokens trained"),
        *([("window", f"{window} tokens (sliding)")] if window else []),
        ("layers", f"{model['n_layer']} of width {model['n_embd']}"),
        ("heads", heads),
        ("vocabulary", f"{model['vocab']['n_tokens']} tokens ({model['vocab']['type']})"),
        ("chat template", "yes" if model["chat_template"] else "no"),
        ("special tokens", tokens or "none"),
        ("licence", (model["license"] or "not given") + (f" ({link})" if link else "")),
    ]


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.1f} GiB"
