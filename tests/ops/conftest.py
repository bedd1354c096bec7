"""The tests of the ops run on emulated GPUs too, and on a real one if there is one."""

import ctypes
from collections.abc import Iterator

import places
import pytest


@pytest.fixture(scope="session")
def emulator() -> ctypes.CDLL:
    """The emulated GPUs: compiled where sources have changed, which takes a minute at most."""
    return places.emulator()


@pytest.fixture(params=places.PLACES)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once at every place: paths of the CPU, emulated GPUs, the GPU."""
    if request.param in places.EMULATED:
        request.getfixturevalue("emulator")  # which fails once, not in every test
    with places.at(request.param) as place:
        yield place


@pytest.fixture(params=places.EMULATED)
def emulated(request: pytest.FixtureRequest, emulator: ctypes.CDLL) -> Iterator[str]:
    """Runs the test once on every emulated GPU: for what only the CUDA kernels distinguish."""
    with places.at(request.param) as place:
        yield place
