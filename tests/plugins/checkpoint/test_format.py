"""A state tree becomes files and comes back the same, bit for bit; what cannot is refused with its place."""

from __future__ import annotations

import json
import random
import struct
from collections import Counter, OrderedDict, namedtuple
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from drivetrain_checkpoint import CheckpointError, read_checkpoint, verify, write_checkpoint

FLOAT_BITS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8]
OTHERS = [torch.complex64, torch.complex128, torch.float8_e4m3fnuz, torch.float8_e8m0fnu]


def bits(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Random bit patterns: NaNs with payloads, denormals and infinities among them."""
    width = torch.empty(0, dtype=dtype).element_size()
    raw = torch.randint(0, 256, (*shape, width), dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


def round_trip(tmp_path, quick, tree):
    path = write_checkpoint(tmp_path, tree, 7, quick)
    assert verify(path) == []
    return read_checkpoint(path)


@pytest.mark.parametrize("dtype", [*FLOAT_BITS, *INTEGERS, *OTHERS], ids=str)
def test_every_type_keeps_every_bit(tmp_path, quick, diff, dtype):
    tensors = {"vector": bits(dtype, 33), "matrix": bits(dtype, 3, 5), "scalar": bits(dtype), "empty": bits(dtype, 0, 4)}
    tree = {"model": tensors, "state": {0: dict(tensors)}}
    assert diff(tree, round_trip(tmp_path, quick, tree)) == []


def test_layouts_of_memory_do_not_matter(tmp_path, quick, diff, monkeypatch):
    from drivetrain_checkpoint import format as module

    monkeypatch.setattr(module, "_CHUNK", 64)  # several pieces for one tensor
    base = torch.randn(6, 8)
    tree = {
        "transposed": base.t(),
        "every_other": base[:, ::2],
        "row": base[3],
        "expanded": torch.randn(1, 5).expand(4, 5),
        "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
        "negative": torch.randn(3, dtype=torch.complex64).conj().imag,
        "bool": torch.tensor([True, False, True]),
        "parameter": nn.Parameter(base.clone()),
        "large": torch.arange(999, dtype=torch.int16),
    }
    loaded = round_trip(tmp_path, quick, tree)
    assert diff({k: v.clone() for k, v in tree.items()}, loaded) == []
    assert all(t.is_contiguous() and type(t) is torch.Tensor for t in loaded.values())


def test_values_that_json_lacks(tmp_path, quick, diff):
    payload = struct.unpack(">d", bytes.fromhex("7ff8dead00000001"))[0]
    tree = {
        "floats": [0.1, -0.0, 5e-324, 1.7976931348623157e308, float("inf"), float("-inf"), float("nan"), payload],
        "ints": [0, -1, 2**53 + 1, 2**63 - 1, 2**63, -(2**63), 10**5000, True, False],
        "texts": ["", "é\n\x00\u2028", "\ud800 alone", "$tensor", "🌊"],
        "bytes": [b"", bytes(range(256))],
        "tuples": ((), (1,), ([2], {"a": (None,)})),
        3: {-1: "int keys", "-1": "and texts beside them", 2**70: 0},
        "marked": {"$tensor": ["model.safetensors", "a"], "$": 1, "plain": {"$tuple": []}},
        "": {"": []},
        "python_rng": random.Random(1).getstate(),
    }
    assert diff(tree, round_trip(tmp_path, quick, tree)) == []


@pytest.mark.parametrize("seed", range(60))
def test_random_trees(tmp_path, quick, diff, seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)

    def make(depth: int):
        kind = rng.choice(["dict", "list", "tuple", *["leaf"] * 4] if depth else ["dict"]) if depth < 6 else "leaf"
        size = rng.randrange(5)
        if kind == "dict":
            keys = [
                rng.choice([rng.randrange(-9, 9), "".join(rng.choices("a.$_ é1\n", k=rng.randrange(4)))]) for _ in range(size)
            ]
            return {key: make(depth + 1) for key in keys}
        if kind != "leaf":
            items = [make(depth + 1) for _ in range(size)]
            return items if kind == "list" else tuple(items)
        return rng.choice(
            [
                lambda: None,
                lambda: rng.random() < 0.5,
                lambda: rng.randrange(-(2**80), 2**80),
                lambda: struct.unpack(">d", rng.randbytes(8))[0],
                lambda: rng.randbytes(rng.randrange(5)),
                lambda: "".join(chr(rng.randrange(1, 0xD7FF)) for _ in range(rng.randrange(4))),
                lambda: bits(
                    rng.choice([*FLOAT_BITS, *INTEGERS, *OTHERS]), *(rng.randrange(4) for _ in range(rng.randrange(4)))
                ),
            ]
        )()

    tree = {"model": make(1), "rest": make(0)}
    assert diff(tree, round_trip(tmp_path, quick, tree)) == []


@pytest.mark.parametrize(
    "make", [torch.optim.AdamW, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), torch.optim.Adafactor, torch.optim.RMSprop]
)
def test_an_optimizer_goes_on_exactly(tmp_path, quick, make):
    def trained(steps, state=None):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        optimizer = make(model.parameters())
        data = torch.randn(10, 3, 4)
        start = 0
        if state is not None:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            start = state["step"]
        for batch in data[start:steps]:
            optimizer.zero_grad()
            model(batch).square().sum().backward()
            optimizer.step()
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": steps}

    whole, half = trained(10), trained(4)
    resumed = trained(10, round_trip(tmp_path, quick, half))
    weights = [torch.equal(whole["model"][name], resumed["model"][name]) for name in whole["model"]]
    assert all(weights) and len(weights) == 4
    without = {**half, "optimizer": {**half["optimizer"], "state": {}}}  # control: the optimizer's state is what makes it exact
    assert not torch.equal(whole["model"]["0.weight"], trained(10, round_trip(tmp_path, quick, without))["model"]["0.weight"])


def test_schedulers_and_other_dict_types(tmp_path, quick, diff):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4])
    point = namedtuple("point", "x y")(1, 2)
    tree = {"ordered": OrderedDict(b=1, a=2), "counter": Counter("abb"), "point": point, "scheduler": scheduler.state_dict()}
    loaded = round_trip(tmp_path, quick, tree)
    assert loaded["ordered"] == {"b": 1, "a": 2} and list(loaded["ordered"]) == ["b", "a"] and type(loaded["ordered"]) is dict
    assert loaded["counter"] == {"a": 1, "b": 2} and loaded["point"] == (1, 2)
    scheduler.load_state_dict(loaded["scheduler"])


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 3)
        self.body = nn.Linear(3, 3)
        self.head = nn.Linear(3, 7, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.tensor(2.0))


def test_a_tied_weight_is_stored_once_and_loads(tmp_path, quick):
    model = Tied()
    path = write_checkpoint(tmp_path, {"model": model.state_dict()}, 1, quick)
    with safe_open(path / "model.safetensors", framework="pt") as file:
        assert sorted(file.keys()) == ["body.bias", "body.weight", "embed.weight", "scale"]
    loaded = read_checkpoint(path)["model"]
    assert loaded["head.weight"] is loaded["embed.weight"]
    other = Tied()
    other.load_state_dict(loaded)
    assert other.head.weight is other.embed.weight and torch.equal(other.embed.weight, model.embed.weight)


def test_other_tools_read_the_model_file(tmp_path, quick):
    from safetensors.torch import load_file, load_model

    model, other = Tied(), Tied()
    path = write_checkpoint(tmp_path, {"optimizer": {"own": model.embed.weight}, "model": model.state_dict()}, 1, quick)
    load_model(other, path / "model.safetensors")  # knows the tied weight by the note in the file's metadata
    assert torch.equal(other.head.weight, model.head.weight) and other.head.weight is other.embed.weight
    plain = load_file(path / "model.safetensors")
    assert torch.equal(plain["embed.weight"], model.embed.weight)  # complete, although another part of the state shares it


def test_views_that_overlap_stay_apart(tmp_path, quick, diff):
    flat = torch.arange(6.0)
    tree = {"a": flat[:4], "b": flat[2:], "c": flat.view(2, 3), "d": flat, "e": flat}
    loaded = round_trip(tmp_path, quick, tree)
    assert diff(tree, loaded) == []
    assert loaded["d"] is loaded["e"] and loaded["a"].untyped_storage().data_ptr() != loaded["b"].untyped_storage().data_ptr()


def test_names_that_collide_or_are_no_names(tmp_path, quick, diff):
    names = ["a.b", "", "__metadata__", "format", "x" * 10_000, "\ud800", "new\nline", "tensor-0", "../../etc/passwd", "0"]
    tensors = {name: torch.tensor(float(i)) for i, name in enumerate(names)}
    tree = {"model": {**tensors, "a": {"b": torch.tensor(-1.0)}, 0: torch.tensor(-2.0)}, "rest": {**tensors, 0: torch.ones(1)}}
    assert diff(tree, round_trip(tmp_path, quick, tree)) == []


def test_loaded_tensors_own_their_memory(tmp_path, quick):
    path = write_checkpoint(tmp_path, {"model": {"w": torch.ones(5000)}}, 1, quick)
    loaded = read_checkpoint(path)["model"]["w"]
    address = loaded.data_ptr()
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if "safetensors" in line and str(path) in line]
    spans = [[int(end, 16) for end in line.split()[0].split("-")] for line in mapped]
    assert not any(low <= address < high for low, high in spans)


def test_the_same_state_gives_the_same_bytes(tmp_path, quick):
    tree = {"model": {"b": torch.ones(2), "a": torch.ones(3, dtype=torch.int8)}, "x": [1.5]}
    first, second = (
        write_checkpoint(tmp_path / name, tree, 1, quick) for name in ("one", "two") if not (tmp_path / name).mkdir()
    )
    assert {p.name: p.read_bytes() for p in first.iterdir()} == {p.name: p.read_bytes() for p in second.iterdir()}


class Odd(torch.Tensor):
    pass


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({1, 2}, "components.plugin.value: a checkpoint cannot hold {1, 2} of type builtins.set"),
        (print, "builtin_function_or_method"),
        (Path("x"), "PosixPath"),
        ({1.5: 0}, "the key 1.5 is neither"),
        ({True: 0}, "the key True is neither"),
        ({None: 0}, "the key None is neither"),
        (torch.ones(2).to_sparse(), "layout torch.sparse_coo"),
        (torch.ones(2, device="meta"), "meta device"),
        (torch.ones(2).as_subclass(Odd), "is a Odd"),
        (torch.empty(2, dtype=torch.bits8), "torch.bits8"),
    ],
    ids=["set", "function", "path", "float key", "bool key", "None key", "sparse", "meta", "subclass", "type"],
)
def test_what_cannot_be_held_is_refused_with_its_place(tmp_path, quick, value, message):
    with pytest.raises(CheckpointError, match=r"^components\.plugin\.value") as caught:
        write_checkpoint(tmp_path, {"components": {"plugin": {"value": value}}}, 1, quick)
    assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_tree_that_holds_itself_is_refused(tmp_path, quick, diff):
    tree: dict = {}
    tree["self"] = tree
    with pytest.raises(CheckpointError, match="nested"):
        write_checkpoint(tmp_path, tree, 1, quick)
    deep: list | dict | tuple = ()
    for level in range(98):
        deep = ({1: deep}, (deep,), [deep], {"k": deep})[level % 4]
    assert diff({"deep": deep}, round_trip(tmp_path, quick, {"deep": deep})) == []


HOSTILE = [
    '{"$tensor": ["model.safetensors", "absent"]}',
    '{"$tensor": ["../other.safetensors", "w"]}',
    '{"$tensor": ["model.safetensors"]}',
    '{"$tensor": ["model.safetensors", "w", "Storage", [1]]}',
    '{"$tensor": ["model.safetensors", "w", "complex64", [9999999999999999999999]]}',
    '{"$tensor": ["model.safetensors", "w", "complex64", [7]]}',
    '{"$tensor": "ab"}',
    '{"$tensor": [["x"], ["y"]]}',
    '{"$tuple": {"a": 1}}',
    '{"$tuple": [], "$dict": []}',
    '{"$dict": [[["unhashable"], 1]]}',
    '{"$dict": [1]}',
    '{"$float": "00"}',
    '{"$int": "ten"}',
    '{"$bytes": "!"}',
    '{"$call": "os.system"}',
    '{"__reduce__": 1, "$x": 2}',
    "NaN",
    "1" * 5000,
    "[" * 100_000,
    "[" * 300 + "]" * 300,
    "\xff",
    "",
]


@pytest.mark.parametrize("text", HOSTILE, ids=[t[:40] for t in HOSTILE])
def test_a_hostile_tree_is_an_error_and_runs_nothing(tmp_path, quick, monkeypatch, text):
    """Even when sizes and hashes fit: whoever writes a checkpoint writes its manifest as well."""
    from drivetrain_checkpoint import format as module

    monkeypatch.setattr(module, "dump_json", lambda value, indent=None: text.encode("latin-1"))
    path = write_checkpoint(tmp_path, {"model": {"w": torch.ones(8, dtype=torch.uint8)}}, 1, quick)
    assert verify(path) == []
    with pytest.raises(CheckpointError, match=r"state\.json and its tensors are not a state"):
        read_checkpoint(path)


@pytest.mark.parametrize("name", ["model.safetensors", "state.safetensors", "state.json"])
def test_a_pickle_in_any_place_never_runs(tmp_path, quick, monkeypatch, name):
    import pickle

    from drivetrain_checkpoint.format import Packed

    class Harm:
        def __reduce__(self):
            return Path.touch, (tmp_path / "harm",)

    whole = Packed.files
    monkeypatch.setattr(
        Packed, "files", lambda self: ((n, (pickle.dumps(Harm()),) if n == name else c) for n, c in whole(self))
    )
    path = write_checkpoint(tmp_path, {"model": {"w": torch.ones(1)}}, 1, quick)
    assert verify(path) == []
    with pytest.raises(CheckpointError, match="are not a state"):
        read_checkpoint(path)
    assert not (tmp_path / "harm").exists()
    pickle.loads((path / name).read_bytes())
    assert (tmp_path / "harm").exists()  # control: it would have


def test_no_file_is_a_pickle(tmp_path, quick):
    path = write_checkpoint(tmp_path, {"model": {"w": torch.ones(2)}, "optimizer": {"state": {0: torch.ones(1)}}}, 1, quick)
    assert sorted(p.name for p in path.iterdir()) == ["manifest.json", "model.safetensors", "state.json", "state.safetensors"]
    for file in path.iterdir():
        assert not file.read_bytes().startswith((b"\x80", b"PK"))
    json.loads((path / "state.json").read_text("ascii"))
