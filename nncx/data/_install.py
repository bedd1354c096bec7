"""What mends a missing library."""


def install(extra: str) -> str:
    """The command, as a sentence has it."""
    return f"pip install 'nncx[{extra}]' (in a checkout: pip install '.[{extra}]')"
