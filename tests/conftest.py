"""Fixtures shared by all tests, and the guard that no CPU path goes untested."""

from collections.abc import Iterator

import pytest
import torch

from nncx import _C

# The tests' tensors are small: more threads only wait for one another, and long on a busy machine.
# Tests of threading set their own number.
torch.set_num_threads(1)

_covered: set[str] = set()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=_C.supported_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once under every CPU path that was built and that this CPU has."""
    before = _C.isa()
    _C.set_isa(request.param)
    _covered.add(request.param)
    yield request.param
    _C.set_isa(before)


@pytest.fixture
def cuda() -> str:
    """The device of tests marked `cuda`."""
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU here")
    return "cuda"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _covered:
        terminalreporter.write_line(f"Covered CPU paths: {', '.join(sorted(_covered))}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A path that this CPU has and that no test ran is a failure, not an oversight."""
    missing = set(_C.supported_isas()) - _covered
    whole_run = not session.config.option.keyword and not session.config.args_source.name == "ARGS"
    if whole_run and missing:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        print(f"\nCPU paths that no test ran: {', '.join(sorted(missing))}")
