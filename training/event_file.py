"""Write TensorBoard event files: checksummed records, each a protocol buffer of which we need four kinds of field.

`tensorboardX` would write them too, but importing it imports torch: 1.8 s in a process that otherwise starts without. A test
reads what is written here with TensorBoard's own reader.

    record  = length (8 bytes), its checksum, Event, the Event's checksum          tensorflow/core/lib/io/record_writer.cc
    Event   = 1 wall_time, 2 step, then one of 3 file_version, 5 Summary, 7 SessionLog             tensorboard event.proto
    Summary = repeated 1 Value (1 tag, 2 simple_value);  SessionLog = 1 status
"""

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

PREFIX = "events.out.tfevents."
FILE_VERSION = b"brain.Event:2"  # readers take a file without it for an old one, where SessionLog means nothing
SESSION_START = 1
CRC32C_POLYNOMIAL = 0x82F63B78  # reversed bits


class EventFile:
    """A new event file in a directory, after those that are there already.

    Readers forget everything that the earlier files say of `purge_step` and later steps.
    """

    def __init__(self, directory: Path, *, now: float, purge_step: int) -> None:
        directory.mkdir(exist_ok=True)
        # Readers take the files in the order of their names. A time in them, as others write it, may repeat or go backwards.
        earlier = [int(path.name.removeprefix(PREFIX)) for path in directory.glob(f"{PREFIX}[0-9][0-9][0-9][0-9][0-9][0-9]")]
        path = directory / f"{PREFIX}{max(earlier, default=0) + 1:06d}"
        self._file = open(path, "xb", buffering=0)  # noqa: SIM115 - open until `close`
        self._write(_double(1, now) + _bytes(3, FILE_VERSION))
        # In the first file too, where it purges nothing: one reader takes a restart for one from the second start on.
        self._write(_double(1, now) + _integer(2, purge_step) + _bytes(7, _integer(1, SESSION_START)))

    def append(self, step: int, scalars: Mapping[str, float], *, now: float) -> None:
        """Write the values of one step under their tags."""
        values = [_bytes(1, _bytes(1, tag.encode()) + _float(2, value)) for tag, value in scalars.items()]
        self._write(_double(1, now) + _integer(2, step) + _bytes(5, b"".join(values)))

    def close(self) -> None:
        self._file.close()

    def _write(self, event: bytes) -> None:
        length = struct.pack("<Q", len(event))
        self._file.write(length + _checksum(length) + event + _checksum(event))


def first_and_last_time(directory: Path) -> tuple[float, float] | None:
    """Return the wall times between which a directory's events were written, or None where there are none."""
    files = sorted(directory.glob(f"{PREFIX}[0-9][0-9][0-9][0-9][0-9][0-9]"))
    times = [time_s for path in files for time_s in _wall_times(path.read_bytes())]
    return (min(times), max(times)) if times else None


def _wall_times(data: bytes) -> Iterator[float]:
    """Yield the time of every whole record; each begins with it, see `EventFile`."""
    start = 12
    while start + 9 <= len(data):
        yield struct.unpack_from("<d", data, start + 1)[0]
        (length,) = struct.unpack_from("<Q", data, start - 12)
        start += length + 16


def _double(field: int, value: float) -> bytes:
    return bytes([field << 3 | 1]) + struct.pack("<d", value)


def _float(field: int, value: float) -> bytes:
    return bytes([field << 3 | 5]) + struct.pack("<f", value)


def _integer(field: int, value: int) -> bytes:
    return bytes([field << 3]) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return bytes([field << 3 | 2]) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    """Return seven bits per byte, the lowest first; the highest bit says that more follow."""
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _checksum(data: bytes) -> bytes:
    """Return the CRC-32C, rotated and shifted as in TensorFlow's records, so that it may be part of checked data itself."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC32C[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _crc32c_table() -> list[int]:
    table = list(range(256))
    for _ in range(8):
        table = [entry >> 1 ^ (CRC32C_POLYNOMIAL if entry & 1 else 0) for entry in table]
    return table


_CRC32C = _crc32c_table()
