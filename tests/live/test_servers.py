"""The private servers: made on first use, closed to others, and with their data after a restart."""

from __future__ import annotations

import os
import stat
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import boto3
import psycopg
import pytest
import redis

from config.servers import Plan, admin_key_file, finish, plan, sshd_port
from config.state import State, StateError
from config.supervisor import Progress, Supervisor

pytestmark = [pytest.mark.live, pytest.mark.skipif(os.getuid() != 0, reason="needs root")]


def _ended(state: State) -> None:
    if user := state.traces().get("user"):
        subprocess.run(["userdel", user], check=True, capture_output=True)


def _start(state: State, given: dict[str, str] | None = None) -> tuple[Supervisor, Plan]:
    supervisor = Supervisor(state, Progress(quiet=True))
    prepared = plan(state, given or {})
    supervisor.start(prepared.services)
    finish(state, prepared)
    return supervisor, prepared


@pytest.fixture(scope="module")
def servers():
    with tempfile.TemporaryDirectory(prefix="berth-servers-") as folder:
        Path(folder).chmod(0o755)
        state = State(Path(folder) / "s")
        state.create()
        supervisor, prepared = _start(state)
        try:
            yield state, supervisor, prepared
        finally:
            supervisor.stop()
            _ended(state)


def test_postgresql_answers_with_fsync_on_and_refuses_a_wrong_password(servers) -> None:
    _, _, prepared = servers
    url = prepared.env["DATABASE_URL"]
    with psycopg.connect(url) as connection:
        assert connection.execute("SHOW fsync").fetchone() == ("on",)
        assert connection.execute("SELECT current_database()").fetchone() == ("berth",)
    elsewhere: tuple[dict[str, Any], ...] = ({}, {"host": "127.0.0.1"})
    for host in elsewhere:
        with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
            psycopg.connect(url, password="wrong", **host)


def test_redis_refuses_who_has_no_password(servers) -> None:
    _, _, prepared = servers
    url = prepared.env["REDIS_URL"]
    assert redis.Redis.from_url(url).ping()
    with pytest.raises(redis.AuthenticationError):
        redis.Redis.from_url("redis://" + url.split("@")[1]).ping()


def test_the_s3_server_serves_ranges_and_refuses_a_wrong_secret(servers) -> None:
    env = servers[2].env

    def client(secret: str):
        return boto3.client(
            "s3",
            endpoint_url=env["S3_ENDPOINT_URL"],
            aws_access_key_id=env["S3_ACCESS_KEY_ID"],
            aws_secret_access_key=secret,
            region_name=env["S3_REGION"],
        )

    good = client(env["S3_SECRET_ACCESS_KEY"])
    good.create_bucket(Bucket="things")
    good.put_object(Bucket="things", Key="a/b", Body=bytes(range(256)))
    answer = good.get_object(Bucket="things", Key="a/b", Range="bytes=16-31")
    assert answer["ResponseMetadata"]["HTTPStatusCode"] == 206
    assert answer["Body"].read() == bytes(range(16, 32))
    with pytest.raises(Exception, match="SignatureDoesNotMatch"):
        client("wrong").list_buckets()


def test_the_loopback_sshd_lets_root_in_with_our_key_only(servers) -> None:
    state = servers[0]
    options = ["StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "BatchMode=yes", "IdentitiesOnly=yes"]

    def log_in(key: str) -> subprocess.CompletedProcess[str]:
        command = ["ssh", "-F", "none", "-i", key, "-p", str(sshd_port(state))]
        for option in options:
            command += ["-o", option]
        return subprocess.run([*command, "root@127.0.0.1", "id -u"], capture_output=True, text=True, timeout=20)

    answer = log_in(str(admin_key_file(state)))
    assert answer.stdout == "0\n", answer.stderr
    refused = log_in("/dev/null")
    assert refused.returncode == 255
    assert "Permission denied (publickey)" in refused.stderr


def test_all_listen_on_loopback_alone_and_run_as_an_unprivileged_user(servers) -> None:
    supervisor = servers[1]
    pids = supervisor.pids()
    listening = subprocess.run(["ss", "-Hltnp"], capture_output=True, text=True, check=True).stdout.splitlines()
    for name, pid in pids.items():
        ours = [line.split()[3] for line in listening if f"pid={pid}," in line]
        assert ours and all(address.startswith("127.0.0.1:") for address in ours), (name, ours)
        owner = Path(f"/proc/{pid}").stat().st_uid
        assert (owner == 0) == (name == "sshd"), (name, owner)


def test_secrets_are_in_files_and_folders_closed_to_others_and_in_no_command_line(servers) -> None:
    state, supervisor, prepared = servers
    for path in ("postgres", "redis", "s3"):
        assert stat.S_IMODE((state.path / path).stat().st_mode) == 0o700
    for path in ("servers.json", "sshd/admin", "sshd/host_key", "redis/redis.conf"):
        assert stat.S_IMODE((state.path / path).stat().st_mode) == 0o600
    secrets = [prepared.env["S3_SECRET_ACCESS_KEY"], prepared.env["REDIS_URL"].split(":")[2].split("@")[0]]
    for pid in supervisor.pids().values():
        line = Path(f"/proc/{pid}/cmdline").read_text()
        assert not any(secret in line for secret in secrets)


def test_a_restart_keeps_addresses_passwords_and_data_but_not_messages(servers) -> None:
    state, supervisor, prepared = servers
    with psycopg.connect(prepared.env["DATABASE_URL"]) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 7 AS n")
    supervisor.stop()
    again, prepared_again = _start(state)
    supervisor._running = again._running  # the fixture's end stops these
    assert prepared_again.env == prepared.env
    with psycopg.connect(prepared.env["DATABASE_URL"]) as connection:
        assert connection.execute("SELECT n FROM kept").fetchone() == (7,)


def test_given_servers_are_used_and_none_is_started() -> None:
    with tempfile.TemporaryDirectory(prefix="berth-servers-") as folder:
        state = State(Path(folder) / "s")
        state.create()
        given = {
            "DATABASE_URL": "postgresql://db.example/x",
            "REDIS_URL": "redis://broker.example/0",
            "S3_ENDPOINT_URL": "https://s3.example",
            "S3_ACCESS_KEY_ID": "a",
            "S3_SECRET_ACCESS_KEY": "b",
            "S3_BUCKET": "c",
        }
        try:
            prepared = plan(state, given)
            assert [service.name for service in prepared.services] == ["sshd"]
            assert prepared.env == given
            with pytest.raises(StateError, match="S3_SECRET_ACCESS_KEY"):
                plan(state, {key: value for key, value in given.items() if key != "S3_SECRET_ACCESS_KEY"})
        finally:
            _ended(state)
