"""Reads an HTTP body as the protocol says, so that `oracle` can say which responses to it are right."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np

from serving.protocol.tensors import DATATYPES, Array
from tests.serving.fuzzing.oracle import INVALID, MAX_RANK, UNIMPLEMENTED, Asked, Expected, Given, judge, read
from tests.serving.fuzzing.requests import MODELS

MAX_INT64 = 2**63 - 1
MAX_DEPTH = 400
MAX_LISTS = 100_000


@dataclass(slots=True)
class HttpExpected:
    """The responses that are right.

    Args:
        expected: as over gRPC; None if only INVALID and OK are known to be right.
        binary: names of the outputs that the client asked for as bytes.
    """

    expected: Expected | None
    binary: set[str] = field(default_factory=set)


class _Wrong(Exception):
    """The body does not follow the protocol."""


class _Doubtful(Exception):
    """Parsers differ about such a body."""


def expect_http(model: str, version: str, body: bytes, header_length: bytes | None) -> HttpExpected:
    """Returns the right responses to a body, given the model and version in the path."""
    invalid = Expected(frozenset({INVALID}))
    try:
        text, tail = _split(body, header_length)
        value, has_duplicates = _load(text)
        reader = _Reader(model, version, value, tail)
        asked = reader.asked()
    except _Wrong:
        judged = judge(Asked(model, version, "", [], [], {}, {INVALID}))
        shared = {UNIMPLEMENTED} if b"shared_memory_region" in body else set()
        return HttpExpected(Expected(judged.codes | shared))
    except _Doubtful:
        return HttpExpected(None)
    if has_duplicates or text.count(b"[") + text.count(b"{") > MAX_LISTS:
        asked.doubtful.add(INVALID)
    expected = judge(asked)
    for output in expected.outputs:
        if output.name in reader.binary:
            continue
        if output.datatype == "FP16" or not _is_text(output.array, output.classes):
            return HttpExpected(invalid)
    return HttpExpected(expected, reader.binary)


def _split(body: bytes, header_length: bytes | None) -> tuple[bytes, bytes | None]:
    if header_length is None:
        return body, None
    if not header_length.isdigit() or len(header_length) > 18 or int(header_length) > len(body):
        raise _Wrong
    return body[: int(header_length)], body[int(header_length) :]


def _load(text: bytes) -> tuple[Any, bool]:
    """Returns the value in the JSON, and whether a key repeats."""
    repeated = False

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal repeated
        value = dict(items)
        repeated = repeated or len(value) < len(items)
        return value

    def number(digits: str) -> float:
        if math.isinf(value := float(digits)):
            raise _Doubtful
        return value

    try:
        value = json.loads(text.decode("utf-8-sig"), object_pairs_hook=pairs, parse_float=number)
    except RecursionError:
        raise _Doubtful from None
    except ValueError:
        raise _Wrong from None
    if _depth(value) > MAX_DEPTH or b"\\ud8" in text or b"000000000000000000000000" in text:
        raise _Doubtful
    return value, repeated


def _depth(value: Any) -> int:
    depth = 0
    level = [value]
    while level and depth <= MAX_DEPTH:
        level = list(
            chain.from_iterable(v.values() if isinstance(v, dict) else v for v in level if isinstance(v, (dict, list)))
        )
        depth += 1
    return depth


class _Reader:
    """Reads one request.

    Attributes:
        binary: names of the outputs that the client asked for as bytes.
    """

    def __init__(self, model: str, version: str, value: Any, tail: bytes | None) -> None:
        self._model, self._version = model, version
        self._value = value
        self._tail = tail
        self._at = 0
        self._wrong: set[int] = set()
        self._doubtful: set[int] = set()
        self.binary: set[str] = set()

    def asked(self) -> Asked:
        value = _typed(self._value, dict)
        parameters = self._parameters(value)
        binary = _typed(parameters.pop("binary_data_output", False), bool)
        inputs = [self._input(given) for given in _typed(value.get("inputs"), list)]
        outputs = [self._output(output, binary) for output in self._list(value, "outputs")]
        if not outputs and binary:
            self.binary = {tensor.name for model in MODELS.values() for tensor in model.outputs}
        if self._tail is not None and self._at != len(self._tail):
            self._wrong.add(INVALID)
        name = "" if value.get("id") is None else _typed(value["id"], str)
        return Asked(self._model, self._version, name, inputs, outputs, parameters, self._wrong, self._doubtful)

    def _list(self, value: dict[str, Any], key: str) -> list[Any]:
        return [] if value.get(key) is None else _typed(value[key], list)

    def _parameters(self, value: dict[str, Any]) -> dict[str, Any]:
        if value.get("parameters") is None:
            return {}
        parameters = dict(_typed(value["parameters"], dict))
        for parameter in parameters.values():
            if not isinstance(parameter, str | int | float):
                raise _Wrong
            if isinstance(parameter, int) and not -MAX_INT64 - 1 <= parameter <= MAX_INT64:
                raise _Wrong
        return parameters

    def _output(self, value: Any, binary: bool) -> tuple[str, Any]:
        name = _typed(_typed(value, dict).get("name"), str)
        parameters = self._parameters(value)
        if "shared_memory_region" in parameters:
            self._wrong.add(UNIMPLEMENTED)
        is_binary = _typed(parameters.get("binary_data", binary), bool)
        self.binary = (self.binary | {name}) if is_binary else (self.binary - {name})
        return name, parameters.get("classification", 0)

    def _input(self, value: Any) -> Given:
        value = _typed(value, dict)
        shape = tuple(_typed(value.get("shape"), list))
        if len(shape) > MAX_RANK or not all(type(size) is int and 0 <= size <= MAX_INT64 for size in shape):
            raise _Wrong
        given = Given(_typed(value.get("name"), str), _typed(value.get("datatype"), str), shape, b"")
        parameters = self._parameters(value)
        if "shared_memory_region" in parameters:
            self._wrong.add(UNIMPLEMENTED)
        size = parameters.get("binary_data_size")
        if size is not None:
            if type(size) is not int or size < 0 or value.get("data") is not None or self._tail is None:
                raise _Wrong
            given.data = self._tail[self._at : self._at + size]
            self._at += size
            return given
        data = _flat(_typed(value.get("data"), list))
        contents = self._elements(given.datatype, data)
        given.data, given.elements = None, {contents: data}
        if read(given) is None:
            self._wrong.add(INVALID)
        return given

    def _elements(self, datatype: str, data: list[Any]) -> str:
        """Checks the types of a tensor's elements. Returns the name of the field that holds them over gRPC."""
        kind = DATATYPES.get(datatype)
        if kind is None or kind.contents is None:
            raise _Wrong
        for place, element in enumerate(data):
            if kind.dtype.kind == "f" and type(element) in (int, float):
                data[place] = float(element)
                if abs(data[place]) > np.finfo(kind.dtype).max and np.isfinite(data[place]):
                    raise _Wrong
            elif kind.dtype.kind in "iu" and type(element) is float and element.is_integer():
                self._doubtful.add(INVALID)
                data[place] = int(element)
            elif kind.dtype == object and type(element) is str:
                data[place] = element.encode()
            elif type(element) is not {"b": bool, "i": int, "u": int}.get(kind.dtype.kind):
                raise _Wrong
        return kind.contents


def _typed(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise _Wrong
    return value


def _flat(data: list[Any]) -> list[Any]:
    """Returns the elements of nested lists."""
    while data and isinstance(data[0], list):
        if not all(isinstance(item, list) for item in data) or len({len(item) for item in data}) > 1:
            raise _Wrong
        data = list(chain.from_iterable(data))
    return list(data)


def _is_text(array: Array, classes: int) -> bool:
    if classes or array.dtype != object:
        return True
    elements: Sequence[bytes] = array.ravel().tolist()
    try:
        for element in elements:
            element.decode()
    except UnicodeDecodeError:
        return False
    return True
