"""Builds nncx for the GPU of this machine, tests it there and times it: what `make gpu` runs.

    python scripts/run_on_gpu.py [--out FOLDER] [--sanitizer TOOL] [--limit SECONDS]

Nothing is installed or downloaded: the libraries are built in place, for this GPU alone, with nvcc,
by a Python that has a torch with CUDA and what NEEDED lists; where it has pytest-xdist, the tests
run in several processes. A step that fails, or is not done when its time is up, costs none of the
others' results, but the exit code is 1.

The results are benchmarks/results/<gpu>.md, .svg (the roofline plot) and .jsonl (what it shows);
they are in FOLDER too, with log.txt. Under a TOOL of compute-sanitizer only the tests run, and
there are no results but the log.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Timer
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BENCHMARKS = (  # first what a run that ends early should not miss
    "binary_linear",
    "int8_linear",
    "binary_conv2d_sign",
    "depthwise_conv2d",
    "grouped_conv2d",
    "channel_shuffle",
    "int8_conv2d",
    "codebook_linear",
    "hashed_linear",
    "pack_signs",
    "quantize_int8",
    "xnor_conv2d",
    "binary_conv2d",
    "codebook_conv2d",
    "max_pool2d_signs",
    "mobile_networks",
)
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
NEEDED = (
    *("numpy", "safetensors", "typer", "rich", "matplotlib"),
    *("setuptools", "pybind11", "pytest", "hypothesis"),
)
SECONDS = 460

# What a Python has, as JSON; asked of another process, because this one shall hold no GPU memory.
PROBE = f"""
import importlib.util, json, torch
gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
print(json.dumps({{
    "gpus": [gpu.name for gpu in gpus],
    "capabilities": sorted({{f"{{gpu.major}}.{{gpu.minor}}" for gpu in gpus}}),
    "missing": [name for name in {NEEDED} if importlib.util.find_spec(name) is None],
    "xdist": importlib.util.find_spec("xdist") is not None,
}}))
"""


@dataclass(frozen=True)
class Step:
    """A program of the run, and the seconds that it may take."""

    name: str
    command: Sequence[str | Path]
    seconds: float = 60
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What became of a step: "ok", or why not."""

    step: str
    result: str
    seconds: float = 0

    @property
    def ok(self) -> bool:
        return self.result.startswith("ok")

    def __str__(self) -> str:
        return f"--- {self.step}: {self.result}, {self.seconds:.0f} s"


def main(arguments: Sequence[str] | None = None) -> int:
    start = time.monotonic()
    options = parse(arguments)
    machine = probe()
    gpu = machine["gpus"][0]
    folder = options.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tables.md", *result_names(gpu)):
        (folder / name).unlink(missing_ok=True)

    outcomes: list[Outcome] = []
    with (folder / "log.txt").open("w") as log:
        for step in plan(machine, folder, options.sanitizer):
            left = options.limit - (time.monotonic() - start)
            if outcomes and not outcomes[0].ok:
                outcome = Outcome(step.name, f"not run, for want of {outcomes[0].step}")
            elif left < 1 and step.name != "plot":
                outcome = Outcome(step.name, f"not run, the {options.limit} s were over")
            else:
                outcome = run(step, log, left)
            outcomes.append(outcome)
            print(outcome, flush=True)
            if not options.sanitizer:
                publish(gpu, folder, outcomes)
    print("\n" + "\n".join(map(str, outcomes)))
    return 0 if all(outcome.ok for outcome in outcomes) else 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Builds, tests and times nncx on this GPU.")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", metavar="FOLDER")
    parser.add_argument("--sanitizer", choices=SANITIZERS, help="run the tests under it, only")
    parser.add_argument("--limit", type=int, default=SECONDS, metavar="SECONDS")
    return parser.parse_args(arguments)


def probe() -> dict[str, Any]:
    """What PROBE prints; ends the run where something is missing."""
    process = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    if process.returncode:
        error = process.stderr.splitlines()[-1]
        sys.exit(
            f"run_on_gpu.py: needs torch in {sys.executable}, got: {error};"
            " set PYTHON to a Python that has it"
        )
    machine = json.loads(process.stdout)
    if machine["missing"]:
        sys.exit(
            f"run_on_gpu.py: {sys.executable} must have {', '.join(NEEDED)}, got no"
            f" {', '.join(machine['missing'])}; install what is missing, or set PYTHON to another"
        )
    if not machine["gpus"]:
        sys.exit(
            f"run_on_gpu.py: needs an NVIDIA GPU that {sys.executable}'s torch sees, found none"
        )
    return machine


def plan(machine: Mapping[str, Any], folder: Path, sanitizer: str | None) -> list[Step]:
    """The steps, the first of which all others need."""
    python = sys.executable
    capabilities = {"NNCX_CUDA": "1", "TORCH_CUDA_ARCH_LIST": ";".join(machine["capabilities"])}
    build = Step("build", [python, "setup.py", "build_ext", "--inplace"], 240, capabilities)
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    tests = [*pytest, "--durations=5", "-m", "cuda", "tests"]
    processes = ["-n", "8"] if machine["xdist"] else []
    if sanitizer:
        # Only nncx's kernels; each tensor in memory of its own, which excludes graph capture.
        tool = ["compute-sanitizer", "--tool", sanitizer, "--error-exitcode", "1"]
        command = [*tool, "--kernel-name", "kns=nncx", *tests, "-k", "not graph"]
        return [build, Step("tests", command, 420, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})]

    records = folder / f"{slug(machine['gpus'][0])}.jsonl"
    options = [
        "--device",
        "cuda",
        "--rounds",
        "7",
        "--markdown",
        folder / "tables.md",
        "--records",
        records,
    ]
    return [
        build,
        Step("doctor", [python, "-c", "from _nncx_command import main; main()", "doctor"]),
        Step("library", [*pytest, "tests/test_build.py", "tests/test_sass.py"]),
        Step("tests", [*tests, *processes], 180),
        *(Step(op, [python, f"benchmarks/{op}.py", *options], 120) for op in BENCHMARKS),
        Step("plot", [python, "benchmarks/roofline.py", records]),
    ]


def run(step: Step, log: TextIO, left: float) -> Outcome:
    """Runs a step, for its seconds or those that are left; prints and logs what it says."""
    if not shutil.which(step.command[0]):
        return Outcome(step.name, f"needs {step.command[0]} on PATH")
    start, seconds = time.monotonic(), min(step.seconds, max(left, 10))
    modules = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    here = {"PYTHONPATH": os.pathsep.join(modules), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        step.command,
        cwd=ROOT,
        env=os.environ | here | step.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # so that what it started ends with it
    )
    timer = Timer(seconds, os.killpg, (process.pid, signal.SIGKILL))
    timer.start()
    counts = ""
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            log.write(line)
            if found := re.search(r"\d+ (?:passed|failed|skipped|error).*(?= in [\d.]+s)", line):
                counts = f": {found[0]}"
        code = process.wait()
    finally:
        in_time = timer.is_alive()
        timer.cancel()
        if process.poll() is None:  # interrupted
            os.killpg(process.pid, signal.SIGKILL)
    took = time.monotonic() - start
    if not in_time:
        return Outcome(step.name, f"stopped after {seconds:.0f} s", took)
    return Outcome(step.name, f"exit code {code}{counts}" if code else f"ok{counts}", took)


def slug(gpu: str) -> str:
    """`NVIDIA H200` -> `nvidia-h200`."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def result_names(gpu: str) -> list[str]:
    return [f"{slug(gpu)}.{kind}" for kind in ("md", "svg", "jsonl")]


def publish(gpu: str, folder: Path, outcomes: Sequence[Outcome]) -> None:
    """Writes the page as far as it has come, and copies the results to where they belong."""
    page, plot, _ = names = result_names(gpu)
    lines = [
        f"# {gpu}",
        "",
        "Printed by `make gpu`. [How to read it](../README.md).",
        "",
        *([f"![roofline]({plot})", ""] if (folder / plot).exists() else []),
        "| step | result | seconds |",
        "| --- | --- | --- |",
        *(f"| {o.step} | {o.result} | {o.seconds:.0f} |" for o in outcomes),
        "",
    ]
    tables = folder / "tables.md"
    text = tables.read_text() if tables.exists() else ""
    (folder / page).write_text("\n".join(lines) + "\n" + text)
    for name in names:
        if (folder / name).exists():
            shutil.copy(folder / name, RESULTS / name)


if __name__ == "__main__":
    raise SystemExit(main())
