"""Certificates in files are reloaded when they change; an invalid change keeps the old ones."""

import logging
import socket
import ssl
import threading
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization as form

from convoy import credentials
from convoy.credentials import CredentialError
from convoy.tls import TlsFiles
from tests.serving.certificates import Authority, Signed, write


@pytest.fixture(autouse=True)
def _look_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credentials, "CHECK_INTERVAL_S", 0.0)


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


def handshake(context: ssl.SSLContext, client: ssl.SSLContext, *, name: str | None = "localhost") -> int:
    """Makes one TLS handshake over a socket pair. Returns the serial number of the certificate that the client saw."""
    ours, theirs = socket.socketpair()
    errors: list[Exception] = []

    def serve() -> None:
        try:
            with context.wrap_socket(ours, server_side=True) as connection:
                connection.sendall(b"!")
        except (OSError, ssl.SSLError) as error:
            errors.append(error)

    serving = threading.Thread(target=serve)
    serving.start()
    try:
        with client.wrap_socket(theirs, server_hostname=name) as connection:
            assert connection.recv(1) == b"!"
            seen = connection.getpeercert(binary_form=True)
    finally:
        serving.join()
    assert seen is not None
    return x509.load_der_x509_certificate(seen).serial_number


def client_context(authority: Authority) -> ssl.SSLContext:
    return ssl.create_default_context(cadata=authority.certificate.decode())


def serial(signed: Signed) -> int:
    return x509.load_pem_x509_certificate(signed.certificate).serial_number


class TestTlsFiles:
    def test_current_returns_the_contents_of_the_files(self, tmp_path: Path, authority: Authority) -> None:
        signed = authority.issue()
        files = TlsFiles(*write(tmp_path, signed))
        now = files.current()
        assert (now.chain, now.key, now.client_ca) == (signed.certificate, signed.key, None)
        assert files.current() is now
        assert not files.requires_client_certificate

    def test_changed_files_are_reloaded(self, tmp_path: Path, authority: Authority) -> None:
        files = TlsFiles(*write(tmp_path, authority.issue()))
        signed = authority.issue()
        write(tmp_path, signed)
        assert (files.current().chain, files.current().key) == (signed.certificate, signed.key)

    def test_a_half_finished_change_keeps_the_old_pair(
        self, tmp_path: Path, authority: Authority, caplog: pytest.LogCaptureFixture
    ) -> None:
        certificate, key = write(tmp_path, authority.issue())
        files = TlsFiles(certificate, key)
        before = files.current()
        signed = authority.issue()
        certificate.write_bytes(signed.certificate)
        assert files.current() is before
        assert files.current() is before
        assert [record.levelno for record in caplog.records] == [logging.WARNING]
        assert f"{key} is not the key of certificate {certificate}" in caplog.text
        key.write_bytes(signed.key)
        assert files.current().key == signed.key

    def test_handshakes_use_the_current_certificate(self, tmp_path: Path, authority: Authority) -> None:
        first, second = authority.issue(), authority.issue()
        context = TlsFiles(*write(tmp_path, first)).server_context()
        client = client_context(authority)
        assert handshake(context, client) == serial(first)
        write(tmp_path, second)
        assert handshake(context, client) == serial(second)

    def test_clients_that_name_no_server_get_the_new_certificate(self, tmp_path: Path, authority: Authority) -> None:
        context = TlsFiles(*write(tmp_path, authority.issue())).server_context()
        second = authority.issue()
        write(tmp_path, second)
        client = client_context(authority)
        client.check_hostname = False
        assert handshake(context, client, name=None) == serial(second)

    def test_clients_without_a_certificate_are_rejected(self, tmp_path: Path, authority: Authority) -> None:
        context, _ = self.mutual(tmp_path, authority)
        with pytest.raises((ssl.SSLError, ConnectionError), match=r"(?i)certificate required|reset"):
            handshake(context, client_context(authority))

    def test_clients_with_a_certificate_are_accepted(self, tmp_path: Path, authority: Authority) -> None:
        context, _ = self.mutual(tmp_path, authority)
        assert handshake(context, self.caller(tmp_path, authority, authority))

    def test_a_new_client_authority_replaces_the_old_one(self, tmp_path: Path, authority: Authority) -> None:
        context, authority_file = self.mutual(tmp_path, authority)
        known = self.caller(tmp_path, authority, authority)
        assert handshake(context, known)
        other = Authority("another authority")
        authority_file.write_bytes(other.certificate)
        with pytest.raises((ssl.SSLError, ConnectionError)):
            handshake(context, known)
        assert handshake(context, self.caller(tmp_path, authority, other))

    def mutual(self, tmp_path: Path, authority: Authority) -> tuple[ssl.SSLContext, Path]:
        authority_file = tmp_path / "ca.crt"
        authority_file.write_bytes(authority.certificate)
        files = TlsFiles(*write(tmp_path, authority.issue()), authority_file)
        assert files.requires_client_certificate
        return files.server_context(), authority_file

    def caller(self, tmp_path: Path, servers: Authority, callers: Authority) -> ssl.SSLContext:
        folder = tmp_path / "caller"
        folder.mkdir(exist_ok=True)
        context = client_context(servers)
        context.load_cert_chain(*write(folder, callers.issue("caller")))
        return context

    def test_a_key_of_another_certificate_is_an_error_at_the_start(self, tmp_path: Path, authority: Authority) -> None:
        certificate, key = write(tmp_path, authority.issue())
        key.write_bytes(authority.issue().key)
        with pytest.raises(CredentialError, match=r"tls\.key is not the key of certificate .*tls\.crt$"):
            TlsFiles(certificate, key)

    @pytest.mark.parametrize("which", ["tls.crt", "tls.key", "ca.crt"])
    @pytest.mark.parametrize("content", [b"", b"no PEM", b"\xff\x00"])
    def test_an_invalid_file_is_named_at_the_start(
        self, tmp_path: Path, authority: Authority, which: str, content: bytes
    ) -> None:
        certificate, key = write(tmp_path, authority.issue())
        (tmp_path / "ca.crt").write_bytes(authority.certificate)
        (tmp_path / which).write_bytes(content)
        with pytest.raises(CredentialError, match=rf"{which} does not hold an? .*in PEM form$"):
            TlsFiles(certificate, key, tmp_path / "ca.crt")

    def test_an_encrypted_key_is_rejected_without_a_prompt(self, tmp_path: Path, authority: Authority) -> None:
        certificate, key = write(tmp_path, authority.issue())
        key.write_bytes(encrypted(key.read_bytes()))
        with pytest.raises(CredentialError, match="does not hold an unencrypted private key"):
            TlsFiles(certificate, key)

    def test_a_missing_file_is_named_at_the_start(self, tmp_path: Path, authority: Authority) -> None:
        certificate, key = write(tmp_path, authority.issue())
        key.unlink()
        with pytest.raises(CredentialError, match=r"cannot read .*tls\.key: No such file or directory"):
            TlsFiles(certificate, key)


def encrypted(key: bytes) -> bytes:
    secret = form.load_pem_private_key(key, None)
    return secret.private_bytes(
        form.Encoding.PEM, form.PrivateFormat.PKCS8, form.BestAvailableEncryption(b"passphrase")
    )
