"""`nncx doctor`: it covers every op, finds a kernel that lies, and says what mends it."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import nncx
from nncx import _C, cli
from nncx.commands import _doctor, _self_test
from nncx.commands._self_test import Check


def diagnose() -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, ["doctor"], env={"COLUMNS": "200"})
    return result.exit_code, result.output


def shown(diagnosis: _doctor.Diagnosis) -> str:
    console = Console(highlight=False, width=300)
    with console.capture() as capture:
        _doctor.show(diagnosis, console)
    return capture.get()


@pytest.fixture
def lying(monkeypatch: pytest.MonkeyPatch) -> str:
    """pack_signs has one bit wrong on one path, which is returned."""
    native, path = nncx.ops.pack_signs, _C.supported_isas()[-1]

    def flipped(input: torch.Tensor, groups: int = 1) -> torch.Tensor:
        packed = native(input, groups)
        if _C.isa() == path:
            packed.view(-1)[0] ^= 1
        return packed

    monkeypatch.setattr(nncx.ops, "pack_signs", flipped)
    return path


def test_all_is_well_here_within_ten_seconds() -> None:
    start = time.monotonic()
    code, output = diagnose()
    assert code == 0, output
    assert time.monotonic() - start < 10
    for fact in (nncx.__version__, torch.__version__, _C.compiler, *_C.supported_isas()):
        assert fact in output
    assert f"{_C.isa()}, the best of what was built" in output
    assert "wrong" not in output


def test_every_op_of_torchs_dispatcher_has_a_self_test_on_every_path() -> None:
    """A new op fails here until `nncx.commands._self_test.SELF_TESTS` has a test that calls it."""
    results = _self_test.run()
    public = {name for name in nncx.ops.__all__ if hasattr(torch.ops.nncx, name)}
    assert set(results) == public == set(_self_test.registered_ops())
    places = dict.fromkeys(_C.supported_isas())
    for op, result in results.items():
        assert {**result, "cuda": None} == {**places, "cuda": None}, op


def test_self_tests_leave_path_and_random_state_alone(isa: str) -> None:
    before = torch.get_rng_state()
    _self_test.run()
    assert _C.isa() == isa
    assert torch.equal(torch.get_rng_state(), before)


def test_a_kernel_that_lies_is_found_and_only_it(lying: str) -> None:
    diagnosis = _doctor.examine()
    (problem,) = diagnosis.problems
    assert problem.startswith(f"pack_signs on {lying}: differs from its reference by ")
    assert "pip install" in problem
    sound = _C.supported_isas()[:-1]
    assert problem.endswith(f"until then, set NNCX_ISA={sound[-1]}" if sound else "nncx")
    code, output = diagnose()
    assert code == 1 and "pack_signs" in output


def raising(device: str) -> Iterator[Check]:
    nncx.ops.pack_signs(torch.ones(2, 3, 4))
    yield Check(torch.ones(1), torch.ones(1))


def of_another_shape(device: str) -> Iterator[Check]:
    yield Check(nncx.ops.pack_signs(torch.ones(2, 4)), torch.zeros(2, 9, dtype=torch.uint8))


def of_another_dtype(device: str) -> Iterator[Check]:
    yield Check(nncx.ops.pack_signs(torch.ones(2, 4)), torch.zeros(2, 8))


def not_a_number(device: str) -> Iterator[Check]:
    nncx.ops.pack_signs(torch.ones(2, 4))
    yield Check(torch.tensor(torch.nan), torch.tensor(1.0), tolerance=1.0)


@pytest.mark.parametrize(
    ("self_test", "fault"),
    [
        (raising, "pack_signs: input must be [M, K] or [N, C, H, W], got shape [2, 3, 4]"),
        (of_another_shape, "gave torch.uint8 [2, 8], its reference torch.uint8 [2, 9]"),
        (of_another_dtype, "gave torch.uint8 [2, 8], its reference torch.float32 [2, 8]"),
        (not_a_number, "differs from its reference by nan"),
    ],
)
def test_what_a_self_test_finds(self_test: _self_test.SelfTest, fault: str) -> None:
    assert set(_self_test.run([self_test])["pack_signs"].values()) == {fault}


@pytest.mark.parametrize(("error", "sound"), [(0.0009, True), (0.0011, False)])
def test_tolerance_is_relative_to_the_largest_value(error: float, sound: bool) -> None:
    def self_test(device: str) -> Iterator[Check]:
        nncx.ops.pack_signs(torch.ones(2, 4))
        expected = torch.tensor([0.0, -10.0], dtype=torch.float64)
        yield Check(expected + 10 * error, expected, tolerance=1e-3)

    assert all((f is None) == sound for f in _self_test.run([self_test])["pack_signs"].values())


def test_an_op_without_self_test_or_kernel_is_wrong() -> None:
    op = _doctor.Op("new_op", cpu=None, cuda=None, self_test={})
    kernel, self_test = _doctor._op_problems(op)
    assert "new_op has no kernel for the CPU" in kernel and "pip install" in kernel
    assert "nncx/commands/_self_test.py" in self_test
    diagnosis = replace(_doctor.examine(), ops=(op,), problems=(kernel, self_test))
    assert kernel in shown(diagnosis) and "none" in shown(diagnosis)


def test_a_library_of_another_version_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_doctor, "__version__", "9.9")
    (problem,) = _doctor.examine().problems
    assert f"native library is of nncx {_C.version}, the Python code of 9.9" in problem
    assert "pip install" in problem


def test_a_library_of_another_checkout_is_wrong(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(_doctor, "PACKAGE", tmp_path)
    (problem,) = _doctor.examine().problems
    assert f"Python code is in {tmp_path}, the native library in " in problem
    assert "pip install" in problem


@pytest.mark.skipif(len(_C.supported_isas()) == 1, reason="this CPU has one path only")
def test_a_forced_path_is_named_with_what_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    before = _C.isa()
    monkeypatch.setenv("NNCX_ISA", "scalar")
    try:
        _C.choose_isa()
        diagnosis = _doctor.examine()
    finally:
        _C.set_isa(before)
    assert diagnosis.facts["active path"] == "scalar, because NNCX_ISA says so"
    assert diagnosis.ops[0].cpu == "scalar"
    assert diagnosis.notes[0] == (
        f"{_C.supported_isas()[-1]} is the faster path of this CPU: unset NNCX_ISA"
    )
    assert diagnosis.problems == ()


ALL = ("sm_75", "compute_80", "sm_80", "sm_90a")  # the default


@pytest.mark.parametrize(
    ("capability", "architectures", "code"),
    [
        ((7, 0), ALL, None),
        ((7, 5), ALL, "sm_75"),
        ((8, 0), ALL, "sm_80"),
        ((8, 9), ALL, "sm_80"),
        ((9, 0), ALL, "sm_90a"),
        ((10, 0), ALL, "compute_80"),
        ((8, 0), ("sm_86", "sm_90a"), None),
        ((8, 6), ("sm_80", "sm_86"), "sm_86"),
        ((9, 0), ("compute_90a", "compute_80"), "compute_90a"),
        ((10, 0), ("sm_90a", "compute_90a"), None),
        ((10, 3), ("sm_100a", "sm_100f"), "sm_100f"),
        ((12, 0), ("sm_100f", "compute_80", "compute_90"), "compute_90"),
    ],
)
def test_which_code_a_gpu_runs(
    capability: tuple[int, int], architectures: tuple[str, ...], code: str | None
) -> None:
    assert _doctor.gpu_code(capability, architectures) == code


class _Built:
    """nncx._C of a build with CUDA."""

    cuda_architectures = ("sm_75", "sm_90a", "compute_75")

    def __getattr__(self, name: str) -> object:
        return getattr(_C, name)


@pytest.mark.parametrize("capability", [(7, 0), (8, 0), (9, 0)])
def test_a_gpu_is_told_what_was_built_for_it(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
) -> None:
    monkeypatch.setattr(_doctor, "_C", _Built())
    monkeypatch.setattr(_doctor, "_library_folder", lambda: _doctor.PACKAGE)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    advice = f"with TORCH_CUDA_ARCH_LIST={capability[0]}.{capability[1]}"
    fact, problems, notes = _doctor._gpu(), _doctor._build_problems(), _doctor._notes()
    fault = _doctor.Op("op", cpu="avx2", cuda=None, self_test={"cuda": "it fails"})
    if capability == (7, 0):
        assert fact == "a GPU, compute capability 7.0, runs none of what was built"
        assert len(problems) == 1 and problems[0].endswith(advice)
        assert _doctor._op_problems(fault) == [], "told once, not by each op"
    elif capability == (8, 0):
        assert fact.endswith("runs compute_75") and notes[0].endswith(advice)
    else:
        assert fact.endswith("runs sm_90a") and not problems and not notes
        assert _doctor._op_problems(replace(fault, cuda="sm_90a"))[0].endswith(advice)


def test_a_gpu_that_the_build_left_out_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    if not _C.cuda_architectures:
        (note,) = _doctor._notes()
        assert "NNCX_CUDA=1" in note
