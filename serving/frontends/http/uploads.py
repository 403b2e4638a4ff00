"""Takes image files out of a request body: several of a form (`curl -F file=@cat.jpg`), or the body itself."""

import logging
from collections.abc import Callable

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.exceptions import HTTPException

from serving.errors import InvalidArgument

MAX_NAME_CHARACTERS = 256
"""Of a file's name, which the response repeats."""
_MAX_HEADER_BYTES = 8 << 10
"""Of one part of a form."""

File = tuple[str, bytes]
"""Name and content."""

logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # a client must not fill the log with its mistakes


def read_files(body: bytes, content_type: bytes, max_files: int) -> list[File]:
    """Returns the files in a body.

    Args:
        content_type: header of the request; empty for none.

    Raises:
        HTTPException: 415, if the type says that the body is neither a form nor an image.
        InvalidArgument: the form is malformed, has too many files, or other fields.
    """
    kind, options = parse_options_header(content_type)
    if kind == b"multipart/form-data":
        return _read_form(body, options.get(b"boundary", b""), max_files)
    if kind.startswith(b"image/") or kind == b"application/octet-stream":
        return [("", body)]
    got = content_type[:MAX_NAME_CHARACTERS].decode("latin-1") or "none"
    raise HTTPException(
        415, f"content type {got}: expected a form (curl -F file=@cat.jpg), or a file with the type image/jpeg or alike"
    )


def _read_form(body: bytes, boundary: bytes, max_files: int) -> list[File]:
    form = _Form(max_files)
    try:
        parser = MultipartParser(boundary, form.callbacks())  # type: ignore[arg-type]
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise InvalidArgument(f"the form is malformed: {error}") from error
    if not form.is_complete:
        raise InvalidArgument("the form is cut off")
    if not form.files:
        raise InvalidArgument("the form has no file: send one with curl -F file=@cat.jpg")
    return form.files


class _Form:
    """Collects the files of a form while it is parsed."""

    def __init__(self, max_files: int) -> None:
        self.files: list[File] = []
        self.is_complete = False
        self._max_files = max_files
        self._start()

    def callbacks(self) -> dict[str, Callable[..., None]]:
        """Returns the functions that the parser calls."""
        return {
            "on_part_begin": self._start,
            "on_header_field": self._add_to_name,
            "on_header_value": self._add_to_value,
            "on_header_end": self._end_header,
            "on_part_data": self._add_data,
            "on_part_end": self._end,
            "on_end": self._complete,
        }

    def _start(self) -> None:
        self._name, self._value, self._disposition = bytearray(), bytearray(), b""
        self._num_header_bytes = 0
        self._data = bytearray()

    def _add_to_name(self, data: bytes, start: int, end: int) -> None:
        self._count(end - start)
        self._name += data[start:end]

    def _add_to_value(self, data: bytes, start: int, end: int) -> None:
        self._count(end - start)
        self._value += data[start:end]

    def _count(self, num_bytes: int) -> None:
        self._num_header_bytes += num_bytes
        if self._num_header_bytes > _MAX_HEADER_BYTES:
            raise InvalidArgument(f"the headers of a part of the form have more than {_MAX_HEADER_BYTES} bytes")

    def _end_header(self) -> None:
        if bytes(self._name).lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._name.clear()
        self._value.clear()

    def _add_data(self, data: bytes, start: int, end: int) -> None:
        self._data += memoryview(data)[start:end]

    def _end(self) -> None:
        _, options = parse_options_header(self._disposition)
        if b"filename" not in options:
            raise InvalidArgument("the form has a field that is no file: write curl -F file=@cat.jpg, with the @")
        if len(self.files) == self._max_files:
            raise InvalidArgument(f"the form has more than {self._max_files} files, the largest number at a time")
        name = options[b"filename"].decode("utf-8", "replace")[:MAX_NAME_CHARACTERS]
        self.files.append((name, bytes(self._data)))

    def _complete(self) -> None:
        self.is_complete = True
