"""Write named float32 tensors as safetensors, and read them back without trusting a byte: only numpy is needed to read."""

import math
import struct
from typing import Any

import numpy as np

from policies.errors import IntegrityError
from policies.integrity import parse_json

MAX_HEADER_BYTES = 1 << 20  # a tensor's entry has about 100 bytes
ENTRY_KEYS = {"dtype", "shape", "data_offsets"}


def encode_tensors(tensors: dict[str, np.ndarray]) -> bytes:
    """Return tensors as the bytes of a safetensors file."""
    from safetensors.numpy import save  # here, not above: reading needs no library at all

    return save({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()})


def decode_tensors(data: bytes, shapes: dict[str, tuple[int, ...]], source: str) -> dict[str, np.ndarray]:
    """Return exactly the tensors that are expected, float32 only; they lie one behind the other and fill the file.

    Nothing is allocated by what the header says: tensors are views of `data`. Raises `IntegrityError`.
    """
    if len(data) < 8:
        raise IntegrityError(f"{source} has {len(data)} bytes, less than the size of a header")
    (header_size,) = struct.unpack("<Q", data[:8])
    if header_size > min(MAX_HEADER_BYTES, len(data) - 8):
        raise IntegrityError(
            f"{source}: the header says {header_size} bytes, the file has {len(data) - 8} and the limit is {MAX_HEADER_BYTES}"
        )
    header = parse_json(data[8 : 8 + header_size], f"{source}: the header")
    body = memoryview(data)[8 + header_size :]
    if not isinstance(header, dict) or set(header) != set(shapes):
        raise IntegrityError(f"{source}: the header does not hold exactly {sorted(shapes)!s:.500}")
    entries = {name: _checked(header[name], shape, f"{source}: entry {name}") for name, shape in shapes.items()}
    _require_tiling(entries, len(body), source)
    return {
        name: np.frombuffer(body, np.float32, math.prod(shape), entries[name][0]).reshape(shape) for name, shape in shapes.items()
    }


def _checked(entry: Any, shape: tuple[int, ...], what: str) -> tuple[int, int]:
    """Return where a tensor begins and ends, when its entry says no more and nothing else than is expected."""
    if not isinstance(entry, dict) or set(entry) != ENTRY_KEYS:
        raise IntegrityError(f"{what} is {entry!s:.100}, expected exactly {sorted(ENTRY_KEYS)}")
    offsets, sizes = entry["data_offsets"], entry["shape"]
    are_integers = all(isinstance(part, list) and all(type(item) is int for item in part) for part in (offsets, sizes))
    if not are_integers or len(offsets) != 2 or entry["dtype"] != "F32" or tuple(sizes) != shape:
        raise IntegrityError(f"{what} is {entry!s:.100}, expected float32 (F32) of shape {list(shape)}")
    start, end = offsets
    if end - start != 4 * math.prod(shape):
        raise IntegrityError(f"{what} has {end - start} bytes, its shape {list(shape)} needs {4 * math.prod(shape)}")
    return start, end


def _require_tiling(entries: dict[str, tuple[int, int]], num_bytes: int, source: str) -> None:
    """Two tensors of the same bytes, or bytes of no tensor, are something that nobody who writes a policy makes."""
    reached = 0
    for name, (start, end) in sorted(entries.items(), key=lambda item: item[1]):
        if start != reached:
            raise IntegrityError(f"{source}: entry {name} begins at byte {start}, the one before it ends at {reached}")
        reached = end
    if reached != num_bytes:
        raise IntegrityError(f"{source}: the tensors have {reached} bytes, the file holds {num_bytes} for them")
