"""The file of ``Routes.save``: safetensors, with a checksum over all that the file means.

Other tools read it without torch and without r3patch, and so does this; docs/rollout.md has the
layout. Files of r3patch 0.1, which torch wrote, are read, with torch, and not written.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from r3patch._errors import RoutesError
from r3patch.rows.plain import ForeignErrors

FORMAT = "r3patch.Routes"
_VERSION = "2"
_TORCH_VERSION = 1
_TORCH_MAGIC = b"PK"  # torch.save writes a zip archive
_ARRAYS = ("experts", "valid", "tokens")


class Contents(NamedTuple):
    """What a file holds. What was read is checked by nobody yet, and arrays may be numpy's."""

    layers: Any
    num_experts: Any
    experts: Any
    valid: Any = None
    tokens: Any = None  # not in version 1


def write(path: str | os.PathLike[str], contents: Contents) -> None:
    """Writes version 2. RoutesError without safetensors and numpy, which the extra has."""
    library = _safetensors()
    layers, num_experts, *tensors = contents
    metadata = {
        "format": FORMAT,
        "version": _VERSION,
        "layers": json.dumps(layers),
        "num_experts": json.dumps(num_experts),
    }
    arrays = {
        name: tensor.contiguous().numpy()
        for name, tensor in zip(_ARRAYS, tensors, strict=True)
        if tensor is not None
    }
    metadata["sha256"] = _checksum(metadata, arrays)
    Path(path).write_bytes(library.numpy.save(arrays, metadata))


def read(path: str | os.PathLike[str]) -> Contents:
    """Reads version 2, or version 1 of r3patch 0.1, and runs no code from it.

    Raises:
        RoutesError: the file is something else, damaged, or of another version.
        OSError: the file cannot be read.
    """
    with Path(path).open("rb") as file:
        torch_wrote_it = file.read(len(_TORCH_MAGIC)) == _TORCH_MAGIC
    return (_read_torch if torch_wrote_it else _read_safetensors)(os.fspath(path))


def is_one(head: bytes) -> bool:
    """Whether a file that begins like this may be one of Routes.save, rather than a payload.

    A safetensors file begins with the length of its header in eight bytes, and the header with
    a brace; no text has zeros in it.
    """
    return head.startswith(_TORCH_MAGIC) or head[4:9] == b"\0\0\0\0{"


def _read_safetensors(path: str) -> Contents:
    library = _safetensors()
    try:
        with library.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            _check_kind(path, metadata, _VERSION)
            arrays = {name: file.get_tensor(name) for name in sorted(file.keys())}
    except library.SafetensorError as error:
        raise _damaged(path, error) from error
    stated = metadata.pop("sha256", None)
    if stated != _checksum(metadata, arrays):
        raise RoutesError(f"{path} is damaged: its checksum is not that of its contents.")
    if "experts" not in arrays or not arrays.keys() <= set(_ARRAYS):
        raise RoutesError(f"{path} holds {sorted(arrays)}, expected {_ARRAYS}.")
    with ForeignErrors(f"{path} is damaged"):
        return Contents(
            json.loads(metadata["layers"]), json.loads(metadata["num_experts"]), **arrays
        )


def _read_torch(path: str) -> Contents:
    try:
        import torch
    except ImportError as error:
        raise RoutesError(
            f"{path} is a zip archive, as r3patch 0.1 wrote by torch.save; only torch reads those. "
            "Where torch is, Routes.load(path).save(path) writes the format of today."
        ) from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch.load raises a dozen kinds on foreign bytes
        raise _damaged(path, error) from error
    if not isinstance(state, dict):
        raise RoutesError(f"{path} is a torch file, but not one of Routes.save.")
    _check_kind(path, state, _TORCH_VERSION)
    with ForeignErrors(f"{path} is damaged"):
        contents = Contents(*(state[name] for name in Contents._fields[:-1]))
        for array in (contents.experts, contents.valid):
            if isinstance(array, torch.Tensor):
                _check_memory(path, array)
    return contents


def _check_memory(path: str, tensor: Any) -> None:
    """A few bytes can state a shape of any size, and checking its rows would cost that memory."""
    held = tensor.untyped_storage().nbytes()
    if tensor.nbytes > held:
        raise RoutesError(
            f"{path} is damaged: a tensor of shape {tuple(tensor.shape)} takes {tensor.nbytes} "
            f"bytes, the file has {held}."
        )


def _check_kind(path: str, state: dict[str, Any], version: object) -> None:
    if state.get("format") != FORMAT:
        raise RoutesError(f"{path} is a file of another kind, not one of Routes.save.")
    if state.get("version") != version:
        raise RoutesError(
            f"{path} has format version {state.get('version')!r}, this r3patch reads 1 and 2: save "
            "it again or install the r3patch that wrote it."
        )


def _damaged(path: str, error: Exception) -> RoutesError:
    return RoutesError(
        f"{path} is not a file of Routes.save, or is damaged ({type(error).__name__})."
    )


def _checksum(metadata: dict[str, str], arrays: dict[str, Any]) -> str:
    """SHA-256 of the metadata, then of each tensor's name, dtype and shape and of its bytes."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name} {array.dtype} {list(array.shape)}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise RoutesError(
            "files of routes need safetensors and numpy: pip install '.[rollout]' in a checkout of "
            "r3patch."
        ) from error
    return safetensors
