"""The user's own torch network where the learner and the rollout workers expect ours: the same methods, the same flat vector."""

import sys

import numpy as np

from policies.network import MODULE_PREFIX, num_outputs
from policies.torch_network import ModuleNetwork
from training.network import LOG_STD, Layout, with_log_std


class TorchNetwork:
    """`training.network.DifferentiableNetwork`, computed by torch. Importing torch takes 2 s, in each process that makes one."""

    rows_at_once = sys.maxsize  # a network of the user's own may look at a minibatch as a whole

    def __init__(self, layout: Layout, parameters_P: np.ndarray) -> None:
        tensors = layout.split(parameters_P)
        self._log_std_K = tensors.get(LOG_STD)
        self._module = ModuleNetwork(
            layout.architecture.module,
            {name.removeprefix(MODULE_PREFIX): tensor for name, tensor in tensors.items()},
            layout.spaces.num_features,
            num_outputs(layout.architecture, layout.spaces),
        )
        self.gradient_P = np.zeros_like(parameters_P)
        self._gradients = layout.split(self.gradient_P)

    def outputs(self, x_ND: np.ndarray) -> np.ndarray:
        """Return the policy's outputs [N, O] for normalised observations, log-deviations of real-valued actions among them."""
        return with_log_std(self._module.outputs_and_values(x_ND)[0], self._log_std_K)

    def values(self, x_ND: np.ndarray) -> np.ndarray:
        """Return the value [N] of each normalised observation."""
        return self._module.outputs_and_values(x_ND)[1]

    def forward(self, x_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return outputs [N, O] and values [N]."""
        self._tensors = self._module.forward(x_ND)
        outputs_NO, values_N = (tensor.detach().numpy() for tensor in self._tensors)
        return with_log_std(outputs_NO, self._log_std_K), values_N

    def backward(self, d_outputs_NO: np.ndarray, d_values_N: np.ndarray) -> np.ndarray:
        """Return the loss's gradient by the parameters, given those by outputs and values. The next call overwrites it."""
        if self._log_std_K is not None:
            num_components = len(self._log_std_K)
            np.sum(d_outputs_NO[:, num_components:], axis=0, out=self._gradients[LOG_STD])
            d_outputs_NO = d_outputs_NO[:, :num_components]
        for name, gradient in self._module.backward(self._tensors, (d_outputs_NO, d_values_N)).items():
            self._gradients[MODULE_PREFIX + name][...] = gradient
        return self.gradient_P
