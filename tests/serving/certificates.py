"""Makes certificates for tests: an authority, and certificates that it signs."""

import datetime
import inspect
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

_DAY = datetime.timedelta(days=1)
_USAGES = tuple(inspect.signature(x509.KeyUsage).parameters)


@dataclass(frozen=True)
class Signed:
    """A certificate and its key, in PEM form."""

    certificate: bytes
    key: bytes


class Authority:
    """Signs certificates for 127.0.0.1 and localhost."""

    def __init__(self, name: str = "test authority") -> None:
        self._name = _name(name)
        self._key = ec.generate_private_key(ec.SECP256R1())
        usage = x509.KeyUsage(**dict.fromkeys(_USAGES, False) | {"key_cert_sign": True})
        extensions = x509.BasicConstraints(ca=True, path_length=0), usage
        self.certificate = _pem(_sign(self._name, self._name, self._key, self._key, *extensions))

    def issue(self, name: str = "localhost") -> Signed:
        key = ec.generate_private_key(ec.SECP256R1())
        hosts = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        certificate = _sign(_name(name), self._name, key, self._key, x509.SubjectAlternativeName(hosts))
        secret = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return Signed(_pem(certificate), secret)


def write(folder: Path, signed: Signed) -> tuple[Path, Path]:
    """Writes certificate and key to files, one after the other, each by one rename. Returns their paths."""
    paths = folder / "tls.crt", folder / "tls.key"
    for path, content in zip(paths, (signed.certificate, signed.key), strict=True):
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(content)
        temporary.replace(path)
    return paths


def _name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _sign(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    issuer_key: ec.EllipticCurvePrivateKey,
    *extensions: x509.ExtensionType,
) -> x509.Certificate:
    """Signs with the key identifiers that Python 3.13 and later ask for."""
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _DAY)
        .not_valid_after(now + _DAY)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )
    for extension in extensions:
        builder = builder.add_extension(extension, critical=not isinstance(extension, x509.SubjectAlternativeName))
    return builder.sign(issuer_key, hashes.SHA256())


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
