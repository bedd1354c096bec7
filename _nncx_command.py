"""The console script `nncx`.

It stands outside of the package, so that an error in importing that is one sentence as well.
"""

import sys


def main() -> None:
    try:
        from nncx.cli import app
    except (ImportError, RuntimeError) as error:
        sys.exit(f"nncx: {error}")
    app()
