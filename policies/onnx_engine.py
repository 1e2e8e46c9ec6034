"""A perceptron computed by ONNX Runtime in numpy's place: the same function with other last bits, faster for large networks.

The packages are in the extra `trimtab[export]`; nothing here imports them with the module.

B rows, D features, H outputs of a layer, O outputs of the network, P numbers of a distribution.
"""

import importlib.metadata
from typing import Any

import numpy as np

from policies.errors import ConfigError, IntegrityError
from policies.network import layers_of
from policies.policy import Policy

PACKAGE = "onnxruntime"
OPSET, IR_VERSION = 17, 8  # old enough for every ONNX Runtime that the extra allows
OPERATORS = {"tanh": "Tanh", "relu": "Relu"}


class OnnxEngine:
    """Answers as its policy does. That a row's bits do not depend on its batch is not promised: whoever relies on it tries it.

    `name` is the package and its version, as pip writes it: another version may have other last bits.
    """

    def __init__(self, policy: Policy) -> None:
        """Raise `ConfigError` where a package is missing, `IntegrityError` for a policy that cannot be computed like this."""
        if not is_computable(policy):
            raise IntegrityError("ONNX Runtime computes plain perceptrons here, and this policy is none")
        self.name = installed_name()
        self.policy = policy
        self._session = _session_of(_model(policy))

    def outputs(self, obs_BD: np.ndarray) -> np.ndarray:
        """Return the network's float32 outputs [B, O], as `Policy.outputs` does."""
        return self.policy.with_log_std(self._run(np.ascontiguousarray(obs_BD, np.float32)))

    def distributions(self, obs_BD: np.ndarray, mask_BA: np.ndarray | None = None) -> np.ndarray:
        """Return a float64 distribution per row [B, P], as `Policy.distributions` does."""
        return self.policy.distribution.parameters(self.outputs(obs_BD), mask_BA)

    def _run(self, obs_BD: np.ndarray) -> np.ndarray:
        return self._session.run(None, {"x": obs_BD})[0]


def installed_name() -> str:
    """Return the name of the engine as it is installed here; raises `ConfigError` where it is not."""
    try:
        importlib.metadata.version("onnx")
        return f"{PACKAGE}=={importlib.metadata.version(PACKAGE)}"
    except importlib.metadata.PackageNotFoundError as error:
        raise ConfigError(f"ONNX Runtime needs the package {error.name}: pip install 'trimtab[export]'") from error


def engine_named(name: str, policy: Policy) -> OnnxEngine:
    """Return the engine that the log names; raises `ConfigError` unless it is installed here in that version."""
    needed = f"it was computed by {name}, whose last bits no other engine has; pip install '{name}' onnx"
    try:
        here = installed_name()
    except ConfigError as error:
        raise ConfigError(f"{needed} ({error})") from error
    if here != name:
        raise ConfigError(f"{needed} (here is {here})")
    return OnnxEngine(policy)


def is_computable(policy: Policy) -> bool:
    """Say whether a policy is a plain perceptron: neither convolutions nor a network of the user's own."""
    return policy.architecture.module is None and not policy.architecture.convolutions


def _layers(policy: Policy) -> list[tuple[np.ndarray, np.ndarray]]:
    return layers_of(policy.tensors, "policy", len(policy.architecture.hidden) + 1)


def _model(policy: Policy) -> bytes:
    """Return the ONNX graph: normaliser, then the layers."""
    from onnx import TensorProto, helper, numpy_helper

    nodes: list[Any] = []
    constants: list[Any] = []

    def add(operator: str, x: str, **tensors: np.ndarray) -> str:
        constants.extend(numpy_helper.from_array(np.ascontiguousarray(tensor), name) for name, tensor in tensors.items())
        nodes.append(helper.make_node(operator, [x, *tensors], [f"y{len(nodes)}"]))
        return nodes[-1].output[0]

    x = "x"
    if policy.normalises:
        x = add("Sub", x, mean=policy.tensors["normaliser.mean"])
        x = add("Mul", x, scale=policy.tensors["normaliser.scale"])
        if policy.architecture.observation_clip is not None:
            clip = np.array(policy.architecture.observation_clip, np.float32)
            x = add("Clip", x, low=-clip, high=clip)
    layers = _layers(policy)
    for index, (weight, bias) in enumerate(layers):
        x = add("Gemm", x, **{f"weight{index}": weight, f"bias{index}": bias})
        if index < len(layers) - 1:
            x = add(OPERATORS[policy.architecture.activation], x)
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", policy.spaces.num_features])]
    outputs = [helper.make_tensor_value_info(x, TensorProto.FLOAT, ["batch", len(layers[-1][1])])]
    graph = helper.make_graph(nodes, "policy", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    return model.SerializeToString()


def _session_of(model: bytes) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1  # replicas share the cores
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its classes have no common base of their own
        raise IntegrityError(f"ONNX Runtime cannot read its own graph of this policy: {error}") from error
