"""One WebSocket through a tunnel: the client's, which our server ends, and one to the server in the devbox.

In charge of the handshake with the server, of messages both ways in their order, each side as fast as the other takes
them, and of close codes. Extensions are not negotiated with the server; frames are taken apart and made anew.

Close codes of ours: 1011 the server broke off or sent what is no WebSocket message, or the tunnel was removed; 1009 a
message over MESSAGE_MAX; 1012 this server is being restarted; any other comes from the other end.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from functools import partial
from typing import Any, Final

from django.conf import settings
from websockets.client import ClientProtocol
from websockets.datastructures import Headers as WireHeaders
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.frames import Close, Frame, Opcode
from websockets.http11 import Request as WireRequest
from websockets.http11 import Response as WireResponse
from websockets.protocol import State
from websockets.uri import WebSocketURI

from accounts.caps import open_socket
from api.bodies import Receive, Scope, Send
from api.errors import ApiError, NotFound, to_api_error
from api.stopping import going_down
from api.websockets import refuse
from hosts.client import HostUnreachable
from hosts.dialling import Dialled
from tunnels import doors, waking
from tunnels.doors import Door, is_token
from tunnels.headers import Headers, check_size, to_client, to_server
from tunnels.open import opened
from tunnels.proxy import STALL_SECONDS, TOUCH_SECONDS, host_of, note_use, peer_of, target_of
from tunnels.upstream import BadGateway, GatewayTimeout, dial

log = logging.getLogger(__name__)

MESSAGE_MAX: Final = 16 << 20
HANDSHAKE_SECONDS: Final = 60.0
FAREWELL_SECONDS: Final = 2.0
REFUSAL_BYTES: Final = 64 * 1024
SLICE_MIN: Final = 1024
SLICE_MAX: Final = 32 * 1024
FRAMES_MANY: Final = 64
"""Taking tiny frames apart is slow, and this process serves others too: the more frames come, the fewer bytes of the
server's are looked at in one turn of the loop."""
NO_STATUS: Final = 1005
BROKEN: Final = 1011
RESTARTING: Final = 1012


async def serve(scope: Scope, receive: Receive, send: Send, *, port: int, key: str) -> None:
    """Serve one WebSocket that came to `{port}-{key}.tunnel.…`."""
    message = await receive()
    if message["type"] != "websocket.connect":
        return
    try:
        async with contextlib.AsyncExitStack() as held:
            try:
                door, own = await _door(scope, port, key)
                held.enter_context(open_socket(door.account_id, door.open_streams))
                await held.enter_async_context(opened(door.tunnel_id, key))
                link = await _connect(scope, door, port, key, own)
                held.push_async_callback(link.aclose)
            except Exception as error:
                await refuse(send, to_api_error(error))
                return
            if isinstance(link, Refusal):
                await link.send(send)
            else:
                await link.run(receive, send)
    except ApiError as error:  # the tunnel was removed, or we are to stop
        with contextlib.suppress(Exception):
            await send({"type": "websocket.close", "code": BROKEN, "reason": error.message[:100]})


async def _door(scope: Scope, port: int, key: str) -> tuple[Door, str | None]:
    """The door, and the subprotocol that was no protocol but the tunnel's token."""
    check_size(scope["headers"], target_of(scope))
    if not port:
        raise NotFound("there is no such tunnel")
    offered = [str(name) for name in scope.get("subprotocols") or []]
    door = await doors.enter(key, doors.tokens_of(scope["headers"], offered), doors.client_of(scope))
    own = next((name for name in offered if is_token(door, name)), None)
    return door, own


class Refusal:
    """The server's answer to the upgrade, when it is another than yes."""

    def __init__(self, response: WireResponse) -> None:
        self._status = response.status_code
        headers = [
            (name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in response.headers.raw_items()
        ]
        self._headers = to_client(headers, websocket=True)
        self._body = bytes(response.body or b"")[:REFUSAL_BYTES]

    async def send(self, send: Send) -> None:
        """Pass it on, in one piece."""
        head = [*self._headers, (b"content-length", str(len(self._body)).encode())]
        await send({"type": "websocket.http.response.start", "status": self._status, "headers": head})
        await send({"type": "websocket.http.response.body", "body": self._body})

    async def aclose(self) -> None:
        """Nothing to close."""


async def _connect(scope: Scope, door: Door, port: int, key: str, own: str | None) -> Link | Refusal:
    """Connect to the server and ask it. Raises ApiError."""
    door, dialled = await waking.reached(key, door, partial(dial, port=port))
    link = Link(dialled, door, scope, own)
    try:
        async with asyncio.timeout(HANDSHAKE_SECONDS):
            refusal = await link.shake_hands()
    except TimeoutError:
        await link.aclose()
        raise GatewayTimeout(
            f"the server in the devbox did not answer the upgrade within {HANDSHAKE_SECONDS:g} s"
        ) from None
    except BaseException:
        await link.aclose()
        raise
    if refusal is not None:
        await link.aclose()
        return refusal
    return link


class Link:
    """The connection to the server in the devbox, from its handshake on."""

    def __init__(self, dialled: Dialled, door: Door, scope: Scope, own: str | None) -> None:
        self._dialled, self._door, self._scope, self._own = dialled, door, scope, own
        self._wanted = [str(name) for name in scope.get("subprotocols") or [] if name != own]
        host = host_of(scope["headers"]).decode("latin-1")
        uri = WebSocketURI(False, host, 80, target_of(scope).decode("latin-1"), "")
        self._wire = ClientProtocol(uri, subprotocols=self._wanted or None, max_size=MESSAGE_MAX, logger=_quiet)  # type: ignore[arg-type]
        self._writing = asyncio.Lock()
        self._accepted: Headers = []
        self._early: list[Any] = []
        self._touched_at = 0.0
        self._unseen = memoryview(b"")
        self._slice = SLICE_MIN

    async def aclose(self) -> None:
        """Hang up."""
        await self._dialled.aclose()

    async def shake_hands(self) -> Refusal | None:
        """Ask for the upgrade; the server's refusal, if it is one. Raises BadGateway for what is neither."""
        self._wire.send_request(self._request())
        await self._flush()
        while True:
            self._early += self._wire.events_received()  # messages may follow at once
            if self._early and isinstance(self._early[0], WireResponse):
                return self._answered(self._early.pop(0))
            error = self._wire.handshake_exc or self._wire.parser_exc
            if error is not None:
                raise BadGateway(f"the server in the devbox did not answer the upgrade as HTTP: {error}") from error
            try:
                if not await self._hear():
                    self._wire.receive_eof()
            except HostUnreachable as gone:
                raise BadGateway("the connection into the devbox broke") from gone

    async def _hear(self) -> bool:
        """Let the parser see some more of what the server says; False at its end. Raises HostUnreachable."""
        if not self._unseen:
            self._unseen = memoryview(await self._dialled.read())
        some, self._unseen = self._unseen[: self._slice], self._unseen[self._slice :]
        if some:
            self._wire.receive_data(bytes(some))
        return bool(some)

    def _request(self) -> WireRequest:
        headers = to_server(
            self._scope["headers"],
            self._door,
            address=peer_of(self._scope),
            scheme="https" if settings.SECURE else {"wss": "https"}.get(str(self._scope.get("scheme")), "http"),
            host=host_of(self._scope["headers"]),
            websocket=True,
        )
        request = self._wire.connect()
        given = WireHeaders((name.decode("latin-1"), value.decode("latin-1")) for name, value in headers)
        given["Upgrade"], given["Connection"] = "websocket", "Upgrade"
        given["Sec-WebSocket-Key"] = request.headers["Sec-WebSocket-Key"]
        given["Sec-WebSocket-Version"] = "13"
        if self._wanted:
            given["Sec-WebSocket-Protocol"] = ", ".join(self._wanted)
        return WireRequest(target_of(self._scope).decode("latin-1"), given)

    def _answered(self, response: WireResponse) -> Refusal | None:
        error = self._wire.handshake_exc
        if error is None:
            raw = [
                (name.lower().encode("latin-1"), value.encode("latin-1"))
                for name, value in response.headers.raw_items()
            ]
            self._accepted = to_client(raw, websocket=True)
            return None
        if isinstance(error, InvalidStatus) and response.status_code != 101 and 200 <= response.status_code < 600:
            return Refusal(response)
        raise BadGateway(f"the server in the devbox did not accept the WebSocket properly: {error}") from error

    async def _flush(self) -> None:
        async with self._writing:
            data = b"".join(self._wire.data_to_send())
            if data:
                try:
                    await self._dialled.write(data)
                except HostUnreachable as error:
                    raise BadGateway("the connection into the devbox broke") from error

    # --- messages

    async def run(self, receive: Receive, send: Send) -> None:
        """From the accept to the close."""
        accept: dict[str, Any] = {"type": "websocket.accept", "headers": self._accepted}
        accept["subprotocol"] = self._wire.subprotocol or (self._own if not self._wanted else None)
        await send(accept)
        up = asyncio.ensure_future(self._up(receive))
        down = asyncio.ensure_future(self._down(send))
        stopping = asyncio.ensure_future(going_down.wait())
        code, reason = NO_STATUS, ""
        try:
            await asyncio.wait({up, down, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if up.done() and not up.exception():
                return  # the client has left, and the server was told
            if down.done():
                code, reason = down.result() if not down.exception() else (BROKEN, "")
            else:
                code = RESTARTING if stopping.done() else BROKEN
            with contextlib.suppress(Exception):
                await self._leave(code)
            down.cancel()
            await send({"type": "websocket.close", "code": 1000 if code == NO_STATUS else code, "reason": reason})
        finally:
            for task in (up, down, stopping):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task

    async def _up(self, receive: Receive) -> None:
        while True:
            message = await receive()
            if message["type"] == "websocket.disconnect":
                with contextlib.suppress(Exception):
                    await self._leave(int(message.get("code") or NO_STATUS))
                return
            data, text = message.get("bytes"), message.get("text")
            try:
                if data is not None:
                    self._wire.send_binary(data)
                elif text is not None:
                    self._wire.send_text(text.encode())
            except ConnectionClosed:
                continue  # the server is leaving; what it says of it is on its way
            await self._flush()
            await self._note()

    async def _leave(self, code: int) -> None:
        """Say goodbye to the server, if that was not done."""
        if self._wire.state is State.OPEN:
            sendable = code in (1000, 1001, 1002, 1003, *range(1007, 1015)) or 3000 <= code < 5000
            self._wire.send_close(code if sendable else 1001)
            async with asyncio.timeout(FAREWELL_SECONDS):
                await self._flush()
        self._dialled.end()

    async def _down(self, send: Send) -> tuple[int, str]:
        """Pass on what the server says, to its end: the close code and the reason."""
        gathered = bytearray()  # no list: empty fragments would make it grow for ever
        text = False
        while True:
            events, self._early = [*self._early, *self._wire.events_received()], []
            for event in events:
                assert isinstance(event, Frame)
                if event.opcode is Opcode.CLOSE:
                    closed = Close.parse(event.data)
                    return closed.code, closed.reason
                if event.opcode not in (Opcode.TEXT, Opcode.BINARY, Opcode.CONT):
                    continue
                if event.opcode is not Opcode.CONT:
                    text = event.opcode is Opcode.TEXT
                if not event.fin:
                    gathered += event.data
                    continue
                data = bytes(gathered + event.data) if gathered else bytes(event.data)
                gathered = bytearray()
                async with asyncio.timeout(STALL_SECONDS):
                    await send({"type": "websocket.send", **({"text": data.decode()} if text else {"bytes": data})})
                await self._note()
                await asyncio.sleep(0)
            self._slice = SLICE_MIN if len(events) > FRAMES_MANY else min(SLICE_MAX, 2 * self._slice)
            await self._flush()  # pongs
            if self._wire.parser_exc is not None:
                sent = self._wire.close_sent
                return (sent.code, sent.reason) if sent is not None else (BROKEN, "")
            if not await self._hear():
                return BROKEN, "the server in the devbox broke off"
            await asyncio.sleep(0)

    async def _note(self) -> None:
        if self._door.http_keep_alive and time.monotonic() - self._touched_at > TOUCH_SECONDS:
            self._touched_at = time.monotonic()
            await note_use(self._door.devbox_id)


_quiet = logging.getLogger("tunnels.wire")
_quiet.setLevel(logging.ERROR)
