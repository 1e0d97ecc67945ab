"""Settings that contradict each other, said before anything is served. ``manage.py check --deploy`` runs them all."""

from __future__ import annotations

import uuid
from typing import Any

from cryptography.fernet import Fernet
from django.conf import settings
from django.core.checks import CheckMessage, Error, Tags, Warning, register

from config import certificates
from hostd.messages import CAP_MAX, CAP_MIN


def _seal_keys() -> list[CheckMessage]:
    found: list[CheckMessage] = []
    if not settings.SEAL_KEYS:
        found.append(Error("BERTH_SEAL_KEYS is empty: secrets could not be kept.", id="berth.E002"))
    for position, key in enumerate(settings.SEAL_KEYS, 1):
        try:
            Fernet(key)
        except ValueError:
            found.append(
                Error(
                    f"BERTH_SEAL_KEYS: key {position} is not 32 url-safe base64 bytes.",
                    hint="python -c 'from cryptography.fernet import Fernet; print(Fernet.generate_key().decode())'",
                    id="berth.E003",
                )
            )
    return found


def problems() -> list[CheckMessage]:
    """What keeps this installation from being served safely."""
    found = _seal_keys()
    if settings.SECRET_KEY == settings.INSECURE_KEY:
        found.append(Error("BERTH_SECRET_KEY is not set; everybody knows its default.", id="berth.E001"))
    own = settings.BERTH
    try:
        uuid.UUID(own.cluster)
    except ValueError:
        found.append(Error("BERTH_CLUSTER must be a UUID: hosts keep clusters apart by it.", id="berth.E004"))
    if own.SILENT_AFTER >= own.LOST_AFTER:
        found.append(Error("BERTH_SILENT_AFTER must be less than BERTH_LOST_AFTER.", id="berth.E005"))
    if own.EXEC_INLINE > own.OUTPUT_INLINE_MAX:
        found.append(Error("BERTH_EXEC_INLINE may not exceed BERTH_OUTPUT_INLINE_MAX.", id="berth.E006"))
    if not CAP_MIN <= own.OUTPUT_CAP <= CAP_MAX:
        found.append(Error(f"BERTH_OUTPUT_CAP must be {CAP_MIN} to {CAP_MAX} bytes.", id="berth.E010"))
    if not 0 < own.RETENTION_DAYS <= 36_500:
        found.append(Error("BERTH_RETENTION_DAYS must be more than 0 and at most 36500.", id="berth.E011"))
    if own.BODY_MAX > own.BODY_BUDGET:
        found.append(Error("BERTH_BODY_MAX may not exceed BERTH_BODY_BUDGET.", id="berth.E007"))
    if min(own.WSGI_THREADS, own.DATABASE_THREADS, own.WORKER_THREADS) < 1:
        found.append(Error("Every pool needs at least one thread.", id="berth.E008"))
    if own.public_url and not own.public_url.startswith(("http://", "https://")):
        found.append(Error("BERTH_PUBLIC_URL must start with http:// or https://.", id="berth.E009"))
    if not 60 <= own.SSH_KEY_TTL <= 366 * 86_400:
        found.append(Error("BERTH_SSH_KEY_TTL must be a minute to a year, in seconds.", id="berth.E013"))
    try:
        certificates.names_of(own.domain)
    except certificates.CertificateError as error:
        found.append(Error(f"BERTH_DOMAIN: {error}", id="berth.E012"))
    if settings.SECURE and own.public_url.startswith("http://"):
        found.append(Warning("BERTH_SECURE is on, so nobody can log in to the admin over http.", id="berth.W001"))
    return found


@register(Tags.security, deploy=True)
def check_settings(**options: Any) -> list[CheckMessage]:
    return problems()
