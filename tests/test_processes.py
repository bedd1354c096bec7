"""Two processes train as one does on the whole batch."""

import contextlib
import csv
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import two_processes
from torch.utils.data import DataLoader
from training import adam, batches, network, same, samples, sgd

import nncx
from nncx.train import fit


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        return listening.getsockname()[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where both have left what they did. The environment is what torchrun gives them."""
    folder = tmp_path_factory.mktemp("processes")
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    # Whatever the name of this machine resolves to, the two meet on the loopback interface.
    variables |= {"GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    variables |= {"PYTHONPATH": str(Path(nncx.__file__).parents[1])}
    errors = [folder / f"{rank}.err" for rank in "01"]
    with contextlib.ExitStack() as stack:
        started = [
            subprocess.Popen(
                [sys.executable, two_processes.__file__, folder],
                env={**os.environ, **variables, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stderr=stack.enter_context(path.open("w")),  # a full pipe would stop its writer
            )
            for rank, path in enumerate(errors)
        ]
        for process in started:
            stack.callback(process.kill)
        codes = exit_codes(started, seconds=two_processes.SECONDS + 30)
    said = "\n".join(f"{path.name}: {path.read_text()}" for path in errors)
    assert codes == [0, 0], f"exit codes {codes}\n{said}"
    return folder


def exit_codes(processes: list[subprocess.Popen], seconds: float) -> list[int | None]:
    """Once all have ended, or soon after one has failed, for which the others may wait in vain."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        codes = [process.poll() for process in processes]
        if None not in codes:
            return codes
        if any(codes):
            end = min(end, time.monotonic() + 5)
        time.sleep(0.1)
    return [process.poll() for process in processes]


@pytest.fixture(scope="module")
def both(folder: Path) -> list[dict]:
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


def close(results: dict, alone: dict) -> None:
    torch.testing.assert_close(results["task"], alone["task"], rtol=1e-4, atol=1e-6)
    for record, other in zip(results["history"], alone["history"], strict=True):
        assert record == pytest.approx(other, rel=1e-5)


@pytest.mark.parametrize("name", two_processes.TASKS)
def test_two_equal_one(both: list[dict], name: str) -> None:
    alone = two_processes.trained(two_processes.TASKS[name], two_processes.loader())
    for results in both:
        close(results[name], alone)
    same(both[0][name]["task"], both[1][name]["task"])
    assert [results[name]["calls"] for results in both] == [[0, 0, 0], []]


def test_any_data_is_shared_out(both: list[dict]) -> None:
    in_order = two_processes.trained(two_processes.supervised, DataLoader(samples(46), 15))
    for results in both:
        close(results["listed"], in_order)
        same(results["workers"]["task"], results["supervised"]["task"])


def test_the_first_writes_and_decides_when_to_stop(both: list[dict], folder: Path) -> None:
    with (folder / "log" / "history.csv").open() as file:
        assert [row["validation"] for row in csv.DictReader(file)] == ["1.0", "2.0"]
    assert [len(results["logged"]["history"]) for results in both] == [2, 2]


def test_resumed_equals_uninterrupted(both: list[dict], folder: Path) -> None:
    for whole, resumed in (results["resumed"] for results in both):
        same(resumed, whole)
    (first, history, random), (second, others, other_random) = (
        results["resumed"][0] for results in both
    )
    same([first, history], [second, others])
    assert not torch.equal(random, other_random)  # or both would drop out the same values

    model = network()
    with pytest.raises(ValueError, match=r"another run \(1 processes here, 2 in the file\)"):
        fit(
            model,
            two_processes.loader(45),
            epochs=3,
            optimizer=adam(model.parameters()),
            amp=torch.bfloat16,
            checkpoint=folder / "run",
        )


def test_a_converted_student(both: list[dict]) -> None:
    (before, after), (_, others) = (results["binary"] for results in both)
    same(after, others)
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert set(after) - changed == set()


def test_one_sentence_for_data_without_a_common_order(both: list[dict]) -> None:
    for results in both:
        assert "which fit shares out, got a DistributedSampler; leave it out" in results["sampler"]
        assert "pass generator=torch.Generator()" in results["order"]


def test_the_command_reports_once(both: list[dict], folder: Path) -> None:
    results = [each["recipe"] for each in both]
    assert results[0].trained_on == "2 x cpu" and results[1] is None
    assert both[0]["device"] == "cpu"
    names = {path.name for path in (folder / "recipe").iterdir()}
    assert names == {"model.safetensors", "history.csv", "result.json"}


def test_a_compression_reports_once(both: list[dict], folder: Path) -> None:
    first, second = (each["compressed"] for each in both)
    assert first.trained_on == "2 x cpu" and second is None
    assert [each.name for each in first.trainings] == ["inq-1", "inq-2"]
    names = {path.name for path in (folder / "compressed").iterdir()}
    assert names == {"model.safetensors", "result.json", "inq-1", "inq-2"}


def test_processes_that_were_not_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would train alone, and write over the other's checkpoint."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    model = network()
    with pytest.raises(ValueError, match="the 2 processes of torchrun must be joined, .*inside"):
        fit(model, batches(), epochs=1, optimizer=sgd(model.parameters()))


def test_alone_there_is_nothing_to_join() -> None:
    with nncx.train.processes() as device:
        assert device.type in ("cpu", "cuda") and not torch.distributed.is_initialized()
