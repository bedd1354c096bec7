"""The one file format of nncx: tensors and JSON in a safetensors file that is whole or refused.

Checkpoints (`nncx.train`) and packed models (`nncx.save`) are both written here. A file is a plain
safetensors file; its metadata has the single key "nncx", whose value is the JSON text

    {"sha256": "<64 hex digits>", "format_version": 1, "metadata": {...}}

The SHA-256 is that of the whole file, taken with 64 zeros in the place of the digest. So it covers
every name, dtype, shape and byte of every tensor and all other metadata. It guards against damage,
not against forgery: whoever can write the file can write its digest too.

Format 2 differs in one thing: "metadata" is a string, the JSON compressed by zlib, in base64. That
matters where the tensors are small too; docs/files.md has both formats byte by byte.
"""

import base64
import hashlib
import json
import os
import re
import shutil
import uuid
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

PLAIN, COMPACT = FORMAT_VERSIONS = (1, 2)

_KEY = "nncx"
_BLANK = b"0" * 64
_LENGTH_BYTES = 8  # a safetensors file begins with the length of its JSON header, little endian
# Of a header: 18,000 tensors. Parsed, a letter takes up to 20 bytes, an empty list 64.
_MAX_HEADER = 4_000_000
_MAX_LISTS = 150_000  # and dictionaries


def write(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: dict[str, Any],
    version: int = PLAIN,
) -> None:
    """Write `tensors` and `metadata` to `path`: afterwards it holds the new file or the old one.

    Args:
        path: the file, replaced if it exists, with its permissions; its folder must exist.
        tensors: by name. Any device, strides and storage; they are stored dense and apart.
        metadata: what JSON can say: dicts with string keys, lists, strings, finite numbers, None.
        version: of the format, `PLAIN` or `COMPACT`.

    Raises:
        ValueError: for a tensor the format cannot hold, for NaN and infinity in `metadata`, or for
            more names and metadata than 4 MB.
        OSError: if the folder is missing or the file cannot be written.
    """
    replace(path, *_serialize(tensors, metadata, version))


def replace(path: str | os.PathLike[str], *parts: bytes | memoryview) -> None:
    """Put a file of these parts in the place of `path`, all of it or nothing.

    Raises:
        OSError: if the folder is missing or the file cannot be written.
    """
    path = Path(os.path.realpath(path))  # replace what a link points to, not the link
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path} cannot be written: the folder {path.parent} is missing")
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            if path.exists():
                shutil.copymode(path, temporary)
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file of `write` and check every byte of it.

    Returns:
        The tensors by name, on the CPU, and the metadata.

    Raises:
        ValueError: if the file is not one of ours, of an unknown version, cut short or changed.
        OSError: if it cannot be opened.
    """

    def refuse(reason: str) -> ValueError:
        return ValueError(f"{os.fspath(path)} is not a whole nncx file: {reason}")

    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        end = _LENGTH_BYTES + int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if end > min(size, _LENGTH_BYTES + _MAX_HEADER):
            raise refuse("it has no safetensors header, or was cut short")
        envelope = _envelope(file.read(end - _LENGTH_BYTES))
        if envelope is None:
            raise refuse("it was not written by nncx, or its header is damaged")
        version, digest = envelope["format_version"], envelope["sha256"]
        if version not in FORMAT_VERSIONS:
            raise refuse(f"this nncx reads formats 1 and 2, the file says {version!r}")
        file.seek(0)
        data = file.read()

    header = data[:end].replace(digest.encode(), _BLANK, 1)
    if _sha256(header, memoryview(data)[end:]) != digest:
        raise refuse("it does not match its SHA-256, so it was cut short or changed after writing")
    try:
        return safetensors.torch.load(data), envelope["metadata"]
    except Exception as error:  # the library raises many types for a file forged with a valid hash
        raise refuse(f"safetensors cannot read it ({error})") from error


def is_ours(path: str | os.PathLike[str]) -> bool:
    """Whether nncx wrote this safetensors file; `read` tells whether it is whole."""
    with safetensors.safe_open(path, "pt") as file:
        return _KEY in (file.metadata() or {})


def _serialize(
    tensors: Mapping[str, Tensor], metadata: dict[str, Any], version: int
) -> tuple[bytes, memoryview]:
    """The file's header, stamped with the digest, and the bytes after it."""
    for name, tensor in tensors.items():
        if name == "__metadata__":
            raise ValueError("a tensor must not be named '__metadata__': safetensors reserves it")
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise ValueError(f"tensor '{name}' must be dense, with data; rebuild it before saving")
        if tensor.dtype == torch.complex128:
            raise ValueError(f"tensor '{name}' is complex128, which safetensors lacks; convert it")
    # The digest comes first in the JSON, and safetensors puts its metadata first in the header:
    # hence the first run of 64 zeros in the file is the place of the digest.
    stored = metadata if version == PLAIN else _compressed(_dumps(metadata))
    text = _dumps({"sha256": _BLANK.decode(), "format_version": version, "metadata": stored})
    dense = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    data = safetensors.torch.save(dense, {_KEY: text})
    end = _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "little")
    header, body = data[:end], memoryview(data)[end:]
    if end - _LENGTH_BYTES > _MAX_HEADER or _envelope(header[_LENGTH_BYTES:]) is None:
        raise ValueError(
            f"names and metadata of a file must take at most {_MAX_HEADER} bytes and"
            f" {_MAX_LISTS} lists and dictionaries, got {end - _LENGTH_BYTES} bytes; store less in"
            " one file"
        )
    return header.replace(_BLANK, _sha256(header, body).encode(), 1), body


def _dumps(value: Any) -> str:
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def _compressed(text: str) -> str:
    return base64.b64encode(zlib.compress(text.encode(), 9)).decode()


def _expanded(text: str) -> str:
    """Undo `_compressed`, if that gives no more than a header may have."""
    stream = zlib.decompressobj()
    expanded = stream.decompress(base64.b64decode(text), _MAX_HEADER)
    if not stream.eof:
        raise ValueError("too long, or cut short")
    return expanded.decode()


def _parse(text: str) -> Any:
    """JSON of bounded size; raises ValueError for any other text."""
    if text.count("[") + text.count("{") > _MAX_LISTS:
        raise ValueError("too many lists")
    return json.loads(text)


def _sha256(header: bytes, body: memoryview) -> str:
    digest = hashlib.sha256(header)
    digest.update(body)
    return digest.hexdigest()


def _envelope(header: bytes) -> dict[str, Any] | None:
    """What `write` put under our key in a safetensors header; None if that is not there."""
    try:
        envelope = _parse(_parse(header.decode())["__metadata__"][_KEY])
        if envelope["format_version"] == COMPACT:
            envelope["metadata"] = _parse(_expanded(envelope["metadata"]))
        whole = (
            envelope.keys() == {"sha256", "format_version", "metadata"}
            and isinstance(envelope["metadata"], dict)
            and re.fullmatch("[0-9a-f]{64}", envelope["sha256"])
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, zlib.error):
        return None
    return envelope if whole else None
