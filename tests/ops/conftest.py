"""The tests of the ops run on emulated GPUs too, and on a real one if there is one."""

from collections.abc import Iterator

import places
import pytest


@pytest.fixture(params=places.PLACES)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once at every place: paths of the CPU, emulated GPUs, the GPU."""
    with places.at(request.param) as place:
        yield place


@pytest.fixture(params=places.EMULATED)
def emulated(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once on every emulated GPU: for what only the CUDA kernels distinguish."""
    with places.at(request.param) as place:
        yield place
