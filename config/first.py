"""What a newcomer sees: a first devbox made through the HTTP API like anybody's, and lines to paste.

In charge of the words and of a small HTTP client for them.  Uses the API only, never rows, so that what it shows is
what users get.
"""

from __future__ import annotations

import json
import socket
import ssl
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

from config.state import State
from config.supervisor import NotReady, Progress, StepFailed, is_same_process


def answers(base_url: str) -> None:
    """Raise NotReady until the API answers: a request without a key is refused by code that has read the database."""
    try:
        call(base_url, "GET", "/v1/accounts/me", key="ak_none", timeout=3.0)
    except ApiRefused as refused:
        if refused.status != 401:
            raise NotReady(f"/v1/accounts/me answers {refused.status}: {refused.text[:200]}") from None
    except OSError as error:
        raise NotReady(str(error)) from None


def greets(address: str) -> None:
    """Raise NotReady until an SSH server says its name there."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=2) as connection:
            connection.settimeout(2)
            if not connection.recv(4).startswith(b"SSH-"):
                raise NotReady("no SSH greeting")
    except OSError as error:
        raise NotReady(str(error)) from None


def shakes_hands(address: str) -> None:
    """Raise NotReady until a server speaks TLS there. Whose certificate it shows is its clients' business."""
    host, _, port = address.rpartition(":")
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=2) as plain:
            context.wrap_socket(plain).close()
    except OSError as error:
        raise NotReady(str(error)) from None


class ApiRefused(Exception):
    """The API answered with an error status."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"{status} {text[:500]}")
        self.status, self.text = status, text


def call(base_url: str, method: str, path: str, key: str, body: object = None, timeout: float = 35.0) -> Any:
    """One request with JSON both ways.  Raises ApiRefused, or OSError when there is no answer within ``timeout``
    seconds."""
    request = urllib.request.Request(  # noqa: S310 - the address is the installation's own
        base_url + path,
        method=method,
        data=None if body is None else json.dumps(body).encode(),
        headers={"Authorization": f"Bearer {key}", "Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:  # noqa: S310
            return json.loads(answer.read() or b"null")
    except urllib.error.HTTPError as error:
        raise ApiRefused(error.code, error.read().decode(errors="replace")) from None


def devbox(state: State, base_url: str, say: Progress) -> str | None:
    """Make the first devbox and run ``uname -a`` in it; the output.  Does nothing after it has worked once."""
    marker = state.path / "first-devbox"
    if marker.exists():
        return None
    key = state.api_key_file.read_text().strip()
    try:
        box = call(base_url, "POST", "/v1/devboxes", key, {"name": "first"})
        say(f"devbox       {box['id']} asked for")
        for _ in range(10):
            if box["status"] not in ("provisioning", "initializing"):
                break
            try:
                wanted = {"statuses": ["running", "failure", "shutdown"], "timeout_seconds": 30}
                box = call(base_url, "POST", f"/v1/devboxes/{box['id']}/wait_for_status", key, wanted, timeout=45.0)
            except ApiRefused as refused:
                if refused.status != 408:
                    raise
        if box["status"] != "running":
            raise StepFailed(
                "devbox", f"{box['id']} is {box['status']}: {box.get('failure_reason')}", state.logs / "worker.log"
            )
        say(f"devbox       {box['id']} running")
        result = call(
            base_url, "POST", f"/v1/devboxes/{box['id']}/execute_sync", key, {"command": "uname -a"}, timeout=60.0
        )
    except (ApiRefused, OSError) as error:
        raise StepFailed("devbox", str(error), state.logs / "web.log") from error
    if result.get("exit_status") != 0:
        raise StepFailed("devbox", f"uname -a ended with {result}", state.logs / "worker.log")
    marker.write_text(box["id"] + "\n")
    return f"$ uname -a      in devbox {box['id']}\n{result['stdout']}"


def supervisor_facts(state: State) -> dict[str, Any] | None:
    """What the supervisor of this folder wrote about itself; None when none runs."""
    try:
        facts: dict[str, Any] = json.loads(state.supervisor_file.read_text())
    except (OSError, json.JSONDecodeError):
        return None
    return facts if is_same_process(facts["pid"], facts["started"]) else None


def running(state: State) -> dict[str, Any] | None:
    """The facts of a running supervisor that has finished its start; None when there is none."""
    facts = supervisor_facts(state)
    return facts if facts and facts.get("ready") else None


def lines_to_paste(state: State, url: str, key: str, ssh: str) -> dict[str, str]:
    """For each client, lines that work as they stand in a shell. `ssh`: address:port of the plain SSH listener."""
    python = f"""\
python3.11 -m venv ~/berth-sdk && ~/berth-sdk/bin/pip install --quiet runloop_api_client
~/berth-sdk/bin/python - <<'END'
from runloop_api_client import Runloop
client = Runloop(base_url="{url}", bearer_token="{key}")
box = client.devboxes.create_and_await_running(name="mine")
print(client.devboxes.execute_and_await_completion(box.id, command="uname -a").stdout)
client.devboxes.shutdown(box.id)
END
"""
    typescript = f"""\
mkdir -p ~/berth-ts && cd ~/berth-ts && npm install --silent @runloop/api-client
node --input-type=module - <<'END'
import {{ Runloop }} from '@runloop/api-client';
const client = new Runloop({{ baseURL: '{url}', bearerToken: '{key}' }});
const box = await client.devboxes.createAndAwaitRunning({{ name: 'mine' }});
console.log((await client.devboxes.executeAndAwaitCompletion(box.id, {{ command: 'uname -a' }})).stdout);
await client.devboxes.shutdown(box.id);
END
"""
    curl = f"""\
curl {url}/v1/devboxes -H 'Authorization: Bearer {key}' \\
     -H 'Content-Type: application/json' -d '{{"name": "mine"}}'
"""
    host, _, port = ssh.rpartition(":")
    shell = f"""\
box=$(curl -s {url}/v1/devboxes/create_and_await_running -H 'Authorization: Bearer {key}' \\
      -H 'Content-Type: application/json' -d '{{"name": "mine"}}' | grep -om1 'dbx_[0-9a-z]*' | head -1)
(umask 077; curl -s -X POST {url}/v1/devboxes/$box/create_ssh_key -H 'Authorization: Bearer {key}' \\
      | python3 -c 'import json, sys; print(json.load(sys.stdin)["ssh_private_key"], end="")' > ~/$box.pem)
ssh -i ~/$box.pem -o UserKnownHostsFile={state.known_hosts_file} -p {port} $box@{host.strip("[]")}
"""
    return {"Python": python, "TypeScript, with Node.js 18 or newer": typescript, "curl": curl, "SSH": shell}


def show(state: State, facts: Mapping[str, Any], output: str | None) -> None:
    """Print the output of the first devbox, the address, where the key is, and lines that work when pasted."""
    url = facts["base_url"]
    key = state.api_key_file.read_text().strip()
    lines = "\n".join(f"# {name}\n{text}" for name, text in lines_to_paste(state, url, key, facts["ssh"]).items())
    served = f"https://{facts['tls']}   for api.{facts['domain']} and *.tunnel.{facts['domain']}"
    text = f"""
{output or ""}
API       {url}          docs: {url}/docs/
TLS       {served if facts["tls"] else "off"}
Key       {key}          (kept in {state.api_key_file})
Admin     {url}/admin/   (user and password in {state.admin_file})
SSH       {facts["ssh"]}, for devbox_id@; {facts["ssh_tls"]} with TLS, for the url of create_ssh_key
Trust     {state.path / "tls" / "ca.pem"}   (the authority of the TLS listeners)
Logs      {state.logs}

{lines}
Ctrl-C ends this machine's devboxes and stops everything; data stays.
"""
    sys.stdout.write(text)
    sys.stdout.flush()
