"""The TLS certificates of a server, reread when their files change. Knows no protocol."""

import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from convoy.credentials import CredentialFiles


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
        self._files = CredentialFiles(paths, lambda contents: _load(paths, contents))

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


def _load(paths: Sequence[Path], contents: Sequence[bytes]) -> Certificates:
    """Loads the certificate chain, its key and, if there is a third file, the authority of clients."""
    chain, key = contents[:2]
    authority = contents[2] if len(contents) > 2 else None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    load_chain(context, paths[0], paths[1], chain)
    if authority is not None:
        load_authority(context, paths[2], authority)
        context.verify_mode = ssl.CERT_REQUIRED
        context.options |= ssl.OP_NO_TICKET  # a resumed session is not checked against a new authority
        context.num_tickets = 0
    if [path.read_bytes() for path in paths] != contents:
        raise ValueError(f"{paths[0]} or {paths[1]} changed while they were read")
    return Certificates(chain, key, authority, context)


def load_chain(context: ssl.SSLContext, certificate: Path, key: Path, chain: bytes) -> None:
    """Loads a certificate chain and its key.

    Args:
        chain: the content of `certificate`.

    Raises:
        ValueError: one of them is invalid, or they do not belong together; says why in one line.
    """
    try:
        # Without a password, OpenSSL would prompt on the terminal.
        context.load_cert_chain(certificate, key, password="")
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ValueError(f"{key} is not the key of certificate {certificate}") from error
        load_authority(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), certificate, chain)
        raise ValueError(f"{key} does not hold an unencrypted private key in PEM form") from error


def load_authority(context: ssl.SSLContext, path: Path, certificates: bytes) -> None:
    """Loads the certificates of authorities.

    Args:
        certificates: the content of `path`.

    Raises:
        ValueError: it holds none; says so in one line.
    """
    try:
        context.load_verify_locations(cadata=certificates.decode("ascii", "ignore"))
    except (ssl.SSLError, ValueError) as error:
        raise ValueError(f"{path} does not hold a certificate in PEM form") from error
