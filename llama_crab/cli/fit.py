"""Show what fits into the memory of the GPUs: layers, context, and where the bytes go."""

from __future__ import annotations

import argparse
import json

from . import loading

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ..params import LlamaParams
    from ..tuning.fit import Fit, MemoryRow
    from ..tuning.rooms import DeviceRoom

NAME = "fit"
# The cards of the table, in GB as they are sold; their memory is as many GiB.
_CARDS = (8, 16, 24)
_GIB = 2**30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("model", nargs="?", help="a GGUF file or owner/name[:quant]")
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="show llama.cpp's messages on stderr"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    group = parser.add_argument_group("devices (default: those of this machine)")
    group.add_argument("--devices", metavar="SIZE,...", help="plan on others, e.g. 8GiB,8GiB")
    group.add_argument(
        "--device",
        action="append",
        default=[],
        metavar="NAME:SIZE",
        help="plan on this one, e.g. CUDA0:24GiB; may be repeated",
    )
    group.add_argument(
        *("--fit-margin-mib", "--margin"),
        type=int,
        default=1024,
        metavar="MIB",
        help="keep this much free on each device (default: 1024)",
    )
    fields = loading.add_fields(parser)
    fields.add_argument("-np", "--n-seq-max", type=int, help="sequences at the same time")


def main(args: argparse.Namespace) -> int:
    """Run the command."""
    from ..hub import resolve_model
    from ..params import ParameterError
    from ..tuning.fit import fit
    from ..tuning.rooms import DeviceRoom

    params = loading.params_of(args, n_seq_max=args.n_seq_max, fit_margin_mib=args.fit_margin_mib)
    try:
        devices = _devices(args)
    except ParameterError as error:
        raise argparse.ArgumentError(None, str(error)) from error
    params = params.replace(model=resolve_model(params.model))
    found = fit(params, devices=devices)
    # A number of layers would be the same in each column.
    automatic = params.replace(n_gpu_layers="auto")
    cards = {
        size: fit(automatic, devices=[DeviceRoom(f"{size} GB GPU", size * _GIB)]) for size in _CARDS
    }
    if args.json:
        tables = {str(size): card.to_dict() for size, card in cards.items()}
        print(
            json.dumps({"model": str(params.model), **found.to_dict(), "cards": tables}, indent=2)
        )
    else:
        print("\n".join(_text(params, found, cards)))
    return 0


def _devices(args: argparse.Namespace) -> list[DeviceRoom] | None:
    from ..tuning.rooms import check_rooms, parse_rooms

    texts = ([args.devices] if args.devices is not None else []) + args.device
    if not texts:
        return None
    return list(check_rooms(parse_rooms(",".join(texts))))


def _text(params: LlamaParams, found: Fit, cards: dict[int, Fit]) -> list[str]:
    lines = [
        f"{'model':<14}{params.model}",
        f"{'n_ctx':<14}{found.n_ctx} tokens, {_sequences(found.n_seq_max)}"
        + (f" (reduced from {found.n_ctx_wanted})" if found.n_ctx < found.n_ctx_wanted else ""),
        f"{'n_gpu_layers':<14}{_layers(found)}",
    ]
    if found.tensor_split is not None:
        lines.append(f"{'tensor_split':<14}{', '.join(f'{part:g}' for part in found.tensor_split)}")
    if not found.fits:
        lines.append(f"{'':<14}does not fit with a margin of {_mib(found.margin)}")
    lines += ["", *_breakdown(found), "", *_by_card(found, cards)]
    return lines


def _sequences(n: int) -> str:
    return "1 sequence" if n == 1 else f"{n} sequences"


def _layers(found: Fit) -> str:
    if not found.rows and not found.dropped:
        return "0: this machine has no GPU that llama.cpp can use"
    text = f"{min(found.n_gpu_layers, found.n_layer_max)} of {found.n_layer_max}"
    if found.n_host_experts:
        text += f", the experts of {found.n_host_experts} layers in host memory"
    return text


def _breakdown(found: Fit) -> list[str]:
    header = ("MiB", "free", "weights", "KV cache", "compute", "used", "left")
    table = [header, *(_row(row) for row in found.rows)]
    table += [_row(row, " (left out)") for row in found.dropped]
    host = _row(found.host)
    return _align([*table, ("host", "", *host[2:6], "")])


def _row(row: MemoryRow, note: str = "") -> tuple[str, ...]:
    parts = (row.free, row.model, row.context, row.compute, row.used, row.free - row.used)
    return (row.device + note, *(f"{part / 2**20:.0f}" for part in parts))


def _by_card(found: Fit, cards: dict[int, Fit]) -> list[str]:
    table = [("", *(f"{size} GB GPU" for size in cards))]
    table.append(("n_gpu_layers", *(_cell(card) for card in cards.values())))
    if any(card.n_host_experts for card in cards.values()):
        experts = (f"{card.n_host_experts} layers" for card in cards.values())
        table.append(("experts on the host", *experts))
    table.append(("n_ctx", *(str(card.n_ctx) for card in cards.values())))
    table.append(("used", *(_mib(sum(r.used for r in card.rows)) for card in cards.values())))
    return [*_align(table), f"with {_mib(found.margin)} left free"]


def _cell(card: Fit) -> str:
    return f"{card.n_gpu_layers} of {card.n_layer_max}"


def _align(table: list[tuple[Any, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return [
        f"{row[0]:<{widths[0]}}"
        + "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in table
    ]


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:.0f} MiB"
