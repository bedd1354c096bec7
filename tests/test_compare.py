"""A comparison says of each network what its report says, beside the first."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_cli import run
from torch import nn

import nncx
from nncx.commands import _eval


def network(width: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Two networks for the digits, in folders as the commands write them."""
    for name, width in (("large", 64), ("small", 16)):
        (tmp_path / name).mkdir()
        nncx.save(network(width), tmp_path / name / "model.safetensors")
    return [tmp_path / name / "model.safetensors" for name in ("large", "small")]


@pytest.fixture
def reports() -> list[nncx.Report]:
    return [nncx.report(network(width), torch.zeros(1, 1, 8, 8), repeats=1) for width in (64, 16)]


def test_the_others_are_compared_with_the_first(reports: list[nncx.Report]) -> None:
    large, small = reports
    comparison = nncx.compare([("large", large, 1.5), ("small", small)])
    first, second = json.loads(json.dumps(comparison.to_dict()))["networks"]
    assert (first["name"], first["error"], second["error"]) == ("large", 1.5, None)
    assert first["ratios"] == dict.fromkeys(("parameters", "bytes", "macs", "latency"), 1)
    assert second["ratios"] == replace(small, baseline=large).ratios
    assert second["report"] == json.loads(json.dumps(small.to_dict()))
    table = str(comparison).splitlines()
    assert table[0].split()[:4] == ["error", "parameters", "bytes", "bits"]
    assert table[2].split()[:6] == ["large", "1.50", "%", "4,810", "19,240", "32.00"]
    assert table[3].split()[:6] == ["small", "-", "1,210", "4,840", "32.00", "3.98x"]
    assert "than large" in table[5] and max(map(len, table)) <= 100
    lines = comparison.to_markdown().splitlines()[:4]
    assert {line.count("|") for line in lines} == {10}


def test_bytes_of_a_file_are_not_compared_with_those_of_memory(
    reports: list[nncx.Report], files: list[Path]
) -> None:
    large = nncx.report(network(64), torch.zeros(1, 1, 8, 8), file=files[0], repeats=1)
    comparison = nncx.compare([("large", large), ("small", reports[1])])
    assert str(comparison).splitlines()[3].split()[5] == "-"


def test_what_cannot_be_compared_is_refused(reports: list[nncx.Report], tmp_path: Path) -> None:
    large, small = reports
    batch = nncx.report(network(16), torch.zeros(3, 1, 8, 8), repeats=1)
    for networks, sentence in (
        ([], "at least one network"),
        ([("a", large), ("a", small)], "names must differ, got 'a' twice"),
        ([("a", large), ("b", batch)], r"one batch size and device, got \[\(1, 'cpu'\), \(3"),
    ):
        with pytest.raises(ValueError, match=sentence):
            nncx.compare(networks)
    with pytest.raises(ValueError, match="every network needs an error, got none for 'b'"):
        nncx.compare([("a", large, 1.0), ("b", small)]).plot(tmp_path / "plot.png")
    assert not list(tmp_path.iterdir())


def test_files_are_measured_on_the_test_split(files: list[Path]) -> None:
    comparison = _eval.compare([str(file) for file in files], data="digits")
    images, labels = nncx.data.load("digits").test.tensors
    for file, (name, report, error) in zip(files, comparison.networks, strict=True):
        wrong = nncx.load(file)(images).argmax(1) != labels
        assert error == pytest.approx(100 * wrong.double().mean().item())
        assert name == file.parent.name and report.file_bytes == file.stat().st_size
        assert sum(row.bytes for row in report.layers) + report.header_bytes == report.file_bytes


# ---------------------------------------------------------------------------------------------
# the command


def test_one_file_is_reported_by_layers(files: list[Path]) -> None:
    result = run("report", str(files[1]), "--shape", "1x8x8", "--baseline", str(files[0]))
    assert result.exit_code == 0, result.output
    for line in ("1 ", "3 ", "(header) ", "total ", "large ", "small "):
        assert any(row.startswith(line) for row in result.output.splitlines()), line
    assert f"{files[1].stat().st_size:,}" in result.output


def test_several_files_are_a_table_and_a_plot(files: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot, names = tmp_path / "plot.png", [str(file) for file in files]
    result = run("report", *names, "--data", "digits", "--markdown", "--plot", str(plot))
    assert result.exit_code == 0, result.output
    assert [line.split(" | ")[0] for line in result.output.splitlines()[2:4]] == [
        "| large",
        "| small",
    ]
    assert "(header)" not in result.output
    assert plot.read_bytes().startswith(b"\x89PNG")
    result = run("report", *names, "--data", "digits", "--plot", str(tmp_path / "no" / "plot.png"))
    assert result.exit_code == 1 and "plot.png cannot be used: No such file" in result.output
    assert "MACs per sample" in result.output, "what was measured is not lost"


def test_a_baseline_that_is_among_the_files_has_one_row(files: list[Path]) -> None:
    """As in nncx report */model.safetensors --baseline float/model.safetensors."""
    large, small = map(str, files)
    result = run("report", large, small, "--baseline", small, "--shape", "1x8x8", "--json")
    assert result.exit_code == 0, result.output
    networks = json.loads(result.stdout)["networks"]
    assert [network["name"] for network in networks] == ["small", "large"]
    result = run("report", large, large, "--shape", "1x8x8")
    assert result.exit_code == 1 and f"got {large} twice; leave one out" in result.output


def test_json_has_every_figure(files: list[Path]) -> None:
    result = run("report", *map(str, files), "--shape", "1x8x8", "--json")
    networks = json.loads(result.stdout)["networks"]
    assert [network["name"] for network in networks] == ["large", "small"]
    for file, each in zip(files, networks, strict=True):
        report = each["report"]
        stored = sum(row["bytes"] for row in report["layers"]) + report["header_bytes"]
        assert stored == report["total"]["bytes"] == file.stat().st_size


def test_files_of_one_name_are_told_apart(files: list[Path], tmp_path: Path) -> None:
    same = tmp_path / "other" / "large"
    same.mkdir(parents=True)
    nncx.save(network(3), same / "model.safetensors")
    names = [str(files[0]), str(same / "model.safetensors")]
    comparison = _eval.compare(names, shape=(1, 8, 8))
    assert [each.name for each in comparison.networks] == names


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ((), "pass data, or else the shape of an image, got data None and shape None"),
        (("--data", "digits", "--shape", "1x8x8"), "pass data, or else the shape"),
        (("--shape", "1x8x"), "as 1x28x28, got '1x8x'"),
        (("--shape", "1x9x9"), r"must take images \[1, 9, 9\], got one that does not"),
        (("--shape", "1x8x8", "--json", "--markdown"), "--json or --markdown, got both"),
        (("--shape", "1x8x8", "--plot", "p.png"), "--plot draws errors, got no --data"),
        (("--data", "nowhere"), "a data set is one of"),
    ],
)
def test_bad_options_get_one_sentence(
    files: list[Path], options: tuple[str, ...], sentence: str
) -> None:
    result = run("report", str(files[0]), *options)
    assert result.exit_code == 1 and "Traceback" not in result.output
    assert re.search(f"^nncx: .*{sentence}", result.output), result.output
