"""What callers and engines hand in, as plain tensors that the rest can trust."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from r3patch._errors import RoutesError
from r3patch.rows.plain import ForeignErrors


def as_ids(array: Any, what: str) -> Tensor:
    """Integer ids on the host, as they are where possible: a tensor, a numpy array or lists.

    Masked elements of a numpy masked array become -1, which is how engines say "missing".

    Raises:
        RoutesError: no array, one of other things than integers, or a tensor without plain data.
    """
    with ForeignErrors(f"{what} cannot be made a tensor, it is no array of ids"):
        ids = _as_tensor(array, what)
    if not ids.numel() and not isinstance(array, Tensor):
        return ids.to(torch.int64)  # an empty list has no dtype of its own
    if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
        raise RoutesError(f"{what} has dtype {ids.dtype}, expected integers.")
    return ids


def as_mask(array: Any, what: str) -> Tensor:
    """Booleans on the host; masked elements of a numpy masked array are False.

    Raises:
        RoutesError: no array, one of other things than booleans, or a tensor without plain data.
    """
    with ForeignErrors(f"{what} cannot be made a tensor"):
        mask = _as_tensor(array, what)
    if mask.dtype != torch.bool and (mask.numel() or isinstance(array, Tensor)):
        raise RoutesError(f"{what} has dtype {mask.dtype}, expected bool.")
    return mask.to(torch.bool)


def as_tokens(array: Any, what: str, num_tokens: int | None = None) -> Tensor:
    """Token ids as ``[num_tokens] int32`` on the host, a copy; -1 stands for no token.

    Raises:
        RoutesError: no array of integers, another shape, or an id outside ``[-1, 2**31)``.
    """
    ids = as_ids(array, what)
    if ids.dim() != 1 or num_tokens not in (None, ids.numel()):
        raise RoutesError(
            f"{what} has shape {tuple(ids.shape)}, expected "
            f"[{'num_tokens' if num_tokens is None else num_tokens}]."
        )
    wide = signed(ids).to(torch.int64)
    if wide.numel() and not -1 <= int(wide.min()) <= int(wide.max()) < 2**31:
        raise RoutesError(
            f"{what} holds {int(wide.min())} to {int(wide.max())}, expected token ids, or -1 for "
            "none."
        )
    return wide.to(torch.int32)


def signed(ids: Tensor) -> Tensor:
    """The same ids in a dtype that torch computes with: it lacks most of uint16/32/64."""
    if ids.dtype == torch.uint16:
        return ids.to(torch.int32)
    if ids.dtype == torch.uint32:
        return ids.to(torch.int64)
    if ids.dtype == torch.uint64:
        return ids.view(torch.int64)  # 2**63 and more turn negative: out of range either way
    return ids


def is_numpy(array: object) -> bool:
    numpy = sys.modules.get("numpy")  # whoever holds an array has imported it
    return numpy is not None and isinstance(array, numpy.ndarray)


def _as_tensor(array: Any, what: str) -> Tensor:
    if isinstance(array, Tensor):
        return _plain(array, what)
    if is_numpy(array):
        return _from_numpy(array)
    return torch.tensor(array, device="cpu")


def _plain(tensor: Tensor, what: str) -> Tensor:
    """The tensor's data on the host; a kind of tensor that keeps it elsewhere is refused."""
    # Fake, distributed, masked and jagged tensors all answer to the dispatcher themselves.
    wrapper = type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__
    if wrapper or tensor.is_nested or tensor.is_quantized or tensor.is_meta:
        raise RoutesError(
            f"{what} is a {type(tensor).__name__} of dtype {tensor.dtype} on {tensor.device} "
            "without plain data: pass an ordinary dense tensor."
        )
    if tensor.layout is not torch.strided:
        raise RoutesError(f"{what} has layout {tensor.layout}: pass an ordinary dense tensor.")
    return tensor.detach().cpu().as_subclass(Tensor)


def _from_numpy(array: Any) -> Tensor:
    numpy = sys.modules["numpy"]
    if isinstance(array, numpy.ma.MaskedArray):
        if array.dtype.kind == "b":
            array = array.filled(False)
        elif array.dtype.kind in "iu":
            array = array.astype(numpy.int64).filled(-1)
    # Arrays from Ray's store are read-only, which torch takes only with a warning.
    native = array.astype(array.dtype.newbyteorder("="), order="C", copy=False)
    return torch.from_numpy(native if native.flags.writeable else native.copy())
