import { ChatClock, formatCredits, show } from "/client/index.js";
import { Proof } from "./demo-proof.js";
import { duration, initials, precise, price, remaining, trimmed } from "./demo-words.js";

const KEPT = "talktime-demo";
const LOW_SECONDS = 15;
const WORDS = {
  running: "Running",
  waiting: "Waiting",
  lapsed: "Interrupted",
  paused: "Paused",
  exhausted: "Out of credits",
  abandoned: "Left",
  ended: "Ended",
};

const $ = (id) => document.getElementById(id);
const line = window.fetch.bind(window); // a line of its own, that the button does not cut
const chats = new Map(); // by id, the newest first: {chatId, advisorId, clock, row}
let advisors = new Map();
let guest = null;
let selected = null;
let cut = false;
let kept = null;

window.fetch = (...request) => (cut ? Promise.reject(new TypeError("the network is cut")) : line(...request));

// --- the product's own server ---

async function ask(url, { method = "GET", headers = {} } = {}, by = fetch) {
  const response = await by(url, { method, headers, cache: "no-store" });
  const body = await response.json();
  if (!response.ok) throw Object.assign(new Error(body.detail), { code: body.code, status: response.status });
  return body;
}

async function command(path, key) {
  const headers = { Authorization: `Bearer ${await token()}` };
  if (key) headers["Idempotency-Key"] = key;
  return ask(`/demo/${path}`, { method: "POST", headers });
}

async function token(refused) {
  if (!kept || kept.token === refused || performance.now() > kept.until) {
    const { token, seconds } = await ask(`/demo/guests/${guest}/token`, { method: "POST" }, line);
    kept = { token, until: performance.now() + seconds * 900 };
  }
  return kept.token;
}

// --- chats ---

function open(chatId, advisorId, { watch = false } = {}) {
  chats.get(chatId)?.clock.close();
  const clock = new ChatClock({
    userId: guest,
    chatId,
    advisorId,
    token,
    watch,
    autoStart: false,
    lowSeconds: LOW_SECONDS,
    start: (key) => command(`advisors/${advisorId}/chats/${encodeURIComponent(chatId)}/start`, key),
    pause: () => command(`chats/${encodeURIComponent(chatId)}/pause`),
    stop: () => command(`chats/${encodeURIComponent(chatId)}/stop`),
  });
  const chat = { chatId, advisorId, clock, watch, row: chats.get(chatId)?.row ?? rowOf(chatId, advisorId) };
  chats.set(chatId, chat);
  let state = null;
  clock.subscribe(() => {
    if (clock.shown.state !== state) {
      state = clock.shown.state;
      if (chat === selected) say(state);
    }
    render(chat);
  });
  return chat;
}

function rowOf(chatId, advisorId) {
  const row = document.createElement("li");
  const { name } = advisors.get(advisorId) ?? { name: advisorId };
  row.innerHTML = `<span class="face" aria-hidden="true"></span>
    <span class="who"><strong></strong><span class="row"><span class="badge"></span><span class="time small"></span></span></span>
    <button type="button" class="quiet slim"></button>`;
  row.querySelector(".face").textContent = initials(name);
  row.querySelector("strong").textContent = name;
  row.querySelector("button").addEventListener("click", () => {
    const chat = chats.get(chatId);
    select(chat);
    if (chat.clock.shown.state !== "ended" && !chat.clock.shown.accruing) run("start");
  });
  $("chats").prepend(row);
  $("no-chats").hidden = true;
  return row;
}

function select(chat) {
  selected = chat;
  localStorage.setItem(KEPT, JSON.stringify({ guest, selected: chat.chatId }));
  proof.follow(chat.clock);
  for (const other of chats.values()) render(other);
}

async function run(name) {
  let chat = selected;
  if (chat.watch && name === "start") select((chat = open(chat.chatId, chat.advisorId)));
  $("trouble").hidden = true;
  try {
    await chat.clock[name]();
  } catch (error) {
    trouble(error);
  }
}

function begin(advisorId) {
  const chatId = `chat-${[...crypto.getRandomValues(new Uint8Array(4))].map((n) => n.toString(16).padStart(2, "0")).join("")}`;
  select(open(chatId, advisorId));
  $("now-title").scrollIntoView({ block: "nearest" });
  run("start");
}

// --- what is shown ---

function render(chat) {
  const { shown } = chat.clock;
  const { row } = chat;
  row.toggleAttribute("aria-current", chat === selected);
  if (chat === selected) row.setAttribute("aria-current", "true");
  const badge = row.querySelector(".badge");
  writeState(badge, shown);
  row.querySelector(".time").textContent = shown.ready ? duration(shown.elapsedUs) : "";
  const button = row.querySelector("button");
  button.textContent = shown.accruing || shown.state === "ended" ? "Show" : "Switch to it";
  button.hidden = chat === selected;
  if (chat === selected) renderSelected(chat);
  renderBalance();
}

function writeState(badge, { ready, state, accruing }) {
  const waits = ready && state === "running" && !accruing; // for the network
  badge.textContent = WORDS[waits ? "waiting" : state] ?? "Opening";
  badge.className = `badge ${waits ? "lapsed" : (state ?? "")}`;
}

function renderSelected({ advisorId, clock }) {
  const { shown } = clock;
  const { name, card } = advisors.get(advisorId) ?? { name: advisorId };
  $("now-title").textContent = name;
  $("now-state").hidden = !shown.state;
  writeState($("now-state"), shown);
  document.querySelector(".now").classList.toggle("still", !shown.accruing);
  $("now-price").textContent = card ? price(card) : "–";
  if (!shown.ready) return;
  const { body } = shown.reading;
  const granted = body.free_used_us + body.free_left_us; // of this chat; others with the advisor share it
  $("now-free").textContent = shown.freeLeftUs > 0 ? remaining(shown.freeLeftUs) : "used up";
  $("now-used").textContent = `${trimmed(shown.creditsUsed)} credits`;
  $("now-bar").hidden = shown.freeLeftUs === 0;
  $("now-bar").firstElementChild.style.setProperty("--part", granted ? shown.freeLeftUs / granted : 0);
  $("now-line").textContent = sentence(shown);
  $("now-buttons").hidden = false;
  $("pause").hidden = !shown.accruing;
  $("go").hidden = shown.accruing || shown.state === "running";
  $("go").textContent = shown.state === "ended" ? "Open it again" : "Continue";
  $("end").hidden = shown.state === "ended";
  $("now-problem").hidden = !shown.problem;
  $("now-problem").textContent = shown.problem?.detail ?? "";
  $("lasts").textContent =
    shown.accruing && shown.secondsLeft !== null ? `Enough for ${remaining(shown.secondsLeft * 1e6)} more` : "\u00a0";
  document.querySelector(".wallet").classList.toggle(
    "low",
    shown.state === "exhausted" || (shown.accruing && shown.secondsLeft !== null && shown.secondsLeft < LOW_SECONDS),
  );
  document.title = `${shown.accruing ? "▶ " : ""}${duration(shown.elapsedUs)} · ${name}`;
}

function sentence({ state, accruing, freeLeftUs, reading }) {
  if (accruing) return freeLeftUs > 0 ? "Free time runs." : "Credits run.";
  const why = {
    running: "No heartbeat gets through: the clock stands where the server's does.",
    lapsed: "The connection was lost; the clock stopped when the lease ended.",
    paused: reading.body.stop_reason === "switched" ? "Another chat took over." : "The clock stands still.",
    exhausted: "The credits have run out. Add some, then continue.",
    abandoned: "Nobody was here for a while.",
    ended: "This chat is over.",
  };
  return why[state];
}

// All clocks that run draw on one balance; each reading knows the others only up to its own instant.
function renderBalance() {
  const clocks = [...chats.values()].map(({ clock }) => clock.shown).filter(({ ready }) => ready);
  if (!clocks.length) return;
  const latest = clocks.reduce((a, b) => (b.reading.asOf > a.reading.asOf ? b : a)).reading;
  const now = Math.max(...clocks.map(({ at }) => at));
  const spent = clocks.map(({ reading }) => show(reading, now).creditsUsed - show(reading, latest.asOf).creditsUsed);
  const left = spent.reduce((sum, one) => sum - one, latest.balance);
  $("balance").textContent = trimmed(formatCredits(left < 0n ? 0n : left));
}

function say(state) {
  if (state) $("said").textContent = `${$("now-title").textContent}: ${WORDS[state] ?? state}`;
}

function trouble(error) {
  $("trouble").textContent = error.status ? error.message : "The server cannot be reached. This page tries again by itself.";
  $("trouble").hidden = false;
}

// --- the page ---

const proof = new Proof({ token, fetch: line });

function frame() {
  const shown = selected?.clock.current();
  const [time, fraction] = shown?.ready ? precise(shown.elapsedUs).split(/(?=\.)/) : [selected ? "–:––" : "0:00", ""];
  if ($("now-clock").textContent !== time) $("now-clock").textContent = time;
  $("now-clock").dateTime = shown?.ready ? `PT${(shown.elapsedUs / 1e6).toFixed(6)}S` : "";
  if ($("now-fraction").textContent !== fraction) $("now-fraction").textContent = fraction;
  requestAnimationFrame(frame);
}

async function restore() {
  const was = JSON.parse(localStorage.getItem(KEPT) ?? "null");
  guest = was?.guest ?? null;
  if (guest) {
    try {
      const headers = { Authorization: `Bearer ${await token()}` };
      const { items } = await ask(`/v1/users/${guest}/chats?limit=20`, { headers });
      const chosen = items.find(({ chat_id }) => chat_id === was.selected) ?? items[0];
      for (const { chat_id, advisor_id, state } of items.reverse()) {
        const chat = open(chat_id, advisor_id, { watch: chat_id !== chosen.chat_id && state !== "running" });
        if (chat_id === chosen.chat_id) select(chat);
      }
      return;
    } catch (error) {
      if (error.status !== 404 && error.status !== 403) throw error;
    }
  }
  ({ user_id: guest } = await ask("/demo/guests", { method: "POST" }));
  localStorage.setItem(KEPT, JSON.stringify({ guest }));
}

async function load() {
  try {
    const found = await ask("/demo/advisors");
    advisors = new Map(found.map((advisor) => [advisor.card.advisor_id, advisor]));
    await restore();
    const account = await ask(`/v1/users/${guest}/account`, { headers: { Authorization: `Bearer ${await token()}` } });
    $("balance").textContent = trimmed(account.balance);
  } catch (error) {
    trouble(error);
    setTimeout(load, 3000);
    return;
  }
  $("trouble").hidden = true;
  $("guest").textContent = guest;
  $("advisors").replaceChildren(
    ...[...advisors.values()].map(({ name, field, card }) => {
      const item = document.createElement("li");
      item.innerHTML = `<span class="face" aria-hidden="true"></span>
        <span class="who"><strong></strong><span class="muted small"></span></span><button type="button" class="slim">Start a chat</button>`;
      item.querySelector(".face").textContent = initials(name);
      item.querySelector("strong").textContent = name;
      item.querySelector(".muted").textContent = `${field} · ${price(card)}`;
      item.querySelector("button").setAttribute("aria-label", `Start a chat with ${name}`);
      item.querySelector("button").addEventListener("click", () => begin(card.advisor_id));
      return item;
    }),
  );
}

$("go").addEventListener("click", () => run("start"));
$("pause").addEventListener("click", () => run("pause"));
$("end").addEventListener("click", () => run("stop"));
$("cut").addEventListener("click", () => {
  cut = !cut;
  $("cut").setAttribute("aria-pressed", cut);
  $("cut").textContent = cut ? "Mend the network" : "Cut the network";
  if (!cut) window.dispatchEvent(new Event("online"));
});
$("top-up").addEventListener("click", async () => {
  try {
    const entry = await command("credits", crypto.randomUUID());
    $("balance").textContent = trimmed(entry.balance_after);
    $("said").textContent = "5 credits were added";
    await Promise.all([...chats.values()].map(({ clock }) => clock.refresh()));
  } catch (error) {
    trouble(error);
  }
});
$("forget").addEventListener("click", () => {
  localStorage.removeItem(KEPT);
  location.reload();
});
load();
frame();
