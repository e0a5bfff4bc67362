"""The certificates of direct connections: self-signed, and trusted for the fingerprint that their owner signs.

Nobody but the pinned certificate is trusted: each connection has a TLS context in which the other side's is the only
one. OpenSSL refuses any other, and one that has expired; the private key behind it never leaves its folder.
"""

import hashlib
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Self

from dugnad.dht.identity import PeerId, write_private

LASTS = timedelta(days=2 * 365)
RENEW_BEFORE = timedelta(days=365)
"""So long before its end a new one is made at the next start: no process runs for longer than a year without one."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """Our own: the file with key and certificate, and the certificate in DER."""

    file: Path
    der: bytes

    @property
    def fingerprint(self) -> bytes:
        """See `fingerprint`."""
        return fingerprint(self.der)

    @classmethod
    def load_or_create(cls, file: Path, owner: PeerId, *, now: datetime | None = None) -> Self:
        """The certificate kept in `file` (PEM, mode 0600), made anew if there is none that lasts. Raises OSError."""
        now = now or datetime.now(UTC)
        try:
            der = ssl.PEM_cert_to_DER_cert(_certificate_in(file.read_text("ascii")))
            if now < _ends(der) - RENEW_BEFORE:
                return cls(file, der)
        except (FileNotFoundError, ValueError):
            pass
        pem, der = _make(owner, now)
        write_private(file, pem)
        return cls(file, der)

    def context(self, *, dialler: bool, trusted: bytes) -> ssl.SSLContext:
        """For one connection: TLS 1.3, ours shown, and no other than `trusted` (DER) taken. Raises ssl.SSLError."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT if dialler else ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False  # names mean nothing here, only the certificate itself
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_cert_chain(self.file)
        context.load_verify_locations(cadata=trusted)
        if not dialler:
            context.num_tickets = 0  # nothing is resumed: each connection is checked anew
        return context


def fingerprint(der: bytes) -> bytes:
    """What pins a certificate: its sha256, 32 bytes."""
    return hashlib.sha256(der).digest()


def _certificate_in(pem: str) -> str:
    begin, end = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"
    start = pem.index(begin)
    return pem[start : pem.index(end, start) + len(end)]


def _ends(der: bytes) -> datetime:
    from cryptography import x509

    return x509.load_der_x509_certificate(der).not_valid_after_utc


def _make(owner: PeerId, now: datetime) -> tuple[bytes, bytes]:
    """(PEM of key and certificate, DER of the certificate)."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, owner)])
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime(2000, 1, 1, tzinfo=UTC))  # a clock that is behind must not keep its owner out
        .not_valid_after(now + LASTS)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    der = made.public_bytes(serialization.Encoding.DER)
    return private + made.public_bytes(serialization.Encoding.PEM), der
