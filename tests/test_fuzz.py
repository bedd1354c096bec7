"""A slice of what `make fuzz` does with many more files."""

import os
import time

import fuzz_files
import pytest


def test_damaged_and_forged_files_are_refused_or_sound() -> None:
    results = list(fuzz_files.run(400))
    assert [result for result in results if result.is_bad] == []
    assert {result.case for result in results} == set(range(400))
    kinds = {change.__name__.strip("_") for change in fuzz_files.DAMAGE + fuzz_files.FORGERY}
    assert {result.kind for result in results} == kinds


@pytest.mark.slow  # two more processes import torch
def test_a_crash_and_a_hang_are_results(monkeypatch) -> None:
    monkeypatch.setattr(fuzz_files, "HANG", 3.0)
    monkeypatch.setattr(fuzz_files, "_serve", _misbehave)
    outcomes = [result.outcome for result in fuzz_files.run(4)]
    assert outcomes == ["refused", "HANG", "CRASH, exit code 9", "refused"]


def _misbehave(cases, seed, results) -> None:
    for case in cases:
        if case == 1:
            time.sleep(60)
        if case == 2:
            os._exit(9)
        results.send(fuzz_files.Result(case, "kind", "refused"))
