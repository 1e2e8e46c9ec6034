"""The face: the `trimtab` command line, `trimtab.Client` and `AsyncClient`, `trimtab.load` and `up`."""

from typing import TYPE_CHECKING, Any

from policies.distributions import seed_of
from trimtab.local_policy import Action, LocalPolicy, load

if TYPE_CHECKING:
    from trimtab.async_client import AsyncClient
    from trimtab.client import Client

__all__ = ["Action", "AsyncClient", "Client", "LocalPolicy", "load", "seed_of"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import a client when it is asked for: they need `requests` or `aiohttp`, while a policy is loaded with numpy alone."""
    if name == "Client":
        from trimtab.client import Client

        return Client
    if name == "AsyncClient":
        from trimtab.async_client import AsyncClient

        return AsyncClient
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
