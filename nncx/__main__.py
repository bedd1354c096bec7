"""`python -m nncx` is the command `nncx`, so that torchrun can start it: `torchrun -m nncx ...`."""

from nncx.cli import app

app(prog_name="nncx")
