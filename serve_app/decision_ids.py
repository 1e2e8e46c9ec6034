"""How a decision gets a name that every replica recognises as ours without looking it up."""

import hmac
import secrets

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
        self._spare: list[tuple[str, str]] = []  # names that were made in advance

    @classmethod
    def of(cls, storage: Storage) -> "DecisionIds":
        return cls(storage.decision_secret_file.read_bytes().strip())

    def name(self, request_id: str) -> str:
        """Return the decision id of a request id."""
        return f"{request_id}.{self._tag(request_id)}"

    def next(self) -> tuple[str, str]:
        """Return a new request id and its decision id; one keyed hash, the dearest part, serves many of them."""
        if not self._spare:
            batch_id = self.new_batch()
            decision_ids = self.names_within(batch_id, NAMES_PER_HASH)
            self._spare = [(decision_id.rpartition(".")[0], decision_id) for decision_id in reversed(decision_ids)]
        return self._spare.pop()

    def new_batch(self) -> str:
        """Return a new id for a request that came without one."""
        self._num_batches += 1
        return f"{self._prefix}{self._num_batches:x}"

    def names_within(self, batch_id: str, num: int) -> list[str]:
        """Return the decision ids `<batch_id>:<index>.<tag>` of a request for many decisions; they share the batch's tag."""
        tag = self._tag(batch_id)
        return [f"{batch_id}:{index}.{tag}" for index in range(num)]

    def is_ours(self, decision_id: str) -> bool:
        """Return whether a holder of our secret made this id."""
        name, _, tag = decision_id.rpartition(".")
        request_id = name.partition(":")[0]
        return hmac.compare_digest(tag.encode(), self._tag(request_id).encode())

    def _tag(self, request_id: str) -> str:
        return hmac.digest(self._secret, request_id.encode(), "sha256").hex()[:_TAG_HEX_DIGITS]
