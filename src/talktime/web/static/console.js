import { ServerTime, formatCredits, formatDuration, parseReading, show } from "/client/index.js";

const REFRESH_MS = 5000;
const TICK_MS = 250;

const time = new ServerTime();
const stale = document.getElementById("stale");
const instant = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "medium" });

function sample(root, sentMs, receivedMs) {
  const at = root.querySelector("[data-server-time]")?.dataset.serverTime;
  if (at) time.sample(sentMs, receivedMs, Date.parse(`${at.slice(0, 19)}Z`) * 1000 + Number(at.slice(20, 26)));
}

// Into the viewer's zone; the exact instant, in UTC, becomes the title.
function localize(root) {
  for (const element of root.querySelectorAll("time:not([title])")) {
    element.title = element.dateTime;
    element.textContent = instant.format(new Date(element.dateTime));
  }
}

function write(element, amount) {
  const exact = formatCredits(amount);
  const [whole, decimals] = exact.split(".");
  element.title = element.value = exact;
  element.textContent = `${BigInt(whole).toLocaleString("en")}.${decimals.slice(0, 2)}`;
}

function tick() {
  const at = time.now(performance.now());
  if (at === null) return;
  const spent = new Map(); // by user: a balance pays for all of the user's chats
  const rows = [...document.querySelectorAll("[data-reading]")].map((row) => {
    const reading = (row.reading ??= parseReading(JSON.parse(row.dataset.reading)));
    const figures = show(reading, at);
    const user = reading.body.user_id;
    spent.set(user, (spent.get(user) ?? 0n) + figures.creditsUsed - reading.creditsUsed);
    return { row, reading, figures, user };
  });
  for (const { row, reading, figures, user } of rows) {
    for (const element of row.querySelectorAll("[data-show]")) {
      if (element.dataset.show === "elapsed") element.textContent = formatDuration(figures.elapsedUs);
      if (element.dataset.show === "free") element.textContent = formatDuration(figures.freeLeftUs);
      if (element.dataset.show === "credits") write(element, figures.creditsUsed);
      if (element.dataset.show === "balance") write(element, reading.balance - spent.get(user));
    }
  }
  const balance = document.querySelector("[data-balance]");
  if (balance) {
    const taken = [...spent.values()].reduce((sum, one) => sum + one, 0n);
    write(balance.querySelector("data"), BigInt(balance.dataset.balance) - taken);
  }
}

// Takes the marked parts of this page as they are now; a part that is in use is left for the next time.
async function refresh() {
  if (document.hidden) return;
  const sentMs = performance.now();
  try {
    const answer = await fetch(location.href, { headers: { Accept: "text/html" } });
    const receivedMs = performance.now();
    if (answer.redirected) return void location.reload(); // the session is over
    if (!answer.ok) throw new Error(answer.status);
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    sample(page, sentMs, receivedMs);
    localize(page);
    for (const old of document.querySelectorAll("[data-live]")) {
      const fresh = page.getElementById(old.id);
      const selection = getSelection();
      if (!fresh || (!selection.isCollapsed && selection.containsNode(old, true))) continue;
      old.querySelectorAll("details").forEach((one, at) => (fresh.querySelectorAll("details")[at].open = one.open));
      const focused = old.contains(document.activeElement) && document.activeElement.getAttribute("href");
      old.replaceWith(fresh);
      if (focused) fresh.querySelector(`a[href="${CSS.escape(focused)}"]`)?.focus({ preventScroll: true });
    }
    stale.hidden = true;
  } catch {
    stale.hidden = false;
  }
}

const [loaded] = performance.getEntriesByType("navigation");
sample(document, loaded.requestStart, loaded.responseStart);
localize(document);
tick();
setInterval(tick, TICK_MS);
if (document.querySelector("[data-live]")) {
  setInterval(refresh, REFRESH_MS);
  document.addEventListener("visibilitychange", refresh);
}
