// A client of terminals made of what the published command line is made of (Node's fetch, the package ws), doing the
// same calls in the same order. argv: one JSON object. Its standard input is typed, its output is the terminal's.
import dns from "node:dns";
import { WebSocket } from "ws";

const given = JSON.parse(process.argv[2]);

// Every name of a tunnel is this machine: what a resolver or a hosts file would say.
const lookup = dns.lookup;
dns.lookup = (name, options, done) =>
  name.includes(".tunnel.") ? lookup("127.0.0.1", options, done) : lookup(name, options, done);

const bearer = (token) => (token ? { Authorization: `Bearer ${token}` } : {});
const call = async (url, method, token, body) => {
  const headers = { "Content-Type": "application/json", ...bearer(token) };
  const answer = await fetch(url, { method, headers, body: body && JSON.stringify(body) });
  if (!answer.ok) throw new Error(`${method} ${url}: ${answer.status} ${await answer.text()}`);
  return answer.json();
};

let { origin } = given;
let token;
if (!origin) {
  const made = await call(`${given.api}/v1/devboxes/${given.devbox}/create_pty_tunnel`, "POST", given.key, {});
  origin = `http://13-${made.tunnel_key}.tunnel.${given.domain}:${new URL(given.api).port}`;
  token = made.auth_token;
}
const session = `${origin}/pty/${given.session}`;
const control = (body) => call(`${session}/control`, "POST", token, body);
const [cols, rows] = [90, 31];

const ready = await call(`${session}?cols=${cols}&rows=${rows}`, "GET", token);
const socket = new WebSocket(`ws://${new URL(origin).host}${ready.connect_url}`, token ? [token] : []);
await new Promise((opened, failed) => {
  socket.once("open", opened);
  socket.once("error", failed);
  socket.once("unexpected-response", (_, answer) => failed(new Error(`the upgrade ended with ${answer.statusCode}`)));
});
const ended = new Promise((closed) => socket.once("close", closed));
await control({ action: "resize", cols, rows });
socket.send("\r");
socket.on("message", (data) => process.stdout.write(data));
if (given.command) socket.send(`${given.command}\nexit\n`);
else process.stdin.on("data", (data) => socket.send(data)).resume();

const code = await ended;
process.stdin.pause();
await control({ action: "close" }).catch(() => {});
process.exit(code === 4000 ? 0 : 1);
