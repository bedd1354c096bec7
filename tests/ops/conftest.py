"""The tests of the ops run on emulated GPUs too, and on a real one if there is one."""

import zlib
from collections.abc import Iterator

import places
import pytest


@pytest.fixture(params=places.PLACES)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once at every place: paths of the CPU, emulated GPUs, the GPU."""
    with places.at(request.param) as place:
        yield place


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Emulated GPUs are slow: each case of a parametrized test runs on one of them, and on all with
    `-m "slow or not slow"`. A test of a single case runs on all; of threads, on none."""
    for item in items:
        case = dict(item.callspec.params) if hasattr(item, "callspec") else {}
        place = case.pop("isa", None)
        if place not in places.EMULATED:
            continue
        name = item.nodeid.replace(place, "").encode()
        chosen = places.EMULATED[zlib.crc32(name) % len(places.EMULATED)]
        if (case and place != chosen) or "threads" in item.name:
            item.add_marker(pytest.mark.slow)
