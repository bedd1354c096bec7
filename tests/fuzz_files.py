"""Damages and forges files of nncx, and loads them. `make fuzz`, or with fewer files a test.

    python tests/fuzz_files.py [--count N] [--seed S] [--first I]

Every file is made of a whole one: a float network, frozen ones, one with entropy-coded weights, the
graph of an int8 one, a checkpoint of `train.fit`, the kept files of all formats. *Damage* changes
bytes and must be refused. *Forgery* changes what the file says and renews its SHA-256: it must be
refused, or be a model that saves and loads again, or a checkpoint that fits its run (the states of
its optimizers are taken at their word).

A refusal is a ValueError, and takes no more than `MEMORY`. Files are loaded in a process of its
own, so that a crash or a hang is one more result; case I of a seed is always the same file.
"""

import argparse
import base64
import contextlib
import copy
import hashlib
import json
import multiprocessing
import random
import resource
import sys
import tempfile
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import nncx
from nncx.graph._operations import OPERATIONS

HANG = 60.0  # seconds, of a machine that may be busy
MEMORY = 1_000  # megabytes that a file of some kilobytes may take
KEPT = sorted((Path(__file__).parent / "files").glob("model-format-*.safetensors"))


# ---------------------------------------------------------------------------------------------
# whole files, and what loads them


def _train(path: Path, epochs: int) -> None:
    torch.manual_seed(0)
    task = nncx.train.Supervised(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)))
    optimizer = torch.optim.Adam(task.parameters())
    nncx.train.fit(
        task,
        [(torch.ones(2, 4), torch.tensor([0, 1]))],
        epochs=epochs,
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.StepLR(optimizer, 2),
        checkpoint=path,
        progress=False,
    )


def _load_model(path: Path) -> None:
    model = nncx.load(path)
    nncx.save(model, path)
    again = nncx.load(path).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.nan_to_num(), again[name].nan_to_num()), name


def _sparse() -> nn.Module:
    """A frozen model whose packed weights are coded in both ways, by gaps and without."""
    model = nn.Sequential(nncx.BinaryConnectLinear(300, 20), nncx.XNORLinear(20, 200))
    with torch.no_grad():
        model[0].weight.copy_(torch.rand(20, 300) - 0.995)
        model[1].weight.copy_(torch.rand(200, 20) - 0.1)
    return nncx.freeze(model)


def _load_checkpoint(path: Path) -> None:
    _train(path, epochs=1)  # as many as it has: nothing is left to do


def _whole_files(folder: Path) -> list[tuple[bytes, Callable[[Path], None]]]:
    path = folder / "whole"
    files = [(kept.read_bytes(), _load_model) for kept in KEPT]
    model = nncx.models.ResNet(8, width=2)
    nncx.save(model, path)
    files.append((path.read_bytes(), _load_model))
    for method in (nncx.XNOR(), nncx.Int8(), nncx.Half(), nncx.Pruning(sparsity=0.8)):
        converted = nncx.convert(copy.deepcopy(model), method).train()
        converted(torch.zeros(2, 3, 8, 8))  # from which int8 takes ranges
        if hasattr(method, "steps"):
            list(method.steps(converted))
        nncx.save(nncx.freeze(converted), path)
        files.append((path.read_bytes(), _load_model))
    nncx.save(_sparse(), path, entropy=True)
    files.append((path.read_bytes(), _load_model))
    graph = nncx.quantize(model, [torch.randn(1, 3, 8, 8)])
    nncx.save(nncx.freeze(graph), path)
    files.append((path.read_bytes(), _load_model))
    path.unlink()
    _train(path, epochs=1)
    files.append((path.read_bytes(), _load_checkpoint))
    return files


# ---------------------------------------------------------------------------------------------
# damage: bytes -> bytes


def _flip(rng: random.Random, data: bytearray) -> None:
    for _ in range(rng.choice([1, 1, 2, 8])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _truncate(rng: random.Random, data: bytearray) -> None:
    del data[rng.randrange(len(data)) :]


def _insert(rng: random.Random, data: bytearray) -> None:
    at = rng.randrange(len(data) + 1)
    data[at:at] = rng.randbytes(rng.choice([1, 8, 100]))


def _delete(rng: random.Random, data: bytearray) -> None:
    at = rng.randrange(len(data))
    del data[at : at + rng.choice([1, 8, 100])]


def _swap(rng: random.Random, data: bytearray) -> None:
    size = rng.randrange(1, 64)
    i, j = (rng.randrange(len(data) - size) for _ in range(2))
    data[i : i + size], data[j : j + size] = data[j : j + size], data[i : i + size]


def _header_length(rng: random.Random, data: bytearray) -> None:
    length = int.from_bytes(data[:8], "little")
    lengths = [0, 1, length - 1, length + 1, len(data), 2**31, 2**63, rng.getrandbits(64)]
    data[:8] = rng.choice(lengths).to_bytes(8, "little")


def _header_text(rng: random.Random, data: bytearray) -> None:
    end = 8 + int.from_bytes(data[:8], "little")
    places = [i for i in range(8, end) if chr(data[i]) in '0123456789"{}[],:']
    data[rng.choice(places)] = ord(rng.choice('0123456789"{}[],: '))


DAMAGE = (_flip, _truncate, _insert, _delete, _swap, _header_length, _header_text)

# ---------------------------------------------------------------------------------------------
# forgery: (table of tensors, metadata, body) -> the same, changed


class _Parts:
    """A file taken apart, and put together with a valid hash."""

    def __init__(self, data: bytes) -> None:
        end = 8 + int.from_bytes(data[:8], "little")
        self.table = json.loads(data[8:end])
        self.envelope = json.loads(self.table.pop("__metadata__")["nncx"])
        self.metadata = self.envelope["metadata"]
        self._compact = isinstance(self.metadata, str)
        if self._compact:
            self.metadata = json.loads(zlib.decompress(base64.b64decode(self.metadata)))
        self.body = bytearray(data[end:])

    def replace(self, name: str, data: bytes) -> None:
        """Other bytes for a tensor, as many as they may be; b"" leaves its place empty."""
        entry = self.table[name]
        start, end = entry["data_offsets"]
        self.body[start:end] = data
        for other in self.table.values():
            if other["data_offsets"][0] >= end:
                other["data_offsets"] = [
                    at + len(data) - end + start for at in other["data_offsets"]
                ]
        entry["data_offsets"] = [start, start + len(data)]

    def join(self) -> bytes:
        metadata = self.metadata
        if self._compact:
            metadata = base64.b64encode(zlib.compress(json.dumps(metadata).encode())).decode()
        self.envelope |= {"sha256": "0" * 64, "metadata": metadata}
        text = {"__metadata__": {"nncx": json.dumps(self.envelope)}}
        header = json.dumps(text | self.table).encode()
        data = len(header).to_bytes(8, "little") + header + self.body
        digest = hashlib.sha256(data).hexdigest()
        return data.replace(b"0" * 64, digest.encode(), 1)


HOSTILE = (
    *(None, True, 0, 1, -1, 2, 7, 2**31, 2**63, 10**30, 1.5, 1e308, "", "weight", "0", ".", "\0"),
    *([], {}, [[]], {"float": "nan"}, {"float": 1}, {"tensor": "x"}, {"same_as": ""}, [10**9] * 3),
    *(["x"] * 50, "x" * 3000, {"list": []}, {"dict": [[[], 0]]}, {"numpy": ["O", 1]}),
)


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in a tree of JSON."""
    keys = tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in keys:
        yield tree, key
        yield from _places(tree[key])


def _hostile_value(rng: random.Random, parts: _Parts) -> None:
    container, key = rng.choice(list(_places(parts.metadata)))
    container[key] = copy.deepcopy(rng.choice(HOSTILE))


def _moved_value(rng: random.Random, parts: _Parts) -> None:
    """A value of the tree at the place of another: nested architectures, wrong layers."""
    places = list(_places(parts.metadata))
    (container, key), (source, other) = rng.choice(places), rng.choice(places)
    container[key] = copy.deepcopy(source[other])


def _lost_value(rng: random.Random, parts: _Parts) -> None:
    container, key = rng.choice(list(_places(parts.metadata)))
    del container[key]


def _other_number(rng: random.Random, parts: _Parts) -> None:
    numbers = [(c, k) for c, k in _places(parts.metadata) if type(c[k]) in (int, float, bool)]
    if numbers:
        container, key = rng.choice(numbers)
        container[key] = rng.choice([0, 1, 3, -5, container[key] + 1, 10**9, 2**40, 2**62])


def _other_argument(rng: random.Random, parts: _Parts) -> None:
    """An argument that a constructor may take."""
    nodes = [c[k] for c, k in _places(parts.metadata) if k == "config" and isinstance(c[k], dict)]
    if nodes:
        names = "num_layers depth width kernel_size padding groups dilation scale bias stride"
        names += " in_channels out_channels in_features num_features image_size affine dtype"
        rng.choice(nodes)[rng.choice(names.split())] = copy.deepcopy(rng.choice(HOSTILE))


def _other_type(rng: random.Random, parts: _Parts) -> None:
    nodes = [c for c, k in _places(parts.metadata) if k == "type"]
    if nodes:
        node = rng.choice(nodes)
        node["type"] = rng.choice([*nncx._store.TYPES, "os.system"])
        if rng.random() < 0.5:
            node["frozen"] = not node.get("frozen", False)
        if rng.random() < 0.5:
            node["config"] = {}


def _deeper(rng: random.Random, parts: _Parts) -> None:
    """What stands somewhere, within many more containers."""
    places = [(c, k) for c, k in _places(parts.metadata) if isinstance(c[k], dict)]
    container, key = rng.choice(places)
    for _ in range(rng.choice([1, 10, 150, 400])):
        container[key] = {
            "type": "torch.nn.Sequential",
            "config": {},
            "children": {"0": container[key]},
        }


def _many(rng: random.Random, parts: _Parts) -> None:
    """Thousands of layers, new ones or repeated ones."""
    nodes = [c[k] for c, k in _places(parts.metadata) if k == "children" and isinstance(c[k], dict)]
    if nodes:
        children = rng.choice(nodes)
        config = {"in_channels": 1, "out_channels": 1, "kernel_size": 1}
        layers = [
            {"type": "nncx.XNORConv2d", "config": config, "frozen": True},
            {
                "type": "torch.nn.LSTM",
                "config": {"input_size": 1, "hidden_size": 1, "num_layers": 9},
            },
            {"type": "nncx.models.ResNet", "config": {"depth": 20}},
            {"type": "torch.nn.ReLU", "config": {}},
            {"same_as": next(iter(children), "")},
        ]
        layer = rng.choice(layers)
        children.update({f"more{i}": layer for i in range(rng.choice([10, 300, 8000]))})


def _graph_node(rng: random.Random, parts: _Parts) -> None:
    """Another node: its operation, what it reads, an argument, its place, or thousands of it."""
    graphs = [c[k] for c, k in _places(parts.metadata) if k == "nodes" and isinstance(c[k], list)]
    if not graphs:
        return
    nodes = rng.choice(graphs)
    node = rng.choice([node for node in nodes if isinstance(node, list) and len(node) == 4])
    name, operation, inputs, arguments = node
    match rng.randrange(6):
        case 0:
            node[1] = rng.choice([*OPERATIONS, "layer", "system", "__class__"])
        case 1:
            node[2] = rng.choice([[], [name], [*inputs, *inputs], ["x"], [nodes[-1][0]], name])
        case 2:
            names = "path other dim index kernel_size pad mode shape dtype out self input".split()
            arguments["dict"][rng.choice(names)] = copy.deepcopy(rng.choice(HOSTILE))
        case 3:
            nodes.insert(rng.randrange(len(nodes)), nodes.pop(rng.randrange(len(nodes))))
        case 4:
            paths = ["", ".", "conv.weight", "stage1", "stage1..0", "forward", "_nodes", "fc"]
            arguments["dict"] = {"path": rng.choice(paths)}
        case 5:
            count = rng.choice([10, 1000, 25_000])
            nodes += [[f"{name}{i}", operation, inputs, arguments] for i in range(count)]


def _table_entry(rng: random.Random, parts: _Parts) -> None:
    name, entry = rng.choice(list(parts.table.items()))
    dtypes = "BOOL U8 I8 I16 U16 F16 BF16 I32 U32 F32 F64 I64 U64 F8_E4M3 F8_E5M2 C64 X".split()
    match rng.randrange(6):
        case 0:
            entry["dtype"] = rng.choice(dtypes)
        case 1:
            entry["shape"] = rng.choice(
                [[], [0], [1], [2**40, 0], [-1], [2**62, 4], entry["shape"] * 2]
            )
        case 2:
            entry["data_offsets"] = rng.choice([[0, 0], [0, 2**62], [8, 4], [-1, 1], [0, 4]])
        case 3:
            parts.table["x" * rng.choice([1, 5000])] = parts.table.pop(name)
        case 4:
            del parts.table[name]
        case 5:
            other = rng.choice(list(parts.table))
            parts.table[name], parts.table[other] = parts.table[other], entry


def _tied(rng: random.Random, parts: _Parts) -> None:
    """One tensor under the name of another."""
    name, source = rng.choice(list(parts.table)), rng.choice(list(parts.table))
    if name != source and isinstance(parts.metadata.get("tied"), dict):
        parts.replace(name, b"")
        del parts.table[name]
        parts.metadata["tied"][name] = source


def _payload(rng: random.Random, parts: _Parts) -> None:
    """Another head, table or stream of an entropy-coded tensor; or another tensor as one."""
    coded = parts.metadata.get("coded")
    if not coded:
        return
    name = rng.choice(coded)
    start, end = parts.table[name]["data_offsets"]
    data = parts.body[start:end]
    head = 10 if data[0] == 1 else 27  # without and with gaps
    match rng.randrange(8):
        case 0:
            data[rng.randrange(2)] = rng.choice([0, 1, 2, 3, 7, 8, 9, 255])
        case 1:
            size = int.from_bytes(data[2:10], "little")
            sizes = [0, 1, size - 1, size + 1, 8 * size, 2040 * len(data), 2**32, 2**62, 2**64 - 1]
            data[2:10] = rng.choice(sizes).to_bytes(8, "little")
        case 2:
            data[rng.randrange(head)] = rng.randrange(256)
        case 3:
            data[head] = rng.choice([0, 1, data[head] - 1, data[head] + 1, 255]) % 256
        case 4:
            for _ in range(rng.choice([1, 2, 30])):  # a nibble is a length
                at = rng.randrange(head + 1, min(len(data), head + 130))
                data[at] ^= rng.randrange(1, 256)
        case 5:
            data[rng.randrange(head, len(data)) :] = rng.randbytes(rng.choice([0, 1, 50, 5000]))
        case 6:
            other = rng.choice(list(parts.table))
            start, end = parts.table[other]["data_offsets"]
            data = parts.body[start:end]
        case 7:
            coded[rng.randrange(len(coded))] = rng.choice(list(parts.table))
    parts.replace(name, data)
    parts.table[name]["shape"] = [len(data)]


def _body(rng: random.Random, parts: _Parts) -> None:
    if parts.body:
        _flip(rng, parts.body)


def _envelope(rng: random.Random, parts: _Parts) -> None:
    key = rng.choice(["format_version", "more"])
    parts.envelope[key] = copy.deepcopy(rng.choice(HOSTILE))


FORGERY = (
    *(_hostile_value, _moved_value, _lost_value, _other_number, _other_argument, _other_type),
    *(_deeper, _many, _graph_node, _table_entry, _tied, _payload, _body, _envelope),
)

# ---------------------------------------------------------------------------------------------
# cases


class Result(NamedTuple):
    case: int
    kind: str
    outcome: str  # "refused", "loaded" (and saved, and loaded again), or what should not be
    seconds: float = 0.0  # of the process's time: others may keep the machine busy
    megabytes: float = 0.0

    @property
    def is_bad(self) -> bool:
        return self.outcome not in ("refused", "loaded") or self.megabytes > MEMORY


def _changed(rng: random.Random, whole: bytes) -> tuple[str, bool, bytes]:
    """Kind, whether it is forged, and bytes that are not `whole`."""
    while True:
        if rng.random() < 0.7:
            change, data = rng.choice(DAMAGE), bytearray(whole)
            change(rng, data)
            forged = False
        else:
            change, parts = rng.choice(FORGERY), _Parts(whole)
            change(rng, parts)
            data = parts.join()
            forged = True
        if bytes(data) != whole:
            return change.__name__.strip("_"), forged, bytes(data)


def _try(case: int, seed: int, files: list, path: Path) -> Result:
    rng = random.Random(f"{seed}/{case}")
    whole, load = rng.choice(files)
    kind, forged, data = _changed(rng, whole)
    path.write_bytes(data)
    peak, start = _peak(), time.process_time()
    try:
        load(path)
        outcome = "loaded" if forged else "DAMAGED FILE LOADED"
    except ValueError as error:
        outcome = "refused" if len(str(error)) < 5000 else "ENDLESS MESSAGE"
    except BaseException as error:
        outcome = f"{type(error).__name__}: {error}"[:200]
    return Result(case, kind, outcome, time.process_time() - start, _peak() - peak)


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _serve(cases: range, seed: int, results: Connection) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        files = _whole_files(Path(folder))
        for whole, load in files:  # what is done once in a process is not the first case's
            path = Path(folder) / "file"
            path.write_bytes(whole)
            load(path)
        for case in cases:
            results.send(_try(case, seed, files, Path(folder) / "file"))


def run(count: int, seed: int = 0, first: int = 0) -> Iterator[Result]:
    """The results of `count` cases, from case `first` on."""
    context = multiprocessing.get_context("spawn")
    case, end = first, first + count
    while case < end:
        receiver, sender = context.Pipe(duplex=False)
        worker = context.Process(target=_serve, args=(range(case, end), seed, sender), daemon=True)
        worker.start()
        sender.close()
        patience = HANG + 60  # until it has begun
        try:
            while case < end:
                if not receiver.poll(patience):
                    yield Result(case, "?", "HANG")
                    case += 1
                    break
                yield receiver.recv()
                case += 1
                patience = HANG
        except EOFError:
            worker.join()
            yield Result(case, "?", f"CRASH, exit code {worker.exitcode}")
            case += 1
        worker.kill()
        worker.join()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    arguments = parser.parse_args()
    results = run(arguments.count, arguments.seed, arguments.first)
    return 1 if _report(results) else 0


def _report(results: Iterator[Result]) -> int:
    """Print what happened, also if interrupted; the number of bad results."""
    table: Counter[tuple[str, str]] = Counter()
    slowest = {outcome: Result(0, "", "") for outcome in ("refused", "loaded")}
    largest = dict(slowest)
    with contextlib.suppress(KeyboardInterrupt):
        for result in results:
            kind, outcome = result.kind, "bad" if result.is_bad else result.outcome
            table[kind, outcome] += 1
            if result.is_bad:
                took = f"{result.seconds:.0f} s, {result.megabytes:.0f} MB"
                print(f"case {result.case} ({kind}): {result.outcome}, {took}", flush=True)
            else:
                slowest[outcome] = max(slowest[outcome], result, key=lambda r: r.seconds)
                largest[outcome] = max(largest[outcome], result, key=lambda r: r.megabytes)
    outcomes = ("refused", "loaded", "bad")
    print(f"{'':16}" + "".join(f"{outcome:>10}" for outcome in outcomes))
    for kind in sorted({kind for kind, _ in table}):
        print(f"{kind:16}" + "".join(f"{table[kind, outcome]:10,}" for outcome in outcomes))
    bad = sum(count for (_, outcome), count in table.items() if outcome == "bad")
    print(f"{table.total():,} files, {bad:,} bad")
    for outcome, result in slowest.items():
        print(f"slowest {outcome}: {result.seconds:.2f} s (case {result.case}, {result.kind})")
    for outcome, result in largest.items():
        print(f"largest {outcome}: {result.megabytes:.0f} MB (case {result.case}, {result.kind})")
    return bad


if __name__ == "__main__":
    sys.exit(main())
