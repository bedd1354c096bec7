"""A file of nncx is whole or refused: round trips, every damaged byte, and saves that fail."""

import base64
import json
import os
import tracemalloc
import zlib
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from nncx import _files

METADATA = {"name": "größe", "list": [1, 2.5, None, True], "nested": {"empty": {}}}


def sample_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(6, 8, generator=generator)
    return {
        "float": base,
        "transposed": base.t(),
        "strided": base[::2, 1::3],
        "shared": base,
        "expanded": torch.tensor([[3.0]]).expand(2, 5),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "scalar": torch.tensor(7, dtype=torch.int64),
        "empty": torch.empty(0, 3),
        "bfloat16": base.to(torch.bfloat16),
        "bool": base > 0,
        "bytes": torch.arange(256, dtype=torch.int32).to(torch.uint8),
        "0" * 64: torch.zeros(1),  # looks like the blank digest
        "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
    }


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    dense = tensor.detach().clone(memory_format=torch.contiguous_format)
    return dense.reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("kind", [str, Path])
def test_round_trip(tmp_path, kind):
    path = kind(tmp_path / "file.safetensors")
    tensors = sample_tensors()
    _files.write(path, tensors, METADATA)
    loaded, metadata = _files.read(path)
    assert metadata == METADATA
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and loaded[name].shape == tensor.shape, name
        assert torch.equal(bytes_of(loaded[name]), bytes_of(tensor)), name


def test_loaded_tensors_are_independent_and_writable(tmp_path):
    path = tmp_path / "file"
    shared = torch.zeros(4)
    _files.write(path, {"a": shared, "b": shared}, {})
    first, _ = _files.read(path)
    first["a"].add_(1)
    assert first["b"].eq(0).all()
    assert _files.read(path)[0]["a"].eq(0).all()


@pytest.mark.parametrize("tensors", [{}, sample_tensors()], ids=["no tensors", "tensors"])
@pytest.mark.parametrize("metadata", [{}, METADATA, {"text": "x" * 10_000}], ids=len)
def test_the_compact_format_holds_the_same_in_fewer_bytes(tmp_path, tensors, metadata):
    for version in _files.FORMAT_VERSIONS:
        _files.write(tmp_path / str(version), tensors, metadata, version)
    plain, compact = (_files.read(tmp_path / name) for name in "12")
    assert compact[1] == plain[1] == metadata and compact[0].keys() == plain[0].keys()
    for name in tensors:
        assert torch.equal(bytes_of(compact[0][name]), bytes_of(plain[0][name]))
    if "text" in metadata:
        assert (tmp_path / "2").stat().st_size < (tmp_path / "1").stat().st_size - 9_000


def test_no_tensors_and_no_metadata(tmp_path):
    _files.write(tmp_path / "file", {}, {})
    assert _files.read(tmp_path / "file") == ({}, {})


def test_is_a_plain_safetensors_file(tmp_path):
    path = tmp_path / "file.safetensors"
    _files.write(path, {"a": torch.arange(3)}, METADATA)
    assert torch.equal(safetensors.torch.load_file(path)["a"], torch.arange(3))
    with safetensors.safe_open(path, "pt") as file:
        envelope = json.loads(file.metadata()["nncx"])
    assert envelope["format_version"] == _files.PLAIN == 1
    assert envelope["metadata"] == METADATA


def test_same_content_same_bytes(tmp_path):
    for name in ("a", "b"):
        _files.write(tmp_path / name, sample_tensors() | {"channels_last": torch.ones(1)}, METADATA)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_every_changed_byte_is_refused(tmp_path):
    path = tmp_path / "file"
    _files.write(path, {"a": torch.arange(4), "b": torch.tensor(True)}, {"key": "value"})
    whole = path.read_bytes()
    for position in range(len(whole)):
        for flip in (0x01, 0x20, 0xFF):
            changed = bytearray(whole)
            changed[position] ^= flip
            path.write_bytes(changed)
            with pytest.raises(ValueError, match=f"{path} is not a whole nncx file: "):
                _files.read(path)


def test_every_truncation_and_any_tail_is_refused(tmp_path):
    path = tmp_path / "file"
    _files.write(path, {"a": torch.arange(4)}, {"key": "value"})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="is not a whole nncx file"):
            _files.read(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match="SHA-256"):
        _files.read(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 64,
        b"PK\x03\x04" + b"\0" * 100,
        (2).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (100_000).to_bytes(8, "little") + b"[" * 100_000,
        safetensors.torch.save({"a": torch.zeros(1)}),
        safetensors.torch.save({"a": torch.zeros(1)}, {"nncx": "no JSON"}),
        safetensors.torch.save({"a": torch.zeros(1)}, {"nncx": "[1]"}),
        safetensors.torch.save(
            {"a": torch.zeros(1)},
            {"nncx": '{"sha256":"","format_version":1,"metadata":{}}'},
        ),
    ],
    ids=lambda content: content[:12].hex() + f"-{len(content)}",
)
def test_foreign_files_are_refused(tmp_path, content):
    path = tmp_path / "foreign"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path} is not a whole nncx file: "):
        _files.read(path)


def test_unknown_version_is_named(tmp_path, monkeypatch):
    path = tmp_path / "file"
    monkeypatch.setattr(_files, "PLAIN", 3)
    _files.write(path, {}, {}, version=3)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="reads formats 1 and 2, the file says 3"):
        _files.read(path)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        _files.read(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="the folder .*absent is missing"):
        _files.write(tmp_path / "absent" / "file", {}, {})


@pytest.mark.parametrize(
    "tensors, metadata, message",
    [
        ({"a": torch.zeros(2, device="meta")}, {}, "tensor 'a' must be dense, with data"),
        ({"a": torch.zeros(2).to_sparse()}, {}, "tensor 'a' must be dense, with data"),
        ({"a": torch.zeros(2, dtype=torch.complex128)}, {}, "'a' is complex128"),
        ({"__metadata__": torch.zeros(2)}, {}, "must not be named '__metadata__'"),
        ({}, {"loss": float("nan")}, "not JSON compliant"),
    ],
)
def test_what_cannot_be_stored_is_refused(tmp_path, tensors, metadata, message):
    path = tmp_path / "file"
    _files.write(path, {"old": torch.ones(1)}, {})
    with pytest.raises(ValueError, match=message):
        _files.write(path, tensors, metadata)
    assert "old" in _files.read(path)[0]
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_failed_save_leaves_the_old_file_alone(tmp_path, monkeypatch, step, error):
    path = tmp_path / "file"
    _files.write(path, {"old": torch.ones(1)}, {})

    def fail(*args):
        raise error

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(type(error)):
        _files.write(path, {"new": torch.ones(1)}, {})
    monkeypatch.undo()
    assert "old" in _files.read(path)[0]
    assert os.listdir(tmp_path) == ["file"]


def test_link_is_followed(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "target")
    _files.write(tmp_path / "link", {}, {"a": 1})
    assert (tmp_path / "link").is_symlink()
    assert _files.read(tmp_path / "target") == ({}, {"a": 1})


def test_permissions_follow_the_umask(tmp_path):
    _files.write(tmp_path / "file", {}, {})
    (tmp_path / "plain").touch()
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664])
def test_permissions_of_a_replaced_file_stay(tmp_path, mode):
    _files.write(tmp_path / "file", {}, {})
    (tmp_path / "file").chmod(mode)
    _files.write(tmp_path / "file", {}, {"a": 1})
    assert (tmp_path / "file").stat().st_mode & 0o777 == mode


@pytest.mark.parametrize("escape", [False, True], ids=["plain", "escaped"])
def test_a_header_of_countless_lists_is_refused_at_once(tmp_path, escape):
    """Three letters of a list take 64 bytes, once parsed."""
    with pytest.raises(ValueError, match="and 150000 lists and dictionaries"):
        _files.write(tmp_path / "file", {}, {"lists": [[]] * _files._MAX_LISTS})
    _files.write(tmp_path / "file", {}, {"lists": []})
    header = (tmp_path / "file").read_bytes()[_files._LENGTH_BYTES :]
    lists = b"[" + b",".join([b"[]"] * _files._MAX_LISTS) + b"]"
    if escape:
        lists = lists.replace(b"[", rb"\u005b")
    header = header.replace(b"[]", lists)
    (tmp_path / "file").write_bytes(len(header).to_bytes(8, "little") + header)
    tracemalloc.start()
    with pytest.raises(ValueError, match="not written by nncx, or its header is damaged"):
        _files.read(tmp_path / "file")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * len(header)


@pytest.mark.parametrize(
    "metadata",
    [
        *({}, None, 1, "", "not base64!", "AAAA", base64.b64encode(zlib.compress(b"no JSON"))),
        base64.b64encode(zlib.compress(b"[]")),
        base64.b64encode(zlib.compress(b'{"a": 1}')[:-8]),
        base64.b64encode(zlib.compress(b"{" + b" " * 4_000_000 + b"}")),
        base64.b64encode(zlib.compress(b'{"a": ' + b"[" * 200_000)),
    ],
    ids=lambda value: str(value)[:20],
)
def test_compact_metadata_that_is_not_sound_is_refused(tmp_path, metadata):
    path = tmp_path / "file"
    stored = metadata.decode() if isinstance(metadata, bytes) else metadata
    envelope = {"sha256": "0" * 64, "format_version": 2, "metadata": stored}
    path.write_bytes(safetensors.torch.save({}, {"nncx": json.dumps(envelope)}))
    with pytest.raises(ValueError, match="not written by nncx, or its header is damaged"):
        _files.read(path)


def test_compressed_metadata_is_not_expanded_without_end(tmp_path):
    path, bomb = tmp_path / "file", zlib.compress(b" " * 400_000_000, 9)
    envelope = {"sha256": "0" * 64, "format_version": 2, "metadata": base64.b64encode(bomb)}
    envelope["metadata"] = envelope["metadata"].decode()
    path.write_bytes(safetensors.torch.save({}, {"nncx": json.dumps(envelope)}))
    tracemalloc.start()
    with pytest.raises(ValueError, match="not written by nncx, or its header is damaged"):
        _files.read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20_000_000


def test_a_header_too_large_to_read_is_not_written(tmp_path):
    _files.write(tmp_path / "file", {}, {"text": "x" * (_files._MAX_HEADER - 1000)})
    assert _files.read(tmp_path / "file")[1]["text"].startswith("x")
    with pytest.raises(ValueError, match="must take at most 4000000 bytes and .*, got 4000"):
        _files.write(tmp_path / "file", {}, {"text": "x" * _files._MAX_HEADER})
    assert _files.read(tmp_path / "file")[1]["text"].startswith("x")
    header = b"[" * (_files._MAX_HEADER + 1)
    (tmp_path / "file").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match="has no safetensors header"):
        _files.read(tmp_path / "file")
