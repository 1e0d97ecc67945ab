"""Keys: making one for a link, reading one, and the words people compare by eye. Opens no connection."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import struct

import paramiko
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey


@dataclasses.dataclass(frozen=True, slots=True)
class Login:
    """How to reach a host as one user. `host_key`: "type base64"; `private_key`: PEM text without a passphrase."""

    address: str
    port: int
    user: str
    private_key: str = dataclasses.field(repr=False)
    host_key: str


def new_key(comment: str) -> tuple[str, str]:
    """A fresh Ed25519 pair: the private key as OpenSSH's PEM text, the public key as a line for authorized_keys."""
    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return private.decode(), f"{public.decode()} {comment}"


def load_key(private_key: str) -> paramiko.PKey:
    """The key of a PEM text. Raises ValueError when it is none, or is locked by a passphrase."""
    for kind in (paramiko.Ed25519Key, paramiko.ECDSAKey, paramiko.RSAKey):
        try:
            return kind.from_private_key(io.StringIO(private_key))
        except paramiko.PasswordRequiredException:
            raise ValueError("the private key is locked by a passphrase") from None
        except (paramiko.SSHException, ValueError, IndexError, struct.error):
            continue
    raise ValueError("not a private key of type ed25519, ecdsa or rsa")


def public_key(private_key: str) -> str:
    """The "type base64" of a private key's public half. Raises ValueError as `load_key`."""
    key = load_key(private_key)
    return f"{key.get_name()} {key.get_base64()}"


def pinned(host_key: str) -> paramiko.PKey:
    """The public key of "type base64". Raises ValueError when it is none."""
    try:
        kind, text = host_key.split()[:2]
        key = paramiko.PKey.from_type_string(kind, base64.b64decode(text, validate=True))
    except (ValueError, paramiko.SSHException, paramiko.pkey.UnknownKeyType) as error:
        raise ValueError(f"not a host key: {host_key[:40]!r}") from error
    return key


def fingerprint(host_key: str) -> str:
    """OpenSSH's SHA256 fingerprint of "type base64"."""
    digest = hashlib.sha256(base64.b64decode(host_key.split()[1])).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")
