// The web terminal: xterm.js on one side, the devbox's terminal on the other, over a WebSocket that is made anew
// whenever it breaks.
//
// What a devbox writes is drawn by xterm.js and reaches nothing else of the page: titles and links that it sets are
// ignored, and every word of our own goes into the page as text.
"use strict";

(() => {
  const { csrf, session } = document.body.dataset;
  const state = document.getElementById("state");
  const again = document.getElementById("again");
  const screen = document.getElementById("screen");
  const path = location.pathname;

  const PAUSE_MS = 500;
  const PAUSE_MAX_MS = 10000;
  const SAY_TAKEN_EACH = 65536;
  // The codes by which the server says that it is not to be tried again by itself.
  const FINAL = {
    4000: "the shell has ended",
    4001: "opened elsewhere",
    4003: "you are signed out of the admin",
    1003: "the server did not understand this page",
    1009: "too much was pasted at once",
  };

  const terminal = new Terminal({
    cursorBlink: true,
    fontSize: 14,
    linkHandler: { activate: () => {} },
    scrollback: 10000,
    theme: { background: "#16181d" },
  });
  const fit = new FitAddon.FitAddon();
  terminal.loadAddon(fit);
  terminal.open(screen);
  fit.fit();

  let socket = null; // undefined while one is on its way
  let pause = PAUSE_MS;
  let replay = 0; // bytes still to be drawn that are from before
  let taken = 0; // bytes drawn that the server does not know of yet

  const show = (text, offer) => {
    state.textContent = text;
    again.hidden = !offer;
  };

  const send = (message) => {
    if (socket?.readyState === WebSocket.OPEN) socket.send(message);
  };
  const say = (what) => send(JSON.stringify(what));
  const resized = () => say({ resize: [terminal.cols, terminal.rows] });

  const drawn = (size) => {
    replay = Math.max(0, replay - size);
    taken += size;
    if (taken >= SAY_TAKEN_EACH) {
      say({ taken });
      taken = 0;
    }
  };

  const ticket = async () => {
    const answer = await fetch(`${path}ticket/`, {
      method: "POST",
      headers: { "X-CSRFToken": csrf },
      redirect: "error",
    });
    const told = await answer.json();
    if (!answer.ok) throw new Error(told.message || `status ${answer.status}`);
    return told.ticket;
  };

  const later = (why) => {
    show(`${why}; trying again`, true);
    setTimeout(() => {
      if (socket === null) connect();
    }, pause);
    pause = Math.min(PAUSE_MAX_MS, pause * 2);
  };

  const connect = async () => {
    socket = undefined;
    show("connecting", false);
    let own;
    try {
      const scheme = location.protocol === "https:" ? "wss" : "ws";
      const query = `replay=1&takeover=1&cols=${terminal.cols}&rows=${terminal.rows}`;
      own = new WebSocket(`${scheme}://${location.host}${path}${session}/attach?${query}`, [await ticket()]);
    } catch (error) {
      socket = null;
      later(error.message);
      return;
    }
    socket = own;
    own.binaryType = "arraybuffer";
    own.onopen = () => {
      terminal.reset();
      replay = taken = 0;
      pause = PAUSE_MS;
      show("connected", false);
      resized();
      terminal.focus();
    };
    own.onmessage = ({ data }) => {
      if (socket !== own) return;
      if (typeof data === "string") {
        replay = JSON.parse(data).replay;
      } else {
        terminal.write(new Uint8Array(data), () => {
          if (socket === own) drawn(data.byteLength);
        });
      }
    };
    own.onclose = ({ code }) => {
      if (socket !== own) return;
      socket = null;
      if (code in FINAL) show(FINAL[code], true);
      else later(code === 1013 ? "the devbox's host is away" : "the connection is lost");
    };
  };

  // Questions that programs asked before: a screen that answered them again would type into the shell.
  const asked = () => replay > 0;
  for (const id of [
    { final: "c" },
    { prefix: ">", final: "c" },
    { prefix: "=", final: "c" },
    { final: "n" },
    { prefix: "?", final: "n" },
    { final: "t" },
    { intermediates: "$", final: "p" },
    { prefix: "?", intermediates: "$", final: "p" },
    { prefix: ">", final: "q" },
    { prefix: "?", final: "u" },
  ]) {
    terminal.parser.registerCsiHandler(id, asked);
  }
  terminal.parser.registerDcsHandler({ intermediates: "$", final: "q" }, asked);
  for (const colour of [4, 10, 11, 12]) {
    terminal.parser.registerOscHandler(colour, (text) => asked() && text.includes("?"));
  }

  terminal.onData((text) => send(new TextEncoder().encode(text)));
  terminal.onBinary((text) => send(Uint8Array.from(text, (character) => character.charCodeAt(0))));
  terminal.onResize(resized);
  new ResizeObserver(() => fit.fit()).observe(screen);
  again.onclick = () => {
    if (socket === null) connect();
  };

  connect();
})();
