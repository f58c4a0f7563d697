"""Make the demo's weights again: 0.7 million parameters, pretrained on its page of text.

    python tools/demo_weights.py
    python tools/demo_weights.py --steps 100 -o early.safetensors
    r3patch demo --weights early.safetensors  # a model that knows less of its text

Takes about two minutes on one core; tests/megatron/test_demo.py tells whether the shipped file is
of this recipe.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # Megatron's jit_fuser wants a C++ compiler
warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)

import torch  # noqa: E402

from r3patch import testing  # noqa: E402
from r3patch.cli.demo import arms, model  # noqa: E402
from r3patch.cli.demo.results import WEIGHTS  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=model.RECIPE["steps"])
    parser.add_argument("-o", "--output", type=Path, default=WEIGHTS, metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(1)
    losses: list[float] = []
    with testing.megatron_on_cpu():
        trained = model.pretrain(counted(args.steps, losses), losses)
        model.save(trained, args.output, losses)
        engine = model.engine()
        engine.load_state_dict(trained.state_dict())
        accepted, mtp_loss = arms.serve(engine)
    print(
        f"{args.output}: {args.output.stat().st_size:,} bytes, loss {losses[-1]:.3f}, MTP loss "
        f"{mtp_loss:.3f} and {accepted:.1%} of drafts accepted as served"
    )


def counted(steps: int, losses: list[float]) -> Iterator[int]:
    began = time.monotonic()
    for step in range(steps):
        if step and step % 20 == 0:
            print(
                f"step {step} of {steps}, loss {losses[-1]:.3f}, {time.monotonic() - began:.0f} s",
                file=sys.stderr,
            )
        yield step


if __name__ == "__main__":
    main()
