import assert from "node:assert/strict";
import { test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import { api, names, neverBack, open, told, until, watch } from "./page.js";

test("an unknown chat is started, and shown within a moment", async () => {
  const clock = open();
  assert.deepEqual(clock.shown, { ready: false, state: null, accruing: false, problem: null, reading: null });
  await until(() => clock.shown.accruing, 5000);
  assert.deepEqual(names().slice(0, 2), ["read", "start"]);
  assert.deepEqual(api.log[1].body, { advisor_id: "a1" });
  assert.match(api.log[1].headers["idempotency-key"], /^([0-9a-f-]{36}|0\.\d+)$/);
  const frames = await watch(clock, 1200);
  neverBack(frames);
  assert.ok(frames.every(({ offMs }) => Math.abs(offMs) < 100), "never off by 100 ms");
});

test("a page that may not start asks its own server", async () => {
  const keys = [];
  const clock = open({ start: async (key) => (keys.push(key), api.command("start"), api.reading()) });
  await until(() => clock.shown.accruing, 5000);
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
  await until(() => clock.shown.accruing, 5000);
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
  assert.ok(ticks.filter((us) => us < 150_000).length >= 3, `ticks at ${ticks.join(", ")}`);
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
  api.rule = ({ name }) => (name === "heartbeat" && n++ % 3 === 0 ? { after: 4000 } : {});
  const frames = await watch(clock, 3000);
  neverBack(frames);
  const asOf = frames.map(({ reading }) => reading.asOf);
  assert.deepEqual(asOf, asOf.toSorted?.((a, b) => a - b) ?? [...asOf].sort((a, b) => a - b));
  await clock.pause();
  const { elapsedUs } = clock.shown;
  // The late answers to beats before the pause come in now.
  for (const { state, elapsedUs: seen } of await watch(clock, 4200)) assert.deepEqual([state, seen], ["paused", elapsedUs]);
  assert.equal(clock.current().state, "paused");
  assert.equal(clock.current().elapsedUs, elapsedUs);
});

test("a server's clock that is set back holds the display, which never goes back", async () => {
  api.leaseUs = 20_000_000;
  const clock = open();
  await until(() => clock.shown.accruing);
  const before = await watch(clock, 1500);
  api.skewUs -= 1_200_000;
  const frames = await watch(clock, 2500);
  neverBack([...before, ...frames]);
  assert.ok(frames.at(-1).elapsedUs > before.at(-1).elapsedUs, "it goes on when the server's clock has come so far");
});

test("a running clock is not shown by a time that is badly known", async () => {
  api.leaseUs = 20_000_000;
  api.command("start");
  let n = 0;
  api.rule = () => (n++ < 2 ? { after: 1200 } : {});
  const clock = open();
  const frames = await watch(clock, 4000);
  assert.ok(frames.length > 100);
  assert.ok(frames.every(({ offMs }) => Math.abs(offMs) < 250));
});

test("a lapsed clock whose place another chat has taken is not started when that one ends", async () => {
  const clock = open();
  await until(() => clock.shown.accruing);
  api.taken = true;
  api.rule = () => ({ lost: true });
  await sleep(1700);
  api.rule = () => ({});
  await until(() => clock.shown.state === "lapsed");
  await sleep(700);
  api.taken = false;
  await sleep(1500);
  assert.equal(clock.shown.state, "lapsed");
  assert.equal((await clock.start()).state, "running");
});
