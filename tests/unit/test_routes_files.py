"""Routes.save and load: a file is what was saved, or refused."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import routes
from safetensors.numpy import save

from r3patch import Routes, RoutesError
from r3patch.rows import files


def test_a_file_keeps_everything(tmp_path: Path) -> None:
    """save and load are inverse, and ids take one byte each."""
    whole = Routes(
        routes(1000, experts=256, topk=8).experts,
        (2, 3, 5),
        torch.arange(1000) < 999,
        num_experts=256,
    )
    whole.save(tmp_path / "routes.pt")
    assert Routes.load(tmp_path / "routes.pt") == whole
    assert (tmp_path / "routes.pt").stat().st_size < 1000 * 3 * 9 + 4096


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    """Any damage ends in RoutesError, wherever the bytes are cut or changed."""
    path = tmp_path / "routes.pt"
    routes(50).save(path)
    good = path.read_bytes()
    for end in range(0, len(good), 97):
        path.write_bytes(good[:end])
        with pytest.raises(RoutesError, match=r"not a file of Routes.save, or is damaged"):
            Routes.load(path)


def test_every_flipped_bit_is_refused_or_means_nothing(tmp_path: Path) -> None:
    """Bits of header, metadata and data, one at a time: refused, or equal routes."""
    path = tmp_path / "routes.safetensors"
    whole = Routes(routes(9, topk=1).experts, (2, 3, 5), torch.arange(9) < 8, num_experts=8)
    whole.save(path)
    good = path.read_bytes()
    refused = 0
    for bit in range(0, 8 * len(good), 5):  # no divisor of 8: every place in a byte
        flipped = bytearray(good)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            assert Routes.load(path) == whole
        except RoutesError:
            refused += 1
    assert refused > 8 * 27 // 5  # the ids alone


def test_sizes_of_an_empty_file_are_checksummed(tmp_path: Path) -> None:
    """Without rows only the shape says topk, and a flipped digit of it is refused as well."""
    path = tmp_path / "routes.safetensors"
    Routes.missing(0, (2, 3), 2, 8).save(path)
    path.write_bytes(path.read_bytes().replace(b"[0,2,2]", b"[0,2,3]"))
    with pytest.raises(RoutesError, match="checksum is not that of its contents"):
        Routes.load(path)


def test_the_file_is_read_without_torch(tmp_path: Path) -> None:
    """Header and bytes by the standard library alone, as docs/rollout.md describes them."""
    path = tmp_path / "routes.safetensors"
    whole = Routes(routes(4).experts, (2, 3, 5), [True, True, True, False], num_experts=8)
    whole.save(path)
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    metadata = header.pop("__metadata__")
    assert json.loads(metadata["layers"]) == [2, 3, 5]
    assert json.loads(metadata["num_experts"]) == 8
    digest = hashlib.sha256(
        json.dumps({k: v for k, v in metadata.items() if k != "sha256"}, sort_keys=True).encode()
    )
    names = {"U8": "uint8", "BOOL": "bool"}
    held: dict[str, list[int]] = {}
    for name, about in sorted(header.items()):
        begin, end = about["data_offsets"]
        held[name] = list(raw[start + begin : start + end])
        digest.update(f"{name} {names[about['dtype']]} {about['shape']}".encode())
        digest.update(bytes(held[name]))
    assert held["experts"] == whole.experts.flatten().tolist()
    assert held["valid"] == whole.mask.to(torch.uint8).flatten().tolist()
    assert digest.hexdigest() == metadata["sha256"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experts": torch.zeros(3, 3, 2, dtype=torch.uint8)}, "damaged: .*distinct ids"),
        ({"num_experts": "8"}, "damaged: num_experts is '8', expected 1 to 32768, an int"),
        ({"layers": None}, "is damaged: layers is no sequence"),
        ({"valid": torch.ones(3, 3, dtype=torch.uint8)}, "damaged: valid has dtype torch.uint8"),
    ],
)
@pytest.mark.parametrize("version", [1, 2])
def test_a_file_with_impossible_rows_is_refused(
    version: int, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """What a file holds is checked like any other input, whoever wrote its checksum."""
    path = tmp_path / "routes"
    state = state_of(routes(3)) | change
    if version == 1:
        torch.save(state, path)
    else:
        files.write(path, files.Contents(*(state.get(name) for name in files.Contents._fields)))
    with pytest.raises(RoutesError, match=message):
        Routes.load(path)


def state_of(part: Routes) -> dict[str, Any]:
    """What r3patch 0.1 gave to torch.save."""
    return {
        "format": "r3patch.Routes",
        "version": 1,
        "experts": part.experts,
        "layers": list(part.layers),
        "valid": part.valid,
        "num_experts": part.num_experts,
    }


@pytest.mark.parametrize("valid", [None, torch.arange(6) < 5])
def test_a_file_of_version_1_is_read(valid: torch.Tensor | None, tmp_path: Path) -> None:
    """What r3patch 0.1 wrote by torch.save still loads."""
    whole = Routes(routes(6).experts, (2, 3, 5), valid, num_experts=8)
    torch.save(state_of(whole), tmp_path / "routes.pt")
    assert Routes.load(tmp_path / "routes.pt") == whole


@pytest.mark.parametrize("field", ["experts", "valid"])
def test_a_shape_without_its_bytes_is_refused_before_it_costs_memory(
    field: str, tmp_path: Path
) -> None:
    """A few bytes of a torch file can state 2**28 rows."""
    state = state_of(routes(3))
    kept = state["experts"] if field == "experts" else torch.ones(3, 3, dtype=torch.bool)
    state[field] = kept[:1].expand(2**28, *kept.shape[1:])
    torch.save(state, tmp_path / "routes.pt")
    assert (tmp_path / "routes.pt").stat().st_size < 4096
    with pytest.raises(
        RoutesError, match=r"damaged: a tensor of shape \(268435456, 3.* has \d+\.$"
    ):
        Routes.load(tmp_path / "routes.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 3}, "format version 3, this r3patch reads 1 and 2"),
        ({"format": "other"}, "not one of Routes.save"),
        ({"experts": torch.zeros(3, 3, 2).to_sparse()}, "is damaged"),
        ({"experts": torch.zeros(3, 3, 2, dtype=torch.int8, device="meta")}, "is damaged"),
    ],
)
def test_a_torch_file_of_another_kind_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """Another format, a later version, tensors that hold no plain data."""
    torch.save(state_of(routes(3)) | change, tmp_path / "routes.pt")
    with pytest.raises(RoutesError, match=message):
        Routes.load(tmp_path / "routes.pt")


@pytest.mark.parametrize(
    ("metadata", "names", "message"),
    [
        (None, ["experts"], "not one of Routes.save"),
        ({"format": "r3patch.Routes", "version": "9"}, ["experts"], "format version '9', this"),
        ({"format": "r3patch.Routes", "version": "2"}, ["experts"], "its checksum is not"),
    ],
)
def test_a_safetensors_file_of_another_kind_is_refused(
    metadata: dict[str, str] | None, names: list[str], message: str, tmp_path: Path
) -> None:
    """Somebody else's tensors, or a later version."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(save({name: np.zeros((1, 1, 1), np.uint8) for name in names}, metadata))
    with pytest.raises(RoutesError, match=message):
        Routes.load(path)


def test_files_name_the_extra_that_they_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without safetensors neither save nor load ends in an ImportError."""
    routes().save(tmp_path / "routes.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    for call in (routes().save, Routes.load):
        with pytest.raises(RoutesError, match=r"need safetensors .* pip install '\.\[rollout\]'"):
            call(tmp_path / "routes.safetensors")


class Payload:
    """Unpickling this would run code."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return (print, ("unpickled",))


def test_load_runs_no_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file of foreign objects is refused without unpickling them."""
    torch.save({"format": "r3patch.Routes", "evil": Payload()}, tmp_path / "routes.pt")
    with pytest.raises(RoutesError, match="damaged"):
        Routes.load(tmp_path / "routes.pt")
    assert capsys.readouterr().out == ""


def test_a_file_that_is_not_there_says_so(tmp_path: Path) -> None:
    """A wrong path is the caller's own error."""
    with pytest.raises(FileNotFoundError):
        Routes.load(tmp_path / "none.pt")
