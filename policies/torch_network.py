"""A network of the user's own, a `torch.nn.Module` that a function makes: how it is found, built and asked.

    def my_network(num_features: int, num_outputs: int, **kwargs) -> torch.nn.Module:
        ...   # forward(x: [N, num_features]) -> (outputs [N, num_outputs], values [N])

A bundle only names the function. To build the network its module has to be imported, which runs code: so that is done for names
that this process was told to trust, in the environment variable `TRIMTAB_MODULES`, and for no others, whatever a bundle says.
The loop file's `training.module` is put there by whoever reads the loop file.

torch is imported when a network is built, not with this module.
"""

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from policies.errors import ConfigError, IntegrityError

TRUSTED_VARIABLE = "TRIMTAB_MODULES"


@dataclass(frozen=True, eq=False)
class Module:
    """Which function makes the network, with which keyword arguments, and which tensors it then has."""

    factory: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        tensors = {name: list(shape) for name, shape in self.tensors.items()}
        return {"factory": self.factory, "kwargs": self.kwargs, "tensors": tensors}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Module":
        tensors = {str(name): tuple(int(size) for size in shape) for name, shape in value["tensors"].items()}
        if any(size < 0 for shape in tensors.values() for size in shape):
            raise ValueError("a tensor has a negative size")
        return cls(str(value["factory"]), dict(value["kwargs"]), tensors)


def trust(factory: str) -> None:
    """Let this process, and those it starts from now on, build networks with a function."""
    names = trusted_modules() | {factory}
    os.environ[TRUSTED_VARIABLE] = ",".join(sorted(names))


def trusted_modules() -> set[str]:
    """Return the functions that may be called to build a network."""
    return set(filter(None, os.environ.get(TRUSTED_VARIABLE, "").split(",")))


def build(module: Module, num_features: int, num_outputs: int, *, seed: int | None = None) -> Any:
    """Return a new network, its parameters drawn from `seed` if one is given.

    Raises `IntegrityError` for a function that is not trusted, `ConfigError` when it cannot be found, fails, or makes no module.
    """
    if module.factory not in trusted_modules():
        raise IntegrityError(
            f"network function {module.factory!r} is not trusted here: name it in training.module of the loop file or in the "
            f"environment variable {TRUSTED_VARIABLE} (now {sorted(trusted_modules()) or 'empty'})"
        )
    import torch

    factory = _find(module.factory)
    try:
        if seed is not None:
            torch.manual_seed(seed)
        network = factory(num_features=num_features, num_outputs=num_outputs, **module.kwargs)
    except Exception as error:
        raise ConfigError(
            f"network function {module.factory!r} with {module.kwargs} raised {type(error).__name__}: {error}"
        ) from error
    if not isinstance(network, torch.nn.Module):
        raise ConfigError(f"network function {module.factory!r} returned {type(network).__name__}, not a torch.nn.Module")
    if list(network.buffers()):
        raise ConfigError(
            f"network {module.factory!r} has buffers (batch normalisation?); only parameters are learned and packed"
        )
    return network.float().eval()


def describe(factory: str, kwargs: dict[str, Any], num_features: int, num_outputs: int) -> Module:
    """Return the description of a network, after building it once and looking at what it computes; raises `ConfigError`."""
    network = build(Module(factory, kwargs), num_features, num_outputs)
    tensors = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    module = Module(factory, kwargs, tensors)
    zeros = {name: np.zeros(shape, np.float32) for name, shape in tensors.items()}
    outputs_NO, values_N = ModuleNetwork(module, zeros, num_features, num_outputs).outputs_and_values(
        np.zeros((3, num_features), np.float32)
    )
    if outputs_NO.shape != (3, num_outputs) or values_N.shape != (3,):
        raise ConfigError(
            f"network {factory!r} returned shapes {outputs_NO.shape} and {values_N.shape} for 3 observations; expected outputs "
            f"(3, {num_outputs}) and values (3,)"
        )
    return module


class ModuleNetwork:
    """A built network whose parameters are the given arrays themselves: a change of an array in place is a change of it."""

    def __init__(self, module: Module, tensors: dict[str, np.ndarray], num_features: int, num_outputs: int) -> None:
        import torch

        self._torch = torch
        torch.set_num_threads(1)  # the order of additions must not depend on the number of cores
        self.network = build(module, num_features, num_outputs)
        found = {name: tuple(parameter.shape) for name, parameter in self.network.named_parameters()}
        if found != module.tensors:
            raise IntegrityError(f"network {module.factory!r} now has tensors {found}, its description says {module.tensors}")
        for name, parameter in self.network.named_parameters():
            array = tensors[name]
            parameter.data = torch.from_numpy(array if array.flags.writeable else array.copy())

    def outputs_and_values(self, x_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return outputs [N, O] and values [N] for normalised observations."""
        with self._torch.no_grad():
            outputs_NO, values_N = self.forward(x_ND)
        return outputs_NO.numpy(), values_N.numpy()

    def outputs_gradient(self, x_ND: np.ndarray) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
        """Return outputs [N, O], and what turns a gradient by them into the one by the normalised observations [N, D]."""
        inputs_ND = self._torch.from_numpy(np.array(x_ND)).requires_grad_()
        outputs_NO, _ = self._answer(inputs_ND)

        def gradient_of(d_outputs_NO: np.ndarray) -> np.ndarray:
            return self._torch.autograd.grad(outputs_NO, inputs_ND, self._torch.from_numpy(d_outputs_NO))[0].numpy()

        return outputs_NO.detach().numpy(), gradient_of

    def forward(self, x_ND: np.ndarray) -> Any:
        """Return outputs and values as tensors that know where they came from."""
        return self._answer(self._torch.from_numpy(np.ascontiguousarray(x_ND)))

    def _answer(self, inputs_ND: Any) -> Any:
        answer = self.network(inputs_ND)
        if not isinstance(answer, tuple) or len(answer) != 2:
            raise ConfigError(f"network {type(self.network).__name__} must return (outputs, values), not {type(answer).__name__}")
        return answer

    def backward(self, tensors: Any, gradients: tuple[np.ndarray, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the gradient by each parameter, given those by outputs and values."""
        gradients_ = [self._torch.from_numpy(np.ascontiguousarray(gradient, np.float32)) for gradient in gradients]
        names, parameters = zip(*self.network.named_parameters())
        flows = self._torch.autograd.grad(tensors, parameters, gradients_, allow_unused=True)
        return {
            name: np.zeros(parameter.shape, np.float32) if flow is None else flow.numpy()
            for name, parameter, flow in zip(names, parameters, flows)
        }


def initial_tensors(module: Module, num_features: int, num_outputs: int, *, seed: int) -> dict[str, np.ndarray]:
    """Return the network's own initial parameters, drawn from a seed."""
    network = build(module, num_features, num_outputs, seed=seed)
    return {name: parameter.detach().numpy() for name, parameter in network.named_parameters()}


def _find(reference: str) -> Any:
    module_name, separator, name = reference.partition(":")
    if not separator or not module_name or not name:
        raise ConfigError(f"training.module is {reference!r}, expected `package.module:function`")
    try:
        found = getattr(importlib.import_module(module_name), name, None)
    except Exception as error:  # the user's code runs here, and may raise anything
        raise ConfigError(
            f"training.module {reference!r}: cannot import {module_name!r}: {type(error).__name__}: {error}"
        ) from error
    if not callable(found):
        raise ConfigError(f"training.module {reference!r}: {module_name} has no function {name!r}")
    return found
