"""What `make gpu` does, as far as that can be tried without a GPU: its steps, times and page."""

import importlib.util
import io
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "run_on_gpu.py"
H200 = {"gpus": ["NVIDIA H200"], "capabilities": ["9.0"], "missing": [], "xdist": False}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """scripts/run_on_gpu.py, whose results go to a folder of the test."""
    spec = importlib.util.spec_from_file_location("run_on_gpu", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "run_on_gpu", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    (tmp_path / "results").mkdir()
    return module


def python(script: ModuleType, name: str, code: str, **more: object) -> object:
    return script.Step(name, [sys.executable, "-c", code], **more)


def run(script: ModuleType, code: str, **more: object) -> object:
    return script.run(python(script, "step", code, **more), io.StringIO(), left=100)


def test_all_benchmarks_run(script: ModuleType, tmp_path: Path) -> None:
    folder = SCRIPT.parents[1] / "benchmarks"
    ops = {path.stem for path in folder.glob("*.py") if "BENCHMARK = " in path.read_text()}
    # Files are read on a CPU; on a GPU a separable convolution is its two ops, one after the other.
    only_on_a_cpu = {"depthwise_separable_conv2d", "entropy"}
    assert sorted(ops - only_on_a_cpu) == sorted(script.BENCHMARKS)
    names = [step.name for step in script.plan(H200, tmp_path, None)]
    assert names == ["build", "doctor", "library", "tests", *script.BENCHMARKS, "plot"]


def test_builds_for_the_gpus_that_are_here(script: ModuleType, tmp_path: Path) -> None:
    machine = H200 | {"capabilities": ["8.0", "9.0"]}
    build, *_ = script.plan(machine, tmp_path, None)
    assert build.environment == {"NNCX_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "8.0;9.0"}


def test_the_tests_share_the_cpus_where_they_can(script: ModuleType, tmp_path: Path) -> None:
    (tests,) = (s for s in script.plan(H200 | {"xdist": True}, tmp_path, None) if s.name == "tests")
    assert tests.command[-2:] == ["-n", "8"]


def test_only_the_tests_run_under_a_sanitizer(script: ModuleType, tmp_path: Path) -> None:
    build, tests = script.plan(H200, tmp_path, "memcheck")
    assert tests.command[:3] == ["compute-sanitizer", "--tool", "memcheck"]


def test_a_step_says_how_it_ended(script: ModuleType) -> None:
    assert run(script, "").result == "ok"
    assert run(script, "exit(3)").result == "exit code 3"
    counts = "print('==== 2 failed, 3 passed in 1.20s (0:00:01) ===='); exit(1)"
    assert run(script, counts).result == "exit code 1: 2 failed, 3 passed"
    outcome = script.run(script.Step("step", ["no-such-program"]), io.StringIO(), left=100)
    assert outcome.result == "needs no-such-program on PATH"
    assert not outcome.ok


def test_a_step_finds_nncx_and_what_pythonpath_names(script: ModuleType, monkeypatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/packages")
    code = f"import sys; assert sys.path[1:3] == [{str(script.ROOT)!r}, '/packages'], sys.path"
    assert run(script, code).result == "ok"


def test_a_step_that_hangs_is_stopped_with_what_it_started(script: ModuleType) -> None:
    child = f"subprocess.Popen([{sys.executable!r}, '-c', 'import time; time.sleep(60)'])"
    outcome = run(script, f"import subprocess; {child}.wait()", seconds=1)
    assert outcome.result == "stopped after 1 s"
    assert outcome.seconds < 10


def test_what_fails_costs_no_other_results(
    script: ModuleType, tmp_path: Path, monkeypatch, capsys
) -> None:
    folder = tmp_path / "out"

    def plan(machine: object, folder: Path, sanitizer: object) -> list:
        table = f"open({str(folder / 'tables.md')!r}, 'a').write('## op\\n')"
        plot = f"open({str(folder / 'nvidia-h200.svg')!r}, 'w').write('<svg/>')"
        return [
            python(script, "build", "print('built')"),
            python(script, "wrong", "exit(1)"),
            python(script, "op", table),
            python(script, "plot", plot),
        ]

    monkeypatch.setattr(script, "probe", lambda: H200)
    monkeypatch.setattr(script, "plan", plan)
    for _ in range(2):  # a second run starts anew
        assert script.main(["--out", str(folder)]) == 1
    page = (script.RESULTS / "nvidia-h200.md").read_text()
    assert page == (folder / "nvidia-h200.md").read_text()
    assert page.startswith("# NVIDIA H200\n\nPrinted by `make gpu`")
    assert "![roofline](nvidia-h200.svg)" in page
    assert "| wrong | exit code 1 | 0 |" in page
    assert page.count("## op") == 1
    assert (script.RESULTS / "nvidia-h200.svg").read_text() == "<svg/>"
    assert "built" in (folder / "log.txt").read_text()
    assert "--- wrong: exit code 1, 0 s" in capsys.readouterr().out


def test_without_a_build_nothing_else_runs(script: ModuleType, tmp_path, monkeypatch) -> None:
    started = tmp_path / "started"
    steps = [
        python(script, "build", "exit(1)"),
        python(script, "tests", f"open({str(started)!r}, 'w')"),
    ]
    monkeypatch.setattr(script, "probe", lambda: H200)
    monkeypatch.setattr(script, "plan", lambda *_: steps)
    assert script.main(["--out", str(tmp_path / "out")]) == 1
    page = (script.RESULTS / "nvidia-h200.md").read_text()
    assert "| tests | not run, for want of build | 0 |" in page
    assert not started.exists()


def test_behind_the_limit_only_the_plot_is_drawn(
    script: ModuleType, tmp_path, monkeypatch, capsys
) -> None:
    build = python(script, "build", "import time; time.sleep(1.5)")
    steps = [build, *(python(script, name, "") for name in ("op", "plot"))]
    monkeypatch.setattr(script, "probe", lambda: H200)
    monkeypatch.setattr(script, "plan", lambda *_: steps)
    assert script.main(["--out", str(tmp_path / "out"), "--limit", "2"]) == 1
    output = capsys.readouterr().out
    assert "--- op: not run, the 2 s were over" in output
    assert "--- plot: ok" in output


def test_success_is_exit_code_0(script: ModuleType, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(script, "probe", lambda: H200)
    monkeypatch.setattr(script, "plan", lambda *_: [python(script, "build", "")])
    assert script.main(["--out", str(tmp_path / "out"), "--sanitizer", "memcheck"]) == 0
    assert list(script.RESULTS.iterdir()) == []


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"missing": ["pybind11"]}, "must have numpy, .*, got no pybind11; install"),
        ({"gpus": []}, "needs an NVIDIA GPU that .* sees, found none"),
    ],
)
def test_says_what_it_needs(script: ModuleType, monkeypatch, found, message: str) -> None:
    monkeypatch.setattr(script, "PROBE", f"import json; print(json.dumps({H200 | found}))")
    with pytest.raises(SystemExit, match=message):
        script.probe()


def test_needs_torch(script: ModuleType, monkeypatch) -> None:
    monkeypatch.setattr(script, "PROBE", "import no_such_torch")
    with pytest.raises(SystemExit, match="needs torch in .*, got: ModuleNotFoundError.*set PYTHON"):
        script.probe()


def test_the_probe_asks_this_python(script: ModuleType, monkeypatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(SystemExit, match="found none|got no"):
        script.probe()
