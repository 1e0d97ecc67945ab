"""A web server for devboxes, of the standard library alone; tests upload this file. Arguments: address and port."""

import base64
import hashlib
import http.server
import json
import sys
import time

PIECE = bytes(range(256)) * 4096


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def do_GET(self):
        kind, _, argument = self.path.strip("/").partition("/")
        getattr(self, f"get_{kind}", self.get_tell)(argument)

    def get_tell(self, _):
        self.answer({"path": self.path, "headers": list(self.headers.items()), "from": self.client_address[0]})

    def answer(self, told):
        data = json.dumps(told).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def get_pour(self, mib):
        self.send_response(200)
        self.send_header("Content-Length", str(int(mib) * len(PIECE)))
        self.end_headers()
        for _ in range(int(mib)):
            self.wfile.write(PIECE)

    def get_events(self, _):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        for number in range(100_000):
            self.wfile.write(b"data: %d\n\n" % number)
            time.sleep(0.2)

    def get_echo(self, _):
        """A WebSocket that sends every message back; for messages below 64 KiB in one frame."""
        given = self.headers["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        self.send_response(101)
        self.send_header("Upgrade", "websocket")
        self.send_header("Connection", "Upgrade")
        self.send_header("Sec-WebSocket-Accept", base64.b64encode(hashlib.sha1(given.encode()).digest()).decode())
        self.end_headers()
        self.close_connection = True
        while True:
            first, second = self.rfile.read(2)
            size = second & 127
            if size == 126:
                size = int.from_bytes(self.rfile.read(2), "big")
            mask = self.rfile.read(4)
            data = bytes(byte ^ mask[at % 4] for at, byte in enumerate(self.rfile.read(size)))
            length = bytes([size]) if size < 126 else b"\x7e" + size.to_bytes(2, "big")
            self.wfile.write(bytes([first]) + length + data)
            if first & 15 == 8:
                return

    def do_PUT(self):
        left, seen = int(self.headers["Content-Length"]), hashlib.sha256()
        while left:
            data = self.rfile.read(min(left, 1 << 20))
            if self.path != "/sink":
                seen.update(data)
            left -= len(data)
        self.answer({"sha256": seen.hexdigest()})


if __name__ == "__main__":
    http.server.ThreadingHTTPServer.request_queue_size = 128
    http.server.ThreadingHTTPServer((sys.argv[1], int(sys.argv[2])), Handler).serve_forever()
