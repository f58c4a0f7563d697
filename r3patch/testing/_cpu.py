"""Stock Megatron on a CPU: what it needs there, for the time of a context and no longer."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from r3patch._errors import ReplayError, UnsupportedMegatronError

_CPU = torch.device("cpu")
_active = False


@contextlib.contextmanager
def megatron_on_cpu(
    *,
    tensor: int = 1,
    pipeline: int = 1,
    virtual_pipeline: int | None = None,
    expert: int = 1,
    context: int = 1,
) -> Iterator[None]:
    """Stock megatron-core (0.16 and newer) runs on the CPU, over gloo, inside this block.

    Initialises ``torch.distributed`` (a world of one, or what ``torchrun`` announced) and
    Megatron's parallel state. On leaving, by any way, both are torn down and every attribute that
    was replaced is what it was.

    Args:
        tensor: tensor-parallel ranks.
        pipeline: pipeline-parallel ranks.
        virtual_pipeline: model chunks per pipeline rank, or None.
        expert: expert-parallel ranks.
        context: context-parallel ranks.

    Raises:
        ReplayError: the block is nested, or torch.distributed is initialised already.
        UnsupportedMegatronError: Megatron cannot be imported.
    """
    global _active
    if _active or torch.distributed.is_initialized():
        raise ReplayError(
            "megatron_on_cpu() sets up torch.distributed itself, and it is set up already. Leave "
            "the other block first, or destroy the process group."
        )
    _module("megatron.core.models.gpt")  # before the stubs: what an import looks at, it keeps
    _active = True
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(_cuda_stubs())
            stack.enter_context(_CudaIsCpu())
            stack.enter_context(_megatron_stubs())
            stack.enter_context(
                _parallel_state(
                    tensor_model_parallel_size=tensor,
                    pipeline_model_parallel_size=pipeline,
                    virtual_pipeline_model_parallel_size=virtual_pipeline,
                    expert_model_parallel_size=expert,
                    context_parallel_size=context,
                )
            )
            yield
    finally:
        _active = False


class _CudaIsCpu(TorchFunctionMode):
    """Maps the literal device "cuda" of Megatron's schedules and buffers to the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        return func(*args, **kwargs)


def _is_cuda(device: object) -> bool:
    return isinstance(device, (str, torch.device)) and str(device).startswith("cuda")


class _Stream:
    """Stands for ``torch.cuda.Stream`` and ``Event``: on a CPU everything is in order already."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def wait_stream(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def record(self, stream: Any = None) -> None: ...
    def wait(self, stream: Any = None) -> None: ...
    def synchronize(self) -> None: ...
    def record_event(self, event: Any = None) -> _Stream:
        return self


@contextlib.contextmanager
def _replaced(owner: Any, **attributes: Any) -> Iterator[None]:
    """Set attributes, and afterwards give back what stood there, or delete what did not."""
    absent = object()
    before = {name: vars(owner).get(name, absent) for name in attributes}
    try:
        for name, value in attributes.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            if value is absent:
                delattr(owner, name)
            else:
                setattr(owner, name, value)


@contextlib.contextmanager
def _cuda_stubs() -> Iterator[None]:
    # A function object of its own for each: dynamo keeps a table of torch's functions by identity.
    with (
        _replaced(
            torch.cuda,
            is_available=lambda: False,
            current_device=lambda: _CPU,
            synchronize=lambda *a, **k: None,
            set_device=lambda *a, **k: None,
            empty_cache=lambda *a, **k: None,
            Stream=_Stream,
            Event=type("_Event", (_Stream,), {}),
            current_stream=lambda *a, **k: _Stream(),
            default_stream=lambda *a, **k: _Stream(),
            stream=lambda *a, **k: contextlib.nullcontext(),
        ),
        _replaced(
            torch.Tensor,
            cuda=lambda this, *a, **k: this,
            record_stream=lambda this, stream: None,
        ),
        _replaced(torch.nn.Module, cuda=lambda this, *a, **k: this),
    ):
        yield


@contextlib.contextmanager
def _megatron_stubs() -> Iterator[None]:
    random = _module("megatron.core.tensor_parallel.random")
    moe_utils = _module("megatron.core.transformer.moe.moe_utils")
    dispatcher = _module("megatron.core.transformer.moe.token_dispatcher")
    norm = _module("megatron.core.transformer.torch_norm").WrappedTorchNorm
    mtp = _module("megatron.core.transformer.multi_token_prediction")
    mla = _module("megatron.core.transformer.multi_latent_attention")
    with (
        _replaced(
            random,
            _get_cuda_rng_state=lambda *a, **k: torch.empty(0, dtype=torch.uint8),
            _set_cuda_rng_state=lambda *a, **k: None,
            _CUDA_RNG_STATE_TRACKER=None,  # a new one, and the old one is given back
            _CUDA_RNG_STATE_TRACKER_INITIALIZED=False,
        ),
        _replaced(dispatcher, maybe_move_tensor_to_cpu=_as_numpy),
        # Without Transformer Engine 0.16.1 calls a name that it never bound.
        _replaced(moe_utils, te_general_gemm=getattr(moe_utils, "te_general_gemm", None)),
        # Without Transformer Engine 0.16.1 takes its absent classes for present ones.
        _replaced(mla, HAVE_TE=False),
        _replaced(norm, __new__=staticmethod(_torch_norm)),
        _replaced(mtp.MTPLossLoggingHelper, tracker={}),
        # The schedules write the loss scale of a step into these, for whoever runs next.
        _replaced(moe_utils.MoEAuxLossAutoScaler, main_loss_backward_scale=None),
        _replaced(mtp.MTPLossAutoScaler, main_loss_backward_scale=torch.tensor(1.0)),
        # Without Transformer Engine 0.20 asks isinstance() of a class that is a mock.
        _replaced(mtp, is_inference_column_parallel_linear=lambda module: False),
        _hybrid_norm(norm),
    ):
        random.initialize_rng_tracker(inference_rng_tracker=True)
        yield


def _hybrid_norm(norm: Any) -> contextlib.AbstractContextManager[None]:
    """The hybrid stack's last norm is Transformer Engine's, whatever the layer specs say."""
    try:
        block = importlib.import_module("megatron.core.models.hybrid.hybrid_block")
    except ImportError:
        return contextlib.nullcontext()
    return _replaced(block, TENorm=norm)


def _as_numpy(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _torch_norm(
    cls: Any, config: Any, hidden_size: int, eps: float = 1e-5, *args: Any, **kwargs: Any
) -> torch.nn.Module:
    """torch's norm, marked for sequence parallelism; Megatron's own wrapper refuses it."""
    kind = torch.nn.RMSNorm if config.normalization == "RMSNorm" else torch.nn.LayerNorm
    norm = kind(hidden_size, eps=eps, dtype=config.params_dtype)
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return norm


@contextlib.contextmanager
def _parallel_state(**sizes: Any) -> Iterator[None]:
    state = _module("megatron.core.parallel_state")
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        torch.distributed.init_process_group("gloo")
    else:
        store: Any = torch.distributed.HashStore()  # type: ignore[attr-defined]
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        state.initialize_model_parallel(**sizes)
        yield
    finally:
        state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UnsupportedMegatronError(
            f"r3patch.testing needs {name} ({error}). Install it by: "
            "pip install '.[megatron]' in a checkout of r3patch"
        ) from error
