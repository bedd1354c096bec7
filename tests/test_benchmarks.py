"""The benchmarks run, print what their README promises, and give a wrong result no time."""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from typer.testing import CliRunner

import nncx
from nncx import _C, _entropy, cli, ops
from nncx.commands import _compress, _recipe

FOLDER = Path(__file__).parents[1] / "benchmarks"
SMALLEST = {
    "binary_conv2d": "c=16",
    "binary_conv2d_sign": "c=16",
    "binary_linear": "m=256",
    "channel_shuffle": "c=60 hw=28 g=3 nhwc",
    "codebook_conv2d": "c=16 hw=32 k=3 bits=1 nhwc",
    "codebook_linear": "m=256 k=1024 o=1024 bits=4",
    "depthwise_conv2d": "c=1024 hw=7 k=3 nhwc",
    "depthwise_separable_conv2d": "c=512 o=1024 hw=14 s=2 nhwc",
    "entropy": "bits=1 ",
    "grouped_conv2d": "c=120 o=480 hw=14 g=3 s=1 nhwc",
    "hashed_linear": "m=1 k=784 o=1000 b=12250",
    "int8_conv2d": "c=1024 hw=7 k=1 symmetric to int8",
    "int8_linear": "m=33 k=1001 o=999 affine",
    "max_pool2d_signs": "c=16",
    "mobile_networks": "ShuffleNetV2 n=1 hw=224 nchw",
    "pack_signs": "c=16 hw=32 nhwc",
    "quantize_int8": "c=16 hw=32 nhwc",
    "xnor_conv2d": "c=16 hw=32 k=3 nhwc",
}
# Of those for a GPU, small ones.
SMALL_ON_GPU = {
    "binary_conv2d": lambda m: m.ConvShape(2, 9, 9, 5, 3),
    "binary_conv2d_sign": lambda m: m.ConvShape(2, 9, 9, 5, 3),
    "binary_linear": lambda m: m.BinaryLinearShape(m.LinearShape(3, 70, 9), "float16"),
    "channel_shuffle": lambda m: m.ShuffleShape(2, 12, 5, 3, "nhwc", "float16"),
    "codebook_conv2d": lambda m: m.CodebookConvShape(
        m.ConvShape(2, 9, 9, 5, 3), 4, "nhwc", "float16"
    ),
    "codebook_linear": lambda m: m.CodebookLinearShape(m.LinearShape(3, 70, 9), 4, dtype="float16"),
    "depthwise_conv2d": lambda m: m.DepthwiseShape(2, 9, 8, 3, 2),
    "grouped_conv2d": lambda m: m.GroupedShape(2, 12, 6, 5, 3, 3, "relu", "nhwc", "float16"),
    "hashed_linear": lambda m: m.HashedLinearShape(m.LinearShape(3, 70, 9), 40),
    "int8_conv2d": lambda m: m.Int8ConvShape(m.ConvShape(2, 9, 9, 5, 3), "affine", "float16"),
    "int8_linear": lambda m: m.Int8LinearShape(m.LinearShape(3, 70, 9), "affine"),
    "max_pool2d_signs": lambda m: m.PoolShape(2, 9, 8, 2, 2),
    "mobile_networks": lambda m: m.NetworkShape("ShuffleNetV2", "nhwc", 2, 64, "float16"),
    "pack_signs": lambda m: m.PackShape((2, 9, 5, 5), "nhwc", "float16"),
    "quantize_int8": lambda m: replace(m.SHAPES["cuda"][0], size=(2, 9, 5, 5)),
    "xnor_conv2d": lambda m: m.LayerShape(m.ConvShape(2, 9, 9, 5, 3), "nhwc"),
}
LINE = re.compile(
    r"(?P<name>\w+)  (\w+ )?\w+=\d+( \w+=\d+)+( nchw| nhwc| per-channel)?"
    r"( float16)?( symmetric| affine)?( to \w+)?  \w+ *"
    r" \| [\d.]+ ms \| [\d.]+ (GMAC|GB|TOP)/s"
    r" \| [\d.]+x [\w. ]+(, [\d.]+x [\w ]+)* \([\w.: ]+ [\d.]+ ms(, [\w.: ]+ [\d.]+ ms)*\)"
    r"( \| \d+% of ((1|2|2\.67|4|13|21)x torch\.mm|the (memory|b1|int8|float16|float32) roof))?"
)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/bench.py, with turns of one call."""
    monkeypatch.syspath_prepend(FOLDER)
    module = importlib.import_module("bench")
    monkeypatch.setattr(module, "TURN_SECONDS", 0.0)
    return module


def run(bench: ModuleType, name: str, *arguments: str) -> int:
    benchmark = importlib.import_module(name).BENCHMARK
    return bench.main(benchmark, ["--rounds", "1", "--shapes", SMALLEST[name], *arguments])


def test_every_benchmark_is_tested_and_collected(bench: ModuleType) -> None:
    shared = {"bench", "cpu", "gpu", "int8", "rivals", "roofline", "test_speed"}
    own_tables = {"break_even", "compression_real_data", "filter_pruning", "hashed_real_data"}
    own_tables |= {"low_rank", "train_loop"}
    files = {path.stem for path in FOLDER.glob("*.py")} - shared - own_tables
    assert files == set(SMALLEST)
    assert files == {op.name for op in importlib.import_module("test_speed").BENCHMARKS}


def test_every_shape_has_its_name(bench: ModuleType) -> None:
    for op in importlib.import_module("test_speed").BENCHMARKS:
        for shapes in op.shapes.values():
            names = [str(shape) for shape in shapes]
            assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", SMALLEST)
def test_prints_a_header_and_a_line(bench: ModuleType, name: str, capsys) -> None:
    assert run(bench, name) == 0
    header, line = capsys.readouterr().out.splitlines()
    assert f"path {_C.isa()}, torch {torch.__version__}" in header
    assert LINE.fullmatch(line)["name"] == name


@pytest.mark.parametrize("name", SMALLEST)
def test_wrong_kernel_gets_no_time(bench: ModuleType, name: str, capsys, monkeypatch) -> None:
    inside = {"xnor_conv2d": "binary_conv2d", "mobile_networks": "grouped_conv2d"}
    home, op = (_entropy, "decode") if name == "entropy" else (ops, inside.get(name, name))
    right = getattr(home, op)

    def wrong(*arguments: object, **epilogue: object) -> torch.Tensor:
        result = right(*arguments, **epilogue)
        result[(0,) * result.dim()] += 1
        return result

    monkeypatch.setattr(home, op, wrong)
    monkeypatch.setattr(bench, "take_turns", lambda *_: pytest.fail("timed a wrong result"))
    assert run(bench, name) == 1
    _, line = capsys.readouterr().out.splitlines()
    wrong_values = r"\d+" if name == "mobile_networks" else "1"  # through all layers behind it
    assert re.search(rf"\| wrong: {wrong_values} of \d+ values differ from the reference$", line)
    assert " ms" not in line


def test_wrong_shape_is_wrong(bench: ModuleType) -> None:
    case = bench.Case(lambda: torch.zeros(2, 1), {}, lambda: torch.zeros(2), 1)
    with pytest.raises(bench.WrongResult, match=r"shape \[2, 1\], the reference has \[2\]"):
        case.check()


def test_a_float_sum_may_be_off_by_the_tolerance_and_no_more(bench: ModuleType) -> None:
    def off_by(error: float):
        return bench.Case(
            lambda: torch.tensor([8.0, error]), {}, lambda: torch.tensor([8.0, 0]), 1, 0.1
        )

    off_by(0.79).check()
    for error in (0.81, torch.nan):
        with pytest.raises(bench.WrongResult, match="1 of 2 values differ"):
            off_by(error).check()


def test_each_path_and_thread_count_has_its_header(bench: ModuleType, capsys, tmp_path) -> None:
    before = _C.isa(), torch.get_num_threads()
    file = tmp_path / "results.md"
    isas = _C.supported_isas()
    options = ["--threads", "1", "2", "--isa", *isas, "--markdown", str(file)]
    assert run(bench, "pack_signs", *options) == 0
    assert (_C.isa(), torch.get_num_threads()) == before

    headers = capsys.readouterr().out.splitlines()[::2]
    settings = [f"{t}, path {isa}," for isa in isas for t in ("1 thread", "2 threads")]
    assert len(headers) == len(settings)
    assert all(setting in header for setting, header in zip(settings, headers, strict=True))

    sections = file.read_text().split("## pack_signs\n")[1:]
    assert len(sections) == len(headers)
    for section, header in zip(sections, headers, strict=True):
        assert header in section
        assert re.search(
            r"^\| n=1 c=16 hw=32 nhwc \| [\d.]+ ms \| [\d.]+ GB/s \| .* \|$", section, re.M
        )


def test_time_rate_and_ratio(bench: ModuleType, monkeypatch) -> None:
    seconds = {"ours": [1.0, 2.0, 4.0], "slow": [9.0, 9.0, 9.0], "fast": [2.0, 6.0, 16.0]}
    monkeypatch.setattr(bench, "take_turns", lambda *_: seconds)
    run = torch.ones(3).clone
    case = bench.Case(run, {"slow": run, "fast": run}, run, work=5 * 10**9)
    benchmark = bench.Benchmark("op", "GMAC/s", "rival", {"cpu": ["n=1"]}, lambda shape: case)
    measurement = benchmark.measure("n=1", rounds=3, device=bench.Cpu("scalar", 1))
    assert measurement.cells == [
        "2000 ms",
        "2.50 GMAC/s",
        "3.0x rival (slow 9000 ms, fast 6000 ms)",
    ]
    assert measurement.ratios == {"rival": 3.0}


def test_the_fastest_rival_of_each_kind_counts(bench: ModuleType, monkeypatch) -> None:
    seconds = {"ours": [1.0], "a:slow": [9.0], "a:fast": [2.0], "b:other": [4.0]}
    monkeypatch.setattr(bench, "take_turns", lambda *_: seconds)
    run = torch.ones(3).clone
    case = bench.Case(run, dict.fromkeys(["a:slow", "a:fast", "b:other"], run), run, work=10**9)
    benchmark = bench.Benchmark("op", "GMAC/s", "rival", {"cpu": ["n=1"]}, lambda shape: case)
    measurement = benchmark.measure("n=1", rounds=1, device=bench.Cpu("scalar", 1))
    assert measurement.ratios == {"a": 2.0, "b": 4.0}
    assert measurement.cells[2].startswith("2.0x a, 4.0x b (a:slow 9000 ms, ")


def test_the_geometric_mean_stands_behind_the_shapes(
    bench: ModuleType, monkeypatch, capsys
) -> None:
    ratios = iter([1.0, 4.0])
    cells = bench.Measurement(["1 ms", "1 GB/s", ""], {}, 1e-3, bench.Work(1))
    monkeypatch.setattr(
        bench.Benchmark,
        "measure",
        lambda *_: cells._replace(ratios={"rival": next(ratios)}),
    )
    shapes = {"cpu": ["n=1", "n=2"]}
    benchmark = bench.Benchmark("op", "GB/s", "rival", shapes, lambda shape: None)
    assert bench.main(benchmark, ["--threads", "1"]) == 0
    assert capsys.readouterr().out.endswith("geometric mean of 2 shapes: 2.0x rival\n")


def test_a_run_that_is_stopped_has_told_what_it_measured(
    bench: ModuleType, monkeypatch, tmp_path
) -> None:
    def measure(benchmark: object, shape: str, *_: object) -> object:
        if shape == "n=2":
            raise KeyboardInterrupt
        return bench.Measurement(["1 ms", "1 GB/s", ""], {"rival": 1.0}, 1e-3, bench.Work(1))

    monkeypatch.setattr(bench.Benchmark, "measure", measure)
    file = tmp_path / "results.md"
    file.write_text("earlier\n")
    benchmark = bench.Benchmark("op", "GB/s", "rival", {"cpu": ["n=1", "n=2"]}, lambda shape: None)
    with pytest.raises(KeyboardInterrupt):
        bench.main(benchmark, ["--threads", "1", "--markdown", str(file)])
    assert file.read_text().startswith("earlier\n## op\n")
    assert "| n=1 | 1 ms | 1 GB/s |  |\n" in file.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "c=17"], "pack_signs: no shape contains 'c=17'"),
        (["--rounds", "0"], "must be at least 1, got 0"),
        (["--isa", "mmx"], "invalid choice: 'mmx'"),
        (["--device", "cuda", "--threads", "1"], "--threads and --isa are of the CPU"),
        (["--records", "file"], "--records needs the limits of a GPU, got --device cpu"),
    ],
)
def test_bad_options(bench: ModuleType, arguments, message: str, capsys) -> None:
    benchmark = importlib.import_module("pack_signs").BENCHMARK
    with pytest.raises(SystemExit) as error:
        bench.main(benchmark, arguments)
    assert error.value.code != 0
    assert message in f"{error.value.code}{capsys.readouterr().err}"


class TwoCopies:
    """A device with a roof, on which all calls of a contender take 4 ms."""

    name, path = "cuda", "cuda"

    def __init__(self, roof: object) -> None:
        self.roof = roof

    def active(self):
        return nullcontext()

    preparing = active

    def describe(self) -> str:
        return str(self.roof)

    def copies(self, moved: int) -> int:
        self.moved = moved
        return 2

    def contender(self, runs):
        return lambda: [run() for run in runs]

    def turn(self, run, calls: int) -> float:
        assert len(run()) == 2
        return 4e-3


def test_a_gpu_has_sets_of_tensors_and_a_roof(
    bench: ModuleType, capsys, monkeypatch, tmp_path
) -> None:
    roofline = importlib.import_module("roofline")
    device = TwoCopies(roofline.Roof("NVIDIA H200", 4e12))
    monkeypatch.setattr(bench, "_devices", lambda options: [device])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    inputs = []

    def prepare(shape: str) -> object:
        x = torch.randn(1000)
        inputs.append(x)
        return bench.Case(x.clone, {"float16:F.conv2d": x.clone}, x.clone, 10**12, reads=[x])

    file = tmp_path / "records.jsonl"
    for name, peak in (("bytes", ""), ("products", "int8")):
        benchmark = bench.Benchmark(
            name, "GMAC/s", "torch", {"cuda": ["n=1"]}, prepare, {"avx2": 1}, peak
        )
        arguments = ["--device", "cuda", "--rounds", "3", "--records", str(file)]
        assert bench.main(benchmark, arguments) == 0
    assert len(inputs) == 4 and not inputs[0].equal(inputs[1])
    assert device.moved == 8000

    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "NVIDIA H200, copy 4.00 TB/s; median of 3 rounds"
    ratio = "1.0x float16 (float16:F.conv2d 2.00 ms)"
    assert (
        lines[1] == f"bytes  n=1  cuda | 2.00 ms | 0.00400 GB/s | {ratio} | 0% of the memory roof"
    )
    assert (
        lines[3] == f"products  n=1  cuda | 2.00 ms | 1000 TOP/s | {ratio} | 51% of the int8 roof"
    )
    assert [record.op for record in roofline.read(file)] == ["bytes", "products"]
    assert roofline.main([str(file)]) == 0
    assert "products" in file.with_suffix(".svg").read_text()


@pytest.mark.parametrize("name", SMALL_ON_GPU)
def test_cases_of_a_gpu(bench: ModuleType, name: str, capsys, monkeypatch) -> None:
    """Its rivals, formats and names, on tensors of the CPU that say they are a GPU's."""
    module = importlib.import_module(name)
    shape = SMALL_ON_GPU[name](module)
    assert type(shape) is type(module.SHAPES["cuda"][0])
    monkeypatch.setitem(module.SHAPES, "cuda", [shape])
    roof = importlib.import_module("roofline").Roof("NVIDIA H200", 4e12)
    monkeypatch.setattr(bench, "_devices", lambda options: [TwoCopies(roof)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True), raising=False)
    assert bench.main(module.BENCHMARK, ["--device", "cuda", "--rounds", "1"]) == 0
    _, line = capsys.readouterr().out.splitlines()
    assert LINE.fullmatch(line)["name"] == name
    in_float32 = ("pack_signs", "quantize_int8", "channel_shuffle", "hashed_linear")
    assert "float16" in line or name in in_float32


def test_the_floor_is_the_longer_of_two_times(bench: ModuleType) -> None:
    roofline = importlib.import_module("roofline")
    roof = roofline.Roof("NVIDIA H200", 4e12)
    assert roof.floor(roofline.Work(8 * 10**12)) == (2.0, "memory")
    assert roof.floor(roofline.Work(4, 2 * 989 * 10**12, "float16")) == (2.0, "float16")
    assert roof.floor(roofline.Work(4 * 10**12, 100, "b1")) == (1.0, "memory")
    unknown = roofline.Roof("a GPU", 1e9)
    assert unknown.floor(roofline.Work(10**9, 10**18, "b1")) == (1.0, "memory")


def test_peaks_by_name(bench: ModuleType) -> None:
    peaks = importlib.import_module("roofline").peaks
    assert peaks("NVIDIA H100 80GB HBM3") == peaks("NVIDIA H200")
    assert peaks("NVIDIA H100 PCIe")["int8"] < peaks("NVIDIA H100 80GB HBM3")["int8"]
    assert peaks("NVIDIA A100-SXM4-80GB")["b1"] == 4992e12
    assert peaks("AMD Instinct") == {}


def test_rivals_of_a_gpu_compute_the_same(bench: ModuleType) -> None:
    rivals = importlib.import_module("rivals")
    x, w, bias = torch.randn(5, 60), torch.randn(33, 60), torch.randn(33)
    expected = torch.nn.functional.linear(x, w, bias)
    for run in rivals.gpu_linear(x, w, bias).values():
        assert torch.allclose(run().float(), expected, rtol=0, atol=0.5)
    x, w = torch.randn(2, 8, 6, 6), torch.randn(9, 8, 3, 3)
    expected = torch.nn.functional.conv2d(x, w, None, 2, 1)
    for run in rivals.gpu_conv2d(x, w, None, 2, 1).values():
        result = run()
        assert result.is_contiguous(memory_format=torch.channels_last)
        assert torch.allclose(result.float(), expected, rtol=0, atol=0.5)


@pytest.mark.parametrize(("size", "name"), [((1, 61, 33), "padded"), ((17, 64, 32), "_int_mm")])
def test_int_mm_is_padded_where_a_gpu_wants_it(bench: ModuleType, size, name: str) -> None:
    m, k, o = size
    x, codes = (torch.randint(-128, 128, shape, dtype=torch.int8) for shape in ((m, k), (o, k)))
    (rival,) = importlib.import_module("rivals").gpu_int_mm(x, codes).items()
    assert rival[0] == f"_int_mm:{name}"
    result = rival[1]()
    assert result.shape[0] > 16 and result.shape[1] % 8 == 0
    assert torch.equal(result[:m, :o].long(), x.long() @ codes.long().T)


def test_runs_as_a_script() -> None:
    script = [sys.executable, FOLDER / "binary_conv2d.py", "--rounds", "1", "--shapes", "c=16"]
    result = subprocess.run(script, capture_output=True, text=True, check=True)
    assert LINE.fullmatch(result.stdout.splitlines()[-1])


def test_runs_under_pytest_benchmark() -> None:
    pytest.importorskip("pytest_benchmark")
    test = f"{FOLDER}/test_speed.py::test_speed[binary_conv2d  n=1 c=16 hw=32 k=3]"
    options = ["--benchmark-only", "--benchmark-max-time=0", "--benchmark-min-rounds=1"]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options, test]
    # Where pytest-xdist runs this test, it would have pytest-benchmark time nothing.
    alone = {name: value for name, value in os.environ.items() if "XDIST" not in name}
    result = subprocess.run(command, capture_output=True, text=True, cwd=FOLDER.parent, env=alone)
    assert result.returncode == 0, result.stdout
    assert "1 passed" in result.stdout


def test_break_even_prints_a_table_a_layer(bench: ModuleType, capsys, monkeypatch) -> None:
    break_even = importlib.import_module("break_even")
    for name, sizes in {"CHANNELS": (8,), "SIZES": (7,), "FEATURES": (64,), "ROWS": (1,)}.items():
        monkeypatch.setattr(break_even, name, sizes)
    break_even.main(["--rounds", "1"])
    output = capsys.readouterr().out
    layers = {*break_even.CONVS, *break_even.LINEARS}
    assert layers == set(re.findall(r"^`(.+)`$", output, re.M))
    cells = re.findall(r"^\| (?:7 x 7|1) \| ([\d.]+) \|$", output, re.M)
    assert len(cells) == 2 * len(break_even.CONVS) + len(break_even.LINEARS)

    break_even.main(["--rounds", "1", "--only", "int8linear"])
    tables = re.findall(r"^`(.+)`$", capsys.readouterr().out, re.M)
    assert tables == ["nncx.Int8Linear, symmetric=True", "nncx.Int8Linear"]


def test_train_loop_prints_a_table_a_network(bench: ModuleType, capsys, monkeypatch) -> None:
    """And no time for a loop that trains otherwise."""
    train_loop = importlib.import_module("train_loop")
    monkeypatch.setattr(train_loop, "BATCHES", 2)
    monkeypatch.setattr(train_loop, "NETWORKS", {"LeNet-5": (train_loop.models.LeNet5, 4, 28)})
    monkeypatch.setattr(sys, "argv", ["train_loop.py", "--rounds", "1"])
    main_threads = torch.get_num_threads()
    train_loop.main()
    cell = r"[+-]?[\d.]+ (ms|%|ms an epoch)"
    row = rf"^\| LeNet-5, 4 x 28 x 28 \| {cell} \| {cell} \| {cell} \|$"
    assert re.search(row, capsys.readouterr().out, re.M)

    monkeypatch.setattr(train_loop.Bare, "_epoch", lambda self, batches: None)
    with pytest.raises(AssertionError, match="must give the same weights"):
        train_loop.main()
    torch.set_num_threads(main_threads)


def test_low_rank_prints_a_row_a_layer(bench: ModuleType, capsys, monkeypatch, tmp_path) -> None:
    low_rank = importlib.import_module("low_rank")
    monkeypatch.setattr(low_rank, "SHAPES", (low_rank.Shape(6, 8, 3, 6),))
    low_rank.main(["--rounds", "1", "--markdown", str(tmp_path / "table.md")])
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split(" | ")[1:3] for row in rows] == [
        [batch, layout] for batch in ("1", "16") for layout in ("nchw", "nhwc")
    ]
    cells = [cell for row in rows for cell in row.split(" | ")[4:]]
    assert len(cells) == 24 and all(re.fullmatch(r"[\d.]+x|-", cell) for cell in cells)
    assert (tmp_path / "table.md").read_text().count("\n| ") == 5


def test_low_rank_tells_what_becomes_of_a_network(bench: ModuleType, capsys, tmp_path) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    low_rank = importlib.import_module("low_rank")
    torch.manual_seed(0)
    nncx.save(nncx.models.LeNet5(image_size=8, padding=2), tmp_path / "net.safetensors")
    arguments = ["--rounds", "1", "--epochs", "1", "--data", "digits", "--lr", "1e-3"]
    low_rank.main([*arguments, "--model", str(tmp_path / "net.safetensors")])
    rows = [row.split(" | ") for row in capsys.readouterr().out.splitlines()[2:]]
    first, weights, by_data, trained, speed = rows
    assert [row[0] for row in rows[1:4]] == ["scheme 2, 3x fewer", "+ data", "+ training"]
    assert 3 * int(weights[2].replace(",", "")) <= int(first[2].replace(",", ""))
    assert float(by_data[3].rstrip("%")) < float(weights[3].rstrip("%"))
    assert float(trained[5].rstrip(" %")) < float(first[5].rstrip(" %"))
    assert speed[0] == "speed-up of conv2" and len(speed) == 3


@pytest.mark.parametrize("model", ["lenet300100", "lenet5"])
def test_compressions_are_commands_of_nncx(
    bench: ModuleType, capsys, monkeypatch, model: str
) -> None:
    """Each accepted, with a network that a command before it has made."""
    script = importlib.import_module("compression_real_data")
    given = []
    monkeypatch.setattr(_recipe, "run", lambda recipe, out, setup: given.append((recipe, out)))
    monkeypatch.setattr(
        _compress, "run", lambda settings, out, setup: given.append((settings, out))
    )
    script.main(["--model", model, "--seeds", "3", "--commands"])
    for line in capsys.readouterr().out.splitlines():
        program, *words = shlex.split(line)
        assert program == "nncx" and CliRunner().invoke(cli.app, words).exit_code == 0
    (training, folder), *compressions = given
    made = [str(folder / "model.safetensors")]
    assert training.model == model and training.seed == 3
    for settings, folder in compressions:
        assert settings.model in made and settings.seed == 3
        made.append(str(folder / "model.safetensors"))
    methods = {settings.methods for settings, _ in compressions}
    assert methods == {("prune",), ("deep-compression",), ("ttq",), ("inq",), ("int8",)}
    assert len(set(made)) == len(given)


def test_compressions_are_run_once_and_put_into_a_table(
    bench: ModuleType, capsys, monkeypatch, tmp_path
) -> None:
    script = importlib.import_module("compression_real_data")

    def made(command: list[str], **_: object) -> None:
        folder = Path(command[-1])
        row, _, seed = folder.name.rpartition("-")
        written = {"file_bytes": 1000, "ratio": 40.0, "seconds": 7.0, "validation_error": 2.0}
        written["test_error"] = 1.5 + int(seed) + (0.25 if row == "prune-share" else 0)
        times = {"1": 2.0, "16": 8.0}
        written |= {"float_latency_ms": times, "latency_ms": {"1": 1.0, "16": 4.0}}
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps(written))

    monkeypatch.setattr(subprocess, "run", made)
    arguments = ["--seeds", "0", "1", "--out", str(tmp_path)]
    script.main(arguments)
    table = capsys.readouterr().out
    rows = {row.split(" | ")[0].strip("| "): row.split(" | ") for row in table.splitlines()[2:]}
    assert rows["float"][1:5] == ["1,000", "1", "2.00 ± 0.00", "2.00 ± 0.71"]
    shared = ["40.0", "2.00 ± 0.00", "2.25 ± 0.71", "+0.25 ± 0.00", "2.00 → 1.00", "8.00 → 4.00"]
    assert rows["prune, share"][2:8] == shared
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("ran again"))
    script.main(arguments)
    assert capsys.readouterr().out == table
