"""What every network asks of its arguments."""


def at_least(minimum: int, **arguments: int) -> None:
    """Raise ValueError for the first argument that is not an integer >= `minimum`."""
    for name, value in arguments.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise ValueError(f"{name} must be an integer of at least {minimum}, got {value!r}")
