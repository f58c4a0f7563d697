"""How long ``decode`` and ``Layout.place`` take, as ratios to a bare base64 decode in one run.

    python benchmarks/decode.py [--tokens 32768] [--layers 61] [--topk 8] [--experts 256]

The payload is SGLang's: base64 of flat int32, all layers. Memory is the peak of the process above
what it held before the call, read from ``VmHWM`` (Linux).
"""

from __future__ import annotations

import argparse
import base64
import time
from collections.abc import Callable
from pathlib import Path

import torch

import r3patch


def payload(tokens: int, layers: int, topk: int, experts: int) -> str:
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(4096, experts, generator=generator)
    rows = scores.topk(topk).indices.to(torch.int32)
    picks = torch.randint(0, len(rows), ((tokens - 1) * layers,), generator=generator)
    return base64.b64encode(rows[picks].numpy().tobytes()).decode()


def seconds(call: Callable[[], object], repeats: int) -> float:
    """The fastest of some runs: the others measure the machine's neighbours."""
    best = float("inf")
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - begin)
    return best


def peak_bytes(call: Callable[[], object]) -> int:
    """How far the resident memory of the process rises during the call."""
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the present size
    before = _status("VmRSS")
    result = call()
    peak = _status("VmHWM") - before
    del result
    return peak


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {field}: memory is measured on Linux only")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--layers", type=int, default=61)
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    import pybase64

    text = payload(args.tokens, args.layers, args.topk, args.experts)
    wide_bytes = (args.tokens - 1) * args.layers * args.topk * 4

    def decode() -> r3patch.Routes:
        return r3patch.decode(
            text,
            num_tokens=args.tokens,
            num_experts=args.experts,
            topk=args.topk,
            num_layers=args.layers,
        )

    peak = peak_bytes(decode)
    routes = decode()
    layout = r3patch.Layout(pad_to_multiple=128)
    bare = seconds(lambda: pybase64.b64decode(text, validate=True), args.repeats)
    standard = seconds(lambda: base64.b64decode(text, validate=True), 3)
    decoded = seconds(decode, args.repeats)
    placed = seconds(lambda: layout.place([routes]), args.repeats)
    print(f"{args.tokens} tokens x {args.layers} layers x top-{args.topk}, {args.experts} experts")
    print(f"{'':36}{'ms':>8}{'ratio':>8}   bar")
    print(f"{'pybase64.b64decode':36}{bare * 1e3:8.1f}{1:8.2f}")
    print(f"{'base64.b64decode':36}{standard * 1e3:8.1f}{standard / bare:8.2f}")
    print(f"{'r3patch.decode':36}{decoded * 1e3:8.1f}{decoded / bare:8.2f}   3")
    print(f"{'Layout.place, to decode':36}{placed * 1e3:8.1f}{placed / decoded:8.2f}   1")
    print(
        f"{'peak memory of decode, to int32':36}{peak / 1e6:5.0f} MB{peak / wide_bytes:8.2f}   1.5"
    )
    print(f"{'bytes per stored id':36}{'':8}{routes.experts.element_size():8d}")


if __name__ == "__main__":
    main()
