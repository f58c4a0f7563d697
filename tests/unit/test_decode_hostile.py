"""decode: whatever it is given, RoutesError is all that comes out."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from engines import FORMATS, Array, Sample, b64, envelope, make, npy
from torch._subclasses.fake_tensor import FakeTensorMode

from r3patch import Layout, Routes, RoutesError, decode


def nested(depth: int) -> list[Any]:
    value: list[Any] = [1]
    for _ in range(depth):
        value = [value]
    return value


def nested_parts(depth: int) -> tuple[Any, ...]:
    value: tuple[Any, ...] = ()
    for _ in range(depth):
        value = (value,)
    return value


def circular() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


def nested_responses(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(depth):
        value = {"routed_experts": value}
    return value


class Raising(Mapping[str, Any]):
    """Raises whatever it is asked."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __getitem__(self, key: str) -> Any:
        raise self.error

    def __iter__(self) -> Iterator[str]:
        raise self.error

    def __len__(self) -> int:
        raise self.error

    def __contains__(self, key: object) -> bool:
        raise self.error


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


def fake() -> torch.Tensor:
    with FakeTensorMode():
        return torch.zeros(4, 4, 3, dtype=torch.int32)


ROWS = torch.zeros(4, 4, 3, dtype=torch.int32)
TENSORS: dict[str, Callable[[], object]] = {
    "sparse": ROWS.to_sparse,
    "sparse csr": ROWS[0].to_sparse_csr,
    "quantized": lambda: torch.quantize_per_tensor(ROWS.float(), 1.0, 0, torch.quint8),
    "nested": lambda: torch.nested.nested_tensor([ROWS[0], ROWS[1]]),
    "jagged": lambda: torch.nested.nested_tensor([ROWS[0], ROWS[1]], layout=torch.jagged),
    "meta": lambda: ROWS.to("meta"),
    "fake": fake,
    "masked": lambda: torch.masked.masked_tensor(ROWS, ROWS == 0),
}


@pytest.mark.parametrize("build", TENSORS.values(), ids=TENSORS.keys())
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_tensor_without_plain_data_is_refused(build: Callable[[], object]) -> None:
    """Tensors of other kinds raise a dozen errors of their own, or answer from nowhere."""
    sample, tensor = make(), build()
    with pytest.raises(RoutesError, match=r"pass an ordinary dense tensor"):
        decode(tensor, **sample.sizes)
    with pytest.raises(RoutesError, match=r"pass an ordinary dense tensor"):
        Routes(tensor, (1, 2, 3, 4), num_experts=20)
    with pytest.raises(RoutesError, match=r"pass an ordinary dense tensor"):
        Routes(ROWS, (1, 2, 3, 4), tensor, num_experts=20)


def test_a_subclass_with_plain_data_is_taken() -> None:
    """A Parameter, or a subclass of somebody's own, holds data like any tensor."""
    sample = make()
    rows = torch.from_numpy(sample.all_layers())

    class Own(torch.Tensor):
        pass

    for tensor in (torch.nn.Parameter(rows, requires_grad=False), rows.as_subclass(Own)):
        routes = decode(tensor, **sample.sizes)
        assert routes == sample.routes
        assert type(routes.experts) is torch.Tensor


HOSTILE: dict[str, Callable[[Array], object]] = {
    "deep lists": lambda a: nested(100_000),
    "deep parts": lambda a: nested_parts(100_000),
    "deep responses": lambda a: nested_responses(100_000),
    "a list in itself": lambda a: circular(),
    "an int above 64 bits": lambda a: [[[2**70] * 3] * 4] * 4,
    "no numbers": lambda a: [[[None] * 3] * 4] * 4,
    "an object in a list": lambda a: [[[Unprintable()]]],
    "shape None": lambda a: envelope(a, a.tobytes()) | {"shape": None},
    "shape 5": lambda a: envelope(a, a.tobytes()) | {"shape": 5},
    "shape of bools": lambda a: envelope(a, a.tobytes()) | {"shape": [True, 4, 12]},
    "shape of floats": lambda a: envelope(a, a.tobytes()) | {"shape": [4.0, 4, 3]},
    "shape text": lambda a: envelope(a, a.tobytes()) | {"shape": "443"},
    "shape huge": lambda a: envelope(a, a.tobytes()) | {"shape": [2**62, 2**62, 2**62]},
    "shape of zero and huge": lambda a: envelope(a, b"") | {"shape": [0, 2**62, 2**62]},
    "shape unprintable": lambda a: envelope(a, a.tobytes()) | {"shape": Unprintable()},
    "data unprintable": lambda a: envelope(a, Unprintable()),
    "dtype unprintable": lambda a: envelope(a, a.tobytes()) | {"dtype": Unprintable()},
    "start True": lambda a: envelope(a, a.tobytes(), start=True),
    "start 0.0": lambda a: envelope(a, a.tobytes(), start=0.0),
    "start huge": lambda a: envelope(a, a.tobytes(), start=2**80),
    "start unprintable": lambda a: envelope(a, a.tobytes(), start=Unprintable()),
    "a key without a name": lambda a: {Unprintable(): 1},
    "nrlre1 of other digits": lambda a: "nrlre1:int32:-4x-4x3:" + b64(a.tobytes()),
    "nrlre1 of many digits": lambda a: f"nrlre1:int32:{'9' * 5000}x4x3:" + b64(a.tobytes()),
    "object array": lambda a: a.astype(object),
    "structured array": lambda a: np.zeros((4, 4, 3), dtype=[("a", "i4")]),
    "dates": lambda a: a.astype("datetime64[s]"),
    "text array": lambda a: a.astype("U3"),
    "scalar": lambda a: np.int64(3),
    "array of no axes": lambda a: np.array(3),
    "structured npy": lambda a: npy(np.zeros((4, 4, 3), dtype=[("a", "i4")])),
    "npy of a huge shape": lambda a: b64(
        b"\x93NUMPY\x01\x00\x4a\x00"
        + b"{'descr': '<i4', 'fortran_order': False, 'shape': (1099511627776, 4, 3)}".ljust(74)
    ),
    "an archive": lambda a: b64(b"PK\x03\x04" + a.tobytes()),
    "text that is not ASCII": lambda a: "\u0663\u0664" * 8,
    "lone surrogates": lambda a: "\ud800" * 8,
}


@pytest.mark.parametrize("build", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_payloads_are_refused(build: Callable[[Array], object]) -> None:
    """Recursion, overflow, huge sizes and objects that raise all end in RoutesError."""
    sample = make()
    with pytest.raises(RoutesError, match=r"^s7: "):
        decode(build(sample.all_layers().astype(np.int32)), **sample.sizes, name="s7")


@pytest.mark.parametrize(
    "error", [KeyError("k"), RecursionError(), MemoryError(), OSError("gone"), StopIteration()]
)
def test_a_mapping_that_raises_is_refused(error: Exception) -> None:
    """A lazy mapping over a store raises what its store does; the cause stays attached."""
    with pytest.raises(RoutesError, match="cannot be read") as caught:
        decode(Raising(error), **make().sizes)
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("name", ["num_tokens", "num_experts", "topk", "num_layers", "start"])
@pytest.mark.parametrize("value", [True, 8.0, "8", None, 2**80, -(2**80), torch.tensor(4), [4]])
def test_an_argument_that_is_no_integer_is_refused_by_name(name: str, value: object) -> None:
    """All integer arguments alike: True is not 1, 8.0 is not 8, and nothing of 2**80 is built."""
    sample = make()
    sizes = sample.sizes | {name: value}
    with pytest.raises(RoutesError, match=rf"(?s){name} is |has \d+ rows|not rows of|num_tokens="):
        decode(FORMATS["sglang"](sample), **sizes)


def test_a_sample_too_long_for_memory_is_refused() -> None:
    """num_tokens is checked against the rows sent, except where a start leaves none to send."""
    with pytest.raises(RoutesError, match=r"no memory for rows of shape \(1125899906842624, "):
        decode("", **(make().sizes | {"num_tokens": 2**50}), start=2**50 - 1)


@pytest.mark.parametrize("moe_layers", [5, (1.0,), ("2",), (True,), (2**80,)])
def test_layers_that_are_no_numbers_are_refused(moe_layers: Any) -> None:
    """moe_layers comes from a config that may hold anything."""
    with pytest.raises(RoutesError, match="layer"):
        decode("", **(make().sizes | {"moe_layers": moe_layers}))


def test_numpy_integers_are_integers() -> None:
    """Sizes read from an array need no int()."""
    sample = make()
    sizes = {k: np.int64(v) if isinstance(v, int) else v for k, v in sample.sizes.items()}
    routes = decode(FORMATS["sglang"](sample), **sizes, start=np.int8(0))
    assert routes == sample.routes
    assert type(routes.num_experts) is int


@pytest.mark.parametrize("flat", [False, True])
def test_the_mask_of_a_masked_array_means_missing(flat: bool) -> None:
    """Masked rows have no routes; a row that is masked in part is ambiguous, so it is bad."""
    sample = make(num_tokens=6)
    array = np.ma.masked_array(sample.all_layers().astype(np.uint8))
    array[2, 1] = np.ma.masked  # layer 2
    array[3] = np.ma.masked
    routes = decode(array.reshape(-1) if flat else array, **sample.sizes)
    assert routes.mask.tolist() == [
        [True, True], [True, True], [False, True], [False, False], [True, True], [False, False],
    ]  # fmt: skip
    given = Routes(array[:, [1, 3]], (2, 4), num_experts=20)
    assert given == routes[:5]
    array[4, 1, 0] = np.ma.masked
    with pytest.raises(RoutesError, match="-1 as a whole"):
        decode(array, **sample.sizes)
    floats = np.ma.masked_array(sample.all_layers() + 0.5)
    with pytest.raises(RoutesError, match=r"dtype torch.float64"):
        decode(floats, **sample.sizes)


def test_routes_stay_on_the_host_whatever_the_default_device() -> None:
    """Under a default device, torch's factories would build rows there."""
    sample = make()
    payload = FORMATS["sglang"](sample)
    expected = sample.routes
    with torch.device("meta"):
        routes = decode(payload, **sample.sizes)
        rest = decode("", **sample.sizes, start=4)
        joined = Routes.join([routes[:3], routes.select((4, 2)), rest])
        placed = Layout(cp_size=2).place([joined, Routes.missing(2, (2, 4), 3, 20)])
        again = Routes(routes.experts.tolist(), (2, 4), routes.mask.tolist(), num_experts=20)
    assert routes == again == expected
    assert joined == expected
    assert placed == Layout(cp_size=2).place([expected, Routes.missing(2, (2, 4), 3, 20)])


# Mutations


def mutate(payload: Any, draw: random.Random) -> Any:
    """The payload with one thing changed: in its bytes, its elements, its keys or its kind."""
    if isinstance(payload, (str, bytes)) and payload and draw.random() < 0.9:
        raw = bytearray(payload.encode() if isinstance(payload, str) else payload)
        at = draw.randrange(len(raw))
        kind = draw.randrange(4)
        if kind == 0:
            raw[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del raw[at : at + draw.randrange(1, 9)]
        elif kind == 2:
            raw[at:at] = raw[: draw.randrange(1, 9)]
        else:
            raw[at] = draw.randrange(256)
        return raw.decode("latin-1") if isinstance(payload, str) else bytes(raw)
    if isinstance(payload, dict) and payload and draw.random() < 0.9:
        key = draw.choice(sorted(payload))
        changed = dict(payload)
        value = changed.pop(key)
        if draw.random() < 0.8:
            changed[key] = mutate(value, draw)
        return changed
    if isinstance(payload, (list, tuple)) and payload and draw.random() < 0.9:
        items = list(payload)
        at = draw.randrange(len(items))
        items[at] = mutate(items[at], draw)
        return type(payload)(items)
    if isinstance(payload, np.ndarray) and payload.size and draw.random() < 0.9:
        return draw.choice(ARRAYS)(payload.copy(), draw)
    return draw.choice(
        [None, True, -1, 0, 2**63, 1.5, "", "A", b"\xff", [], {}, (), [[]], object()]
    )


def with_one_id(array: Array, draw: random.Random) -> Array:
    array.reshape(-1)[draw.randrange(array.size)] = draw.choice([0, 1, 19, 20, 127])
    return array


ARRAYS: list[Callable[[Array, random.Random], Any]] = [
    with_one_id,
    lambda a, draw: a.astype(draw.choice(["f4", "c8", "b1", "O", "M8[s]", "u8", ">i2", "S3"])),
    lambda a, draw: a.reshape(draw.choice([(-1,), (1, *a.shape), (a.shape[0], -1)])),
    lambda a, draw: np.moveaxis(a, 0, draw.randrange(a.ndim)),
    lambda a, draw: a[draw.choice([slice(1, None), slice(None, None, -1), slice(0, 0)])],
    lambda a, draw: np.broadcast_to(a[:1], a.shape),
    lambda a, draw: np.ma.masked_array(a, mask=np.arange(a.size).reshape(a.shape) % 5 == 0),
    lambda a, draw: a.tolist(),
]


def check_mutations(count: int, seed: int) -> tuple[int, int]:
    """How many mutated payloads were taken and refused; anything else fails."""
    draw = random.Random(seed)
    samples = [make(seed=0), make(9, 5, (1, 2, 5), 1, 300, seed=1), make(2, 1, (1,), 2, 256)]
    taken = refused = 0
    for _ in range(count):
        sample: Sample = draw.choice(samples)
        payload = draw.choice(list(FORMATS.values()))(sample)
        for _ in range(draw.randrange(1, 4)):
            payload = mutate(payload, draw)
        try:
            routes = decode(payload, **sample.sizes)
        except RoutesError:
            refused += 1
            continue
        taken += 1
        assert routes.num_tokens == sample.num_tokens
        assert routes == Routes(
            routes.experts, sample.moe_layers, routes.mask, num_experts=sample.num_experts
        )
    return taken, refused


@pytest.mark.filterwarnings("ignore:Casting complex")
def test_mutated_payloads_give_routes_or_routes_error() -> None:
    """2,000 mutated payloads of all formats; MUTATIONS=20000 in the environment for as many."""
    taken, refused = check_mutations(int(os.environ.get("MUTATIONS", "2000")), seed=18)
    assert refused > taken > 0
