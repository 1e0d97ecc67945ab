"""What boxes may reach: one nftables table per install.

In charge of: the rules as one text (:func:`rules`, pure), loading and removing them. Not in charge of: addresses
(`config`), forwarding (`network`).

Every chain accepts by policy and refuses only what comes from, or goes to, this install's own links: a dropping policy
in the machine's namespace would cut the networks of Docker, libvirt and others. Closed to boxes: other boxes, every
address of the machine, private and special ranges (the metadata address among them), port 25, all of IPv6. Open: public
addresses, and port 53 of the resolvers, which may be private.
"""

from __future__ import annotations

import json
import subprocess
from typing import Any

from hostd.config import HostConfig
from hostd.messages import Refused

CLOSED = (
    *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
    *("192.0.0.0/24", "192.168.0.0/16", "224.0.0.0/3"),
)
_SECONDS = 30


def rules(cfg: HostConfig, resolvers: tuple[str, ...]) -> str:
    """The whole table, replacing what was loaded before in one transaction."""
    table = f"inet {cfg.firewall_table}"
    ours = f'"{cfg.link_prefix}*"'
    dns = ""
    dns_input = dns_forward = ""
    if resolvers:
        dns = f"""
  set resolvers {{
    type ipv4_addr
    elements = {{ {", ".join(resolvers)} }}
  }}"""
        # A resolver may run on this very machine, or elsewhere.
        dns_input = f"\n    iifname {ours} ip daddr @resolvers meta l4proto {{ tcp, udp }} th dport 53 accept"
        dns_forward = dns_input
    return f"""\
add table {table}
delete table {table}
table {table} {{
  set closed {{
    type ipv4_addr
    flags interval
    elements = {{ {", ".join(CLOSED)} }}
  }}{dns}
  set connections {{
    type ipv4_addr
    size 4096
    flags dynamic
  }}
  chain early {{
    type filter hook prerouting priority raw; policy accept;
    iifname {ours} meta nfproto ipv6 counter drop
    iifname {ours} fib saddr . iif oif missing counter drop comment "an address that is not the box's"
  }}
  chain input {{
    type filter hook input priority filter - 5; policy accept;
    iifname {ours} ct state established,related accept{dns_input}
    iifname {ours} ip daddr {cfg.gateway} icmp type echo-request limit rate 50/second accept
    iifname {ours} counter reject with icmp type admin-prohibited
  }}
  chain forward {{
    type filter hook forward priority filter - 5; policy accept;
    iifname {ours} oifname "vb*" counter reject with icmp type admin-prohibited
    oifname {ours} ct state established,related accept
    oifname {ours} counter drop comment "nothing from outside begins a connection into a box"
    iifname {ours} ct state established,related accept
    iifname {ours} ct state invalid counter drop
    iifname {ours} ct state new add @connections {{ ip saddr ct count over {cfg.connections_per_box} }} counter drop
    iifname {ours} tcp flags syn tcp option maxseg size set rt mtu{dns_forward}
    iifname {ours} ip daddr @closed counter reject with icmp type admin-prohibited
    iifname {ours} tcp dport 25 counter reject with tcp reset
    iifname {ours} accept
  }}
  chain late {{
    type filter hook postrouting priority filter; policy accept;
    oifname {ours} meta nfproto ipv6 drop
  }}
  chain translate {{
    type nat hook postrouting priority srcnat; policy accept;
    ip saddr {cfg.subnet} oifname != {ours} masquerade
  }}
}}
"""


def load(cfg: HostConfig, resolvers: tuple[str, ...]) -> None:
    """Load the table; connections that are open stay open. Raises Refused internal with nft's words."""
    _nft("-f", "-", text=rules(cfg, resolvers))


def remove(cfg: HostConfig) -> None:
    """Remove the table; none there is fine. Raises Refused internal."""
    _nft("-f", "-", text=f"add table inet {cfg.firewall_table}\ndelete table inet {cfg.firewall_table}\n")


def dropping_forward_chains() -> list[str]:
    """Chains of others that drop forwarded packets by policy, as Docker's does: they would cut boxes off, whatever our
    own table accepts. Each as `family table chain`."""
    try:
        listed = json.loads(_nft("-j", "list", "chains"))["nftables"]
    except (ValueError, KeyError, Refused):
        return []
    return [found for entry in listed if (found := _dropping(entry.get("chain")))]


def _dropping(chain: dict[str, Any] | None) -> str | None:
    if chain and chain.get("hook") == "forward" and chain.get("policy") == "drop":
        return f"{chain['family']} {chain['table']} {chain['name']}"
    return None


def _nft(*arguments: str, text: str | None = None) -> str:
    done = subprocess.run(
        ["nft", *arguments], input=text, capture_output=True, text=True, timeout=_SECONDS, check=False
    )
    if done.returncode:
        raise Refused("internal", f"nft ended with {done.returncode}: {done.stderr.strip()[:500]}")
    return done.stdout
