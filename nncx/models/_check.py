"""What every network asks of its arguments."""

import math
from collections.abc import Collection


def at_least(minimum: int, **arguments: int) -> None:
    """Raise ValueError for the first argument that is not an integer >= `minimum`."""
    for name, value in arguments.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise ValueError(f"{name} must be an integer of at least {minimum}, got {value!r}")


def probability(**arguments: float) -> None:
    """Raise ValueError for the first argument that is no probability below 1."""
    for name, value in arguments.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name} must be a probability in [0, 1), got {value}")


def positive(**arguments: float) -> None:
    """Raise ValueError for the first argument that is not a finite number above 0."""
    for name, value in arguments.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be a number above 0, got {value}")


def one_of(choices: Collection[object], **arguments: object) -> None:
    """Raise ValueError for the first argument that is none of `choices`."""
    for name, value in arguments.items():
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}")
