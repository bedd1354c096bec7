"""The report states what was measured, and leaves the model alone."""

import json
import time

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import nncx
from nncx import BinaryConnectLinear, XNORLinear
from nncx._report import Report, report


def small():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, (3, 1), groups=4), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(32, 10),
    )  # fmt: skip


class Slow(nn.Linear):
    def forward(self, x):
        time.sleep(0.01)
        return super().forward(x)


@pytest.fixture
def images():
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def rows(result):
    return {row.name: row for row in result.layers}


def test_rows_are_the_layers_that_own_something(images):
    result = report(small(), images, repeats=1)
    assert [(row.name, row.type) for row in result.layers] == [
        ("0", "Conv2d"),
        ("1", "BatchNorm2d"),
        ("3", "Conv2d"),
        ("6", "Linear"),
    ]
    assert {row.precision for row in result.layers} == {"float32"}
    assert result.total.type == "Sequential" and result.total.precision == "float32"


def test_parameters_and_bytes(images):
    model = small()
    result = report(model, images, repeats=1)
    assert {name: row.parameters for name, row in rows(result).items()} == {
        "0": 16 * 3 * 9,
        "1": 32,
        "3": 32 * 4 * 3 + 32,
        "6": 330,
    }
    assert result.total.parameters == sum(p.numel() for p in model.parameters())
    assert rows(result)["1"].bytes == 4 * 16 * 4 + 8  # running statistics and their counter too
    assert result.total.bytes == sum(t.nbytes for t in model.state_dict().values())


def test_macs_per_sample(images):
    result = report(small(), images, repeats=1)
    expected = {"0": 16 * 3 * 9 * 4 * 4, "1": 0, "3": 32 * 4 * 3 * 2 * 4, "6": 320}
    assert {name: row.macs for name, row in rows(result).items()} == expected
    assert result.total.macs == sum(expected.values())
    assert result.macs == {"float32": result.total.macs}


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(6, 8, 5, padding=2, groups=2), (2, 6, 12)),
        (nn.Conv2d(6, 9, 3, stride=2, dilation=2, groups=3), (2, 6, 12, 11)),
        (nn.Conv3d(6, 4, (1, 2, 3)), (2, 6, 4, 5, 6)),
        (nn.Linear(12, 7), (2, 12)),
        (nn.Linear(12, 7, bias=False), (2, 5, 12)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_macs_agree_with_torchs_flop_counter(layer, shape):
    example = torch.zeros(shape)
    with FlopCounterMode(display=False) as counter:
        layer(example)
    macs = report(layer, example, repeats=1).total.macs
    assert 2 * 2 * macs == counter.get_total_flops()  # a batch of 2; 2 FLOPs a MAC


def test_macs_of_transposed_convolution():
    # Every input pixel is multiplied with every weight of its group.
    layer = nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2)
    result = report(layer, torch.randn(2, 4, 5, 5), repeats=1)
    assert result.total.macs == layer.weight.numel() * 25


def test_shared_layers_count_once_but_run_twice():
    layer = nn.Linear(5, 5)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    result = report(model, torch.randn(2, 5), repeats=1)
    assert [row.name for row in result.layers] == ["0"]
    assert (result.total.parameters, result.total.bytes) == (30, 120)
    assert result.total.macs == 50


def test_tied_weights_belong_to_the_first():
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    model[1].weight = model[0].weight
    result = report(model, torch.randn(2, 5), repeats=1)
    assert [(row.parameters, row.bytes) for row in result.layers] == [(30, 120), (5, 20)]


@pytest.mark.parametrize(
    "layer, precision", [(XNORLinear, "binary"), (BinaryConnectLinear, "binary weights")]
)
def test_packed_layers_count_weights_and_hold_bytes(layer, precision):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 50), layer(50, 40))
    example = torch.randn(2, 9)
    before = report(model, example, repeats=1)
    model[1].freeze()
    after = report(model, example, repeats=1)
    assert rows(before)["1"].precision == f"{precision} (unfrozen)"
    assert rows(after)["1"].precision == precision
    assert after.total.precision == "mixed"
    assert rows(before)["1"].parameters == rows(after)["1"].parameters == 50 * 40 + 40
    assert rows(before)["1"].bytes == 4 * 2040
    alpha = 4 * 40 if layer is XNORLinear else 0
    assert rows(after)["1"].bytes == 50 * 40 // 8 + alpha + 4 * 40  # bits, alpha, bias
    assert after.macs == {"float32": 450, precision: 2000}


def test_parametrized_layers():
    model = nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 4, 3, bias=False))
    result = report(model, torch.randn(1, 2, 5, 5), repeats=1)
    assert result.total.parameters == sum(p.numel() for p in model.parameters())
    assert result.total.bytes == sum(t.nbytes for t in model.state_dict().values())
    assert result.total.macs == 4 * 2 * 9 * 9


def test_layer_that_is_not_called():
    model = nn.Sequential(nn.Linear(3, 3))
    model[0].unused = nn.Linear(3, 2)
    row = rows(report(model, torch.randn(1, 3), repeats=1))["0.unused"]
    assert (row.macs, row.latency_ms, row.parameters) == (0, None, 8)


def test_latency_finds_the_slow_layer():
    model = nn.Sequential(nn.Linear(4, 4), Slow(4, 4))
    result = report(model, torch.randn(3, 4), repeats=3)
    assert rows(result)["0"].latency_ms < rows(result)["1"].latency_ms >= 10
    assert result.total.latency_ms >= 10
    assert (result.batch, result.repeats, result.device) == (3, 3, "cpu")
    assert result.threads == torch.get_num_threads()


def test_the_model_is_left_as_it_was(images):
    model = small()
    model[1].eval()  # a mixture of modes
    handle = model[0].register_forward_hook(lambda *_: None)
    modes = [module.training for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    hooks = list(model[0]._forward_hooks)
    report(model, images, repeats=2)
    with pytest.raises(RuntimeError):
        report(model, images[:, :2], repeats=2)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert list(model[0]._forward_hooks) == hooks == [handle.id]
    for module in model.modules():
        assert not module._forward_pre_hooks and (module is model[0] or not module._forward_hooks)
    assert torch.is_grad_enabled() and all(p.grad is None for p in model.parameters())


def test_ratios_to_a_baseline(images, tmp_path):
    big, little = nn.Sequential(nn.Flatten(), Slow(192, 10)), nn.Sequential(nn.Flatten())
    little.append(nn.Linear(192, 5))
    result = report(little, images, big, repeats=3)
    assert result.ratios["parameters"] == result.ratios["bytes"] == result.ratios["macs"] == 2
    before, after = result.baseline.total.latency_ms, result.total.latency_ms
    assert result.ratios["latency"] == before / after
    assert result.baseline.total.type == "Sequential" and result.baseline.total.macs == 1920
    again = report(little, images, result.baseline, repeats=1)
    assert again.ratios["bytes"] == 2 and again.baseline is result.baseline
    assert report(little, images, repeats=1).ratios == {}


def test_bits_per_weight_count_all_that_is_stored(images):
    result = report(small(), images, repeats=1)
    by_name = rows(result)
    assert by_name["0"].bits_per_weight == by_name["6"].bits_per_weight == 32
    assert by_name["1"].bits_per_weight == (4 * 16 * 32 + 64) / 32
    assert result.total.bits_per_weight == 8 * result.total.bytes / result.total.parameters
    buffers = nn.BatchNorm1d(3, affine=False)
    assert report(buffers, torch.randn(2, 3), repeats=1).total.bits_per_weight is None
    packed = report(XNORLinear(128, 64).freeze(), torch.randn(2, 128), repeats=1)
    assert packed.total.bits_per_weight == (128 * 64 + 32 * 64 + 32 * 64) / (128 * 64 + 64)


@pytest.fixture
def saved(tmp_path):
    """A network with packed, tied and plain tensors, and its file."""
    model = small()
    model.add_module("7", nn.Linear(10, 10))
    model.add_module("8", nn.Linear(10, 10))
    model[8].weight = model[7].weight
    nncx.freeze(nncx.convert(model, nncx.XNOR(), skip=["0", "3", "7", "8"]))
    nncx.save(model, tmp_path / "model.safetensors")
    return model, tmp_path / "model.safetensors"


def test_bytes_of_layers_and_header_are_those_of_the_file(saved, images):
    model, path = saved
    result, in_memory = (report(model, images, file=f, repeats=1) for f in (path, None))
    assert result.total.bytes == result.file_bytes == path.stat().st_size
    assert sum(row.bytes for row in result.layers) + result.header_bytes == result.file_bytes
    assert result.total.bits_per_weight == 8 * path.stat().st_size / result.total.parameters
    with path.open("rb") as file:
        assert result.header_bytes == 8 + int.from_bytes(file.read(8), "little")
    # Nothing is coded here: a layer takes in the file what it takes in memory.
    assert [row.bytes for row in result.layers] == [row.bytes for row in in_memory.layers]
    assert (in_memory.file_bytes, in_memory.header_bytes) == (None, None)
    lines = {line.split()[0]: line.split() for line in str(result).splitlines() if line}
    assert lines["(header)"] == ["(header)", f"{result.header_bytes:,}"]
    assert lines["total"][4] == f"{result.file_bytes:,}"
    assert "as stored in the file" in str(result) and "in the state dict" in str(in_memory)


def test_coded_layers_count_what_the_file_has_of_them(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64), nn.BatchNorm1d(64))
    nncx.freeze(nncx.convert(model, nncx.TTQ(threshold=0.9), skip=["0"]))
    path = tmp_path / "model.safetensors"
    nncx.save(model, path, entropy=True)
    example = torch.randn(2, 64)
    coded, plain = (report(model, example, file=f, repeats=1) for f in (path, None))
    with safe_open(path, "pt") as file:
        sizes = {name: file.get_tensor(name).nbytes for name in file.keys()}
    assert sizes["2.packed_weight"] < 96 * 64 // 4 == model[2].packed_weight.nbytes
    stored = sum(size for name, size in sizes.items() if name.startswith("2."))
    assert rows(coded)["2"].bytes == stored < rows(plain)["2"].bytes
    assert rows(coded)["2"].bits_per_weight == 8 * stored / (96 * 64 + 64)
    assert sum(row.bytes for row in coded.layers) + coded.header_bytes == path.stat().st_size
    for name in ("0", "3"):
        assert rows(coded)[name].bytes == rows(plain)[name].bytes


def test_logical_parameters_do_not_depend_on_how_they_are_stored():
    """Masked, shared and hashed weights are weights; what a method trains besides is none."""
    methods = (
        *(nncx.Pruning(sparsity=0.5), nncx.TTQ(), nncx.INQ(), nncx.Hashed()),
        *(nncx.DeepCompression(), nncx.XNOR(), nncx.Int8(), nncx.compress.Half()),
    )
    example = torch.randn(2, 32)
    for method in methods:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 16))
        nncx.convert(model, method, skip=[])
        if isinstance(method, nncx.Int8):
            model(example)  # which sets the range of the input
        if isinstance(method, nncx.INQ):
            list(method.steps(model))
        before = report(model, example, repeats=1).total.parameters
        after = report(nncx.freeze(model), example, repeats=1).total.parameters
        assert before == after == 32 * 16 + 16, method


def test_a_baseline_is_compared_file_by_file(saved, images, tmp_path):
    model, path = saved
    baseline = small()
    result = report(model, images, baseline, file=path, repeats=1)
    nncx.save(baseline, tmp_path / "baseline.safetensors")
    size = (tmp_path / "baseline.safetensors").stat().st_size
    assert result.baseline.file_bytes == size
    assert result.ratios["bytes"] == size / path.stat().st_size
    in_memory = report(baseline, images, repeats=1)
    assert "bytes" not in report(model, images, in_memory, file=path, repeats=1).ratios
    assert "macs" in report(model, images, in_memory, file=path, repeats=1).ratios


def test_a_file_of_another_network_is_refused(saved, images, tmp_path):
    model, path = saved
    for change, reason in ((nn.Linear(10, 2), "'9.bias' is missing"), (None, "is too many")):
        other = nn.Sequential(*model, change) if change else nn.Sequential(*list(model)[:-1])
        with pytest.raises(ValueError, match=f"must hold the tensors of the model, .*{reason}"):
            report(other, images, file=path)
    nncx.save(small(), tmp_path / "float")
    with pytest.raises(ValueError, match="'0.weight' is of another size"):
        report(small().half(), images.half(), file=tmp_path / "float")
    (tmp_path / "other").write_bytes(bytes(1234))
    with pytest.raises(ValueError, match="is not a whole nncx file"):
        report(model, images, file=tmp_path / "other")
    with pytest.raises(FileNotFoundError):
        report(model, images, file=tmp_path / "missing")


def test_table_fits_a_terminal(images):
    deep = nn.Sequential()
    deep.add_module("a_rather_long_name_for_a_stage", nn.Sequential())
    deep[0].add_module("and_another_one_for_its_block" * 2, small())
    table = str(report(deep, images, small(), repeats=1))
    assert max(map(len, table.splitlines())) <= 100
    header, rule, *body = table.splitlines()
    columns = ["layer", "type", "precision", "parameters", "bytes", "bits", "MACs", "ms"]
    assert header.split() == columns
    assert [line.split()[1] for line in body[:4]] == ["Conv2d", "BatchNorm2d", "Conv2d", "Linear"]
    assert body[0].startswith("…") and body[0].split()[0].endswith(".0")
    assert "per batch of 4, median of 1 runs on cpu, CPU threads:" in table
    assert "Sequential (baseline) over this: parameters 1.00x, bytes 1.00x" in table


def test_markdown_has_a_row_per_layer(images):
    lines = report(small(), images, repeats=1).to_markdown().split("\n\n")[0].splitlines()
    assert len(lines) == 2 + 4 + 1
    assert {line.count("|") for line in lines} == {9}
    assert lines[2].startswith("| 0 | Conv2d | float32 | 432 | 1,728 | 32.00 | 6.912 k |")


def test_dict_is_json(images):
    result = report(small(), images, small(), repeats=1)
    plain = json.loads(json.dumps(result.to_dict()))
    assert plain["total"]["macs"] == result.total.macs
    assert [row["name"] for row in plain["layers"]] == ["0", "1", "3", "6"]
    assert plain["baseline"]["total"]["bytes"] == result.total.bytes
    assert plain["ratios"]["bytes"] == 1 and plain["baseline"]["baseline"] is None
    assert isinstance(result, Report)


def test_several_inputs_and_a_single_layer():
    class Add(nn.Linear):
        def forward(self, a, b):
            return super().forward(a + b)

    result = report(Add(3, 2), (torch.randn(5, 3), torch.randn(5, 3)), repeats=1)
    assert result.batch == 5 and result.layers[0].macs == 6 and "(itself)" in str(result)


def test_model_without_parameters():
    result = report(nn.ReLU(), torch.randn(2, 3), repeats=1)
    assert result.layers == () and result.total.bytes == 0 and "total" in str(result)


def test_bad_arguments(images):
    with pytest.raises(ValueError, match="repeats must be positive, got 0"):
        report(small(), images, repeats=0)
    with pytest.raises(ValueError, match=r"at least one sample, got shape \(0, 3, 8, 8\)"):
        report(small(), images[:0])
    with pytest.raises(ValueError, match=r"at least one sample, got shape \(\)"):
        report(small(), torch.tensor(1.0))


@pytest.mark.cuda
def test_cuda(images, cuda):
    result = report(small().to(cuda), images.to(cuda), repeats=3)
    assert result.device == torch.cuda.get_device_name() and result.total.latency_ms > 0
    assert all(row.latency_ms > 0 for row in result.layers)
