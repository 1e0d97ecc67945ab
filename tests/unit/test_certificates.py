"""The installation's own certificate authority: what it makes, keeps, renews, and who may read it."""

from __future__ import annotations

import datetime
import os
import socket
import ssl
import stat
import threading

import pytest

from config import certificates

DOMAIN = "berth.test"


def shown_to(found: certificates.Certificates, name: str) -> bytes:
    """A handshake with verification, as a client that trusts the authority does it."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(found.certificate, found.key)
    client = ssl.create_default_context(cafile=str(found.authority))
    ours, theirs = socket.socketpair()

    def serve():
        try:
            with server.wrap_socket(theirs, server_side=True) as sock:
                sock.recv(1)
        except OSError:
            pass

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        with client.wrap_socket(ours, server_hostname=name) as sock:
            return sock.getpeercert(binary_form=True) or b""
    finally:
        ours.close()
        thread.join(10)
        theirs.close()


@pytest.mark.parametrize("name", [DOMAIN, f"api.{DOMAIN}", f"8080-abc.tunnel.{DOMAIN}", f"x.ssh.{DOMAIN}", "localhost"])
def test_clients_that_trust_the_authority_take_every_name(tmp_path, name):
    assert shown_to(certificates.ensure(tmp_path, DOMAIN), name)


def test_other_names_are_not_vouched_for(tmp_path):
    found = certificates.ensure(tmp_path, DOMAIN)
    with pytest.raises(ssl.SSLCertVerificationError):
        shown_to(found, "example.com")


def test_keys_are_closed_and_nothing_changes_the_second_time(tmp_path):
    found = certificates.ensure(tmp_path, DOMAIN)
    for key in (found.key, tmp_path / "ca.key"):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert certificates.ensure(tmp_path, DOMAIN) == found
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_another_domain_has_another_certificate_of_the_same_authority(tmp_path):
    first = certificates.ensure(tmp_path, DOMAIN)
    authority = first.authority.read_bytes()
    certificates.ensure(tmp_path, "other.test")
    assert first.authority.read_bytes() == authority
    assert shown_to(first, "api.other.test")


def test_the_servers_certificate_is_renewed_before_it_ends(tmp_path, monkeypatch):
    found = certificates.ensure(tmp_path, DOMAIN)
    old, authority = found.certificate.read_bytes(), found.authority.read_bytes()
    _later(monkeypatch, days=certificates.SERVER_DAYS - certificates.SERVER_SPARE_DAYS + 1)
    certificates.ensure(tmp_path, DOMAIN)
    assert found.certificate.read_bytes() != old
    assert found.authority.read_bytes() == authority
    _later(monkeypatch, days=certificates.CA_DAYS - certificates.CA_SPARE_DAYS + 1)
    certificates.ensure(tmp_path, DOMAIN)
    assert found.authority.read_bytes() != authority


@pytest.mark.parametrize("broken", ["server.pem", "server.key", "ca.key"])
def test_what_is_damaged_is_made_anew(tmp_path, broken):
    found = certificates.ensure(tmp_path, DOMAIN)
    (tmp_path / broken).write_text("no PEM")
    certificates.ensure(tmp_path, DOMAIN)
    assert shown_to(found, f"api.{DOMAIN}")


def test_a_key_of_another_authority_is_not_kept(tmp_path):
    found = certificates.ensure(tmp_path / "a", DOMAIN)
    other = certificates.ensure(tmp_path / "b", DOMAIN)
    os.replace(other.certificate, found.certificate)
    os.replace(other.key, found.key)
    certificates.ensure(tmp_path / "a", DOMAIN)
    assert shown_to(found, DOMAIN)


@pytest.mark.parametrize("domain", ["", "Berth.test", "a..b", "-a.test", "a b", "a/b", "*.test", "x" * 64 + ".test"])
def test_what_is_no_domain_is_refused(tmp_path, domain):
    with pytest.raises(certificates.CertificateError):
        certificates.ensure(tmp_path, domain)


def _later(monkeypatch, days):
    class Later(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.datetime.now(tz) + datetime.timedelta(days=days)

    fake = type("module", (), {"datetime": Later, "UTC": datetime.UTC, "timedelta": datetime.timedelta})
    monkeypatch.setattr(certificates, "datetime", fake)


@pytest.mark.parametrize(
    ("named", "url", "domain"),
    [
        ("Dev.Example.com", "https://api.other.com", "dev.example.com"),
        ("", "https://api.example.com", "example.com"),
        ("", "https://berth.example.com:8443/x", "berth.example.com"),
        ("", "http://192.0.2.1:8420", "berth.localhost"),
        ("", "http://[2001:db8::1]", "berth.localhost"),
        ("", "http://localhost:8420", "berth.localhost"),
        ("", "", "berth.localhost"),
    ],
)
def test_the_domain_follows_the_public_address(named, url, domain):
    assert certificates.domain_of(named, url) == domain
