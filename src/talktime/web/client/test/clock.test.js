import assert from "node:assert/strict";
import { afterEach, beforeEach, test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import { ChatClock } from "../index.js";
import { FakeApi } from "./server.js";

let api;
let clocks;

beforeEach(async () => {
  api = await new FakeApi().listen();
  clocks = [];
});

afterEach(async () => {
  for (const clock of clocks) clock.close();
  await api.close();
});

function open(options = {}) {
  const clock = new ChatClock({ url: api.url, userId: "u1", chatId: "c1", advisorId: "a1", token: "good", ...options });
  clocks.push(clock);
  return clock;
}

async function until(condition, ms = 5000) {
  const end = performance.now() + ms;
  while (!condition()) {
    assert.ok(performance.now() < end, `waited ${ms} ms for ${condition}`);
    await sleep(2);
  }
}

function told(clock, type) {
  const events = [];
  clock.addEventListener(type, (event) => events.push(event.detail));
  return events;
}

/** Look at the clock every few milliseconds, as frames of a page would; returns what was seen, and how far it was off. */
async function watch(clock, ms) {
  const frames = [];
  for (const end = performance.now() + ms; performance.now() < end; await sleep(4)) {
    const shown = clock.current();
    if (shown.ready) frames.push({ ...shown, offMs: (shown.elapsedUs - api.elapsed(api.now())) / 1000 });
  }
  return frames;
}

function neverBack(frames) {
  for (let i = 1; i < frames.length; i++) {
    assert.ok(frames[i].elapsedUs >= frames[i - 1].elapsedUs, `back from ${frames[i - 1].elapsedUs} to ${frames[i].elapsedUs}`);
  }
}

const names = () => api.log.map(({ name }) => name);

test("an unknown chat is started, and shown within a moment", async () => {
  const clock = open();
  assert.deepEqual(clock.shown, { ready: false, state: null, accruing: false, problem: null, reading: null });
  await until(() => clock.shown.accruing, 1000);
  assert.deepEqual(names().slice(0, 2), ["read", "start"]);
  assert.deepEqual(api.log[1].body, { advisor_id: "a1" });
  assert.match(api.log[1].headers["idempotency-key"], /^([0-9a-f-]{36}|0\.\d+)$/);
  const frames = await watch(clock, 1200);
  neverBack(frames);
  assert.ok(frames.every(({ offMs }) => Math.abs(offMs) < 20), "never off by 20 ms");
});

test("a page that may not start asks its own server", async () => {
  const keys = [];
  const clock = open({ start: async (key) => (keys.push(key), api.command("start"), api.reading()) });
  await until(() => clock.shown.accruing, 1000);
  assert.equal(keys.length, 1);
  assert.ok(!names().includes("start"));
});

test("a page that may not pause asks its own server too", async () => {
  const told = [];
  const own = (name) => async () => (told.push(name), void api.command(name));
  const clock = open({ pause: own("pause"), stop: own("stop") });
  await until(() => clock.shown.accruing);
  assert.equal((await clock.pause()).state, "paused");
  assert.equal((await clock.stop()).state, "ended");
  assert.deepEqual(told, ["pause", "stop"]);
  assert.ok(!names().includes("pause"));
});

test("what the page's own server refuses is told as it says it", async () => {
  const refused = Object.assign(new Error("no more chats today"), { code: "limit" });
  const clock = open({ autoStart: false, start: () => Promise.reject(refused) });
  await assert.rejects(clock.start(), refused);
  assert.deepEqual(clock.shown.problem, { code: "limit", detail: "no more chats today" });
});

test("a server that starts the chat and tells nothing is asked", async () => {
  const clock = open({ start: async () => void api.command("start") });
  await until(() => clock.shown.accruing, 1000);
});

test("a chat that was not started stays unknown if it is to", async () => {
  const clock = open({ autoStart: false });
  await until(() => clock.shown.state === "unknown");
  await sleep(1200);
  assert.ok(names().every((name) => name === "read"));
  await clock.start();
  assert.equal(clock.shown.state, "running");
});

for (const state of ["paused", "ended"]) {
  test(`a chat that was ${state} is shown and left alone`, async () => {
    api.command("start");
    await sleep(30);
    api.command(state === "paused" ? "pause" : "stop");
    const clock = open();
    await until(() => clock.shown.ready);
    await sleep(1100);
    assert.equal(clock.shown.state, state);
    assert.equal(clock.shown.elapsedUs, api.chat.elapsed);
    assert.ok(api.log.length >= 2 && names().every((name) => name === "read"), names().join());
  });
}

test("a running chat goes on after a refresh, and a lapsed one is taken up again", async () => {
  api.command("start");
  await sleep(100);
  let clock = open();
  await until(() => clock.shown.accruing);
  assert.ok(clock.shown.elapsedUs >= 100_000);
  clock.close();
  await sleep(1700);
  api.reading();
  assert.equal(api.chat.state, "lapsed");
  const before = api.chat.elapsed;
  clock = open();
  await until(() => clock.shown.accruing);
  assert.ok(clock.shown.elapsedUs >= before && clock.shown.elapsedUs < before + 500_000);
  assert.ok(!names().includes("start"));
});

test("one small request a heartbeat, and a tick at each whole second", async () => {
  const clock = open();
  await until(() => clock.shown.accruing);
  const before = api.log.length;
  const ticks = [];
  clock.addEventListener("change", () => ticks.push(clock.shown.elapsedUs % 1e6));
  await sleep(3100);
  const requests = api.log.length - before;
  assert.ok(requests >= 5 && requests <= 7, `${requests} requests in 3.1 s at 0.5 s`);
  assert.ok(ticks.filter((us) => us < 30_000).length >= 3, `ticks at ${ticks.join(", ")}`);
});

test("with half the answers late by up to 1.5 s, no frame goes back or is off by 250 ms", async () => {
  api.leaseUs = 6_000_000;
  let seed = 7;
  const chance = () => (seed = (seed * 16807) % 2147483647) / 2147483647;
  api.rule = () => (chance() < 0.5 ? { after: chance() * 1500 } : {});
  const clock = open();
  await until(() => clock.shown.ready);
  const frames = await watch(clock, 8000);
  neverBack(frames);
  assert.ok(frames.length > 500);
  const worst = Math.max(...frames.map(({ offMs }) => Math.abs(offMs)));
  assert.ok(worst < 250, `off by ${worst} ms`);
});

test("answers that overtake each other do no harm", async () => {
  api.leaseUs = 20_000_000;
  const clock = open();
  await until(() => clock.shown.accruing);
  let n = 0;
  api.rule = () => (n++ % 3 === 0 ? { after: 1400 } : {});
  const frames = await watch(clock, 3000);
  neverBack(frames);
  const asOf = frames.map(({ reading }) => reading.asOf);
  assert.deepEqual(asOf, asOf.toSorted?.((a, b) => a - b) ?? [...asOf].sort((a, b) => a - b));
  await clock.pause();
  const { elapsedUs } = clock.shown;
  await sleep(1500); // the late answers to beats before the pause come in now
  assert.equal(clock.current().state, "paused");
  assert.equal(clock.current().elapsedUs, elapsedUs);
});

test("without network the clock stops where the lease ends, says so, and goes on from there", async () => {
  const clock = open();
  const problems = told(clock, "problem");
  await until(() => clock.shown.accruing);
  api.rule = () => ({ lost: true });
  const cut = await watch(clock, 2600);
  neverBack(cut);
  const stood = cut.at(-1);
  assert.equal(stood.accruing, false);
  assert.equal(stood.problem.code, "offline");
  assert.match(stood.problem.detail, /cannot be reached/);
  assert.equal(problems.length, 1);
  api.reading();
  assert.equal(stood.elapsedUs, api.chat.elapsed); // to the microsecond where the server stopped
  api.rule = () => ({});
  const back = await watch(clock, 2500);
  neverBack([stood, ...back]);
  assert.equal(back.at(-1).problem, null);
  assert.ok(back.at(-1).accruing && back.at(-1).elapsedUs > stood.elapsedUs);
});

test("a pause stands at once, and then where the server stopped", async () => {
  const clock = open();
  await until(() => clock.shown.accruing);
  api.rule = ({ name }) => (name === "pause" ? { before: 150, after: 300 } : {});
  const paused = clock.pause();
  const first = clock.current();
  assert.equal(first.accruing, false);
  const frames = await watch(clock, 400);
  assert.ok(frames.every(({ elapsedUs }) => elapsedUs === first.elapsedUs));
  await paused;
  assert.equal(clock.shown.state, "paused");
  assert.equal(clock.shown.elapsedUs, api.chat.elapsed);
  assert.ok(clock.shown.elapsedUs >= first.elapsedUs);
});

test("a pause that cannot be sent is tried again, and the clock goes on if it fails for good", async () => {
  const clock = open();
  await until(() => clock.shown.accruing);
  let n = 0;
  api.rule = ({ name }) => (name === "pause" && n++ < 1 ? { lost: true } : {});
  await clock.pause();
  assert.equal(clock.shown.state, "paused");
  await clock.start();
  api.rule = ({ name }) => (name === "pause" ? { status: 403, body: { code: "forbidden", detail: "no" } } : {});
  await assert.rejects(clock.pause(), { code: "forbidden", status: 403 });
  assert.equal(clock.shown.accruing, true);
});

test("a pause on another device corrects the display once, together with the state", async () => {
  const clock = open();
  await until(() => clock.shown.accruing);
  await sleep(50);
  api.command("pause");
  const frames = await watch(clock, 900);
  const change = frames.findIndex(({ state }) => state === "paused");
  neverBack(frames.slice(0, change));
  assert.ok(frames.slice(change).every(({ elapsedUs }) => elapsedUs === api.chat.elapsed));
});

test("credits run out at the same microsecond here and there, and the page is told once", async () => {
  api.balance = 1_200_000;
  const clock = open({ lowSeconds: 1 });
  const [low, exhausted] = [told(clock, "low"), told(clock, "exhausted")];
  await until(() => exhausted.length);
  await sleep(700);
  assert.equal(clock.shown.state, "exhausted");
  assert.equal(clock.shown.elapsedUs, 1_200_000);
  assert.equal(api.chat.elapsed, 1_200_000);
  assert.deepEqual([clock.shown.creditsUsed, clock.shown.balance], ["1.200000", "0.000000"]);
  assert.deepEqual([low.length, exhausted.length], [1, 1]);
  assert.ok(low[0].secondsLeft < 1 && low[0].secondsLeft > 0);
});

test("exhaustion is foretold without network, to the microsecond", async () => {
  api.balance = 900_000;
  const clock = open();
  await until(() => clock.shown.accruing);
  api.rule = () => ({ lost: true });
  await until(() => clock.shown.state === "exhausted", 2000);
  assert.deepEqual([clock.shown.elapsedUs, clock.shown.balance], [900_000, "0.000000"]);
});

test("free time counts down, and then credits are used", async () => {
  api.freeUs = 600_000;
  const clock = open();
  await until(() => clock.shown.accruing);
  const frames = await watch(clock, 1200);
  for (const { elapsedUs, freeLeftUs, creditsUsed } of frames) {
    assert.equal(freeLeftUs, Math.max(0, 600_000 - elapsedUs));
    assert.equal(Number(creditsUsed).toFixed(6), (Math.max(0, elapsedUs - 600_000) / 1e6).toFixed(6));
  }
});

test("a token that ran out is asked for again, and the page is told if there is no better one", async () => {
  let fresh = "good";
  const asked = [];
  const clock = open({ token: (refused) => (asked.push(refused), refused ? fresh : "stale") });
  await until(() => clock.shown.accruing);
  assert.ok(asked.includes("stale"));
  const refusals = told(clock, "unauthorized");
  fresh = "stale";
  await until(() => refusals.length === 1);
  assert.deepEqual([refusals[0].code, refusals[0].status], ["unauthorized", 401]);
  assert.equal(clock.shown.problem.code, "unauthorized");
  fresh = "good";
  await until(() => clock.shown.problem === null);
  assert.equal(refusals.length, 1);
});

test("a chat that is over tells the page, which does not start it again", async () => {
  const clock = open();
  const conflicts = told(clock, "conflict");
  await until(() => clock.shown.accruing);
  api.command("stop");
  await until(() => conflicts.length);
  assert.equal(conflicts[0].code, "chat-not-active");
  assert.equal(clock.shown.state, "ended");
  await sleep(1100);
  assert.equal(names().filter((name) => name === "start").length, 1);
  assert.equal(api.log.at(-1).name, "read");
  assert.equal(conflicts.length, 1);
});

test("who may not beat goes on reading", async () => {
  api.command("start");
  api.rule = ({ name }) => (name === "heartbeat" ? { status: 403, body: { code: "forbidden", detail: "no" } } : {});
  const clock = open();
  const problems = told(clock, "problem");
  await until(() => clock.shown.accruing);
  await sleep(1600);
  assert.deepEqual([1, 0, null], [names().filter((name) => name === "heartbeat").length, problems.length, clock.shown.problem]);
});

test("a server in trouble is left the time it asks for", async () => {
  const clock = open();
  await until(() => clock.shown.accruing);
  api.rule = () => ({ status: 503, body: "<html>not a problem document</html>", headers: { "retry-after": "2" } });
  await until(() => clock.shown.problem);
  const before = api.log.length;
  await sleep(1700);
  assert.equal(api.log.length, before);
});

test("a Retry-After that is a date, or nonsense, is no reason to hurry", async () => {
  const clock = open();
  await until(() => clock.shown.accruing);
  api.rule = () => ({ status: 503, body: "{}", headers: { "retry-after": "Sat, 21 Nov 2026 14:00:00 GMT" } });
  await until(() => clock.shown.problem);
  const before = api.log.length;
  await sleep(1000);
  assert.ok(api.log.length - before <= 4, `${api.log.length - before} requests within a second`);
});

test("a command waits as long as a server in trouble asks", async () => {
  const clock = open();
  await until(() => clock.shown.accruing);
  const tries = [];
  api.rule = ({ name, at }) => (name === "pause" && tries.push(at) < 2 ? { status: 503, body: "{}", headers: { "retry-after": "2" } } : {});
  await clock.pause();
  assert.ok(tries[1] - tries[0] >= 1990, `${tries[1] - tries[0]} ms`);
});

test("a start that fails for a while is tried until it works, and the page is told meanwhile", async () => {
  const clock = open();
  const problems = told(clock, "problem");
  api.rule = ({ name }) => (name === "start" ? { status: 500, body: "{}" } : {});
  await until(() => names().filter((name) => name === "start").length === 5, 12_000);
  assert.ok(problems.length >= 1);
  assert.equal(problems[0].code, "unavailable");
  api.rule = () => ({});
  await until(() => clock.shown.accruing, 4000);
});

test("the page's own server may answer with a Response, and refuse with one", async () => {
  const answers = [new Response('{"code": "no-funds", "detail": "add credits first"}', { status: 402 }), new Response(null, { status: 204 })];
  const clock = open({ autoStart: false, start: async () => answers.shift() });
  await until(() => clock.shown.state === "unknown");
  await assert.rejects(clock.start(), { code: "no-funds", status: 402, message: "add credits first" });
  api.command("start");
  assert.equal((await clock.start()).state, "running");
});

test("options that are undefined are as if they were not given", async () => {
  api.balance = 500_000;
  const clock = open({ autoStart: undefined, lowSeconds: undefined, watch: undefined, start: undefined });
  const low = told(clock, "low");
  await until(() => clock.shown.accruing);
  assert.equal(low.length, 1);
});

test("a clock that is closed while it retries starts nothing", async () => {
  const clock = open({ autoStart: false });
  await until(() => clock.shown.state === "unknown");
  api.rule = ({ name }) => (name === "start" ? { status: 503, body: "{}" } : {});
  const started = clock.start();
  await until(() => names().includes("start"));
  clock.close();
  await assert.rejects(started, { code: "unavailable" });
  assert.equal(names().filter((name) => name === "start").length, 1);
});

test("a pause that is answered after the clock was closed has succeeded", async () => {
  const clock = open();
  await until(() => clock.shown.accruing);
  const paused = clock.pause();
  clock.close();
  await paused;
  assert.equal(api.chat.state, "paused");
});

test("a pause right after a start is no step back", async () => {
  const clock = open({ autoStart: false });
  await until(() => clock.shown.state === "unknown");
  api.rule = ({ name }) => (name === "pause" ? { after: 500 } : {});
  const both = [clock.start(), clock.pause()];
  const frames = await watch(clock, 900);
  await Promise.allSettled(both);
  neverBack([...frames, clock.current()]);
});

test("an onlooker beside it does not keep a clock from beating", async () => {
  const onlooker = open({ watch: true });
  const clock = open();
  await until(() => clock.shown.accruing && onlooker.shown.accruing);
  await sleep(3000);
  assert.equal(api.chat.state, "running");
  assert.ok(names().filter((name) => name === "heartbeat").length >= 4);
});

test("a tab whose own request failed hears from another that all is well", async () => {
  const [first, second] = [open(), open()];
  await until(() => first.shown.accruing && second.shown.accruing);
  let lost = 2;
  api.rule = () => (lost-- > 0 ? { lost: true } : {});
  await until(() => first.shown.problem || second.shown.problem, 3000);
  await until(() => !first.shown.problem && !second.shown.problem, 3000);
});

test("of several tabs on one chat one beats, and all agree", async () => {
  const tabs = [open(), open(), open()];
  await until(() => tabs.every((tab) => tab.shown.accruing));
  await sleep(300);
  const before = names().length;
  await sleep(3000);
  const requests = names().length - before;
  assert.ok(requests <= 9, `${requests} requests of three tabs in 3 s at 0.5 s`);
  const seen = tabs.map((tab) => tab.current().elapsedUs);
  assert.ok(Math.max(...seen) - Math.min(...seen) < 20_000, seen.join());
  await tabs[1].pause();
  await until(() => tabs.every((tab) => tab.shown.state === "paused"), 300);
  assert.equal(new Set(tabs.map((tab) => tab.shown.elapsedUs)).size, 1);
});

test("while another chat takes over, this clock stands still, and shows where it was stopped", async () => {
  const clock = open();
  await until(() => clock.shown.accruing);
  const other = new BroadcastChannel(`talktime ${api.url} u1`);
  other.postMessage({ from: "c2", advisorId: "a1", starting: "k" });
  await until(() => !clock.shown.accruing, 300);
  const stood = clock.shown.elapsedUs;
  await sleep(120);
  api.command("pause"); // the switch
  assert.equal(clock.current().elapsedUs, stood);
  other.postMessage({ from: "c2", started: "k" });
  await until(() => clock.shown.state === "paused", 500);
  assert.equal(clock.shown.elapsedUs, api.chat.elapsed);
  assert.ok(clock.shown.elapsedUs >= stood);
  other.close();
});

test("a closed clock asks nothing more and lets the process end", async () => {
  const clock = open();
  await until(() => clock.shown.accruing);
  clock.close();
  await sleep(50);
  const before = api.log.length;
  await sleep(1200);
  assert.equal(api.log.length, before);
});

