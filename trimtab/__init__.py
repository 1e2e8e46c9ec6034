"""The face: the `trimtab` command line, `trimtab.Client`, `trimtab.load` and `up`."""

from typing import TYPE_CHECKING, Any

from policies.distributions import seed_of
from trimtab.local_policy import Action, LocalPolicy, load

if TYPE_CHECKING:
    from trimtab.client import Client

__all__ = ["Action", "Client", "LocalPolicy", "load", "seed_of"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import the client when it is asked for: it needs `requests`, while a policy is loaded with numpy alone."""
    if name != "Client":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from trimtab.client import Client

    return Client
