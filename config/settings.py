"""Django's settings: one module, every value from ``config.env``.

``BERTH`` holds the product's own settings with their units in the names; everything else is Django's, DRF's or a
library's. Nothing here opens a file or a socket.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any
from urllib.parse import urlsplit

import django_stubs_ext
import psycopg.conninfo

import config  # noqa: F401  (settles the name ``pty`` whoever imported the settings)
from config import certificates, env

django_stubs_ext.monkeypatch()  # lets classes such as ModelAdmin[Host] say what they are for

PROJECT = pathlib.Path(__file__).resolve().parent.parent
STATE = pathlib.Path(env.text("BERTH_STATE")) if env.text("BERTH_STATE") else None

MIB = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Berth:
    """The product's settings. Times are seconds, sizes bytes unless the name says otherwise."""

    cluster: str = env.text("BERTH_CLUSTER")
    bind: str = env.text("BERTH_BIND", "127.0.0.1:8080")
    public_url: str = env.text("BERTH_PUBLIC_URL")
    # Addresses of balancers in front of us, whose word is taken on where a request came from.
    PROXIES: tuple[str, ...] = tuple(env.words("BERTH_PROXIES"))
    # The names below it are tunnels' and devboxes': {port}-{key}.tunnel.<domain>, <devbox>.ssh.<domain>.
    domain: str = certificates.domain_of(env.text("BERTH_DOMAIN"), env.text("BERTH_PUBLIC_URL"))
    warm: int = env.whole("BERTH_WARM", 0)

    # Silence of hosts
    SILENT_AFTER: float = env.number("BERTH_SILENT_AFTER", 10.0)
    LOST_AFTER: float = env.number("BERTH_LOST_AFTER", 900.0)
    PLACE_FOR: float = env.number("BERTH_PLACE_FOR", 300.0)

    # Outputs of commands
    EXEC_INLINE: int = env.whole("BERTH_EXEC_INLINE", 64 * 1024)
    OUTPUT_INLINE_MAX: int = env.whole("BERTH_OUTPUT_INLINE_MAX", 16 * MIB)
    COMMAND_MAX: int = env.whole("BERTH_COMMAND_MAX", MIB)
    # Kept of each stream of a command: its head and its tail, half each; the command goes on.
    OUTPUT_CAP: int = env.whole("BERTH_OUTPUT_CAP", 256 * MIB)
    # How long commands and their outputs are kept after they, or after their devbox, have ended.
    RETENTION_DAYS: float = env.number("BERTH_RETENTION_DAYS", 30.0)

    # Logs of devboxes
    LOGS_MAX: int = env.whole("BERTH_LOGS_MAX", 5000)
    LOGS_KEPT: float = env.number("BERTH_LOGS_KEPT", 7 * 86_400.0)
    LOGS_ROWS_MAX: int = env.whole("BERTH_LOGS_ROWS_MAX", 20_000)
    STATS_SECONDS: int = env.whole("BERTH_STATS_SECONDS", 60)
    STATS_KEPT: float = env.number("BERTH_STATS_KEPT", 86_400.0)

    # Overcommit: what may be promised per real unit
    OVERCOMMIT_CPU: float = env.number("BERTH_OVERCOMMIT_CPU", 8.0)
    OVERCOMMIT_MEMORY: float = env.number("BERTH_OVERCOMMIT_MEMORY", 2.0)
    OVERCOMMIT_DISK: float = env.number("BERTH_OVERCOMMIT_DISK", 2.0)

    # Caps of an account that has none of its own
    CAP_RUNNING_DEVBOXES: int = env.whole("BERTH_CAP_RUNNING_DEVBOXES", 100)
    CAP_EXECUTIONS: int = env.whole("BERTH_CAP_EXECUTIONS", 1000)
    CAP_SHELLS: int = env.whole("BERTH_CAP_SHELLS", 64)
    CAP_STREAMS: int = env.whole("BERTH_CAP_STREAMS", 1000)

    # The web tier, per process
    WSGI_THREADS: int = env.whole("BERTH_WSGI_THREADS", 4)
    WSGI_QUEUE: int = env.whole("BERTH_WSGI_QUEUE", 1024)
    DATABASE_THREADS: int = env.whole("BERTH_DATABASE_THREADS", 8)
    DATABASE_QUEUE: int = env.whole("BERTH_DATABASE_QUEUE", 16384)
    PTY_IDLE_TTL: int = env.whole("BERTH_PTY_IDLE_TTL", 300)
    BODY_MAX: int = env.whole("BERTH_BODY_MAX", 16 * MIB)
    BODY_BUDGET: int = env.whole("BERTH_BODY_BUDGET", 256 * MIB)
    BODY_IDLE: float = env.number("BERTH_BODY_IDLE", 30.0)
    SEND_IDLE: float = env.number("BERTH_SEND_IDLE", 120.0)

    # SSH into devboxes: how long a key is valid, and where `serve_ssh` listens, without TLS and with it.
    SSH_KEY_TTL: float = env.number("BERTH_SSH_KEY_TTL", 86_400.0)
    ssh_bind: str = env.text("BERTH_SSH_BIND", "127.0.0.1:8422")
    ssh_tls_bind: str = env.text("BERTH_SSH_TLS_BIND", "127.0.0.1:8443")

    # Names a file by which tests make a worker kill itself at a point of a flow (flows.faults); never set otherwise.
    FAULT_FILE: str = env.text("BERTH_FAULT_FILE")

    WORKER_THREADS: int = env.whole("BERTH_WORKER_THREADS", 16)
    HINTS_CHANNEL: str = "hints"


BERTH = Berth()

# A key that is known to everybody lets commands such as makemigrations run on a bare checkout; config.checks refuses
# to serve with it.
INSECURE_KEY = "insecure: set BERTH_SECRET_KEY"
SECRET_KEY = env.text("BERTH_SECRET_KEY", INSECURE_KEY)
SEAL_KEYS = env.words("BERTH_SEAL_KEYS")
DEBUG = False
# The names the admin and the docs page answer to; the API answers to any. The addresses we were told are among them.
ALLOWED_HOSTS = [
    *env.words("BERTH_ALLOWED_HOSTS", ("localhost", "127.0.0.1", "[::1]")),
    *(host for host in (BERTH.bind.rpartition(":")[0], urlsplit(BERTH.public_url).hostname) if host),
]

DATABASE_URL = env.text("DATABASE_URL", "postgresql:///berth")
REDIS_URL = env.text("REDIS_URL", "redis://127.0.0.1:6379/0")
S3 = {
    "endpoint_url": env.text("S3_ENDPOINT_URL"),
    # At which hosts reach it; the same unless it is given.
    "endpoint_for_hosts": env.text("S3_ENDPOINT_FOR_HOSTS"),
    # AES256, aws:kms, or aws:kms/<key id>: S3 then encrypts what it keeps.
    "encryption": env.text("S3_ENCRYPTION"),
    "access_key_id": env.text("S3_ACCESS_KEY_ID"),
    "secret_access_key": env.text("S3_SECRET_ACCESS_KEY"),
    "bucket": env.text("S3_BUCKET", "berth"),
    "region": env.text("S3_REGION", "us-east-1"),
}


CLIENT_API_KEY = env.text("RUNLOOP_API_KEY")  # of whoever runs `manage.py pty_proxy`

# What the TLS listeners show, as PEM files: those of `make up`'s own authority unless others are named.
_TLS = STATE / "tls" if STATE else None
TLS_CERTIFICATE = env.text("BERTH_TLS_CERTIFICATE", str(_TLS / "server.pem") if _TLS else "")
TLS_KEY = env.text("BERTH_TLS_KEY", str(_TLS / "server.key") if _TLS else "")


def _database(url: str) -> dict[str, Any]:
    parts = dict(psycopg.conninfo.conninfo_to_dict(url))
    return {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": parts.pop("dbname", "") or "berth",
        "USER": parts.pop("user", "") or "",
        "PASSWORD": parts.pop("password", "") or "",
        "HOST": parts.pop("host", "") or "",
        "PORT": str(parts.pop("port", "") or ""),
        "CONN_MAX_AGE": None,
        "OPTIONS": {
            "connect_timeout": 5,
            # A server that vanished is noticed within half a minute, whoever is waiting for it.
            "keepalives_idle": 10,
            "keepalives_interval": 5,
            "keepalives_count": 3,
            "tcp_user_timeout": 20_000,
            # Django's own cursors bind on the client and never prepare; this is for api.prepared's.
            "prepare_threshold": 2,
            **parts,
        },
    }


DATABASES = {"default": _database(DATABASE_URL)}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
SILENCED_SYSTEM_CHECKS: list[str] = []

APPS = [
    "api",
    "accounts",
    "flows",
    "hosts",
    "storage",
    "snapshots",  # before devboxes: of two URLs that fit, the first is taken
    "devboxes",
    "executions",
    "files",
    "pty",
    "ssh_access",
    "tunnels",
]
APPS = [app for app in APPS if (PROJECT / app / "__init__.py").exists()]

INSTALLED_APPS = [
    "unfold",
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
    "rest_framework",
    "drf_spectacular",
    "drf_spectacular_sidecar",
    *APPS,
    "config",  # for its commands
]

# The admin and the docs page go through these; the API does not (config.wsgi_bridge).
MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "whitenoise.middleware.WhiteNoiseMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
]
APPEND_SLASH = False  # a redirect loses the body, and some clients follow none

ROOT_URLCONF = "config.urls"
ASGI_APPLICATION = "config.asgi.application"
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "DIRS": [PROJECT / "config" / "templates"],
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ]
        },
    }
]

LANGUAGE_CODE = "en"
USE_I18N = False
USE_TZ = True
TIME_ZONE = "UTC"

STATIC_URL = "/static/"
WEB_FILES = PROJECT / "build" / "web"
STATICFILES_DIRS = [("xterm", WEB_FILES)] if WEB_FILES.is_dir() else []
WHITENOISE_USE_FINDERS = True  # served from the packages themselves: there is nothing to collect
WHITENOISE_AUTOREFRESH = False

AUTH_PASSWORD_VALIDATORS = [
    {"NAME": "django.contrib.auth.password_validation.MinimumLengthValidator", "OPTIONS": {"min_length": 12}},
    {"NAME": "django.contrib.auth.password_validation.CommonPasswordValidator"},
]
# Tunnels are same-site with the admin: a __Host- cookie cannot be set by a sibling name. Only https may carry one.
SECURE = env.flag("BERTH_SECURE", default=BERTH.public_url.startswith("https://"))
_host = "__Host-" if SECURE else ""
SESSION_COOKIE_NAME = f"{_host}berth_session"
CSRF_COOKIE_NAME = f"{_host}berth_csrf"
SESSION_COOKIE_SECURE = CSRF_COOKIE_SECURE = SECURE
SESSION_COOKIE_HTTPONLY = CSRF_COOKIE_HTTPONLY = True
SESSION_COOKIE_SAMESITE = CSRF_COOKIE_SAMESITE = "Strict"
CSRF_TRUSTED_ORIGINS = [BERTH.public_url] if BERTH.public_url.startswith("https://") else []
SECURE_CONTENT_TYPE_NOSNIFF = True
DATA_UPLOAD_MAX_MEMORY_SIZE = BERTH.BODY_MAX
X_FRAME_OPTIONS = "DENY"

UNFOLD = {
    "SITE_TITLE": "Berth",
    "SITE_HEADER": "Berth",
    "SITE_SUBHEADER": "Devboxes, hosts and accounts",
    "SITE_SYMBOL": "sailing",
    "SHOW_HISTORY": True,
    "SHOW_VIEW_ON_SITE": False,
    "SIDEBAR": {"show_search": True, "show_all_applications": True},
}

# How the frame finds the caller without importing accounts.
AUTHENTICATE = "accounts.authentication.authenticate"
REST_FRAMEWORK = {
    "DEFAULT_AUTHENTICATION_CLASSES": ["accounts.authentication.ApiKeyAuthentication"],
    "DEFAULT_PERMISSION_CLASSES": ["api.permissions.CallerMay"],
    "DEFAULT_RENDERER_CLASSES": ["api.rendering.JSONRenderer"],
    "DEFAULT_PARSER_CLASSES": ["api.rendering.JSONParser"],
    "DEFAULT_CONTENT_NEGOTIATION_CLASS": "api.rendering.AlwaysJSON",
    "DEFAULT_SCHEMA_CLASS": "api.schema.Schema",
    "EXCEPTION_HANDLER": "api.errors.handle_exception",
    "UNAUTHENTICATED_USER": None,
    "UNAUTHENTICATED_TOKEN": None,
    "URL_FORMAT_OVERRIDE": None,
}
SPECTACULAR_SETTINGS = {
    "TITLE": "Berth Devbox API",
    "VERSION": "1",
    "SERVERS": [],
    "DESCRIPTION": "Devboxes, commands, files and terminals of a self-hosted devbox cloud.",
    "SERVE_INCLUDE_SCHEMA": False,
    "SCHEMA_PATH_PREFIX": "/v1",
    "COMPONENT_SPLIT_REQUEST": False,
    "ENUM_GENERATE_CHOICE_DESCRIPTION": False,
    "SWAGGER_UI_DIST": "SIDECAR",
    "SWAGGER_UI_FAVICON_HREF": "SIDECAR",
    "REDOC_DIST": "SIDECAR",
    "POSTPROCESSING_HOOKS": ["api.schema.finish"],  # enums stay where they are used,
}

LOGGING: dict[str, Any] = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"format": "%(asctime)s %(levelname)s %(name)s %(threadName)s %(message)s"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line"}},
    "root": {"handlers": ["stderr"], "level": env.text("BERTH_LOG_LEVEL", "INFO")},
    "loggers": {
        "paramiko": {"level": "WARNING"},
        "botocore": {"level": "WARNING"},
        "asyncssh": {"level": "WARNING"},  # it would write down what people run
        # Two lines for every task cost a third of a short command's time; the rows tell what was done.
        "celery.worker.strategy": {"level": "WARNING"},
        "celery.app.trace": {"level": "WARNING"},
        # Answers below 500 are the client's business; a 404 scan must not fill the log.
        "django.request": {"level": "ERROR"},
    },
}
