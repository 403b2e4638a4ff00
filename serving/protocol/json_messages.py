"""Converts protobuf messages to JSON in the form of Triton's HTTP server. Works for every message type."""

import math
from base64 import b64encode
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message


def to_json(message: Message) -> dict[str, Any]:
    """Returns a message as values for `json.dumps`, with the field names of the .proto file.

    Includes fields that have their default value, and leaves out absent messages. 64-bit integers are numbers, as
    Triton's clients expect; `google.protobuf.json_format` makes them strings.
    """
    return {
        field.name: _field(field, getattr(message, field.name))
        for field in message.DESCRIPTOR.fields
        if not field.has_presence or message.HasField(field.name)
    }


def _field(field: FieldDescriptor, value: Any) -> Any:
    message = field.message_type
    if message is not None and message.GetOptions().map_entry:
        kind = message.fields_by_name["value"]
        return {str(key): _value(kind, value[key]) for key in value}
    if field.is_repeated:
        return [_value(field, element) for element in value]
    return _value(field, value)


def _value(field: FieldDescriptor, value: Any) -> Any:
    if field.message_type is not None:
        return to_json(value)
    if field.enum_type is not None:
        return field.enum_type.values_by_number[value].name
    if isinstance(value, float) and not math.isfinite(value):
        return None  # JSON has no number for it
    return b64encode(value).decode() if isinstance(value, bytes) else value
