"""The face: the `trimtab` command line, `trimtab.Client` and `up`."""

from trimtab.client import Client

__all__ = ["Client"]
__version__ = "0.1.0"
