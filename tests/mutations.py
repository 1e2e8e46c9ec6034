"""Damaged and forged bundles: one change each, of which every one has to be refused.

In the first families a file is no more what the manifest says. In the others whoever made the change has put every hash and the
digest right, so that only what the files say gives it away. A change that would make another valid bundle (another time of
creation, another observation among the golden ones) is not made here: nothing but a signature can tell it from the original.
"""

import io
import re
import struct
import zipfile
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from policies.bundle_reader import DOCUMENTS, GATES, GOLDEN, MANIFEST, TENSORS
from policies.integrity import canonical_json, parse_json, sha256_hex

Contents = dict[str, bytes]
JUNK = (None, True, -1, 0.5, 10**30, "", "x", "../../etc/passwd", [], {}, [[]], {"kind": "box"}, "\ud7ff" * 50)
# What the policy or the reader stands for; times, origin and names are anybody's word.
BOUND_KEYS = (
    "schema_version",
    "policy_sha256",
    "spaces",
    "network",
    "normaliser",
    "action_distribution",
    "serving_mode",
    "files",
    "override_gates",
)


@dataclass(frozen=True)
class Mutation:
    """The changed files (None: removed) of a bundle, and the digest under which it is asked for."""

    family: str
    changes: dict[str, bytes | None]
    digest: str


def read_contents(path: Path) -> Contents:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def mutate(family: str, contents: Contents, rng: np.random.Generator) -> Mutation:
    """Return a change of this family."""
    changes = FAMILIES[family](contents, rng)
    if family in HASHED:
        return Mutation(family, changes, sha256_hex(contents[MANIFEST]))
    changed = {name: data for name, data in {**contents, **changes}.items() if data is not None}
    if MANIFEST not in changes:
        manifest = parse_json(contents[MANIFEST], MANIFEST)
        manifest["files"] = {
            name: {"sha256": sha256_hex(data), "size_bytes": len(data)} for name, data in changed.items() if name != MANIFEST
        }
        changed[MANIFEST] = changes[MANIFEST] = canonical_json(manifest)
    return Mutation(family, changes, sha256_hex(changed[MANIFEST]))


def flip(contents: Contents, rng: np.random.Generator) -> dict[str, bytes | None]:
    name = _one(sorted(contents), rng)
    data = bytearray(contents[name])
    data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    return {name: bytes(data)}


def cut(contents: Contents, rng: np.random.Generator) -> dict[str, bytes | None]:
    name = _one(sorted(contents), rng)
    return {name: contents[name][: rng.integers(len(contents[name]))]}


def add(contents: Contents, rng: np.random.Generator) -> dict[str, bytes | None]:
    name = _one([*DOCUMENTS, "policy.pkl", ".hidden", "gates.json ", "golden.npy", "Manifest.json", "%2e%2e", "x" * 200], rng)
    return {name: rng.bytes(rng.integers(50))}


def rename(contents: Contents, rng: np.random.Generator) -> dict[str, bytes | None]:
    """Rename one file, or give two of them each other's names."""
    name, other = rng.choice(sorted(contents), 2, replace=False).tolist()
    if rng.random() < 0.5:
        return {name: contents[other], other: contents[name]}
    return {name: None, _one([name.upper(), f"{name}.bak", name[:-1], "x"], rng): contents[name]}


def swap_gate_record(contents: Contents, rng: np.random.Generator) -> dict[str, bytes | None]:
    """Put another report in: of another policy, of other verdicts, with a gate missing, or no report at all."""
    report = parse_json(contents[GATES], GATES)
    result = report["results"][rng.integers(len(report["results"]))]
    how = rng.integers(6)
    if how == 0:
        report["policy_sha256"] = rng.bytes(32).hex()
    elif how == 1:
        report["results"].remove(result)
        report["verdict"] = _one(["pass", "inconclusive"], rng)
    elif how == 2:
        result["verdict"] = _one(["fail", "inconclusive", "passed", None, 1], rng)
        report["verdict"] = _one(["pass", result["verdict"]], rng)
    elif how == 3:
        del report[_one(sorted(report), rng)]
    elif how == 4:
        key = _one(["results", "schema_version", "policy_sha256", "verdict", "created_at"], rng)
        report[key] = _one([junk for junk in JUNK if not isinstance(junk, float | int)], rng)
    else:
        report = _one(JUNK, rng)
    return {GATES: canonical_json(report)}


def duplicate_key(contents: Contents, rng: np.random.Generator) -> dict[str, bytes | None]:
    """Say a key twice in one object of a JSON text: two readers could each take another one."""
    name = _one([MANIFEST, GATES, TENSORS], rng)
    data = contents[name]
    if name != TENSORS:
        return {name: _with_duplicate(data, rng)}
    (size,) = struct.unpack("<Q", data[:8])
    header = _with_duplicate(data[8 : 8 + size], rng)
    return {name: struct.pack("<Q", len(header)) + header + data[8 + size :]}


def header_bomb(contents: Contents, rng: np.random.Generator) -> dict[str, bytes | None]:
    """Let a header promise more than there is, or other things."""
    size = int(rng.integers(1, 1 << 62))
    if rng.random() < 0.5:
        return {TENSORS: _tensors_bomb(contents[TENSORS], size, rng)}
    members = _members(contents[GOLDEN])
    name, how = _one(sorted(members), rng), rng.integers(5)
    if how == 0:
        members[name] = re.sub(rb"\((\d+),", b"(%d," % size, members[name], count=1)
    elif how == 1:
        members[name] = members[name].replace(b"'shape': (", b"'shape': (%d, " % rng.integers(2, 1000))
    elif how == 2:
        descr = _one(["|O ", "|O8", "<f2", "|S9", ">f8"], rng).encode()
        members[name] = re.sub(rb"'descr': '...'", b"'descr': '%s'" % descr, members[name])
    elif how == 3:
        members[name] = b"\x93NUMPY\x02\x00" + struct.pack("<I", size % (1 << 32)) + members[name][10:]
    return {GOLDEN: packed(members, zipfile.ZIP_DEFLATED if how == 4 else zipfile.ZIP_STORED)}


def numbers(contents: Contents, rng: np.random.Generator) -> dict[str, bytes | None]:
    """Change a weight, something that was drawn, or put NaN or infinity anywhere."""
    if rng.random() < 0.5:
        data = bytearray(contents[TENSORS])
        (size,) = struct.unpack("<Q", data[:8])
        index = 8 + size + 4 * int(rng.integers((len(data) - 8 - size) // 4))
        if rng.random() < 0.5:
            data[index : index + 4] = struct.pack("<f", _one([np.nan, np.inf, -np.inf], rng))
        else:
            data[index + rng.integers(4)] ^= 1 << rng.integers(8)
        return {TENSORS: bytes(data)}
    members = _members(contents[GOLDEN])
    name = _one(["observations", "distributions", "propensities", "sampled", "greedy"], rng)
    array = np.load(io.BytesIO(members[name]))
    index = rng.integers(array.size)
    if name in ("sampled", "greedy"):
        array.flat[index] ^= 1 << rng.integers(62)
    elif name == "propensities":
        array.flat[index] = _one([np.nan, np.inf, 0.0, np.nextafter(array.flat[index], 2)], rng)
    else:
        array.flat[index] = _one([np.nan, np.inf, -np.inf], rng)
    buffer = io.BytesIO()
    np.save(buffer, array)
    return {GOLDEN: packed(members | {name: buffer.getvalue()})}


def manifest_value(contents: Contents, rng: np.random.Generator) -> dict[str, bytes | None]:
    """Take a key of the manifest away, or put something else in its place, at any depth."""
    manifest = parse_json(contents[MANIFEST], MANIFEST)
    parent, key = _one(list(_places({key: manifest[key] for key in BOUND_KEYS})), rng)
    holder: Any = manifest
    for step in parent:
        holder = holder[step]
    if isinstance(holder, dict) and rng.random() < 0.3:
        del holder[key]
        return {MANIFEST: canonical_json(manifest)}
    before = canonical_json(holder[key])
    nested: Any = 0
    for _ in range(rng.integers(1, 400)):
        nested = [nested] if rng.random() < 0.5 else {"parts": nested, "kind": "tuple"}
    # Another reason to overrule gates that need none would be a valid bundle.
    choices = [junk for junk in (*JUNK, nested) if canonical_json(junk) != before]
    if key == "override_gates":
        choices = [junk for junk in choices if not isinstance(junk, str)]
    holder[key] = deepcopy(_one(choices, rng))
    return {MANIFEST: canonical_json(manifest)}


HASHED = ("flip", "cut", "add", "rename")
FAMILIES: dict[str, Callable[[Contents, np.random.Generator], dict[str, bytes | None]]] = {
    "flip": flip,
    "cut": cut,
    "add": add,
    "rename": rename,
    "gate record": swap_gate_record,
    "duplicate key": duplicate_key,
    "header bomb": header_bomb,
    "numbers": numbers,
    "manifest value": manifest_value,
}


def _tensors_bomb(data: bytes, size: int, rng: np.random.Generator) -> bytes:
    (header_size,) = struct.unpack("<Q", data[:8])
    if rng.random() < 0.3:
        return struct.pack("<Q", size) + data[8:]
    header = parse_json(data[8 : 8 + header_size], TENSORS)
    entry, how = header[_one(sorted(header), rng)], rng.integers(5)
    if how == 0:
        entry["data_offsets"] = [entry["data_offsets"][0], size]
    elif how == 1:
        entry["shape"] = [size, *entry["shape"]]
    elif how == 2:
        entry["dtype"] = _one(["F64", "I8", "BOOL", "O", "F3", None], rng)
    elif how == 3:
        entry["data_offsets"] = [offset + 4 for offset in entry["data_offsets"]]  # of the next tensor, or beyond the end
    else:
        header[f"t{size}"] = {"dtype": "F32", "shape": [size], "data_offsets": [0, 4 * size]}
    text = canonical_json(header)
    return struct.pack("<Q", len(text)) + text + data[8 + header_size :]


def _with_duplicate(text: bytes, rng: np.random.Generator) -> bytes:
    match = _one(list(re.finditer(rb'[{,](?="([^"]+)":)', text)), rng)
    return text[: match.end()] + b'"' + match[1] + b'":null,' + text[match.end() :]


def _members(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name.removesuffix(".npy"): archive.read(name) for name in archive.namelist()}


def packed(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return buffer.getvalue()


def _places(value: Any, path: tuple = ()):
    """Yield every place in a JSON value: the path to what holds it, and its key."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield path, key
        yield from _places(part, (*path, key))


def _one(items: Any, rng: np.random.Generator) -> Any:
    return items[rng.integers(len(items))]
