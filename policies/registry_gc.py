"""Which bundles may go: those that were never registered, and those of versions that nothing has asked for in a long time."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from policies.errors import ReleaseRefused
from policies.registry import Registry
from policies.registry_entries import collect_version
from policies.registry_state import RegistryState
from policies.registry_store import BUNDLES
from policies.trust import signature_path

DAY_S = 86_400.0


@dataclass(frozen=True)
class Garbage:
    """A bundle, or what a killed writer left of one, that may go, and why; `versions` are to be given up with it."""

    name: str
    versions: tuple[int, ...]
    reason: str


def find_garbage(state: RegistryState, ages_s: dict[str, float], *, keep_s: float, now: float) -> list[Garbage]:
    """Return the bundles that may go, of those there are with the seconds since they were put there.

    What is used is never among them: champion, previous champion, what a rollback brings back, both sides of an open release,
    holdout, shadows, and versions with an alias. A bundle without an entry may be one that is just being published, so it is
    given time as well.
    """
    found = []
    for name, age_s in sorted(ages_s.items()):
        versions = [version for version in state.versions.values() if version.digest == name]
        live = tuple(version.number for version in versions if version.collected_at is None)
        if versions and not live:
            found.append(Garbage(name, (), "was given up, but a removal was interrupted"))
        elif not versions and age_s > keep_s:
            found.append(Garbage(name, (), f"was never registered, {age_s / DAY_S:.0f} days old"))
        elif live and not any(state.in_use(number) for number in live):
            idle_s = now - max(state.last_used_at(number) for number in live)
            if idle_s > keep_s:
                found.append(Garbage(name, live, f"was last used {idle_s / DAY_S:.0f} days ago"))
    return found


def bundle_ages_s(registry: Registry) -> dict[str, float]:
    """Return all that is among a registry's bundles but their signatures, with the seconds since it was put there."""
    names = registry.store.names(BUNDLES)
    signatures = {signature_path(Path(name)).name for name in names}
    return {name: registry.store.bundle_age_s(name) for name in names if name not in signatures}


def collect(registry: Registry, garbage: list[Garbage], *, now: float) -> list[Garbage]:
    """Give versions up and remove their bundles; return what went. What came into use meanwhile stays."""
    gone = []
    for item in garbage:
        try:
            for number in item.versions:
                registry.append(partial(collect_version, version=number, reason=item.reason), now=now)
        except ReleaseRefused:
            continue
        registry.remove_bundle(item.name)
        gone.append(item)
    return gone
