"""The wire formats of rollout engines: from a payload to the ids that it holds, unchecked."""

from __future__ import annotations

import base64
import binascii
import io
import math
import re
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from r3patch._errors import RoutesError
from r3patch.rows.arrays import as_ids, is_numpy, signed
from r3patch.rows.plain import ForeignErrors, integer

_NPY_MAGIC = b"\x93NUMPY"
_NEMO_MAGIC = "nrlre1:"
_BASE64 = re.compile(rb"[A-Za-z0-9+/]{8,}={0,2}")
_DTYPES = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64")


def read(payload: Any) -> tuple[Tensor, int | None]:
    """The ids as sent, flat or ``[rows, axis, topk]``, and the start that the payload states.

    Raises:
        RoutesError: the payload is none of the formats, or whatever else its objects raised.
    """
    with ForeignErrors("the payload cannot be read"):
        sent, stated = _read(payload)
        return sent, None if stated is None else integer(stated, "the payload's start", 0)


def _read(payload: Any) -> tuple[Tensor, object]:
    stated: object = None
    if isinstance(payload, Mapping):
        sent, stated = _read_mapping(payload)
    elif isinstance(payload, tuple):
        sent = _read_parts(payload)
    elif isinstance(payload, (str, bytes, bytearray)):
        sent = _read_text(payload)
    elif isinstance(payload, list) and payload and isinstance(payload[0], (str, bytes, Mapping)):
        raise RoutesError(
            f"a list of {len(payload)} payloads or responses: decode each, or all by decode_batch."
        )
    elif isinstance(payload, (Tensor, list)) or is_numpy(payload):
        sent = as_ids(payload, "the payload")
    elif payload is None:
        raise RoutesError(
            "the engine returned no routes (None). For a sample that was aborted before its "
            "prefill use Routes.missing; otherwise the engine's flag to return them is off."
        )
    else:
        raise RoutesError(
            f"a payload of type {type(payload).__name__} is none of the formats that engines send."
        )
    if sent.dim() not in (1, 3):
        raise RoutesError(
            f"the payload has shape {tuple(sent.shape)}, expected flat ids or [rows, layers, topk]."
        )
    return sent, stated


def _read_mapping(payload: Mapping[str, Any]) -> tuple[Tensor, object]:
    if "routed_experts" in payload:  # an engine's response, or SGLang's meta_info
        ids, dtype = payload["routed_experts"], payload.get("routed_experts_dtype")
        if payload.get("prompt_routed_experts") is not None:
            ids = (payload["prompt_routed_experts"], ids)
        if dtype is not None and isinstance(ids, (str, bytes, bytearray)):
            sent, start = _read_text(ids, _dtype(dtype)), None
        else:
            sent, start = _read(ids)
        return sent, payload.get("routed_experts_start_len", start)
    if not {"data", "shape", "dtype"} <= payload.keys():
        return _read(_inside(payload))
    data = payload["data"]
    if not isinstance(data, (str, bytes, bytearray, memoryview)):
        raise RoutesError(f'"data" is {type(data).__name__}, expected base64 text or raw bytes.')
    raw = _base64(data) if isinstance(data, str) else bytearray(data)
    sent = _from_bytes(raw, _dtype(payload["dtype"]))
    return _reshape(sent, payload["shape"]), payload.get("start")


def _inside(response: Mapping[str, Any]) -> Any:
    """The part of a whole response that has the routes."""
    for key in ("meta_info", "sglext", "sgl_ext"):  # SGLang
        part = response.get(key)
        if isinstance(part, Mapping) and "routed_experts" in part:
            _check_single(response)
            return part
    if "moe_topk_indices" in response:  # Megatron's inference server
        return response["moe_topk_indices"]
    if response.get("choices"):
        _check_single(response)
        prompt = response.get("prompt_routed_experts")  # vLLM 0.21
        (choice,) = response["choices"]
        return choice if prompt is None else {**choice, "prompt_routed_experts": prompt}
    raise RoutesError(
        f"a mapping with keys {sorted(map(str, response))} has no routes: expected "
        '"routed_experts", or "data", "shape" and "dtype". In an answer without them the flag to '
        "return them is off: --enable-return-routed-experts, and with SGLang "
        "return_routed_experts in the request."
    )


def _check_single(response: Mapping[str, Any]) -> None:
    choices = response.get("choices") or [None]
    if len(choices) > 1:
        raise RoutesError(
            f"the response has {len(choices)} choices, which are as many samples: decode each, "
            'response["choices"][i]. (SGLang returns routes of the first only: response["sglext"].)'
        )


def _read_parts(parts: tuple[Any, ...]) -> Tensor:
    """Prompt and generation apart, as vLLM 0.21 sends them."""
    read = [signed(_read(part)[0]) for part in parts]
    filled = [part for part in read if part.numel()]
    if len({part.shape[1:] for part in filled}) > 1:
        raise RoutesError(f"the parts have shapes {[tuple(part.shape) for part in filled]}.")
    return torch.cat(filled) if filled else torch.empty(0, dtype=torch.int64, device="cpu")


def _read_text(text: str | bytes | bytearray, dtype: torch.dtype = torch.int32) -> Tensor:
    if isinstance(text, str) and text.startswith(_NEMO_MAGIC):
        return _read_envelope(text)
    head = text[:8].lstrip() if isinstance(text, str) else ""
    if head.startswith(("{", "[")):
        raise RoutesError("the payload is JSON text: pass json.loads(text).")
    if head.startswith("data:"):
        raise RoutesError("a stream carries no routes: ask without stream, or take its last chunk.")
    raw = _base64(text)
    if raw.startswith(_NPY_MAGIC):
        return _read_npy(raw)
    if dtype.itemsize >= 4 and _BASE64.fullmatch(raw):  # as ids they would be millions
        raise RoutesError(
            "the payload is base64 of base64: decode it once and pass what comes out."
        )
    return _from_bytes(raw, dtype)


def _read_envelope(text: str) -> Tensor:
    """NeMo-RL: ``nrlre1:<dtype>:<rows>x<layers>x<topk>:<base64>``."""
    fields = text.split(":", 3)
    try:
        _, dtype, shape, data = fields
        sizes = tuple(int(size) for size in shape.split("x"))
    except ValueError as error:
        raise RoutesError(
            f"{text[:40]!r}... is not nrlre1:<dtype>:<rows>x<layers>x<topk>:<base64>."
        ) from error
    return _reshape(_from_bytes(_base64(data), _dtype(dtype)), sizes)


def _read_npy(raw: bytearray) -> Tensor:
    try:
        import numpy as np
    except ImportError as error:
        raise RoutesError(
            "a .npy payload needs numpy: pip install '.[rollout]' in a checkout of r3patch."
        ) from error
    try:
        array = np.load(io.BytesIO(raw), allow_pickle=False)
    except Exception as error:  # numpy reads the header with Python's tokenizer and parser
        raise RoutesError(f"the .npy payload is damaged: {error}.") from error
    return as_ids(array, "the .npy payload")


def _base64(text: str | bytes | bytearray) -> bytearray:
    try:
        try:
            from pybase64 import b64decode_as_bytearray
        except ImportError:
            return bytearray(base64.b64decode(text, validate=True))
        return b64decode_as_bytearray(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RoutesError(
            f"the payload {text[:24]!r}... is not base64 ({error}). Raw bytes need their shape: "
            'pass {"data": ..., "shape": ..., "dtype": ...}. LMDeploy with '
            "enable_transfer_obj_ref sends a key: fetch the array first."
        ) from error


def _dtype(name: object) -> torch.dtype:
    short = str(name).removeprefix("torch.")
    if short not in _DTYPES:
        raise RoutesError(f"the payload's dtype is {name!r}, expected one of {_DTYPES}.")
    dtype: torch.dtype = getattr(torch, short)
    return dtype


def _from_bytes(raw: bytearray, dtype: torch.dtype) -> Tensor:
    if len(raw) % dtype.itemsize:
        raise RoutesError(f"{len(raw)} bytes are not whole {dtype} ids: the payload is truncated.")
    # torch.frombuffer refuses an empty buffer, which is what a start at the end leaves.
    return torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype, device="cpu")


def _reshape(sent: Tensor, shape: Any) -> Tensor:
    with ForeignErrors(f"the payload's shape is {shape!r}, expected [rows, layers, topk]"):
        sizes = tuple(integer(size, "a size", -sys.maxsize) for size in shape)
    if min(sizes, default=0) < 0 or math.prod(sizes) != sent.numel():
        raise RoutesError(f"the payload has {sent.numel()} ids, but states shape {sizes}.")
    return sent.view(sizes)
