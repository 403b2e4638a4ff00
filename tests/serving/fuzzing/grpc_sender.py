"""Sends messages over gRPC, many at a time, and compares the responses with what is right."""

import queue
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from protos import grpc_service_pb2 as pb
from serving.protocol.methods import INFER, STREAM_INFER
from tests.serving.fuzzing.comparison import difference
from tests.serving.fuzzing.message import GrpcMessage
from tests.serving.fuzzing.oracle import OK, Expected
from tests.serving.fuzzing.result import Result

TIMEOUT_S = 30
NUM_IN_FLIGHT = 64
NUM_STREAM_THREADS = 4

_CODES = {code: code.value[0] for code in grpc.StatusCode}


def send_grpc(target: str, messages: Iterable[GrpcMessage]) -> Iterator[Result]:
    """Sends the messages over one connection. Yields the results, in the order of the responses."""
    done: queue.SimpleQueue[Result] = queue.SimpleQueue()
    pending = 0
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
    with grpc.insecure_channel(target, options) as channel, ThreadPoolExecutor(NUM_STREAM_THREADS) as streams:
        for message in messages:
            if message.path == STREAM_INFER:
                streams.submit(_stream, channel, message, done)
            else:
                call = channel.unary_unary(message.path).future(message.payloads[0], timeout=TIMEOUT_S)
                call.add_done_callback(lambda call, message=message: done.put(_unary_result(message, call)))
            pending += 1
            while pending and (pending >= NUM_IN_FLIGHT or not done.empty()):
                yield done.get()
                pending -= 1
        for _ in range(pending):
            yield done.get()


def _unary_result(message: GrpcMessage, call: Any) -> Result:
    code = call.code()
    try:
        problem = _problem(message, code, call)
    except Exception as error:
        problem = f"the response cannot be read: {error!r}"
    return Result(message, code.name, problem)


def _problem(message: GrpcMessage, code: grpc.StatusCode, call: Any) -> str | None:
    [expected] = message.expected
    if _CODES[code] not in expected.codes:
        return f"{code.name} ({call.details()}), expected one of {_names(expected)}"
    if code != grpc.StatusCode.OK or message.path != INFER:
        return None
    return check_response(pb.ModelInferResponse.FromString(call.result()), expected)


def check_response(response: pb.ModelInferResponse, expected: Expected) -> str | None:
    """Returns what is wrong with a ModelInferResponse."""
    head = (response.model_name, response.model_version, response.id)
    if head != (expected.model, expected.version, expected.id):
        return f"the response is of {head}, expected {(expected.model, expected.version, expected.id)}"
    names = [output.name for output in response.outputs]
    if names != [output.name for output in expected.outputs] or len(names) != len(response.raw_output_contents):
        return f"outputs {names}, expected {[output.name for output in expected.outputs]}"
    for output, got, data in zip(expected.outputs, response.outputs, response.raw_output_contents, strict=True):
        if problem := difference(output, got.datatype, tuple(got.shape), data):
            return problem
    return None


def _names(expected: Expected) -> str:
    return ", ".join(code.name for code, number in _CODES.items() if number in expected.codes)


def _stream(channel: grpc.Channel, message: GrpcMessage, done: "queue.SimpleQueue[Result]") -> None:
    metadata = [("triton_grpc_error", "true")] if message.ends_on_error else []
    responses: list[pb.ModelStreamInferResponse] = []
    call = channel.stream_stream(STREAM_INFER)(iter(message.payloads), timeout=TIMEOUT_S, metadata=metadata)
    try:
        for response in call:
            responses.append(pb.ModelStreamInferResponse.FromString(response))
        problem = _stream_problem(message, responses, OK, "")
    except grpc.RpcError:
        problem = _stream_problem(message, responses, _CODES[call.code()], call.details())
    except DecodeError as error:
        problem = f"a response cannot be read: {error}"
    done.put(Result(message, f"{call.code().name} of a stream", problem))


def _stream_problem(message: GrpcMessage, responses: list[Any], code: int, details: str) -> str | None:
    if not message.ends_on_error and code != OK:
        return f"the stream ended with {code} ({details})"
    if code == OK and len(responses) != len(message.expected):
        return f"{len(responses)} responses to {len(message.expected)} requests"
    for place, (response, expected) in enumerate(zip(responses, message.expected, strict=False)):
        problem = None
        if not response.error_message:
            problem = check_response(response.infer_response, expected)
            if OK not in expected.codes:
                problem = f"a response, expected one of {_names(expected)}"
        elif expected.codes == {OK}:
            problem = response.error_message
        if problem:
            return f"request {place} of the stream: {problem}"
    if code != OK and code not in message.expected[len(responses)].codes:
        return f"the stream ended with {code} ({details}) at request {len(responses)}"
    return None
