"""Every error Trimtab raises on purpose.

    TrimtabError
    ├── UsageError                 the caller can mend it: exit code 2
    │   ├── ConfigError            loop file, --set, constraint reference
    │   ├── StorageError           the storage root cannot be used
    │   ├── ClusterError           Ray does not answer, a port is taken
    │   ├── SpaceUnsupported       an observation or action space we cannot encode
    │   └── NotFound               run, version, checkpoint or decision that does not exist
    ├── IntegrityError             bytes are not what their hash, schema or golden vectors say
    ├── RegistryConflict           another writer was faster, or the order of entries is impossible
    ├── SignatureRefused           no valid signature by a key that is trusted now: exit code 1
    ├── GateRefused                a version without a passing gate report was asked for: exit code 1
    ├── ReleaseRefused             a release operation that the current state does not allow: exit code 1
    ├── TrainingFailed             the run ended without reaching what it was asked for
    │   └── EnvironmentFailed      the environment's own code raised, or returned something unusable
    └── RequestRefused             an HTTP request we answer with its `status`
        ├── RequestInvalid         400, 404, 408, 413, 415, 422, 431: what was expected is in the message
        ├── Unauthorized           401
        ├── Forbidden              403
        ├── DecisionUnknown        404
        ├── RequestConflict        409
        ├── Overloaded             429
        ├── ServiceUnavailable     503
        └── DeadlineExceeded       504

All constructor arguments go to `super().__init__`: Ray re-creates an exception from `args`, and a class that keeps some for
itself arrives as `UnserializableException`, which no `except` here would match.
"""


class TrimtabError(Exception):
    """Base of all errors raised on purpose; the message says what happened and what to do."""


class UsageError(TrimtabError):
    """The caller can mend it: the command line ends with exit code 2."""


class ConfigError(UsageError):
    """A setting is unknown, has the wrong type or contradicts another one."""


class StorageError(UsageError):
    """The storage root is read-only, holds something else, or is not a place we can write to."""


class ClusterError(UsageError):
    """Ray does not answer, or a port that Serve needs is taken."""


class SpaceUnsupported(UsageError):
    """An observation or action space that this version cannot encode."""


class NotFound(UsageError):
    """A run, version, checkpoint or decision that does not exist in this storage root."""


class IntegrityError(TrimtabError):
    """Bytes are not what their hash, schema or golden vectors say; nothing of them is used."""


class RegistryConflict(TrimtabError):
    """A journal entry cannot follow the ones before it, or another writer was faster too often."""


class SignatureRefused(TrimtabError):
    """Something is not signed, wrongly signed, or signed with a key that is unknown, expired or revoked; it is not used."""


class GateRefused(TrimtabError):
    """A version without a passing gate report was asked into a place where only gated versions go."""


class ReleaseRefused(TrimtabError):
    """A release operation that the current state of the registry does not allow."""


class TrainingFailed(TrimtabError):
    """A run ended without reaching what it was asked for; its last checkpoint stays resumable."""


class EnvironmentFailed(TrainingFailed):
    """The environment's own code raised, or returned something that is not an observation or a reward."""


class RequestRefused(TrimtabError):
    """An HTTP request that is answered with `status` and the message."""

    status = 400


class RequestInvalid(RequestRefused):
    """The body is not what the policy expects; `status` is 400 (not JSON), 413 (too large), 422 (wrong content) …"""

    def __init__(self, message: str, status: int = 422):
        super().__init__(message, status)
        self.status = status

    def __str__(self) -> str:
        return self.args[0]


class Unauthorized(RequestRefused):
    """The API key is missing, or is none that is valid now."""

    status = 401


class Forbidden(RequestRefused):
    """The API key is valid, but was not made for this."""

    status = 403


class DecisionUnknown(RequestRefused):
    """Feedback names a decision that this deployment never made."""

    status = 404


class RequestConflict(RequestRefused):
    """The request's id was used before, for another request."""

    status = 409


class Overloaded(RequestRefused):
    """The replica's bounded queue is full, or the key's own limit is reached; the client should come back in `retry_after_s`."""

    status = 429

    def __init__(self, message: str, retry_after_s: int = 1):
        super().__init__(message, retry_after_s)
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return self.args[0]


class ServiceUnavailable(RequestRefused):
    """This replica cannot answer now: no champion is loaded, the log cannot be written, or no version gave an answer."""

    status = 503


class DeadlineExceeded(RequestRefused):
    """The request's own deadline was over before its turn came; nothing was decided."""

    status = 504
