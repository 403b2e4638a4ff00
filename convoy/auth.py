"""Credentials of a server that are kept in files: the bearer token of its clients, and its TLS certificates.

Files are read when the server starts, and again when they change: Kubernetes swaps a symbolic link when it rotates a
secret. A file that is then missing or invalid is logged once, and the last valid content stays in use. Checking a file
for changes takes microseconds, so each use checks. Knows no protocol.
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
    """The token that clients must send as `authorization: Bearer TOKEN`. Thread-safe.

    Raises:
        CredentialError: the file cannot be read, or does not hold a token.
    """

    def __init__(self, path: Path) -> None:
        self._file = ReloadingFile([path], lambda: _read_token(path))
        if path.stat().st_mode & stat.S_IROTH:
            logger.warning("token file %s can be read by every user of this machine", path)

    def accepts(self, header: str | None) -> bool:
        """Returns whether the value of an `authorization` header holds the token. Compares in constant time."""
        if header is None:
            return False
        scheme, _, credentials = header.partition(" ")
        token = credentials.strip().encode("utf-8", "backslashreplace")
        return hmac.compare_digest(token, self._file.get()) and scheme.lower() == "bearer"


@dataclass(frozen=True, slots=True)
class Certificates:
    """The contents of the TLS files, read together, so that key and certificate belong to each other.

    Args:
        chain: the server's certificate chain, PEM.
        key: the server's private key, PEM.
        client_ca: certificates of the authorities that sign client certificates, PEM; None if clients need none.
        context: the same for Python's `ssl`.
    """

    chain: bytes
    key: bytes
    client_ca: bytes | None
    context: ssl.SSLContext


class TlsFiles:
    """A server's certificate chain and key, and the authority that signs client certificates. Thread-safe.

    Args:
        client_ca: None if clients need no certificate; else mutual TLS.

    Raises:
        CredentialError: a file cannot be read or is invalid, or the key does not belong to the certificate.
    """

    def __init__(self, certificate: Path, key: Path, client_ca: Path | None = None) -> None:
        self.requires_client_certificate = client_ca is not None
        paths = [path for path in (certificate, key, client_ca) if path is not None]
        self._files = ReloadingFile(paths, lambda: _read_certificates(certificate, key, client_ca))

    def current(self) -> Certificates:
        """Returns the last valid content of the files; the same object until they change."""
        return self._files.get()

    def server_context(self) -> ssl.SSLContext:
        """Returns a context for a TLS server. Each handshake uses the current certificates."""
        context = self.current().context

        def use_current(connection: ssl.SSLSocket | ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> None:
            connection.context = self.current().context

        context.sni_callback = use_current  # called in each handshake, even if the client names no server
        return context


class ReloadingFile(Generic[Value]):
    """A value that is read from files, and read again when one of them changes. Thread-safe.

    Args:
        read: returns the value; raises OSError, or ValueError with a message of one line, if the files are invalid.

    Raises:
        CredentialError: the first read fails.
    """

    def __init__(self, paths: Sequence[Path], read: Callable[[], Value]) -> None:
        self._paths = paths
        self._read = read
        self._lock = threading.Lock()
        self._stamps = self._current_stamps()
        try:
            self._value = read()
        except (OSError, ValueError) as error:
            raise CredentialError(_one_line(error)) from error

    def get(self) -> Value:
        """Returns the value of the last valid content."""
        if self._current_stamps() != self._stamps:
            with self._lock:
                self._reload()
        return self._value

    def _reload(self) -> None:
        stamps = self._current_stamps()  # before reading, so that a change during the read is noticed next time
        if stamps == self._stamps:
            return  # another thread has reloaded
        try:
            self._value = self._read()
            logger.info("reloaded %s", ", ".join(map(str, self._paths)))
        except (OSError, ValueError) as error:
            logger.warning("%s; the previous content stays in use", _one_line(error))
        self._stamps = stamps

    def _current_stamps(self) -> list[tuple[int, ...] | None]:
        return [_stamp(path) for path in self._paths]


def _stamp(path: Path) -> tuple[int, ...] | None:
    """Differs between two versions of a file; None if it does not exist."""
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
        raise ValueError(f"token file {path} must hold one line of printable ASCII without spaces")
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
        context.options |= ssl.OP_NO_TICKET  # a resumed session is not checked against a new authority
        context.num_tickets = 0
    if read() != (chain, secret, authority):
        raise ValueError(f"{certificate} or {key} changed while they were read")
    return Certificates(chain, secret, authority, context)


def _load_chain(context: ssl.SSLContext, certificate: Path, key: Path, chain: bytes) -> None:
    try:
        context.load_cert_chain(
            certificate, key, password=""
        )  # without a password, OpenSSL would prompt on the terminal
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ValueError(f"{key} is not the key of certificate {certificate}") from error
        _load_authority(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), certificate, chain)
        raise ValueError(f"{key} does not hold an unencrypted private key in PEM form") from error


def _load_authority(context: ssl.SSLContext, path: Path, certificates: bytes) -> None:
    try:
        context.load_verify_locations(cadata=certificates.decode("ascii", "ignore"))
    except (ssl.SSLError, ValueError) as error:
        raise ValueError(f"{path} does not hold a certificate in PEM form") from error
