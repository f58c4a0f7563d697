"""Stock Megatron on a CPU: tests of your own integration on a laptop or in CI.

    from r3patch import testing

    with testing.megatron_on_cpu():
        chunks = testing.tiny_model("glm47_flash")
        losses = testing.train_step(chunks, testing.random_batches(num_microbatches=4))

Under ``torchrun``, or in processes that `run_ranks` starts, the same with parallel sizes:
``megatron_on_cpu(pipeline=2)``. `seed_parameters` gives every cut of a model the same weights, so
that losses can be compared with those of a single process.
"""

from __future__ import annotations

from r3patch.testing._calls import RoutingCall, RoutingCalls
from r3patch.testing._cpu import megatron_on_cpu
from r3patch.testing._hf import load_hf
from r3patch.testing._models import SHAPES, tiny_config, tiny_model
from r3patch.testing._parallel import seed_parameters
from r3patch.testing._run import run_ranks, torchrun
from r3patch.testing._steps import on_this_rank, random_batches, train_step

__all__ = [
    "SHAPES",
    "RoutingCall",
    "RoutingCalls",
    "load_hf",
    "megatron_on_cpu",
    "on_this_rank",
    "random_batches",
    "run_ranks",
    "seed_parameters",
    "tiny_config",
    "tiny_model",
    "torchrun",
    "train_step",
]
