"""Our protobuf messages as JSON in the form of Triton's HTTP server. Knows no message in particular."""

from base64 import b64encode
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message


def to_json(message: Message) -> dict[str, Any]:
    """A message as values for `json.dumps`, with the field names of the .proto file.

    Differs from `google.protobuf.json_format` in one point: 64-bit integers are numbers, not strings, as Triton has
    them and its clients read them. Fields at their default are there, absent messages are not.
    """
    return {
        field.name: _field(field, getattr(message, field.name))
        for field in message.DESCRIPTOR.fields
        if not field.has_presence or message.HasField(field.name)
    }


def _field(field: FieldDescriptor, value: Any) -> Any:
    entry = field.message_type
    if entry is not None and entry.GetOptions().map_entry:
        kind = entry.fields_by_name["value"]
        return {str(key): _value(kind, value[key]) for key in value}
    if field.is_repeated:
        return [_value(field, element) for element in value]
    return _value(field, value)


def _value(field: FieldDescriptor, value: Any) -> Any:
    if field.message_type is not None:
        return to_json(value)
    if field.enum_type is not None:
        return field.enum_type.values_by_number[value].name
    return b64encode(value).decode() if isinstance(value, bytes) else value
