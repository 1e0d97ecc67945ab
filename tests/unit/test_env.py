"""The environment: a state folder's file below the real environment, and types that say which variable is wrong."""

import os
import subprocess
import sys

import pytest

from tests.house.tree import PROJECT


def read(expression, tmp_path, **environment):
    program = f"from config import env; print(repr(({expression})))"
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=PROJECT,
        env={"PATH": os.environ["PATH"], "BERTH_STATE": str(tmp_path), **environment},
        capture_output=True,
        text=True,
    )
    return run.stdout.strip() if run.returncode == 0 else run.stderr.strip().splitlines()[-1]


def test_the_real_environment_wins_over_the_file(tmp_path):
    (tmp_path / "env").write_text("# made by make up\nA=from file\nB= x = y \n\nC=\n")
    assert read("env.text('A'), env.text('B'), env.text('C', 'none')", tmp_path) == "('from file', 'x = y', 'none')"
    assert read("env.text('A')", tmp_path, A="from environment") == "'from environment'"
    assert read("env.text('A')", tmp_path, A="") == "'from file'"


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("env.whole('N', 7)", "7"),
        ("env.words('N', ('a',))", "['a']"),
        ("env.flag('N', True)", "True"),
        ("env.text('N', None)", "None"),
    ],
)
def test_defaults(tmp_path, expression, result):
    assert read(expression, tmp_path) == result


@pytest.mark.parametrize("expression", ["env.whole('N', 1)", "env.number('N', 1)", "env.flag('N')"])
def test_a_wrong_value_is_named(tmp_path, expression):
    answer = read(expression, tmp_path, N="many")
    assert "BadEnvironment" in answer and "N='many'" in answer


def test_words(tmp_path):
    assert read("env.words('N')", tmp_path, N=" a, ,b,") == "['a', 'b']"


def settings_of(expression, **environment):
    program = f"from django.conf import settings as s; print(repr(({expression})))"
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=PROJECT,
        env={"PATH": os.environ["PATH"], "DJANGO_SETTINGS_MODULE": "config.settings", **environment},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_admin_cookies_cannot_be_set_by_a_sibling_where_https_is():
    cookies = "s.SESSION_COOKIE_NAME, s.CSRF_COOKIE_NAME, s.SESSION_COOKIE_SECURE"
    assert settings_of(cookies) == "('berth_session', 'berth_csrf', False)"
    secure = settings_of(cookies, BERTH_PUBLIC_URL="https://berth.example.com")
    assert secure == "('__Host-berth_session', '__Host-berth_csrf', True)"


def test_a_database_url_with_a_socket_folder():
    url = "postgresql://berth:p%40ss@/berth?host=/run/x&port=5433&application_name=web"
    database = "[s.DATABASES['default'][k] for k in ('NAME', 'USER', 'PASSWORD', 'HOST', 'PORT')]"
    assert settings_of(database, DATABASE_URL=url) == "['berth', 'berth', 'p@ss', '/run/x', '5433']"
    assert settings_of("s.DATABASES['default']['OPTIONS']['application_name']", DATABASE_URL=url) == "'web'"


def test_nothing_is_served_with_a_known_key():
    program = "import config.asgi"
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=PROJECT, env={"PATH": os.environ["PATH"]}, capture_output=True
    )
    assert run.returncode != 0
    for name in (b"BERTH_SECRET_KEY", b"BERTH_SEAL_KEYS", b"BERTH_CLUSTER"):
        assert name in run.stderr
