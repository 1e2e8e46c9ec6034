"""How a decision gets a name that every replica recognises as ours without looking it up."""

import hmac

from policies.storage import Storage

_TAG_HEX_DIGITS = 12  # 48 bits: guessing one takes 10^14 requests


class DecisionIds:
    """Names decisions `<request_id>.<tag>`; the tag is a keyed hash, so only a holder of the storage's secret can make one.

    The name depends on the request id alone: a repeated request gets the same name, and with it the same sampling seed.
    """

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    @classmethod
    def of(cls, storage: Storage) -> "DecisionIds":
        return cls(storage.decision_secret_file.read_bytes().strip())

    def name(self, request_id: str) -> str:
        """Return the decision id of a request id."""
        return f"{request_id}.{self._tag(request_id)}"

    def is_ours(self, decision_id: str) -> bool:
        """Return whether a holder of our secret made this id."""
        request_id, _, tag = decision_id.rpartition(".")
        return hmac.compare_digest(tag.encode(), self._tag(request_id).encode())

    def _tag(self, request_id: str) -> str:
        return hmac.digest(self._secret, request_id.encode(), "sha256").hex()[:_TAG_HEX_DIGITS]
