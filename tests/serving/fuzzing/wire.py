"""Protobuf's wire format as a tree of fields that a mutation can change into anything, valid or not.

https://protobuf.dev/programming-guides/encoding/
"""

from collections.abc import Iterator
from dataclasses import dataclass

from google.protobuf.descriptor import Descriptor

VARINT, FIXED64, BYTES, GROUP, END_GROUP, FIXED32 = range(6)
VERBATIM = -1
"""Not a wire type: the value is bytes that are written as they are."""

_MASK = (1 << 64) - 1


@dataclass(slots=True)
class Field:
    """One field.

    Args:
        value: a number for VARINT; a list of fields for GROUP, and for BYTES that hold a message; else bytes.
        is_text: the value must be UTF-8.
        padding: number of superfluous bytes of the varint.
        stretch: what the written length differs from the real one.
    """

    number: int
    wire: int
    value: "int | bytes | list[Field]"
    is_text: bool = False
    padding: int = 0
    stretch: int = 0

    def copy(self) -> "Field":
        value = [field.copy() for field in self.value] if isinstance(self.value, list) else self.value
        return Field(self.number, self.wire, value, self.is_text, self.padding, self.stretch)


def parse(payload: bytes, descriptor: Descriptor) -> list[Field]:
    """Returns the fields of a valid message without groups."""
    fields = []
    at = 0
    while at < len(payload):
        tag, at = _read_varint(payload, at)
        number, wire = tag >> 3, tag & 7
        known = descriptor.fields_by_number[number]
        value: int | bytes | list[Field]
        if wire == VARINT:
            value, at = _read_varint(payload, at)
        else:
            size = {FIXED64: 8, FIXED32: 4}.get(wire, 0)
            if wire == BYTES:
                size, at = _read_varint(payload, at)
            value, at = payload[at : at + size], at + size
            if known.message_type is not None:
                value = parse(value, known.message_type)
        fields.append(Field(number, wire, value, is_text=known.type == known.TYPE_STRING))
    return fields


def encode(fields: list[Field]) -> bytes:
    """Returns the fields' bytes."""
    return b"".join(map(_encode_field, fields))


def all_lists(fields: list[Field]) -> Iterator[list[Field]]:
    """Yields this list of fields and those of all messages in it."""
    yield fields
    for field in fields:
        if isinstance(field.value, list):
            yield from all_lists(field.value)


def varint(number: int, padding: int = 0) -> bytes:
    """Returns a number as a varint with some superfluous bytes."""
    number &= _MASK
    parts = bytearray()
    while number > 127:
        parts.append(number & 127 | 128)
        number >>= 7
    parts.append(number)
    if padding:
        parts[-1] |= 128
        parts += b"\x80" * (padding - 1) + b"\0"
    return bytes(parts)


def _encode_field(field: Field) -> bytes:
    value = field.value
    if field.wire == VERBATIM:
        assert isinstance(value, bytes)
        return value
    tag = varint(field.number << 3 | field.wire)
    if field.wire == VARINT:
        assert isinstance(value, int)
        return tag + varint(value, field.padding)
    if field.wire == END_GROUP:
        return tag
    body = encode(value) if isinstance(value, list) else value
    assert isinstance(body, bytes)
    if field.wire == GROUP:
        return tag + body + varint(field.number << 3 | END_GROUP)
    if field.wire == BYTES:
        return tag + varint(max(0, len(body) + field.stretch), field.padding) + body
    return tag + body.ljust(8, b"\0")[: 8 if field.wire == FIXED64 else 4]


def _read_varint(payload: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = payload[at]
        number |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return number, at
