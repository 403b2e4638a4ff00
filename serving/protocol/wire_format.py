"""Reads a ModelInferRequest in protobuf's wire format, before any object is made of it.

Splitting a message costs a fraction of parsing it, copies no tensor, and counts fields on the way: a message of many
tiny fields would otherwise cost a hundred times its size in objects
(https://protobuf.dev/programming-guides/encoding/).
"""

from serving.errors import InvalidArgument
from serving.protocol.tensors import MAX_RANK

MAX_FIELDS = 4096
"""Of a request's message and of the messages in it, beside elements of typed contents: tensors, parameters, …"""
MAX_UNPACKED_ELEMENTS = 100_000
"""Of typed contents: strings, and numbers that the client has not packed. Raw contents have no such limit."""
MAX_KEY_BYTES = 4096
"""Of a header that may be kept. Parameters can make one longer."""

# The first byte of a length-delimited field: its number, shifted by 3, and wire type 2.
_ID = 3 << 3 | 2
_INPUT = 5 << 3 | 2
_OUTPUT = 6 << 3 | 2
_RAW_INPUT = 7 << 3 | 2
# Fields of an input.
_SHAPE = 3 << 3 | 2
_CONTENTS = 5 << 3 | 2

_FIXED_SIZES = {1: 8, 5: 4}
"""Bytes of a field's value by its wire type."""
_VARINT, _DELIMITED = 0, 2
_MAX_VARINT_BYTES = 10
_MAX_UINT64 = 2**64 - 1


class SplitRequest:
    """A serialised ModelInferRequest, split into parts.

    Attributes:
        header: the message without `id` and `raw_input_contents`; itself a serialised ModelInferRequest.
        key: equal for requests that share a plan; None if it is too long to be kept, or holds data.
        request_id: the client's id; empty for none.
        tensors: `raw_input_contents`, without a copy.
    """

    __slots__ = ("header", "key", "request_id", "tensors")

    def __init__(self, payload: bytes) -> None:
        """Splits a message.

        Raises:
            InvalidArgument: the bytes are no message, or one of too many fields.
        """
        end = len(payload)
        header: list[bytes] = []
        tensors: list[memoryview] = []
        self.request_id = ""
        position = num_fields = 0
        try:
            while position < end and num_fields < MAX_FIELDS:
                num_fields += 1
                tag, length, start = payload[position], payload[position + 1], position + 2
                if tag & 0x87 != _DELIMITED:  # a long tag, or another wire type
                    tag, start, length = _read_field(payload, position)
                elif length > 127:  # it has several bytes
                    length, start = _read_varint(payload, position + 1)
                begin, position = position, start + length
                if tag == _RAW_INPUT:
                    tensors.append(memoryview(payload)[start:position])
                elif tag == _ID:
                    self.request_id = str(payload[start:position], "utf-8")
                else:
                    header.append(payload[begin:position])
        except (IndexError, UnicodeDecodeError) as error:
            raise _malformed(payload) from error
        if position != end:
            raise _malformed(payload) if position > end else _too_many_fields()
        self.header = b"".join(header)
        self.key = self.header if tensors and len(self.header) <= MAX_KEY_BYTES else None
        self.tensors = tensors


def request_id(payload: bytes) -> str:
    """Returns the client's id in a serialised ModelInferRequest; empty if it has none, or is malformed."""
    try:
        return SplitRequest(payload).request_id
    except InvalidArgument:
        return ""


def check_budget(header: bytes) -> None:
    """Checks that the messages in a header have a bounded number of fields, so that parsing it costs little.

    Raises:
        InvalidArgument: they have not, or are malformed.
    """
    budget = _Budget(header)
    for tag, start, end in budget.fields(0, len(header)):
        if tag == _INPUT:
            for inner, inner_start, inner_end in budget.fields(start, end):
                if inner == _CONTENTS:
                    budget.count_elements(inner_start, inner_end)
                elif inner == _SHAPE and inner_end - inner_start > MAX_RANK * _MAX_VARINT_BYTES:
                    raise InvalidArgument(f"a shape has more dimensions than the {MAX_RANK} that are accepted")
        elif tag == _OUTPUT:
            budget.fields(start, end)


class _Budget:
    """Counts the fields of a message and of the messages in it."""

    def __init__(self, message: bytes) -> None:
        self._message = message
        self._num_left = MAX_FIELDS
        self._num_elements_left = MAX_UNPACKED_ELEMENTS

    def fields(self, start: int, end: int) -> "list[tuple[int, int, int]]":
        """Counts the fields in a range of the message. Returns the tag, start and end of the value of each."""
        found = _fields(self._message, start, end, self._num_left)
        if found is None:
            raise _too_many_fields()
        self._num_left -= len(found)
        return found

    def count_elements(self, start: int, end: int) -> None:
        """Counts the fields of an InferTensorContents."""
        found = _fields(self._message, start, end, self._num_elements_left)
        if found is None:
            raise InvalidArgument(
                f"typed contents have more than {MAX_UNPACKED_ELEMENTS} strings or unpacked numbers: "
                "use raw_input_contents"
            )
        self._num_elements_left -= len(found)


def _fields(message: bytes, start: int, end: int, limit: int) -> list[tuple[int, int, int]] | None:
    """Returns the tag, start and end of the value of each field in a range; None if there are more than `limit`."""
    found: list[tuple[int, int, int]] = []
    try:
        while start < end:
            if len(found) == limit:
                return None
            tag, begin, length = _read_field(message, start)
            start = begin + length
            found.append((tag, begin, start))
    except IndexError as error:
        raise _malformed(message) from error
    if start != end:
        raise _malformed(message)
    return found


def _read_field(message: bytes, position: int) -> tuple[int, int, int]:
    """Returns the tag of the field at a position, and the start and length of its value."""
    tag, position = _read_varint(message, position)
    wire_type = tag & 7
    if wire_type == _DELIMITED:
        length, position = _read_varint(message, position)
        return tag, position, length
    if wire_type == _VARINT:
        return tag, position, _read_varint(message, position)[1] - position
    if wire_type in _FIXED_SIZES:
        return tag, position, _FIXED_SIZES[wire_type]
    raise _malformed(message)  # groups, which proto3 does not have, and wire types that do not exist


def _read_varint(message: bytes, position: int) -> tuple[int, int]:
    """Returns the number at a position in base 128, least digits first, and the position after it.

    As in protobuf's own parsers, bits beyond the 64th have no meaning.
    """
    number = 0
    for shift in range(0, 7 * _MAX_VARINT_BYTES, 7):
        byte = message[position]
        position += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number & _MAX_UINT64, position
    raise _malformed(message)


def _too_many_fields() -> InvalidArgument:
    return InvalidArgument(f"the message has more than {MAX_FIELDS} fields")


def _malformed(message: bytes) -> InvalidArgument:
    return InvalidArgument(f"the {len(message)} bytes received are not a ModelInferRequest: a field is malformed")
