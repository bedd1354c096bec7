"""Fixtures shared by all tests, and the guard that no CPU path goes untested."""

from collections.abc import Iterator

import places
import pytest
import torch

# The tests' tensors are small: more threads only wait for one another, and long on a busy machine.
# Tests of threading set their own number.
torch.set_num_threads(1)

WHOLE_RUNS = ("not slow", "slow or not slow", "")  # -m of those that cover every CPU path


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=places.CPU_PATHS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once under every CPU path that was built and that this CPU has."""
    with places.at(request.param) as path:
        yield path


@pytest.fixture
def cuda() -> str:
    """The device of tests marked `cuda`."""
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU here")
    return "cuda"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if places.covered:
        terminalreporter.write_line(f"Covered paths: {', '.join(sorted(places.covered))}")


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object, error: object) -> None:
    """What a process of pytest-xdist covered, told to the one that started it."""
    places.covered.update(getattr(node, "workeroutput", {}).get("covered", ()))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A path that this CPU has and that no test ran is a failure, not an oversight."""
    if hasattr(session.config, "workeroutput"):  # it runs a part, and does not judge
        session.config.workeroutput["covered"] = sorted(places.covered)
        return
    missing = set(places.CPU_PATHS) - places.covered
    options = session.config.option
    chosen = options.keyword or options.markexpr not in WHOLE_RUNS
    whole_run = not chosen and not session.config.args_source.name == "ARGS"
    if whole_run and missing:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        print(f"\nCPU paths that no test ran: {', '.join(sorted(missing))}")
