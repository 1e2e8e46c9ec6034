"""How a decision gets a name that every replica recognises as ours without looking it up."""

import hmac
import secrets

from policies.distributions import seeds_of_many
from policies.storage import Storage

NAMES_PER_HASH = 64
_TAG_HEX_DIGITS = 12  # 48 bits: guessing one takes 10^14 requests


class DecisionIds:
    """Names decisions `<request_id>.<tag>`; the tag is a keyed hash, so only a holder of the storage's secret can make one.

    The name depends on the request id alone: a repeated request gets the same name, and with it the same sampling seed.
    """

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._prefix = secrets.token_hex(8)  # of requests that came without an id
        self._num_batches = 0
        self._spare: list[tuple[str, str, int]] = []  # names that were made in advance

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
        return [f"{batch_id}:{index}.{tag}" for index in range(num)], seeds_of_many(f"{batch_id}.{tag}", num)

    def is_ours(self, decision_id: str) -> bool:
        """Return whether a holder of our secret made this id."""
        name, _, tag = decision_id.rpartition(".")
        request_id = name.partition(":")[0]
        return hmac.compare_digest(tag.encode(), self._tag(request_id).encode())

    def _tag(self, request_id: str) -> str:
        return hmac.digest(self._secret, request_id.encode(), "sha256").hex()[:_TAG_HEX_DIGITS]
