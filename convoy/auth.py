"""Secrets that live in files: the callers' token, and the server's certificates. Knows no transport.

Files are read at the start, where a fault ends the server with one line, and again when they change (Kubernetes swaps a
symbolic link when a secret is rotated). What is then found missing or broken is logged once, and the last good state
stays in use. A look at the files costs some microseconds, so they are looked at whenever they are needed.
"""

import hmac
import logging
import os
import ssl
import stat
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

logger = logging.getLogger(__name__)

Value = TypeVar("Value")


class CredentialError(Exception):
    """A credential file cannot be used; `str` is one line for the operator."""


class Token:
    """The token that callers must show as `authorization: Bearer TOKEN`; thread-safe.

    Raises:
        CredentialError: the file cannot be read, or holds no token.
    """

    def __init__(self, path: Path) -> None:
        self._file = ReloadingFile([path], lambda: _read_token(path))
        if path.stat().st_mode & stat.S_IROTH:
            logger.warning("token file %s: every user of this machine can read it", path)

    def accepts(self, header: str | None) -> bool:
        """Whether this value of the header `authorization` shows the token; compared in constant time."""
        if header is None:
            return False
        scheme, _, given = header.partition(" ")
        shown = given.strip().encode("utf-8", "backslashreplace")
        return hmac.compare_digest(shown, self._file.get()) and scheme.lower() == "bearer"


@dataclass(frozen=True, slots=True)
class Certificates:
    """What the files hold, consistent among themselves: PEM, and the same in the form of Python's `ssl`.

    Args:
        client_ca: the authority that must have signed callers' certificates; None if callers need none.
    """

    chain: bytes
    key: bytes
    client_ca: bytes | None
    context: ssl.SSLContext


class TlsFiles:
    """The server's certificate chain and key, and the authority of its callers' certificates; thread-safe.

    Raises:
        CredentialError: a file cannot be read, or the key is not the certificate's.
    """

    def __init__(self, certificate: Path, key: Path, client_ca: Path | None = None) -> None:
        self.asks_callers = client_ca is not None
        paths = [path for path in (certificate, key, client_ca) if path is not None]
        self._files = ReloadingFile(paths, lambda: _read_certificates(certificate, key, client_ca))

    def current(self) -> Certificates:
        """The last good state of the files; the same object as long as they have not changed."""
        return self._files.get()

    def server_context(self) -> ssl.SSLContext:
        """A context for a TLS server; each handshake takes the files' state of its moment."""
        context = self.current().context

        def choose(connection: ssl.SSLSocket | ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> None:
            connection.context = self.current().context

        context.sni_callback = choose  # called in each handshake, whether or not the client names a server
        return context


class ReloadingFile(Generic[Value]):
    """A value read from files, and read again when one of them has changed.

    Args:
        read: raises OSError or ValueError with one line if the files will not do.
    """

    def __init__(self, paths: Sequence[Path], read: Callable[[], Value]) -> None:
        self._paths = paths
        self._read = read
        self._lock = threading.Lock()
        self._stamps = self._look()
        try:
            self._value = read()
        except (OSError, ValueError) as error:
            raise CredentialError(_one_line(error)) from error

    def get(self) -> Value:
        if self._look() != self._stamps:
            with self._lock:
                self._read_again()
        return self._value

    def _read_again(self) -> None:
        stamps = self._look()
        if stamps == self._stamps:
            return  # another thread was faster
        try:
            self._value = self._read()
            logger.info("read again: %s", ", ".join(map(str, self._paths)))
        except (OSError, ValueError) as error:
            logger.warning("%s; what was read before stays in use", _one_line(error))
        self._stamps = stamps

    def _look(self) -> list[tuple[int, ...] | None]:
        """What tells one state of the files from another. Taken before reading: later changes are seen next time."""
        return [_stamp(path) for path in self._paths]


def _stamp(path: Path) -> tuple[int, ...] | None:
    try:
        state = os.stat(path)
    except OSError:
        return None
    return (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns)


def _one_line(error: OSError | ValueError) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"cannot read {error.filename}: {error.strerror}"
    return str(error)


def _read_token(path: Path) -> bytes:
    token = path.read_bytes().strip()
    if not token:
        raise ValueError(f"token file {path} is empty")
    if not all(0x21 <= byte <= 0x7E for byte in token):
        raise ValueError(f"token file {path}: expected one line of printable ASCII without spaces")
    return token


def _read_certificates(certificate: Path, key: Path, client_ca: Path | None) -> Certificates:
    def read() -> tuple[bytes, bytes, bytes | None]:
        return certificate.read_bytes(), key.read_bytes(), None if client_ca is None else client_ca.read_bytes()

    chain, secret, authority = read()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    _load_chain(context, certificate, key, chain)
    if client_ca is not None and authority is not None:
        _load_authority(context, client_ca, authority)
        context.verify_mode = ssl.CERT_REQUIRED
        context.options |= ssl.OP_NO_TICKET  # a resumed session would not be checked against a new authority
        context.num_tickets = 0
    if read() != (chain, secret, authority):
        raise ValueError(f"{certificate} and {key} changed while they were read")
    return Certificates(chain, secret, authority, context)


def _load_chain(context: ssl.SSLContext, certificate: Path, key: Path, chain: bytes) -> None:
    try:
        context.load_cert_chain(certificate, key, password="")  # without one, OpenSSL would ask the terminal
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ValueError(f"{key} is not the key of the certificate {certificate}") from error
        _load_authority(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), certificate, chain)
        raise ValueError(f"{key} holds no unencrypted private key in PEM form") from error


def _load_authority(context: ssl.SSLContext, path: Path, certificates: bytes) -> None:
    try:
        context.load_verify_locations(cadata=certificates.decode("ascii", "ignore"))
    except (ssl.SSLError, ValueError) as error:
        raise ValueError(f"{path} holds no certificate in PEM form") from error
