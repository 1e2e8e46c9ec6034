"""How a function that a loop file names, `module:function`, is found."""

import importlib
from collections.abc import Callable
from typing import Any

from policies.errors import ConfigError


def load_function(reference: str, key: str) -> Callable[..., Any]:
    """Import `module:function`; raises `ConfigError` that names the setting and says which half is wrong."""
    module_name, separator, name = reference.partition(":")
    if not separator or not module_name or not name:
        raise ConfigError(f"{key} is {reference!r}, expected `module:function`")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the user's code runs here, and may raise anything
        raise ConfigError(f"{key} {reference!r}: cannot import {module_name!r}: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"{key} {reference!r}: {module_name} has no function {name!r}")
    return function
