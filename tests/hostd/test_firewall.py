"""The rules as a text. That they hold is tested from inside boxes (test_boxes.py)."""

from __future__ import annotations

import ipaddress
import os
import re
import shutil
import subprocess

import pytest

from hostd import config, firewall
from hostd.config import HostConfig


def made(install: int = 3, **more: object) -> HostConfig:
    return config.from_dict({"cluster": "c", "host": "hst_x", "install": install, **more})


def chain(text: str, name: str) -> list[str]:
    found = re.search(rf"  chain {name} {{\n(.*?)\n  }}", text, re.DOTALL)
    assert found, f"no chain {name}"
    return [line.strip() for line in found[1].splitlines()]


def test_every_chain_accepts_by_policy() -> None:
    text = firewall.rules(made(), ("10.0.0.53",))
    assert text.count("policy accept;") == text.count("type filter hook") + text.count("type nat hook") == 5
    assert "policy drop" not in text


def test_every_rule_names_the_installs_own_links() -> None:
    """A rule without them would touch the traffic of others on the machine."""
    for name in ("early", "input", "forward", "late"):
        for rule in chain(firewall.rules(made(11), ("10.0.0.53",)), name)[1:]:
            assert '"vbb*"' in rule, rule
    [masquerade] = chain(firewall.rules(made(11), ()), "translate")[1:]
    assert "ip saddr 10.213.176.0/20" in masquerade


def test_the_resolver_comes_before_the_closed_ranges() -> None:
    rules = chain(firewall.rules(made(), ("10.0.0.53", "10.0.0.54")), "forward")
    words = ("@resolvers", "@closed", "dport 25")
    at = [next(i for i, rule in enumerate(rules) if word in rule) for word in words]
    assert at == sorted(at)
    assert at[-1] < len(rules) - 1
    assert rules[-1] == 'iifname "vb3*" accept'
    assert "@resolvers" not in firewall.rules(made(), ())


def test_no_two_installs_share_a_link_name() -> None:
    names = {made(install).link(n) for install in range(config.INSTALLS) for n in range(config.BOXES)}
    assert len(names) == config.INSTALLS * config.BOXES
    prefixes = [made(install).link_prefix for install in range(config.INSTALLS)]
    assert not any(a != b and a.startswith(b) for a in prefixes for b in prefixes)
    assert max(map(len, names)) <= 15  # the kernel's limit


def test_the_closed_ranges_hold_what_must_be_closed() -> None:
    networks = [ipaddress.ip_network(text) for text in firewall.CLOSED]
    private = ("10.0.0.1", "169.254.169.254", "127.0.0.1", "192.168.1.1", "172.31.0.1", "100.100.100.200", "0.0.0.0")
    for address in private:
        assert any(ipaddress.ip_address(address) in network for network in networks), address
    for address in ("1.1.1.1", "172.32.0.1", "151.101.2.132"):
        assert not any(ipaddress.ip_address(address) in network for network in networks), address


@pytest.mark.live
@pytest.mark.parametrize("resolvers", [(), ("10.0.0.53", "1.1.1.1")])
def test_nft_takes_the_rules(resolvers: tuple[str, ...]) -> None:
    if os.geteuid() or not shutil.which("nft"):
        pytest.skip("needs root and nft")
    text = firewall.rules(made(), resolvers)
    done = subprocess.run(["nft", "--check", "-f", "-"], input=text, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
