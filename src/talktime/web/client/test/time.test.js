import assert from "node:assert/strict";
import { test } from "node:test";
import { ServerTime } from "../index.js";

const SERVER_US = 1_800_000_000_000_000;

// A small generator of its own, so that a failure can be repeated.
function random(seed) {
  return () => {
    seed = (seed * 1664525 + 1013904223) % 2 ** 32;
    return seed / 2 ** 32;
  };
}

test("there is no time before the first answer", () => {
  assert.equal(new ServerTime().now(5), null);
  assert.equal(new ServerTime().uncertainty(5), Infinity);
});

test("the first answer sets the time to the middle of its round trip", () => {
  const time = new ServerTime();
  time.sample(1000, 1100, SERVER_US);
  assert.equal(time.now(1100), SERVER_US + 50_000);
  assert.equal(time.uncertainty(1100), 51_000);
});

test("a slow answer takes nothing from what a quick one told", () => {
  const time = new ServerTime();
  time.sample(1000, 1004, SERVER_US + 2_000); // exact: the local clock says 1002
  time.sample(2000, 6000, SERVER_US + 4_990_000); // came late: the middle would be 990 ms off
  assert.ok(Math.abs(time.now(6000) - (SERVER_US + 5_000_000)) < 2_000);
});

test("a small correction is worked in slowly, and time never goes back", () => {
  const time = new ServerTime();
  time.sample(0, 800, SERVER_US); // in truth the server's clock was read at local 0: 400 ms too little
  time.now(800);
  time.sample(1000, 1002, SERVER_US + 1_001_000);
  let before = time.now(1002);
  const missing = [];
  for (let ms = 1002; ms < 8000; ms += 16) {
    const now = time.now(ms);
    const step = now - before;
    assert.ok(step >= 0 && step <= 16 * 1000 * 1.11, `a step of ${step} us within 16 ms`);
    missing.push(Math.abs(SERVER_US + ms * 1000 - now));
    before = now;
  }
  assert.ok(missing[0] > 300_000);
  assert.ok(missing.at(-1) < 2_000);
});

test("what was known badly and never shown is no reason to be slow", () => {
  const time = new ServerTime();
  time.sample(0, 1400, SERVER_US); // 700 ms too little
  time.sample(1500, 1502, SERVER_US + 1_501_000);
  assert.ok(Math.abs(time.now(1502) - (SERVER_US + 1_502_000)) < 3_000);
});

test("a clock that was set, or a device that slept, is followed at once", () => {
  for (const jump of [600_000_000, -600_000_000]) {
    const time = new ServerTime();
    time.sample(1000, 1010, SERVER_US);
    time.now(1010);
    time.sample(2000, 2010, SERVER_US + 1_000_000 + jump);
    assert.ok(Math.abs(time.now(2010) - (SERVER_US + 1_005_000 + jump)) <= 1);
  }
});

test("over random round trips the error stays within what is said of it, and time never goes back", () => {
  for (let seed = 0; seed < 200; seed++) {
    const chance = random(seed);
    const time = new ServerTime();
    const drift = 1 + (chance() - 0.5) * 1e-4; // of the server's clock, as local clocks have it
    const truth = (ms) => SERVER_US + ms * 1000 * drift;
    let shown = 0;
    let sure = Infinity;
    for (let ms = 0; ms < 120_000; ms += 5000) {
      const [there, back] = [chance() * (chance() < 0.5 ? 1500 : 20), chance() * (chance() < 0.5 ? 1500 : 20)];
      time.sample(ms, ms + there + back, Math.round(truth(ms + there)));
      // What was known of the first moment bounds every later error, slow corrections included.
      sure = Math.min(sure, ms === 0 ? time.uncertainty(there + back) : Infinity);
      for (let at = ms + there + back; at < ms + 5000; at += 100) {
        const now = time.now(at);
        assert.ok(now >= shown, `seed ${seed}: back by ${shown - now} us at ${at} ms`);
        shown = now;
        assert.ok(Math.abs(now - truth(at)) <= sure + 15_000, `seed ${seed}: off by ${now - truth(at)} us at ${at} ms`);
      }
    }
    const known = time.uncertainty(120_000);
    assert.ok(Math.abs(time.now(120_000) - truth(120_000)) <= known + 1, `seed ${seed}`);
  }
});
