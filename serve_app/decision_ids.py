"""How a decision gets a name that every replica recognises as ours without looking it up."""

import functools
import hashlib
import hmac
import secrets
from dataclasses import dataclass
from functools import cached_property

from policies.distributions import seeds_of_many
from policies.storage import Storage

NAMES_PER_HASH = 64
LEASE_S = 86_400.0  # how long a local client may name decisions, and so how long it may decide without hearing from us
MAX_LEASE_HASHES = 4096  # remembered; each saves a keyed hash per id that is checked
_TAG_HEX_DIGITS = 12  # 48 bits: guessing one takes 10^14 requests


@dataclass(frozen=True)
class Lease:
    """The right to name decisions without us, for a while: `<request_id>.<lease id>.<tag>`, the tag made with the lease's key.

    The id begins with the second it was given in, as 8 hex digits. The key is a keyed hash of the id, so nobody keeps a list of
    leases: whoever knows our secret can check any of them.
    """

    id: str
    key: str
    expires_at: float

    def name(self, request_id: str) -> str:
        """Return the decision id of a request id."""
        return f"{request_id}.{self.tail(request_id)}"

    def tail(self, request_id: str) -> str:
        """Return what follows the request id, or `<request_id>:<index>`: many of one request share the keyed hash."""
        return f"{self.id}.{self._hash.tag(request_id)}"

    @cached_property
    def _hash(self) -> "KeyedHash":
        return KeyedHash(self.key.encode())


class DecisionIds:
    """Names decisions `<request_id>.<tag>`; the tag is a keyed hash, so only a holder of the storage's secret can make one.

    The name depends on the request id alone: a repeated request gets the same name, and with it the same sampling seed.
    """

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._hash = KeyedHash(secret)
        # Of requests that came without an id. A client's own has no `~`, so none can ask for what was named for somebody else.
        self._prefix = f"~{secrets.token_hex(8)}"
        self._num_batches = 0
        self._spare: list[tuple[str, str, int]] = []  # names that were made in advance
        self._lease_hashes: dict[str, KeyedHash] = {}

    @classmethod
    def of(cls, storage: Storage) -> "DecisionIds":
        return cls(storage.decision_secret_file.read_bytes().strip())

    def name(self, request_id: str) -> str:
        """Return the decision id of a request id."""
        return f"{request_id}.{self._tag(request_id)}"

    def next(self) -> tuple[str, str, int]:
        """Return a new request id, its decision id and its seed; the hashes, the dearest part, serve many of them."""
        if not self._spare:
            decision_ids, seeds = self.names_within(self.new_batch(), NAMES_PER_HASH)
            names = [(name.rpartition(".")[0], name, seed) for name, seed in zip(decision_ids, seeds)]
            self._spare = names[::-1]
        return self._spare.pop()

    def new_batch(self) -> str:
        """Return a new id for a request that came without one."""
        self._num_batches += 1
        return f"{self._prefix}{self._num_batches:x}"

    def names_within(self, batch_id: str, num: int) -> tuple[list[str], list[int]]:
        """Return the decision ids `<batch_id>:<index>.<tag>` of a request for many decisions, and their seeds.

        They share the batch's tag.
        """
        tag = self._tag(batch_id)
        # In one text, for the third of the time; no id has a line's end.
        names = f"{batch_id}:" + f".{tag}\n{batch_id}:".join(_indices(num)) + f".{tag}"
        return names.split("\n"), seeds_of_many(f"{batch_id}.{tag}", num)

    def is_ours(self, decision_id: str) -> bool:
        """Return whether a holder of our secret made this id, or one whom we gave a lease."""
        name, _, tag = decision_id.rpartition(".")
        name, dot, lease_id = name.partition(".")
        request_id = name.partition(":")[0]
        keyed = self._lease_hash(lease_id) if dot else self._hash
        return hmac.compare_digest(tag.encode(), keyed.tag(request_id).encode())

    def lease(self, *, now: float) -> Lease:
        """Return a new lease."""
        lease_id = f"{int(now):08x}{secrets.token_hex(4)}"
        return Lease(lease_id, self._lease_key(lease_id), int(now) + LEASE_S)

    def _lease_hash(self, lease_id: str) -> "KeyedHash":
        found = self._lease_hashes.get(lease_id)
        if found is None:
            if len(self._lease_hashes) >= MAX_LEASE_HASHES:  # also of ids that somebody made up
                self._lease_hashes.clear()
            found = self._lease_hashes[lease_id] = KeyedHash(self._lease_key(lease_id).encode())
        return found

    def _lease_key(self, lease_id: str) -> str:
        # No request id has a colon, so no decision's tag says anything of a lease's key.
        return hmac.digest(self._secret, f"lease:{lease_id}".encode(), "sha256").hex()

    def _tag(self, request_id: str) -> str:
        return self._hash.tag(request_id)


class KeyedHash:
    """HMAC-SHA-256 under one key, with the key's two blocks hashed in advance: half of what `hmac.digest` takes, 1 µs for 2."""

    __slots__ = ("_inner", "_outer")

    def __init__(self, key: bytes) -> None:
        block = (key if len(key) <= 64 else hashlib.sha256(key).digest()).ljust(64, b"\0")
        self._inner = hashlib.sha256(bytes(byte ^ 0x36 for byte in block))
        self._outer = hashlib.sha256(bytes(byte ^ 0x5C for byte in block))

    def tag(self, text: str) -> str:
        """Return the first digits of the hash: the tag of a decision's name."""
        inner, outer = self._inner.copy(), self._outer.copy()
        inner.update(text.encode())
        outer.update(inner.digest())
        return outer.hexdigest()[:_TAG_HEX_DIGITS]


@functools.lru_cache(maxsize=8)
def _indices(num: int) -> tuple[str, ...]:
    return tuple(map(str, range(num)))


def lease_began_at(decision_id: str) -> float | None:
    """Return when the lease was given that a decision was named under; None for an id that was not."""
    try:
        return float(int(decision_id.split(".")[-2][:8], 16)) if decision_id.count(".") == 2 else None
    except ValueError:
        return None
