"""A certificate authority of this installation's own, and the server certificate that its TLS listeners show.

In charge of making both below one folder, of who may read the keys, and of renewing what is close to its end. Not in
charge of who listens with them, nor of certificates that were given: those are read from where the settings say.

    ca.pem      for clients to trust: NODE_EXTRA_CA_CERTS, SSL_CERT_FILE, curl --cacert
    ca.key      root's alone; signs nothing but the server's certificate
    server.pem  the certificate of `<domain>`, `*.<domain>`, `*.tunnel.<domain>` and `*.ssh.<domain>`
    server.key  its key, for the user that serves

Nothing here imports Django: `make up` calls it before there is a database.
"""

from __future__ import annotations

import datetime
import fcntl
import ipaddress
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from config.state import Owner, StateError

DAY: Final = datetime.timedelta(days=1)
CA_DAYS: Final = 3650
CA_SPARE_DAYS: Final = 500
"""An authority with less left is replaced: what it signs must not outlive it."""
SERVER_DAYS: Final = 397
"""More is refused by some clients."""
SERVER_SPARE_DAYS: Final = 90
_DOMAIN: Final = re.compile(r"(?=.{1,200}\Z)[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*")


class CertificateError(StateError):
    """No certificate can be made; the message says why."""


@dataclass(frozen=True)
class Certificates:
    """Where they are, as PEM files."""

    authority: Path
    certificate: Path
    key: Path


def domain_of(named: str, public_url: str) -> str:
    """The installation's domain: `named`, else the public URL's host less a leading `api.` (as its clients reckon),
    else one that resolves to loopback on most systems."""
    host = urlsplit(public_url).hostname or ""
    if not named and re.search(r"[a-z]", host) and ":" not in host and host != "localhost":
        named = host.removeprefix("api.")
    return (named or "berth.localhost").lower()


def names_of(domain: str) -> list[str]:
    """The names that a server of `domain` answers to. Raises CertificateError when it is no domain."""
    if _DOMAIN.fullmatch(domain) is None:
        raise CertificateError(f"{domain[:200]!r} is not a lower-case domain name")
    return [domain, f"*.{domain}", f"*.tunnel.{domain}", f"*.ssh.{domain}", "localhost"]


def ensure(folder: Path, domain: str, reader: Owner | None = None) -> Certificates:
    """Both, made or renewed where that is needed; `reader` is who may read the server's key beside root.

    Cheap and repeatable: what is there and good stays byte for byte. Raises CertificateError, OSError.
    """
    names = names_of(domain)
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    folder.chmod(0o755)
    found = Certificates(folder / "ca.pem", folder / "server.pem", folder / "server.key")
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # held for milliseconds
        now = datetime.datetime.now(datetime.UTC)
        authority = _read(found.authority, folder / "ca.key")
        if authority is None or authority[0].not_valid_after_utc - now < CA_SPARE_DAYS * DAY:
            authority = _make_authority(folder, now)
        server = _read(found.certificate, found.key)
        if server is None or not _is_good(server[0], authority[0], names, now):
            _make_server(found, authority, names, now)
        if reader is not None:
            os.chown(found.key, reader.uid, reader.gid)
    return found


_Pair = tuple[x509.Certificate, ec.EllipticCurvePrivateKey]


def _read(certificate: Path, key: Path) -> _Pair | None:
    """A certificate and its own key, None when they are not there or do not belong together."""
    try:
        made = x509.load_pem_x509_certificate(certificate.read_bytes())
        private = serialization.load_pem_private_key(key.read_bytes(), password=None)
    except (FileNotFoundError, ValueError):
        return None
    if not isinstance(private, ec.EllipticCurvePrivateKey) or private.public_key() != made.public_key():
        return None
    return made, private


def _is_good(server: x509.Certificate, authority: x509.Certificate, names: list[str], now: datetime.datetime) -> bool:
    if server.not_valid_after_utc - now < SERVER_SPARE_DAYS * DAY:
        return False
    try:
        server.verify_directly_issued_by(authority)
        told = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound):
        return False
    return told.get_values_for_type(x509.DNSName) == names


def _make_authority(folder: Path, now: datetime.datetime) -> _Pair:
    key = ec.generate_private_key(ec.SECP256R1())
    # Its own name in every installation: a client that trusts several of one name may try the wrong one.
    mark = x509.random_serial_number()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Berth local authority {mark % 16**8:08x}")])
    made = (
        _builder(name, name, key, now, CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    _write(folder / "ca.key", _private(key), 0o600)
    _write(folder / "ca.pem", made.public_bytes(serialization.Encoding.PEM), 0o644)
    return made, key


def _make_server(found: Certificates, authority: _Pair, names: list[str], now: datetime.datetime) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    ca, ca_key = authority
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Berth server")])
    addresses = [x509.IPAddress(ipaddress.ip_address(address)) for address in ("127.0.0.1", "::1")]
    issuer_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
    made = (
        _builder(name, ca.subject, key, now, SERVER_DAYS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(
            x509.SubjectAlternativeName([*(x509.DNSName(name) for name in names), *addresses]), critical=False
        )
        .add_extension(issuer_id, critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    _write(found.key, _private(key), 0o600)
    _write(found.certificate, made.public_bytes(serialization.Encoding.PEM), 0o644)


def _builder(
    name: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, now: datetime.datetime, days: int
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - DAY)  # a client's clock may be behind
        .not_valid_after(now + days * DAY)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _private(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write(path: Path, data: bytes, mode: int) -> None:
    """Replace a file in one step; its mode is right from its first byte on."""
    fresh = path.with_name(path.name + ".new")
    fresh.unlink(missing_ok=True)
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as out:
        out.write(data)
        os.fchmod(out.fileno(), mode)
        out.flush()
        os.fsync(out.fileno())
    fresh.rename(path)
