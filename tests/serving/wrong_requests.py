"""Requests for ModelInfer with one error each, and the expected status and details."""

from collections.abc import Callable
from typing import Any

import grpc
import numpy as np

from protos import grpc_service_pb2 as pb

X = np.arange(12, dtype=np.float32).reshape(3, 4)
INVALID = grpc.StatusCode.INVALID_ARGUMENT


def good() -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name="rows")
    request.inputs.add(name="x", datatype="FP32", shape=[3, 4])
    request.raw_input_contents.append(X.tobytes())
    return request


def pair() -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name="pair")
    request.inputs.add(name="a", datatype="FP32", shape=[2, 2])
    request.inputs.add(name="b", datatype="INT64", shape=[2, 1])
    request.raw_input_contents.extend([bytes(16), bytes(16)])
    return request


def strings(raw: bytes) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name="strings")
    request.inputs.add(name="text", datatype="BYTES", shape=[1, 2])
    request.raw_input_contents.append(raw)
    return request


def changed(request: pb.ModelInferRequest, change: Callable[[pb.ModelInferRequest], object]) -> bytes:
    change(request)
    return bytes(request.SerializeToString())


def shaped(*shape: int) -> Callable[[pb.ModelInferRequest], object]:
    def change(request: pb.ModelInferRequest) -> None:
        request.inputs[0].shape[:] = shape

    return change


def with_contents(request: pb.ModelInferRequest) -> None:
    request.inputs[0].contents.fp32_contents.extend([1.0] * 12)


def wrong_field(request: pb.ModelInferRequest) -> None:
    request.ClearField("raw_input_contents")
    request.inputs[0].contents.int_contents.extend([1] * 12)


def too_few_elements(request: pb.ModelInferRequest) -> None:
    request.ClearField("raw_input_contents")
    request.inputs[0].contents.fp32_contents.extend([1.0] * 11)


def out_of_range(request: pb.ModelInferRequest) -> None:
    request.Clear()
    request.model_name = "digits"
    image = request.inputs.add(name="images", datatype="UINT8", shape=[1, 1, 4, 4])
    image.contents.uint_contents.extend([*range(15), 256])


def typed_halves(request: pb.ModelInferRequest) -> None:
    request.Clear()
    request.model_name = "halves"
    request.inputs.add(name="in_FP16", datatype="FP16", shape=[1, 2]).contents.fp32_contents.extend([1, 2])


def batched(rows: int) -> Callable[[pb.ModelInferRequest], object]:
    def change(request: pb.ModelInferRequest) -> None:
        request.inputs[0].shape[0] = rows
        request.raw_input_contents[0] = bytes(16 * rows)

    return change


def one_more_output(name: str, **parameters: Any) -> Callable[[pb.ModelInferRequest], object]:
    def change(request: pb.ModelInferRequest) -> None:
        output = request.outputs.add(name=name)
        for key, value in parameters.items():
            output.parameters[key].MergeFrom(value)

    return change


def set_field(name: str, value: object) -> Callable[[pb.ModelInferRequest], object]:
    return lambda request: setattr(request, name, value)


def set_input(name: str, value: object) -> Callable[[pb.ModelInferRequest], object]:
    return lambda request: setattr(request.inputs[0], name, value)


def number(value: int) -> pb.InferParameter:
    return pb.InferParameter(int64_param=value)


HUGE = 2**62
LONG = "ü" * 20_000
"""Does not fit in a header, where the details of a status travel."""

WRONG: dict[str, tuple[bytes, grpc.StatusCode, str]] = {
    "unknown model": (
        changed(good(), set_field("model_name", "nothing")),
        grpc.StatusCode.NOT_FOUND,
        "unknown model 'nothing': this server has .*",
    ),
    "no model": (b"", grpc.StatusCode.NOT_FOUND, "unknown model '': this server has .*"),
    "a long name": (
        changed(good(), set_field("model_name", "m" * 100_000)),
        grpc.StatusCode.NOT_FOUND,
        "unknown model 'm{64}…': .*",
    ),
    "a path": (
        changed(good(), set_field("model_name", "../../etc/passwd")),
        grpc.StatusCode.NOT_FOUND,
        "unknown model '../../etc/passwd': .*",
    ),
    "unknown version": (
        changed(good(), set_field("model_version", "7")),
        grpc.StatusCode.NOT_FOUND,
        "model 'rows' has no version 7: it has 1",
    ),
    "version that is not a number": (
        changed(good(), set_field("model_version", "new")),
        INVALID,
        "version 'new' of model 'rows' is not a number",
    ),
    "model without a ready version": (
        changed(good(), set_field("model_name", "broken")),
        grpc.StatusCode.NOT_FOUND,
        "model 'broken' has no available versions: .*",
    ),
    "wrong name": (
        changed(good(), set_input("name", "y")),
        INVALID,
        "model 'rows' has no input 'y': it expects 'x'",
    ),
    "a long name of an input": (
        changed(good(), set_input("name", LONG)),
        INVALID,
        "model 'rows' has no input 'ü{64}…': it expects 'x'",
    ),
    "a long name of an input in both forms": (
        changed(good(), lambda request: (with_contents(request), set_input("name", LONG)(request))),
        INVALID,
        "contents of input 'ü{64}…' and raw_input_contents are both given: .*",
    ),
    "a long name of an output": (
        changed(good(), one_more_output(LONG)),
        INVALID,
        "unexpected inference output 'ü{64}…': model 'rows' has 'echo', 'product'",
    ),
    "a long type": (
        changed(good(), set_input("datatype", LONG)),
        INVALID,
        "input 'x' of model 'rows': data-type is 'ü{64}…', but the model expects 'FP32'",
    ),
    "a long type in the typed form": (
        changed(good(), lambda request: (too_few_elements(request), set_input("datatype", LONG)(request))),
        INVALID,
        "input 'x': unknown data-type 'ü{64}…'",
    ),
    "a long shape": (changed(good(), shaped(*[1] * 32)), INVALID, r".*expected \[-1, 4\], got \[1, 1, 1.*…"),
    "a shape of 33 dimensions": (
        changed(good(), shaped(*[1] * 33)),
        INVALID,
        "input 'x' has 33 dimensions: at most 32 are accepted",
    ),
    "a shape of 20,000 dimensions": (
        changed(good(), shaped(*[1] * 20_000)),
        INVALID,
        "a shape has more dimensions than the 32 that are accepted",
    ),
    "a long classification": (
        changed(good(), one_more_output("echo", classification=pb.InferParameter(string_param=LONG))),
        INVALID,
        "classification of output 'echo' must be a positive whole number, got 'ü{64}…'",
    ),
    "a long timeout": (
        changed(good(), lambda request: request.parameters["timeout"].MergeFrom(pb.InferParameter(string_param=LONG))),
        INVALID,
        "parameter 'timeout' must be a whole number of microseconds, got 'ü{64}…'",
    ),
    "missing input": (
        changed(pair(), lambda request: (request.inputs.pop(), request.raw_input_contents.pop())),
        INVALID,
        "model 'pair' expected 2 inputs, got 1: 'b' is missing",
    ),
    "input given twice": (
        changed(pair(), set_input("name", "b")),
        INVALID,
        "an input is given twice: .*",
    ),
    "wrong type": (
        changed(good(), set_input("datatype", "FP64")),
        INVALID,
        "input 'x' of model 'rows': data-type is 'FP64', but the model expects 'FP32'",
    ),
    "unknown type": (
        changed(good(), set_input("datatype", "FP8")),
        INVALID,
        ".*'FP8'.*",
    ),
    "wrong shape": (
        changed(good(), shaped(4, 3)),
        INVALID,
        r"input 'x' of model 'rows': unexpected shape, expected \[-1, 4\], got \[4, 3\]",
    ),
    "wrong rank": (changed(good(), shaped(3, 2, 2)), INVALID, r".*expected \[-1, 4\], got \[3, 2, 2\]"),
    "no shape": (changed(good(), shaped()), INVALID, r".*expected \[-1, 4\], got \[\]"),
    "negative shape": (changed(good(), shaped(-1, 4)), INVALID, r".*expected \[-1, 4\], got \[-1, 4\]"),
    "a huge shape": (changed(good(), shaped(HUGE, 4)), INVALID, f".*between 1 and 8 .*got {HUGE}"),
    "a huge shape without a batch dimension": (
        changed(
            good(),
            lambda request: (set_field("model_name", "whole")(request), shaped(2**63 - 1)(request)),
        ),
        INVALID,
        f".*expected {4 * (2**63 - 1)} bytes for FP32 of shape .*, got 48",
    ),
    "a huge shape of strings": (
        changed(strings(b""), shaped(8, 2**60)),
        INVALID,
        f".*a BYTES tensor of {8 * 2**60} elements is too large: at most 1000000 are accepted",
    ),
    "too few bytes": (
        changed(good(), lambda request: request.raw_input_contents.__setitem__(0, bytes(47))),
        INVALID,
        r"input 'x' of model 'rows': expected 48 bytes for FP32 of shape \[3, 4\], got 47",
    ),
    "too many bytes": (
        changed(good(), lambda request: request.raw_input_contents.__setitem__(0, bytes(4800))),
        INVALID,
        ".*expected 48 bytes .*, got 4800",
    ),
    "no contents": (
        changed(good(), lambda request: request.ClearField("raw_input_contents")),
        INVALID,
        r"input 'x' of model 'rows': expected 12 FP32 elements for shape \[3, 4\], got 0",
    ),
    "too few raw entries": (
        changed(pair(), lambda request: request.raw_input_contents.pop()),
        INVALID,
        "expected one entry of raw_input_contents for each of the 2 inputs, got 1",
    ),
    "too many raw entries": (
        changed(good(), lambda request: request.raw_input_contents.append(b"")),
        INVALID,
        "expected one entry of raw_input_contents for each of the 1 inputs, got 2",
    ),
    "raw and typed": (
        changed(good(), with_contents),
        INVALID,
        "contents of input 'x' and raw_input_contents are both given: .*",
    ),
    "typed in the wrong field": (
        changed(good(), wrong_field),
        INVALID,
        "input 'x': expected FP32 in fp32_contents, got int_contents",
    ),
    "too few typed elements": (
        changed(good(), too_few_elements),
        INVALID,
        r"input 'x' of model 'rows': expected 12 FP32 elements for shape \[3, 4\], got 11",
    ),
    "typed element out of range": (
        changed(good(), out_of_range),
        INVALID,
        "input 'images' of model 'digits': an element does not fit UINT8: .*256.*",
    ),
    "typed contents for an unknown model": (
        changed(good(), lambda request: (too_few_elements(request), set_field("model_name", "nothing")(request))),
        grpc.StatusCode.NOT_FOUND,
        "unknown model 'nothing': .*",
    ),
    "typed halves": (changed(good(), typed_halves), INVALID, "input 'in_FP16': FP16 is only accepted in raw_.*"),
    "batch too large": (
        changed(good(), batched(9)),
        INVALID,
        "inference request batch-size must be between 1 and 8 for model 'rows', got 9",
    ),
    "zero rows": (changed(good(), batched(0)), INVALID, ".*between 1 and 8 for model 'rows', got 0"),
    "batches that differ": (
        changed(pair(), lambda request: (shaped(1, 2)(request), request.raw_input_contents.__setitem__(0, bytes(8)))),
        INVALID,
        r"the inputs of model 'pair' differ in their batch dimension: \[1, 2\]",
    ),
    "unknown output": (
        changed(good(), one_more_output("z")),
        INVALID,
        "unexpected inference output 'z': model 'rows' has 'echo', 'product'",
    ),
    "negative classification": (
        changed(good(), one_more_output("echo", classification=number(-1))),
        INVALID,
        "classification of output 'echo' must be a positive whole number, got -1",
    ),
    "classification that is not a number": (
        changed(good(), one_more_output("echo", classification=pb.InferParameter(string_param="3"))),
        INVALID,
        "classification of output 'echo' must be a positive whole number, got '3'",
    ),
    "classification of strings": (
        changed(strings(b"\0\0\0\0" * 2), one_more_output("echo", classification=number(1))),
        INVALID,
        "output 'echo' holds strings, which have no classification",
    ),
    "strings cut off": (strings(b"\x05\0\0\0one").SerializeToString(), INVALID, "BYTES tensor is cut off: .*"),
    "too few strings": (
        strings(b"\x03\0\0\0one").SerializeToString(),
        INVALID,
        r"expected 2 BYTES elements for shape \[1, 2\], got 1",
    ),
    "shared memory": (
        changed(
            good(),
            lambda request: (
                request.inputs[0].parameters["shared_memory_region"].MergeFrom(pb.InferParameter(string_param="region"))
            ),
        ),
        grpc.StatusCode.UNIMPLEMENTED,
        ".*shared memory.*",
    ),
    "timeout that is not a number": (
        changed(
            good(), lambda request: request.parameters["timeout"].MergeFrom(pb.InferParameter(string_param="soon"))
        ),
        INVALID,
        "parameter 'timeout' must be a whole number of microseconds, got 'soon'",
    ),
    "random bytes": (b"\xff\x00\xd8random", INVALID, "the 9 bytes received are not a ModelInferRequest: .*"),
    "a message cut off": (good().SerializeToString()[:-1], INVALID, ".* bytes received are not a ModelInferRequest.*"),
    "name that is no UTF-8": (b"\x0a\x02\xff\xfe", INVALID, "the 4 bytes received are not a ModelInferRequest: .*"),
}
