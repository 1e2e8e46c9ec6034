"""Who may use the endpoint: whoever presents the storage root's API key."""

import hmac

from policies.errors import Unauthorized
from policies.storage import Storage

_SCHEME = b"Bearer "


class ApiKey:
    """The endpoint's key; comparing takes the same time however much of a guess is right."""

    def __init__(self, key: bytes) -> None:
        self._expected = _SCHEME + key

    @classmethod
    def of(cls, storage: Storage) -> "ApiKey":
        return cls(storage.api_key_file.read_bytes().strip())

    def check(self, authorization: bytes | None) -> None:
        """Raise `Unauthorized` unless the Authorization header's value is this key."""
        if authorization is None:
            raise Unauthorized(
                "the API key is missing: send `Authorization: Bearer <key>`; the key is in secrets/api_key of the storage root"
            )
        if not hmac.compare_digest(authorization, self._expected):
            raise Unauthorized(
                "the API key is wrong: send `Authorization: Bearer <key>`; the key is in secrets/api_key of the storage root"
            )
