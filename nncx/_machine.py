"""One line that says on what a figure was measured."""

import platform

import torch

from nncx._native import _C


def describe() -> str:
    """CPU, threads, CPU path of nncx, versions: to stand beside every measured figure."""
    threads = torch.get_num_threads()
    return (
        f"{_cpu_name()}, {threads} thread{'s' * (threads != 1)}, path {_C.isa()}, "
        f"torch {torch.__version__}, nncx {_C.version}"
    )


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as info:
            names = [
                line.split(":", 1)[1].strip() for line in info if line.startswith("model name")
            ]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
