"""How tensors travel over HTTP in the Open Inference Protocol: as JSON lists, or as bytes behind the JSON.

Specification: Open Inference Protocol (KServe "V2"), HTTP/REST, with Triton's binary tensor data extension.
"""

import math
import struct
from typing import Any

import msgspec
import numpy as np

from policies.errors import RequestInvalid
from serve_app.wire import BodyDecoder
from serve_app.wire import encode as encode_json

DTYPES = {
    "BOOL": np.dtype("?"),
    "UINT8": np.dtype("u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
BYTES = "BYTES"
_LENGTH = struct.Struct("<I")  # before a text
_SHORT_LENGTHS = [_LENGTH.pack(length).decode() for length in range(128)]
MAX_DIMENSIONS = 32  # of a numpy array that has room for one more


class InputTensor(msgspec.Struct):
    name: str
    shape: list[int]
    datatype: str
    parameters: dict[str, Any] = {}
    data: Any = None


class RequestedOutput(msgspec.Struct):
    name: str
    parameters: dict[str, Any] = {}


class InferRequest(msgspec.Struct):
    inputs: list[InputTensor]
    id: str | None = None
    parameters: dict[str, Any] = {}
    outputs: list[RequestedOutput] = []


_decoder = BodyDecoder(
    InferRequest,
    '{"inputs": [{"name": text, "shape": [integers], "datatype": text, "data": list}], "id"?: text, "parameters"?: object, '
    '"outputs"?: [{"name": text}]}',
)


def read_request(body: bytes, header_length: bytes | None) -> tuple[InferRequest, dict[str, np.ndarray]]:
    """Return a request and its tensors by name; raises `RequestInvalid`. Text tensors are arrays of str."""
    length = len(body) if header_length is None else _header_length(header_length, len(body))
    request: InferRequest = _decoder.decode(body[:length])
    binary, tensors = memoryview(body)[length:], {}
    for tensor in request.inputs:
        size = _num_items(tensor)
        num_bytes = tensor.parameters.get("binary_data_size")
        if num_bytes is None:
            tensors[tensor.name] = _from_json(tensor, size)
            continue
        if type(num_bytes) is not int or not 0 <= num_bytes <= len(binary):
            raise RequestInvalid(
                f"input {tensor.name!r} says binary_data_size {num_bytes!s:.24}; {len(binary)} bytes are left", 400
            )
        tensors[tensor.name] = _from_bytes(tensor, size, binary[:num_bytes])
        binary = binary[num_bytes:]
    if len(binary):
        raise RequestInvalid(f"{len(binary)} bytes behind the last tensor belong to none; set their binary_data_size", 400)
    return request, tensors


def write_response(
    document: dict[str, Any], outputs: dict[str, tuple[str, list[int], Any]], request: InferRequest
) -> tuple[bytes, int | None]:
    """Return the body and, where tensors follow it as bytes, the length of its JSON; raises `RequestInvalid`.

    `outputs` are datatype, shape and values by name. The request says which of them are wanted, and which as bytes.
    """
    all_binary = request.parameters.get("binary_data_output") is True
    wanted = {output.name: output.parameters.get("binary_data", all_binary) for output in request.outputs}
    unknown = sorted(set(wanted) - set(outputs))
    if unknown:
        raise RequestInvalid(f"there is no output {unknown[0]!r}; outputs are {', '.join(outputs)}", 400)
    blobs, described = [], []
    for name, is_binary in (wanted or dict.fromkeys(outputs, all_binary)).items():
        datatype, shape, values = outputs[name]
        tensor: dict[str, Any] = {"name": name, "datatype": datatype, "shape": shape}
        if is_binary:
            blob = _to_bytes(datatype, values)
            blobs.append(blob)
            tensor["parameters"] = {"binary_data_size": len(blob)}
        else:
            tensor["data"] = values if datatype == BYTES else np.asarray(values).reshape(-1).tolist()
        described.append(tensor)
    header = encode_json({**document, "outputs": described})
    return (header + b"".join(blobs), len(header)) if blobs else (header, None)


def _header_length(value: bytes, num_bytes: int) -> int:
    length = int(value) if value.isdigit() and len(value) < 12 else -1
    if not 0 <= length <= num_bytes:
        raise RequestInvalid(f"inference-header-content-length is {value[:24]!r}; the body has {num_bytes} bytes", 400)
    return length


def _num_items(tensor: InputTensor) -> int:
    if len(tensor.shape) > MAX_DIMENSIONS or any(size < 0 for size in tensor.shape):
        raise RequestInvalid(f"input {tensor.name!r} has shape {tensor.shape!s:.100}; sizes are 0 or more", 400)
    return math.prod(tensor.shape)


def _from_json(tensor: InputTensor, size: int) -> np.ndarray:
    kind = str if tensor.datatype == BYTES else _dtype(tensor)
    flat: list[Any] = []
    rest = [tensor.data]
    while rest:  # nested or flat, the protocol allows both; not recursive, for nesting has no limit
        item = rest.pop()
        if isinstance(item, list):
            rest.extend(reversed(item))
        else:
            flat.append(item)
    types = {str: (str,), "b": (bool,), "f": (int, float)}.get(kind if kind is str else kind.kind, (int,))
    wrong = [item for item in flat if type(item) not in types]  # a list: null is wrong, too
    if len(flat) != size or wrong:
        found = f"{len(flat)} items" if len(flat) != size else f"{wrong[0]!r:.24}"
        raise RequestInvalid(f"input {tensor.name!r} holds {found}; expected {size} of {tensor.datatype}", 400)
    try:
        array = np.array(flat, object if kind is str else kind)
    except OverflowError:
        raise RequestInvalid(f"input {tensor.name!r} holds a number that is no {tensor.datatype}", 400) from None
    return _shaped(array, tensor)


def _from_bytes(tensor: InputTensor, size: int, data: memoryview) -> np.ndarray:
    if tensor.datatype == BYTES:
        return _shaped(np.array(_texts(tensor, size, data), object), tensor)
    dtype = _dtype(tensor)
    if len(data) != size * dtype.itemsize:
        expected = f"{size * dtype.itemsize} for {tensor.datatype} of shape {tensor.shape}"
        raise RequestInvalid(f"input {tensor.name!r} has {len(data)} bytes, expected {expected}", 400)
    return _shaped(np.frombuffer(data, dtype), tensor)


def _shaped(array: np.ndarray, tensor: InputTensor) -> np.ndarray:
    """Return an array of the right number of items in a tensor's shape: of no items, its other sizes may be any."""
    try:
        return array.reshape(tensor.shape)
    except (ValueError, OverflowError):
        raise RequestInvalid(f"input {tensor.name!r} has shape {tensor.shape!s:.100}; no array has", 400) from None


def _texts(tensor: InputTensor, size: int, data: memoryview) -> list[str]:
    texts, at = [], 0
    while at + 4 <= len(data) and len(texts) < size:
        [length] = _LENGTH.unpack_from(data, at)
        text = bytes(data[at + 4 : at + 4 + length])
        if len(text) < length:
            break
        try:
            texts.append(text.decode())
        except UnicodeDecodeError:
            raise RequestInvalid(f"input {tensor.name!r}: item {len(texts)} is not UTF-8", 400) from None
        at += 4 + length
    if len(texts) != size or at != len(data):
        raise RequestInvalid(f"input {tensor.name!r} does not hold exactly {size} texts, each behind its length", 400)
    return texts


def _dtype(tensor: InputTensor) -> np.dtype:
    if tensor.datatype not in DTYPES:
        known = ", ".join([*DTYPES, BYTES])
        raise RequestInvalid(f"input {tensor.name!r} has datatype {tensor.datatype!r:.24}; known are {known}", 400)
    return DTYPES[tensor.datatype]


def _to_bytes(datatype: str, values: Any) -> bytes:
    if datatype == BYTES:
        if values[0] == values[-1] and values.count(values[0]) == len(values):  # arms and reasons, nearly always
            return _text_items(values[:1]) * len(values)
        return _text_items(values)
    return np.ascontiguousarray(values, DTYPES[datatype]).tobytes()


def _text_items(texts: list[str]) -> bytes:
    """Return each text behind its length in bytes."""
    if max(map(len, texts)) < 128:  # ids, say: put together as text, ASCII takes the third of the time
        joined = "".join([_SHORT_LENGTHS[len(text)] + text for text in texts])
        if joined.isascii():
            return joined.encode()
    items = [text.encode() for text in texts]
    return b"".join([part for item in items for part in (_LENGTH.pack(len(item)), item)])
