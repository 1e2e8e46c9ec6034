"""What a sealed segment of decisions looks like: one Parquet file, `<stem>.parquet`, in place of `<stem>.jsonl`.

A row is a decision and a column is a field of `Decision`; what has no fixed type there (observation, action, action mask,
engines) is JSON text, null where the field is. One column more, `row`, is the decision's place among all those of the `jsonl`
file: whoever had read a part of that goes on behind it here. Rows are sorted by time, and by `row` among equal times. Pages
carry checksums. The file's metadata says what it was made of: see `SealedInfo`.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from policies.errors import IntegrityError
from policies.records import SCHEMA_VERSION, Decision, SegmentKind

SUFFIX = ".parquet"
ROW = "row"
MAX_GROUP_ROWS = 4096  # a reader takes in a row group at a time: some ten milliseconds
MAX_GROUP_BYTES = 1 << 20  # of JSON text, before compression

_ARROW_NAMES = {msgspec.inspect.StrType: "string", msgspec.inspect.IntType: "int64", msgspec.inspect.FloatType: "float64"}


class SealedInfo(msgspec.Struct, frozen=True):
    """A sealed segment's metadata. `jsonl_sha256` and `jsonl_bytes` are of the file it was made of, torn tail included.

    `num_rows` are the decisions in it; `num_duplicates` more were logged, with an id that an earlier one has. The times are
    those of its first and last row, None without rows.
    """

    schema_version: int
    kind: SegmentKind
    writer: str
    jsonl_sha256: str
    jsonl_bytes: int
    num_rows: int
    num_duplicates: int
    num_torn_bytes: int
    first_time_s: float | None = None
    last_time_s: float | None = None


def _column_type(field: msgspec.inspect.Field) -> str:
    kinds = field.type.types if isinstance(field.type, msgspec.inspect.UnionType) else (field.type,)
    names = {_ARROW_NAMES.get(type(kind), "json") for kind in kinds if not isinstance(kind, msgspec.inspect.NoneType)}
    if all(isinstance(kind, msgspec.inspect.LiteralType) for kind in kinds):
        return "string"
    return names.pop() if len(names) == 1 else "json"


COLUMNS = {field.name: _column_type(field) for field in msgspec.inspect.type_info(Decision).fields}


class SealedWriter:
    """Writes a sealed segment into an open binary file; `close` completes it."""

    def __init__(self, file: Any, info: SealedInfo) -> None:
        import pyarrow  # here, not above: a policy is served without it
        import pyarrow.parquet

        types = {"string": pyarrow.string(), "int64": pyarrow.int64(), "float64": pyarrow.float64(), "json": pyarrow.string()}
        fields = [(ROW, pyarrow.int64()), *((name, types[kind]) for name, kind in COLUMNS.items())]
        metadata = {name: str(value) for name, value in msgspec.structs.asdict(info).items() if value is not None}
        self._schema = pyarrow.schema(fields, metadata=metadata)
        # No dictionaries for what is different in each row: they would only be given up again, a page later.
        dictionary = [name for name, kind in COLUMNS.items() if kind == "string" and name != "decision_id"]
        self._writer = pyarrow.parquet.ParquetWriter(
            file, self._schema, compression="zstd", use_dictionary=dictionary, write_page_checksum=True
        )
        self._rows: list[tuple[int, Decision]] = []
        self._texts: dict[str, list[str | None]] = {name: [] for name, kind in COLUMNS.items() if kind == "json"}
        self._num_bytes = 0

    def add(self, row: int, decision: Decision) -> bool:
        """Add a decision; True when that completed a row group, which took some time."""
        self._rows.append((row, decision))
        for name, texts in self._texts.items():
            value = getattr(decision, name)
            text = None if value is None else msgspec.json.encode(value).decode()
            texts.append(text)
            self._num_bytes += len(text or "")
        is_full = len(self._rows) >= MAX_GROUP_ROWS or self._num_bytes >= MAX_GROUP_BYTES
        if is_full:
            self._write_group()
        return is_full

    def close(self) -> None:
        """Write what is left, and the end of the file."""
        if self._rows:
            self._write_group()
        self._writer.close()

    def abandon(self) -> None:
        """Let go of the file after an error, while it is open; what is in it is no segment."""
        with contextlib.suppress(OSError, ValueError):
            self._writer.close()

    def _write_group(self) -> None:
        import pyarrow

        columns: list[list] = [[row for row, _ in self._rows]]
        for name, kind in COLUMNS.items():
            columns.append(self._texts[name] if kind == "json" else [getattr(decision, name) for _, decision in self._rows])
        arrays = [pyarrow.array(column, field.type) for column, field in zip(columns, self._schema)]
        self._writer.write_table(pyarrow.Table.from_arrays(arrays, schema=self._schema), row_group_size=len(self._rows))
        self._rows = []
        self._texts = {name: [] for name in self._texts}
        self._num_bytes = 0


class SealedFile:
    """Reads a sealed segment by row groups. Every method raises `IntegrityError` for bytes that are not what was written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with _reading(path) as file:
            self.info = _info(path, file)
            self.num_groups: int = file.num_row_groups

    def read_group(self, index: int, *, first_row: int = 0) -> list[Decision]:
        """Return the decisions of a row group whose `row` is at least `first_row`."""
        return [decision for row, decision in self.read_rows(index) if row >= first_row]

    def read_rows(self, index: int) -> list[tuple[int, Decision]]:
        """Return a row group's decisions with their `row`."""
        with _reading(self.path) as file:
            table = file.read_row_group(index, use_threads=False)
            columns = {name: column.to_pylist() for name, column in zip(table.column_names, table.columns)}
            for name, kind in COLUMNS.items():
                if kind == "json" and name in columns:
                    columns[name] = _decode_texts(columns[name])
            rows = columns.pop(ROW)
            documents = [dict(zip(columns, values)) for values in zip(*columns.values())]
            return list(zip(rows, msgspec.convert(documents, list[Decision], str_keys=True)))

    def num_rows_from(self, first_row: int) -> int:
        """Return how many decisions have a `row` of at least this."""
        if first_row == 0:
            return self.info.num_rows
        return sum(row >= first_row for rows in self._read_column(ROW) for row in rows)

    def find(self, decision_id: str) -> Decision | None:
        """Return the decision with this id, or None. Reads the ids, and one row group."""
        for index, ids in enumerate(self._read_column("decision_id")):
            if decision_id in ids:
                return next(decision for decision in self.read_group(index) if decision.decision_id == decision_id)
        return None

    def _read_column(self, name: str) -> Iterator[list]:
        with _reading(self.path) as file:
            for index in range(file.num_row_groups):
                yield file.read_row_group(index, columns=[name]).column(0).to_pylist()


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[Any]:
    """Open a Parquet file for a block of reading; what is wrong in it leaves the block as `IntegrityError`."""
    import pyarrow
    import pyarrow.parquet

    try:
        with open(path, "rb") as file:
            yield pyarrow.parquet.ParquetFile(file, page_checksum_verification=True)
    except FileNotFoundError:  # not damaged: gone
        raise
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, OverflowError, msgspec.MsgspecError) as error:
        raise IntegrityError(f"{path} is damaged, or no sealed segment: {type(error).__name__} {error}") from error


def _info(path: Path, file: Any) -> SealedInfo:
    metadata = {name.decode(): value.decode() for name, value in (file.schema_arrow.metadata or {}).items()}
    try:
        info = msgspec.convert(metadata, SealedInfo, strict=False)
    except msgspec.ValidationError as error:
        raise IntegrityError(f"{path} is not a sealed segment: {error}") from error
    if info.kind != "decisions" or not 1 <= info.schema_version <= SCHEMA_VERSION:
        raise IntegrityError(
            f"{path}: {info.kind} of schema version {info.schema_version}, expected decisions of version 1 to {SCHEMA_VERSION}"
        )
    if file.metadata.num_rows != info.num_rows:
        raise IntegrityError(f"{path} has {file.metadata.num_rows} rows and says it has {info.num_rows}")
    return info


def _decode_texts(texts: list[str | None]) -> list[Any]:
    """Decode JSON texts all at once: a call for each takes several times as long."""
    values = msgspec.json.decode(f"[{','.join('null' if text is None else text for text in texts)}]")
    if len(values) != len(texts):
        raise ValueError("a JSON text holds more than one value")
    return values
