"""Changes to JSON that know its structure. A tree keeps what Python's own types cannot: keys twice, odd literals."""

import json
import random
from dataclasses import dataclass
from typing import Any

ODD_LITERALS = (
    *("null", "true", "false", "0", "-1", "1.0", "1e2", "1.5", "-0", "2147483648", "9223372036854775807"),
    *(
        "9223372036854775808",
        "18446744073709551616",
        "1e400",
        "-1e400",
        "1" + "0" * 400,
        "NaN",
        "Infinity",
        "-Infinity",
    ),
    *(
        '""',
        '"x"',
        '"\\u0000"',
        '"\\ud800"',
        '"\\ud83d\\ude00"',
        '"1"',
        "[]",
        "{}",
        "[[]]",
        "[1]",
        '{"a":1}',
        '["x",1]',
    ),
    *("01", "+1", ".5", "0x10", "nul", "'x'", '"\\x"', '"\t"', "undefined", "", "-"),
)
"""The last lines are no JSON."""
MAX_BYTES = 1 << 18
"""Of repeated elements."""


@dataclass(slots=True)
class Literal:
    """A value as it is written."""

    text: str


@dataclass(slots=True)
class Object:
    """An object whose keys may repeat."""

    items: list[tuple[str, Any]]


def tree(value: Any) -> Any:
    """Returns a JSON value with `Object` for each dict."""
    if isinstance(value, dict):
        return Object([(key, tree(item)) for key, item in value.items()])
    return [tree(item) for item in value] if isinstance(value, list) else value


def dump(value: Any) -> str:
    """Returns a tree as JSON."""
    if isinstance(value, Object):
        return "{" + ",".join(f"{json.dumps(key)}:{dump(item)}" for key, item in value.items) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(dump, value)) + "]"
    return value.text if isinstance(value, Literal) else json.dumps(value)


class JsonMutator:
    """Changes JSON at random. Each method with a name in `MUTATIONS` changes one object or list, in place."""

    MUTATIONS = (
        "drop",
        "duplicate",
        "reorder",
        "replace",
        "replace",
        "replace_word",
        "rename",
        "repeat",
        "nest",
        "nest_deeply",
        "shorten",
    )

    def __init__(self, rng: random.Random, words: tuple[str, ...]) -> None:
        self._rng = rng
        self._words = words

    def mutate(self, value: Any, count: int) -> tuple[bytes, list[str]]:
        """Returns the bytes of a changed JSON value, and the names of the changes."""
        root = tree(value)
        names = []
        for _ in range(count):
            names.append(self._rng.choice(self.MUTATIONS))
            getattr(self, names[-1])(self._rng.choice(_containers(root)))
        body = dump(root).encode()
        if count and self._rng.random() < 0.15:
            names.append(self._rng.choice(list(_ENCODINGS)))
            body = _ENCODINGS[names[-1]](self._rng, body)
        return body, names

    def drop(self, at: Any) -> None:
        items = _items(at)
        if items:
            del items[self._rng.randrange(len(items))]

    def duplicate(self, at: Any) -> None:
        items = _items(at)
        if items:
            items.insert(self._rng.randint(0, len(items)), self._rng.choice(items))

    def reorder(self, at: Any) -> None:
        self._rng.shuffle(_items(at))

    def replace(self, at: Any) -> None:
        self._set(at, Literal(self._rng.choice(ODD_LITERALS)))

    def replace_word(self, at: Any) -> None:
        self._set(at, self._rng.choice(self._words))

    def rename(self, at: Any) -> None:
        if isinstance(at, Object) and at.items:
            place = self._rng.randrange(len(at.items))
            keys = (*self._words, "", "x", "name", "shape", "datatype", "data", "parameters", "binary_data_size")
            at.items[place] = (self._rng.choice(keys), at.items[place][1])

    def repeat(self, at: Any) -> None:
        """Repeats an element; seldom thousands of times. Later changes leave the copies alone."""
        items = _items(at)
        if items:
            copies = self._rng.choice([2, 10, 100]) if self._rng.random() < 0.97 else 5000
            place = self._rng.randrange(len(items))
            key, value = items[place] if isinstance(at, Object) else ("", items[place])
            text = dump(value)
            separator = f",{json.dumps(key)}:" if isinstance(at, Object) else ","
            many = Literal(separator.join([text] * max(1, min(copies, MAX_BYTES // (len(text) + 1)))))
            items.insert(place, (key, many) if isinstance(at, Object) else many)

    def nest(self, at: Any) -> None:
        items = _items(at)
        if items:
            value = self._rng.choice(items)
            self._set(at, [value[1] if isinstance(at, Object) else value])

    def nest_deeply(self, at: Any) -> None:
        depth = self._rng.choice([50, 900, 1100, 20_000])
        opening, closing = self._rng.choice([("[", "]"), ('{"a":', "}")])
        self._set(at, Literal(opening * depth + "1" + closing * (depth if self._rng.random() < 0.8 else depth - 1)))

    def shorten(self, at: Any) -> None:
        items = _items(at)
        del items[self._rng.randint(0, len(items)) :]

    def _set(self, at: Any, value: Any) -> None:
        items = _items(at)
        if not items:
            items.append(("x", value) if isinstance(at, Object) else value)
            return
        place = self._rng.randrange(len(items))
        items[place] = (items[place][0], value) if isinstance(at, Object) else value


def _items(at: Any) -> list[Any]:
    return at.items if isinstance(at, Object) else at  # type: ignore[no-any-return]


def _containers(value: Any) -> list[Any]:
    """Returns all objects and lists in a tree, the outermost first."""
    if isinstance(value, Object):
        return [value, *(found for _, item in value.items for found in _containers(item))]
    if isinstance(value, list):
        return [value, *(found for item in value[:20] for found in _containers(item))]
    return []


def _change_byte(rng: random.Random, body: bytes) -> bytes:
    changed = bytearray(body)
    if changed:
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


_ENCODINGS = {
    "cut off": lambda rng, body: body[: rng.randint(0, len(body))],
    "garbage after it": lambda rng, body: body + rng.choice([b"}", b"null", b"\0", b" \n\t", b"//"]),
    "byte order mark": lambda rng, body: b"\xef\xbb\xbf" + body,
    "utf-16": lambda rng, body: body.decode("utf-8", "replace").encode("utf-16"),
    "bad utf-8": lambda rng, body: body.replace(b'"', b'"\xff', 1),
    "byte": _change_byte,
    "empty": lambda rng, body: b"",
}
