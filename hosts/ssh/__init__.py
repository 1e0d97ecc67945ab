"""SSH to VM hosts: the only place that knows paramiko.

In charge of dialling with a pinned host key, of opening channels to one Unix socket on the host
(`direct-streamlocal@openssh.com`, a kind paramiko does not know), of the errors that may come of it, and of the admin
login's exec channel. Knows no host row, no verb and no retry.

Two ways of running a Transport, because one reader thread per Transport is right for threads and wrong for a loop:
* `threads`: paramiko's own reader thread; a `ThreadStream` blocks with a deadline.
* `loop`: paramiko's thread does handshake and login and ends; then the event loop owns the socket, so nothing crosses
  threads and a stream's bytes are decrypted where they are used.

What is cured of paramiko 5.1 (pinned; tests/ssh runs each):
1. A reader thread that must answer CLOSE during a re-key waits for itself: such messages are kept until NEWKEYS.
2. `_channel_handler_table` holds the base class's functions: names are looked up on the channel instead.
3. sshd leaves Nagle on when no session channel was opened: TCP_QUICKACK after every recv (it does not stick).
4. `channels_seen` grows for ever: only the highest number is kept.
5. An open that timed out leaks its channel on the host when the success comes late: it is answered with CLOSE.
6. One thread may be given another's refusal (`saved_exception`): errors of opens are kept per channel.
7. `set_keepalive` notices nothing: `probe` asks and `heard_at` says when anything last came.
"""

from hosts.ssh.admin import Admin
from hosts.ssh.errors import ConnectionCut, DialFailed, HostKeyChanged, LoginRefused, SocketRefused, SshError, TimedOut
from hosts.ssh.keys import Login, fingerprint, new_key, public_key
from hosts.ssh.loop import LoopStream, LoopTransport, dial_for_loop
from hosts.ssh.threads import IDLE_WINDOW, WINDOW, HostTransport, ThreadStream, dial, scan_host_key

__all__ = [
    "IDLE_WINDOW",
    "WINDOW",
    "Admin",
    "ConnectionCut",
    "DialFailed",
    "HostKeyChanged",
    "HostTransport",
    "Login",
    "LoginRefused",
    "LoopStream",
    "LoopTransport",
    "SocketRefused",
    "SshError",
    "ThreadStream",
    "TimedOut",
    "dial",
    "dial_for_loop",
    "fingerprint",
    "new_key",
    "public_key",
    "scan_host_key",
]
