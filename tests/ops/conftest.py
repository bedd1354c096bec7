"""The tests of the ops run on the GPU too, if there is one."""

from collections.abc import Iterator

import places
import pytest


@pytest.fixture(params=places.PLACES)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once under every path of the CPU, and once on the GPU."""
    with places.at(request.param) as place:
        yield place
