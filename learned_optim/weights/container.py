"""The safetensors container: a table of tensors and strings in JSON, then the tensors' bytes.

The table is checked before any tensor is made, so a file from a stranger costs neither time nor memory beyond its size.
"""

from __future__ import annotations

import json
from math import prod
from typing import Any, NamedTuple, NoReturn

from safetensors import SafetensorError, deserialize
from torch import Tensor

from learned_optim.weights.errors import WeightsError
from learned_optim.weights.fingerprint import from_little_endian, to_little_endian
from learned_optim.weights.text import one_line

MAX_BYTES = 16 * 2**20
"""The largest file that is read, fetched or written; an update rule has kilobytes."""

MAX_HEADER = 2**20
"""The largest table that is read or written, in bytes."""

MAX_DIGITS = 20
MAX_RANK = 8


class Entry(NamedTuple):
    """What the table says of one tensor: its place is counted in bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Container(NamedTuple):
    """A checked file: its strings, and its tensors as described."""

    strings: dict[str, str]
    entries: dict[str, Entry]
    data: bytes

    def tensor(self, name: str) -> Tensor:
        """Make one float32 tensor; its entry must say ``F32``."""
        entry = self.entries[name]
        return from_little_endian(self.data[entry.start : entry.stop], entry.shape)


def parse(data: bytes, source: str) -> Container:
    """Check a safetensors file and make none of its tensors.

    Args:
        data: The content.
        source: What messages call it.

    Returns:
        The checked file.

    Raises:
        WeightsError: If it is no whole safetensors file, or its table is too large or has entries of wrong types.
    """
    check_size(len(data), source)
    size = int.from_bytes(data[:8], "little")
    if MAX_HEADER < size <= len(data) - 8:
        raise WeightsError(
            f"{source} has a header of {size:,} bytes, and an update rule needs a few thousand; {MAX_HEADER:,} are read at "
            "most, so check where the file is from"
        )
    try:
        deserialize(data)
    except SafetensorError as error:
        _explain(data, source, error)
    try:
        table = parse_json(data[8 : 8 + size])
        strings = table.pop("__metadata__", None) or {}
        return Container(strings, {name: _entry(entry, 8 + size) for name, entry in table.items()}, data)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise WeightsError(
            f"{source}: the header is damaged ({type(error).__name__}: {one_line(error, 200)}); get the file again"
        ) from error


def parse_json(text: str | bytes) -> Any:
    """Parse JSON, but refuse what no honest writer makes.

    Args:
        text: The JSON.

    Returns:
        The value.

    Raises:
        ValueError: If it is not JSON, repeats a key, or holds NaN, Infinity or a number of very many digits.
        RecursionError: If it is nested too deep.
    """

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no setting")

    def integer(digits: str) -> int:
        if len(digits) > MAX_DIGITS:
            raise ValueError(f"a number of {len(digits)} digits")
        return int(digits)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key stands twice")
        return found

    return json.loads(text, parse_constant=refuse, parse_int=integer, object_pairs_hook=unique)


def assemble(strings: dict[str, str], tensors: dict[str, Tensor], source: str) -> bytes:
    """Lay out a safetensors file. The library's own writer orders the header differently from run to run.

    Args:
        strings: The header's strings.
        tensors: Written in float32.
        source: What messages call it.

    Returns:
        The content of the file.

    Raises:
        WeightsError: If the file could not be read back: it is too large, or a string is not valid Unicode.
    """
    table: dict[str, Any] = {"__metadata__": dict(sorted(strings.items()))}
    pieces: list[bytes] = []
    start = 0
    for name, tensor in tensors.items():
        pieces.append(to_little_endian(tensor))
        stop = start + len(pieces[-1])
        table[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, stop]}
        start = stop
    try:
        text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise WeightsError(f"{source}: a string of the header is not valid Unicode ({error}); change it") from error
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise WeightsError(
            f"{source} would have a header of {len(text):,} bytes, and {MAX_HEADER:,} are read at most; shorten the recipe "
            "or the metadata"
        )
    return b"".join((len(text).to_bytes(8, "little"), text, *pieces))


def check_size(size: int, source: str) -> None:
    """Refuse a file that is too large to be an update rule.

    Args:
        size: Its bytes.
        source: What messages call it.

    Raises:
        WeightsError: If there are more than :data:`MAX_BYTES`.
    """
    if size > MAX_BYTES:
        raise WeightsError(
            f"{source} has {size:,} bytes, and an update rule has kilobytes; it may hold a model instead: check its name"
        )


def refuse_pickle(source: str) -> str:
    """Return the message for a pickle."""
    return (
        f"{source} is a pickle, which can run code when it is read: weights are never read from one; load it yourself "
        "if you trust it, and write Weights(rule).save('name.safetensors')"
    )


def _entry(entry: dict[str, Any], offset: int) -> Entry:
    dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    sizes = (*shape, start, stop)
    if len(shape) > MAX_RANK or any(type(size) is not int or not 0 <= size <= MAX_BYTES for size in sizes):
        raise ValueError(f"a tensor of shape {one_line(shape, 60)} at {one_line((start, stop), 60)}")
    if dtype == "F32" and stop - start != 4 * prod(shape):
        raise ValueError(f"{stop - start} bytes for a tensor of shape {shape}")
    return Entry(dtype, shape, offset + start, offset + stop)


def _explain(data: bytes, source: str, error: SafetensorError) -> NoReturn:
    """Say what content that is not safetensors most likely is."""
    if not data:
        raise WeightsError(f"{source} is empty; an interrupted copy? get it again") from error
    if data.startswith(b"version https://git-lfs"):
        raise WeightsError(f"{source} is a Git LFS pointer, not the file it points to; run `git lfs pull`") from error
    # A zip (torch.save), or protocol 2 and later; a safetensors file begins with the length of its header, of which a third
    # byte would mean 64 kB.
    if data.startswith(b"PK\x03\x04") or (data[:1] == b"\x80" and data[2:3] > b"\0"):
        raise WeightsError(refuse_pickle(source)) from error
    raise WeightsError(
        f"{source} is truncated, corrupt or not a safetensors file ({len(data):,} bytes: {one_line(error, 200)}); get it "
        "again, from the Hub with force_download=True"
    ) from error
