"""Changes to protobuf messages that know their structure: most results are near the border of what is valid."""

import random
from collections.abc import Callable, Sequence

from google.protobuf.message import Message

from tests.serving.fuzzing.wire import (
    BYTES,
    END_GROUP,
    FIXED32,
    FIXED64,
    GROUP,
    VARINT,
    VERBATIM,
    Field,
    all_lists,
    encode,
    parse,
    varint,
)

NUMBERS = (0, 1, 2, 3, 127, 128, 255, 256, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
BAD_TEXT = (b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe2\x82", b"ok\x80")
ODD_TEXT = ("", "\0", "é", "٣", "\U0001f40d", "a" * 70, "x\n", "../x", "%s", "{0}")
MAX_BYTES = 1 << 18
"""Of repeated fields."""


class Mutator:
    """Changes messages at random. Each method with a name in `MUTATIONS` changes one list of fields, in place.

    Args:
        words: names that mean something to the server, for the messages' strings.
    """

    MUTATIONS = (
        "drop",
        "duplicate",
        "reorder",
        "change_length",
        "pad_varint",
        "explode_count",
        "break_text",
        "replace_text",
        "swap_wire_type",
        "renumber",
        "add_unknown",
        "nest_groups",
        "nest_messages",
        "change_number",
        "unpack_numbers",
        "resize",
    )

    def __init__(self, rng: random.Random, words: Sequence[str]) -> None:
        self._rng = rng
        self._words = (*words, *ODD_TEXT)

    def mutate(self, message: Message, count: int) -> tuple[bytes, list[str]]:
        """Returns the bytes of a changed message, and the names of the changes."""
        fields = parse(message.SerializeToString(), message.DESCRIPTOR)
        names = []
        for _ in range(count):
            names.append(self._rng.choice(self.MUTATIONS))
            getattr(self, names[-1])(self._rng.choice(list(all_lists(fields))))
        payload = encode(fields)
        if count and self._rng.random() < 0.1:
            names.append("noise")
            payload = noise(self._rng, payload)
        return payload, names

    def drop(self, fields: list[Field]) -> None:
        if fields:
            del fields[self._rng.randrange(len(fields))]

    def duplicate(self, fields: list[Field]) -> None:
        if fields:
            self._insert(fields, self._rng.choice(fields).copy())

    def reorder(self, fields: list[Field]) -> None:
        self._rng.shuffle(fields)

    def change_length(self, fields: list[Field]) -> None:
        if field := self._choose(fields, lambda field: field.wire == BYTES):
            field.stretch = self._rng.choice([-5, -1, 1, 2, 9, 1000, 2**31 - 1, 2**31, 2**32, 2**63])

    def pad_varint(self, fields: list[Field]) -> None:
        """Makes a varint longer than it need be; over 10 bytes it is invalid."""
        if field := self._choose(fields, lambda field: field.wire in (VARINT, BYTES)):
            field.padding = self._rng.choice([1, 1, 2, 3, 4, 8, 9, 10, 20])

    def explode_count(self, fields: list[Field]) -> None:
        """Repeats a field many times; seldom thousands of times, because these messages are slow to check."""
        if fields:
            copies = self._rng.choice([3, 10, 30, 100]) if self._rng.random() < 0.97 else 10_000
            one = encode([self._rng.choice(fields)])
            self._insert(fields, Field(0, VERBATIM, one * min(copies, MAX_BYTES // (len(one) + 1))))

    def break_text(self, fields: list[Field]) -> None:
        if field := self._choose(fields, _is_text):
            assert isinstance(field.value, bytes)
            field.value = self._rng.choice([b"", field.value]) + self._rng.choice(BAD_TEXT)

    def replace_text(self, fields: list[Field]) -> None:
        if field := self._choose(fields, _is_text):
            field.value = self._rng.choice(self._words).encode()

    def swap_wire_type(self, fields: list[Field]) -> None:
        if field := self._choose(fields, lambda field: field.wire != VERBATIM):
            old = encode(field.value) if isinstance(field.value, list) else field.value
            field.wire = self._rng.choice([VARINT, FIXED64, BYTES, GROUP, END_GROUP, FIXED32, 6, 7])
            if field.wire == VARINT:
                field.value = old if isinstance(old, int) else int.from_bytes(old[:8], "little")
            elif field.wire == GROUP:
                field.value = field.value if isinstance(field.value, list) else []
            else:
                field.value = old if isinstance(old, bytes) else varint(old)

    def renumber(self, fields: list[Field]) -> None:
        """Makes a field another known one, or one with the number 0, which is invalid."""
        if fields:
            self._rng.choice(fields).number = self._rng.randint(0, 8)

    def add_unknown(self, fields: list[Field]) -> None:
        number = self._rng.choice([9, 15, 16, 100, 18999, 19000, 2**29 - 1, 2**29, 2**32])
        wire = self._rng.choice([VARINT, FIXED64, BYTES, GROUP, FIXED32])
        value: int | bytes | list[Field] = self._rng.randbytes(self._rng.choice([0, 1, 8, 40]))
        if wire == VARINT:
            value = self._rng.choice(NUMBERS)
        elif wire == GROUP:
            value = [field.copy() for field in fields[:2]]
        self._insert(fields, Field(number, wire, value))

    def nest_groups(self, fields: list[Field]) -> None:
        """Adds unknown groups in each other, to about the depth that protobuf allows (100), or far deeper."""
        depth = self._rng.choice([1, 2, 50, 95, 105, 3000])
        number = self._rng.choice([1, 5, 100])
        start, end = varint(number << 3 | GROUP), varint(number << 3 | END_GROUP)
        ends = depth if self._rng.random() < 0.7 else depth - 1
        self._insert(fields, Field(0, VERBATIM, start * depth + end * ends))

    def nest_messages(self, fields: list[Field]) -> None:
        """Wraps a message's bytes in its own field again and again."""
        if field := self._choose(fields, lambda field: field.wire == BYTES and isinstance(field.value, list)):
            assert isinstance(field.value, list)
            body = encode(field.value)
            for _ in range(self._rng.choice([1, 2, 5, 120])):
                body = encode([Field(field.number, BYTES, body)])
            field.value = [Field(0, VERBATIM, body)]

    def change_number(self, fields: list[Field]) -> None:
        """Changes a varint, or removes and adds packed ones."""
        if field := self._choose(fields, lambda field: field.wire == VARINT):
            field.value = self._rng.choice(NUMBERS)
        elif field := self._choose(fields, _is_packed):
            assert isinstance(field.value, bytes)
            added = varint(self._rng.choice(NUMBERS)) if self._rng.random() < 0.5 else b""
            field.value = (field.value + added)[self._rng.randint(0, 1) :]

    def unpack_numbers(self, fields: list[Field]) -> None:
        """Writes packed numbers of one byte as a field each, which means the same."""
        if field := self._choose(fields, _is_packed):
            assert isinstance(field.value, bytes)
            if all(byte < 128 for byte in field.value):
                at = next(place for place, other in enumerate(fields) if other is field)
                fields[at : at + 1] = [Field(field.number, VARINT, byte) for byte in field.value]

    def resize(self, fields: list[Field]) -> None:
        """Changes the number of bytes of a string or of bytes, and the length with them."""
        if field := self._choose(fields, lambda field: field.wire == BYTES and isinstance(field.value, bytes)):
            assert isinstance(field.value, bytes)
            old = field.value
            size = self._rng.choice([0, 1, 2, 4, 8, 16, max(0, len(old) - 1), len(old) + 1, 2 * len(old), 5000])
            field.value = old[:size].ljust(size, b"\0")

    def _insert(self, fields: list[Field], field: Field) -> None:
        fields.insert(self._rng.randint(0, len(fields)), field)

    def _choose(self, fields: list[Field], fits: Callable[[Field], bool]) -> Field | None:
        fitting = [field for field in fields if fits(field)]
        return self._rng.choice(fitting) if fitting else None


def noise(rng: random.Random, payload: bytes) -> bytes:
    """Returns the bytes with one of them changed, a few removed or inserted, or the end cut off."""
    changed = bytearray(payload)
    at = rng.randint(0, len(changed))
    kind = rng.randrange(4)
    if kind == 0:
        del changed[at:]
    elif kind == 1:
        del changed[at : at + rng.randint(1, 8)]
    elif kind == 2:
        changed[at:at] = rng.randbytes(rng.randint(1, 12))
    elif at < len(changed):
        changed[at] = rng.randrange(256)
    return bytes(changed)


def _is_text(field: Field) -> bool:
    return field.is_text and field.wire == BYTES and isinstance(field.value, bytes)


def _is_packed(field: Field) -> bool:
    return field.wire == BYTES and isinstance(field.value, bytes) and not field.is_text and 0 < len(field.value) < 40
