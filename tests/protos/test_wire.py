"""Our messages and those of Triton's client have the same bytes, for every message type."""

from collections.abc import Iterator

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import model_config_pb2 as their_config
from tritonclient.grpc import service_pb2 as their_service

from protos import grpc_service_pb2, model_config_pb2

_SAMPLES = {
    FieldDescriptor.CPPTYPE_INT32: -3,
    FieldDescriptor.CPPTYPE_INT64: -(2**40),
    FieldDescriptor.CPPTYPE_UINT32: 2**32 - 1,
    FieldDescriptor.CPPTYPE_UINT64: 2**64 - 1,
    FieldDescriptor.CPPTYPE_FLOAT: 0.5,
    FieldDescriptor.CPPTYPE_DOUBLE: 0.1,
    FieldDescriptor.CPPTYPE_BOOL: True,
}


def _types(descriptors: dict[str, Descriptor], prefix: str = "") -> Iterator[str]:
    for name, descriptor in descriptors.items():
        if not descriptor.GetOptions().map_entry:
            yield prefix + name
            yield from _types(descriptor.nested_types_by_name, f"{prefix}{name}.")


_OURS = {**grpc_service_pb2.DESCRIPTOR.message_types_by_name, **model_config_pb2.DESCRIPTOR.message_types_by_name}
_THEIRS = {**their_service.DESCRIPTOR.message_types_by_name, **their_config.DESCRIPTOR.message_types_by_name}
_NAMES = sorted(_types(_OURS))


def _new(top: dict[str, Descriptor], name: str) -> Message:
    first, *rest = name.split(".")
    descriptor = top[first]
    for part in rest:
        descriptor = descriptor.nested_types_by_name[part]
    return GetMessageClass(descriptor)()


def _sample(field: FieldDescriptor, choice: int) -> object:
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        return b"\x00\xff" if field.type == FieldDescriptor.TYPE_BYTES else f"é {field.name}"
    if field.cpp_type == FieldDescriptor.CPPTYPE_ENUM:
        return field.enum_type.values[choice % len(field.enum_type.values)].number
    return _SAMPLES[field.cpp_type]


def _fill(message: Message, choice: int) -> Message:
    """Sets every field; of each oneof, the member that `choice` picks."""
    for field in message.DESCRIPTOR.fields:
        oneof = field.containing_oneof
        if oneof is not None and oneof.fields[choice % len(oneof.fields)] is not field:
            continue
        is_message = field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE
        if is_message and field.message_type.GetOptions().map_entry:
            _fill_map(getattr(message, field.name), field.message_type.fields_by_name, choice)
        elif is_message and field.is_repeated:
            for _ in range(2):
                _fill(getattr(message, field.name).add(), choice)
        elif is_message:
            getattr(message, field.name).SetInParent()
            _fill(getattr(message, field.name), choice)
        elif field.is_repeated:
            getattr(message, field.name).extend([_sample(field, choice)] * 3)
        else:
            setattr(message, field.name, _sample(field, choice))
    return message


def _fill_map(mapping: object, entry: dict[str, FieldDescriptor], choice: int) -> None:
    key = _sample(entry["key"], choice)
    if entry["value"].cpp_type == FieldDescriptor.CPPTYPE_MESSAGE:
        _fill(mapping[key], choice)
    else:
        mapping[key] = _sample(entry["value"], choice)


def test_we_have_every_type_that_triton_has():
    assert sorted(_types(_THEIRS)) == _NAMES
    assert len(_NAMES) > 100


@pytest.mark.parametrize("name", _NAMES)
@pytest.mark.parametrize("choice", range(5))
def test_bytes_are_the_same_in_both_directions(name, choice):
    ours, theirs = _fill(_new(_OURS, name), choice), _fill(_new(_THEIRS, name), choice)
    assert ours.SerializeToString(deterministic=True) == theirs.SerializeToString(deterministic=True)
    read_by_us = _new(_OURS, name).FromString(theirs.SerializeToString())
    read_by_them = _new(_THEIRS, name).FromString(ours.SerializeToString())
    assert (read_by_us, read_by_them) == (ours, theirs)
    # The text has field names: it shows equal numbers under different names.
    assert str(ours) == str(theirs)


@pytest.mark.parametrize("name", ["DataType", "ModelInstanceGroup.Kind", "ModelQueuePolicy.TimeoutAction"])
def test_enum_values_have_the_same_numbers(name):
    def values(module: object) -> dict[str, int]:
        enum = module
        for part in name.split("."):
            enum = getattr(enum, part)
        return dict(enum.items())

    assert values(model_config_pb2) == values(their_config)


@given(
    shape=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=5),
    raw=st.lists(st.binary(max_size=50), max_size=4),
    parameters=st.dictionaries(st.text(max_size=10), st.integers(0, 2**64 - 1), max_size=4),
)
def test_requests_of_any_content_are_the_same_bytes(shape, raw, parameters):
    messages = []
    for module in (grpc_service_pb2, their_service):
        request = module.ModelInferRequest(model_name="m", raw_input_contents=raw)
        request.inputs.add(name="x", datatype="UINT8", shape=shape)
        for key, value in parameters.items():
            request.parameters[key].uint64_param = value
        messages.append(request)
    ours, theirs = (message.SerializeToString(deterministic=True) for message in messages)
    assert ours == theirs
    assert grpc_service_pb2.ModelInferRequest.FromString(theirs) == messages[0]
