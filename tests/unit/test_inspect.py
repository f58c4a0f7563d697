"""inspect: what a file of routes holds, where two differ, and what is no such file."""

from __future__ import annotations

import base64
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from r3patch import Routes, cli
from r3patch.cli._selection import Selection
from r3patch.cli.inspect import suspicions

pytest.importorskip("rich")

NUM_TOKENS, NUM_EXPERTS, TOPK, LAYERS = 200, 32, 4, (2, 3, 4, 5)


def _zip() -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("words.txt", "not routes")
    return data.getvalue()


def chosen(seed: int = 0, noise: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (NUM_TOKENS, len(LAYERS), NUM_EXPERTS)
    scores = torch.randn(shape, generator=generator)
    return (scores + noise * torch.randn(shape, generator=generator)).topk(TOPK).indices


def selection(experts: torch.Tensor, valid: torch.Tensor | None = None) -> Selection:
    return Selection.of(Routes(experts, LAYERS, valid, num_experts=NUM_EXPERTS))


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., str]:
    def save(name: str, experts: torch.Tensor, valid: torch.Tensor | None = None) -> str:
        path = str(tmp_path / name)
        Routes(experts, LAYERS, valid, num_experts=NUM_EXPERTS).save(path)
        return path

    return save


@pytest.fixture
def inspect(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str]]:
    monkeypatch.setenv("COLUMNS", "60")

    def inspect(*args: str) -> tuple[int, str]:
        status = cli.main(["inspect", *args])
        out, err = capsys.readouterr()
        return status, out + err

    return inspect


def test_inspect_shows_shape_coverage_and_load(
    save: Callable[..., str], inspect: Callable[..., tuple[int, str]]
) -> None:
    """The facts of a healthy file, and exit status 0; every line fits 60 columns."""
    valid = torch.ones(NUM_TOKENS, dtype=torch.bool)
    valid[-10:] = False
    status, out = inspect(save("a.pt", chosen(), valid))
    assert status == 0
    assert "top-4 of 32" in out
    assert "4: 2-5" in out
    assert "760 of 800 (95.0%)" in out
    assert "No layer is suspicious." in out
    assert max(map(len, out.splitlines())) <= max(60, len(out.splitlines()[0]))


def test_inspect_finds_the_layers_that_no_router_chose() -> None:
    """Never captured, constant, copied from a neighbour, and one expert everywhere."""
    experts = chosen()
    experts[:, 1] = torch.arange(TOPK)
    experts[:, 3] = experts[:, 2]
    valid = torch.ones(NUM_TOKENS, len(LAYERS), dtype=torch.bool)
    valid[:, 0] = False
    found = dict(suspicions(selection(experts, valid)))
    assert list(found) == [2, 3, 5]
    assert "no valid row" in found[2]
    assert "constant: every row is [0, 1, 2, 3]" in found[3]
    assert "equal to layer 4" in found[5]

    experts = chosen() % (NUM_EXPERTS - 1) + 1
    experts[:, 2] = torch.tensor([0, *range(1, TOPK)]) + torch.arange(NUM_TOKENS)[:, None] % 2
    experts[:, 2, 0] = 0
    found = dict(suspicions(selection(_distinct(experts))))
    assert list(found) == [4]
    assert "one expert is in 100% of the rows" in found[4]


def _distinct(experts: torch.Tensor) -> torch.Tensor:
    """The same with the rows of other layers chosen anew, so that no id repeats."""
    fresh = chosen(3)
    fresh[:, 2] = experts[:, 2]
    return fresh


def test_inspect_of_a_suspicious_file_fails(
    save: Callable[..., str], inspect: Callable[..., tuple[int, str]]
) -> None:
    """So that a script can stop at it."""
    experts = chosen()
    experts[:, 1] = torch.arange(TOPK)
    status, out = inspect(save("a.pt", experts))
    assert status == 1
    assert "suspicious layer 3" in out


@pytest.mark.parametrize("kind", ["json", "b64", "npy"])
def test_inspect_reads_raw_payloads(
    kind: str, tmp_path: Path, inspect: Callable[..., tuple[int, str]]
) -> None:
    """The same numbers from JSON, base64 of flat int32, and .npy; sizes come by option."""
    # The engine sends the dense first layer too, as zeros.
    experts = torch.nn.functional.pad(chosen()[:-1].int(), (0, 0, 1, 0))
    path = tmp_path / f"payload.{kind}"
    if kind == "json":
        path.write_text(json.dumps({"routed_experts": experts.tolist()}))
    elif kind == "b64":
        path.write_bytes(base64.b64encode(experts.numpy().tobytes()) + b"\n")
    else:
        pytest.importorskip("numpy").save(path, experts.numpy())
    sizes = ["--num-tokens", "200", "--num-experts", "32", "--topk", "4", "--num-layers", "5"]
    status, out = inspect(str(path), *sizes, "--moe-layers", "2-5")
    assert status == 0, out
    assert "4: 2-5" in out
    assert "796 of 800" in out


def test_inspect_asks_for_the_sizes_of_a_payload(
    tmp_path: Path, inspect: Callable[..., tuple[int, str]]
) -> None:
    """What a payload does not say is asked for by the names of the options."""
    path = tmp_path / "payload.json"
    path.write_text("[]")
    status, out = inspect(str(path), "--topk", "4")
    assert status == 1
    assert "add --num-tokens, --num-experts, --num-layers" in out


def test_inspect_of_two_files_says_where_they_differ(
    save: Callable[..., str], inspect: Callable[..., tuple[int, str]]
) -> None:
    """Layer by layer; equal files are exit status 0, others 1, as diff has it."""
    a, other = chosen(), chosen()
    other[:50, 2] = chosen(9)[:50, 2]
    path = save("a.pt", a)
    assert inspect(path, path)[0] == 0
    status, out = inspect(path, save("b.pt", other))
    assert status == 1
    row = next(line.split() for line in out.splitlines() if line.startswith("4 "))
    assert row[:3] == ["4", "200", "25.0%"]
    assert "6.2% of rows differ" in out
    assert "25.0% of tokens differ" in out
    assert "shifted" not in out


@pytest.mark.parametrize(
    ("axis", "by", "text"),
    [(1, 1, "+1 MoE layer"), (1, -1, "-1 MoE layer"), (0, 1, "+1 token"), (0, -2, "-2 token")],
)
def test_inspect_recognises_a_shift_by_layers_or_tokens(
    axis: int,
    by: int,
    text: str,
    save: Callable[..., str],
    inspect: Callable[..., tuple[int, str]],
) -> None:
    """Routes that are off by a layer or a token are named as such, with the sign."""
    status, out = inspect(
        save("a.pt", chosen()), save("b.pt", chosen(noise=0.02).roll(by, dims=axis))
    )
    out = " ".join(out.split())
    assert status == 1
    assert "not the same tokens, layers and weights" in out
    assert f"The second is shifted by {text}" in out
    assert out.count("shifted by") == 1


def test_inspect_of_a_missing_file_is_one_line(inspect: Callable[..., tuple[int, str]]) -> None:
    """No traceback."""
    status, out = inspect("nowhere.pt")
    assert status == 1
    assert out.startswith("r3patch inspect: ")
    assert out.count("\n") == 1


BROKEN = {
    "an empty file": b"",
    "a truncated archive": b"PK\x03\x04" + b"\x00" * 50,
    "an archive of something else": _zip(),
    "deep JSON": b"[" * 100_000,
    "deep JSON that ends": b"[" * 500 + b"]" * 500,
    "deep objects": b'{"a":' * 100_000,
    "cut JSON": b'{"routed_experts": [[[1, 2',
    "JSON of something else": b'{"loss": [0.5, null, {"a": 1}]}',
    "a cut .npy": b"\x93NUMPY\x01\x00v\x00{'descr': '<i4', 'fortr",
    "a .npy of objects": b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, "
    b"'shape': (1,), }" + b" " * 58 + b"\n\x80\x04K\x01.",
    "a picture": b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
    "no text": b"\xff\xfe\x00" * 100,
    "a safetensors of a huge header": b"\xff\xff\xff\xff\xff\xff\xff\x7f{",
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("sizes", ["", "--num-tokens 3 --num-experts 8 --topk 2 --num-layers 2"])
def test_inspect_of_a_broken_or_foreign_file_is_words(
    tmp_path: Path, inspect: Callable[..., tuple[int, str]], content: bytes, sizes: str
) -> None:
    """Truncated, deeply nested, something else: a message that names the file, no traceback."""
    path = tmp_path / "some.bin"
    path.write_bytes(content)
    status, out = inspect(str(path), *sizes.split())
    assert status == 1
    assert out.startswith("r3patch inspect: ")
    assert "some.bin" in out
    assert out.count("\n") < 4


def test_inspect_of_a_cut_file_of_routes_is_words(
    save: Callable[..., str], inspect: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    """What a full disk left of a saved Routes, cut at ten places."""
    whole = Path(save("a.pt", chosen())).read_bytes()
    for part in range(10):
        path = tmp_path / "cut.pt"
        path.write_bytes(whole[: len(whole) * part // 10])
        status, out = inspect(str(path))
        assert (status, out[:17]) == (1, "r3patch inspect: "), out
        assert "cut.pt" in out


def test_inspect_of_a_trace_says_which_command_reads_it(
    tmp_path: Path, inspect: Callable[..., tuple[int, str]]
) -> None:
    """The two kinds of file that r3patch writes are easily mixed up."""
    path = tmp_path / "run.rank0.jsonl"
    path.write_text('{"schema":1,"time":1.0,"process":"a","kind":"replay"}\n')
    status, out = inspect(str(path))
    assert status == 1
    assert f"r3patch report {path}" in " ".join(out.split())
