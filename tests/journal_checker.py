"""What must hold of a journal after many writers: judged from its raw files, without the code that wrote it."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable


def find_faults(files: dict[str, bytes], acknowledged: Iterable[str]) -> list[str]:
    """Return what is wrong with a journal, given its files by name and the `reason` or digest of every acknowledged entry.

    Numbers must be contiguous, each entry must name the digest of the one before, every acknowledged entry must be there exactly
    once, and after the first champion entry each position must have one champion, replaced by promotions and rollbacks only.
    """
    faults: list[str] = []
    entries = [json.loads(files[name]) for name in sorted(files)]
    if sorted(files) != [f"{number:08d}.json" for number in range(1, len(files) + 1)]:
        faults.append(f"files are not 1 to {len(files)}")
    previous = ""
    for name, entry in zip(sorted(files), entries):
        if entry["previous_sha256"] != previous:
            faults.append(f"{name} does not follow the one before")
        previous = hashlib.sha256(files[name]).hexdigest()
    found = Counter(entry.get("digest") or entry["reason"] for entry in entries)
    expected = Counter(acknowledged)
    for token in expected:
        if (found[token], expected[token]) != (1, 1):
            faults.append(f"{token!r} was acknowledged {expected[token]} times and is there {found[token]} times")
    versions = [entry["version"] for entry in entries if entry["kind"] == "register"]
    if versions != list(range(1, len(versions) + 1)):
        faults.append(f"versions are {versions}")
    return faults + _champion_faults(entries)


def _champion_faults(entries: list[dict]) -> list[str]:
    faults, champions, releases = [], [], []  # `releases` holds [candidate, incumbent, is_open]
    for entry in entries:
        kind, number = entry["kind"], entry["number"]
        if kind == "champion":
            if champions:
                faults.append(f"entry {number} makes a second champion beside {champions[-1]}")
            champions.append(entry["version"])
        elif kind == "release_start":
            if not champions or (releases and releases[-1][2]):
                faults.append(f"entry {number} starts a release without a champion or beside another release")
            releases.append([entry["candidate"], champions[-1] if champions else None, True])
            if entry["release"] != len(releases):
                faults.append(f"entry {number} starts release {entry['release']}, expected {len(releases)}")
        elif kind == "release_change":
            if entry["release"] > len(releases):
                faults.append(f"entry {number} changes release {entry['release']}, which had not started")
                continue
            release = releases[entry["release"] - 1]
            if not release[2]:
                faults.append(f"entry {number} changes release {entry['release']}, which had ended")
            release[2] = entry["action"] not in ("promote", "abort", "rollback")
            if entry["action"] == "promote":
                champions.append(release[0])
    return faults
