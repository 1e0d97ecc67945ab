// Drives the web terminal in a real browser, as an operator at a desk would: argv is one JSON object of what it needs.
// The browser reaches the server through a port of ours, so that its connections can be cut like a bad network does.
import assert from "node:assert";
import net from "node:net";
import { chromium } from "playwright-core";

const given = JSON.parse(process.argv[2]);
const WITHIN = 60_000;

const sockets = new Set();
const line = net.createServer((browser) => {
  const server = net.connect(given.port, "127.0.0.1");
  for (const [from, to] of [[browser, server], [server, browser]]) {
    sockets.add(from);
    from.pipe(to);
    from.on("error", () => to.destroy());
    from.on("close", () => (sockets.delete(from), to.destroy()));
  }
});
await new Promise((listening) => line.listen(0, "127.0.0.1", listening));
const origin = `http://127.0.0.1:${line.address().port}`;

const browser = await chromium.launchPersistentContext(given.profile, {
  executablePath: given.chromium,
  headless: true,
  viewport: { width: 1000, height: 600 },
  args: ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync"],
});
const page = browser.pages()[0] ?? (await browser.newPage());
page.setDefaultTimeout(WITHIN);
const trouble = [];
process.on("uncaughtException", (error) => {
  console.error(error, trouble);
  process.exit(1);
});
const foreign = [];
page.on("dialog", (dialog) => (trouble.push(`a dialog: ${dialog.message()}`), dialog.dismiss()));
page.on("pageerror", (error) => trouble.push(String(error)));
page.on("console", (message) => message.type() === "error" && trouble.push(message.text()));
browser.on("request", (request) => {
  const url = new URL(request.url());
  if (!["data:", "blob:"].includes(url.protocol) && url.host !== new URL(origin).host) foreign.push(request.url());
});

// Signed in, from the devbox's page by its link.
await page.goto(`${origin}/admin/`);
await page.fill("input[name=username]", given.user);
await page.fill("input[name=password]", given.password);
await page.click("button[type=submit], input[type=submit]");
await page.waitForURL(`${origin}/admin/`);
await page.goto(`${origin}/admin/devboxes/devbox/${given.devbox}/change/`);
trouble.length = 0; // of the admin's own pages
await page.click("text=open in this browser");

const state = (text) => page.waitForFunction(
  (wanted) => document.getElementById("state").textContent.includes(wanted), text, { timeout: WITHIN });
const shown = () => page.evaluate(() =>
  [...document.querySelectorAll(".xterm-rows > div")].map((row) => row.textContent.replaceAll("\u00a0", " ").trimEnd()));
const sees = async (wanted) => {
  const end = Date.now() + WITHIN;
  while (!(await shown()).some((row) => row.trim() === wanted)) {
    assert(Date.now() < end, `${wanted} is not shown:\n${(await shown()).join("\n")}`);
    await new Promise((tick) => setTimeout(tick, 50));
  }
};
const types = async (text) => {
  await page.keyboard.type(text);
  await page.keyboard.press("Enter");
};
const size = async (name) => {
  await types(`clear; echo ${name}=$(stty size | tr ' ' x).`);
  const end = Date.now() + WITHIN;
  const told = new RegExp(`^${name}=(\\d+)x(\\d+)\\.$`);
  for (;;) {
    const found = (await shown()).map((row) => told.exec(row)).find(Boolean);
    if (found) return [Number(found[1]), Number(found[2])];
    assert(Date.now() < end, "no size is shown");
    await new Promise((tick) => setTimeout(tick, 50));
  }
};

await state("connected");
await page.keyboard.press("Control+c");
await types("echo it wo''rks in $(id -un)");
await sees("it works in user");
const before = await size("large");
await page.setViewportSize({ width: 700, height: 400 });
await page.waitForTimeout(500);
const after = await size("small");
assert(after[0] < before[0] && after[1] < before[1], `${before} became ${after}`);

// What a devbox writes stays in the screen.
const title = await page.title();
await types(String.raw`clear; printf '\033]0;taken over\007\033]52;c;aGk=\007\033]8;;javascript:alert(1)\007li''nk\033]8;;\007\n'`);
await sees("link");
await types(String.raw`echo '<img src=x onerror=alert(1)>'; echo ma''rk`);
await sees("mark");
assert.equal(await page.title(), title);
assert.equal(await page.locator("#screen img").count(), 0);

// The network breaks: the same shell again, with what was written before and meanwhile, and nothing typed by itself.
await types(String.raw`clear; X=kept; printf '\033[6n'; read -rsdR answer; (sleep 2; echo; echo mean''while) & echo bef''ore`);
await sees("before");
for (const socket of sockets) socket.destroy();
await state("trying again");
await state("connected");
await sees("before");
await sees("meanwhile");
await types("echo $X it i''s");
await sees("kept it is");
assert((await shown()).some((row) => /^(.*\$ )?echo \$X it i''s$/.test(row)), (await shown()).join("\n"));

// A flood: the page stays alive and shows its end.
await types("clear; yes 0123456789abcdef | head -c 20000000; echo; echo th''e end");
await sees("the end");
await types("echo still he''re");
await sees("still here");
await page.setViewportSize({ width: 1000, height: 600 });
await types("clear; ls --color=always / | head -8; echo $((6 * 7))");
await sees("42");
await page.screenshot({ path: given.screenshot });

// The shell's end is said, and another one is a click away.
await types("exit");
await state("the shell has ended");
await page.click("#again");
await state("connected");
await types("echo X=$X.");
await sees("X=.");

assert.deepEqual(foreign, [], "nothing is asked of another host");
const own = trouble.filter((text) => !/WebSocket|ERR_|Failed to fetch/.test(text)); // what a cut line sounds like
assert.deepEqual(own, []);
const cookies = await browser.cookies();
await browser.close();
line.close();
for (const socket of sockets) socket.destroy();
console.log(JSON.stringify({ cookies: cookies.map(({ name, value }) => `${name}=${value}`).join("; ") }));
