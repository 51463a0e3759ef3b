import assert from "node:assert/strict";
import { test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import { api, names, neverBack, open, told, until, watch } from "./page.js";

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

test("a page that loads while the API is down says so, and begins when it is back", async () => {
  api.rule = () => ({ lost: true });
  const clock = open();
  await until(() => clock.shown.problem);
  assert.deepEqual([clock.shown.ready, clock.shown.problem.code], [false, "offline"]);
  api.rule = () => ({});
  await until(() => clock.shown.accruing, 8000);
});

test("a laptop that slept for ten minutes shows what the server counted, and goes on from there", async () => {
  const clock = open();
  await until(() => clock.shown.accruing);
  const before = await watch(clock, 300);
  api.skewUs += 600_000_000; // this process, and its monotonic clock, stood still meanwhile
  const slept = await watch(clock, 1500);
  neverBack([...before, ...slept]);
  assert.ok(slept.every(({ elapsedUs, reading }) => elapsedUs <= reading.elapsedUs + (reading.accruesUntil ?? reading.asOf) - reading.asOf));
  const { accruing, elapsedUs } = slept.at(-1);
  assert.ok(accruing && elapsedUs < 5_000_000, `${elapsedUs} us after a few seconds of chat`);
  assert.ok(Math.abs(slept.at(-1).offMs) < 100);
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
  assert.ok(Math.max(...seen) - Math.min(...seen) < 100_000, seen.join());
  await tabs[1].pause();
  await until(() => tabs.every((tab) => tab.shown.state === "paused"), 3000);
  assert.equal(new Set(tabs.map((tab) => tab.shown.elapsedUs)).size, 1);
});

test("while another chat takes over, this clock stands still, and shows where it was stopped", async () => {
  const clock = open();
  await until(() => clock.shown.accruing);
  const other = new BroadcastChannel(`talktime ${api.url} u1`);
  other.postMessage({ from: "c2", advisorId: "a1", starting: "k" });
  await until(() => !clock.shown.accruing, 3000);
  const stood = clock.shown.elapsedUs;
  await sleep(120);
  api.command("pause"); // the switch
  assert.equal(clock.current().elapsedUs, stood);
  other.postMessage({ from: "c2", started: "k" });
  await until(() => clock.shown.state === "paused", 3000);
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

test("a gateway's 401, which is no problem document, is told as one", async () => {
  const clock = open();
  const refusals = told(clock, "unauthorized");
  await until(() => clock.shown.accruing);
  api.rule = () => ({ status: 401, body: "<html>" });
  await until(() => refusals.length);
  assert.equal(clock.shown.problem.code, "unauthorized");
});

test("a beat that is answered late, after the lease was seen to end, does not end resuming", async () => {
  api.leaseUs = 700_000;
  const clock = open();
  await until(() => clock.shown.accruing);
  let beats = 0;
  api.rule = ({ name }) => (name !== "heartbeat" ? {} : beats++ === 0 ? { after: 1500 } : { lost: true });
  await until(() => beats >= 1);
  await sleep(1350);
  await clock.refresh();
  assert.equal(clock.shown.state, "lapsed");
  await sleep(300); // the late answer comes
  api.rule = () => ({});
  await until(() => clock.shown.state === "running");
});
