// What the tests of the clock share: an API for each, clocks on it, and looks at them.

import assert from "node:assert/strict";
import { afterEach, beforeEach } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import { ChatClock } from "../index.js";
import { FakeApi } from "./server.js";

/** The API of the test that runs. */
export let api;
let clocks;

beforeEach(async () => {
  api = await new FakeApi().listen();
  clocks = [];
});

afterEach(async () => {
  for (const clock of clocks) clock.close();
  await api.close();
});

export function open(options = {}) {
  const clock = new ChatClock({ url: api.url, userId: "u1", chatId: "c1", advisorId: "a1", token: "good", ...options });
  clocks.push(clock);
  return clock;
}

export async function until(condition, ms = 5000) {
  const end = performance.now() + ms;
  while (!condition()) {
    assert.ok(performance.now() < end, `waited ${ms} ms for ${condition}`);
    await sleep(2);
  }
}

export function told(clock, type) {
  const events = [];
  clock.addEventListener(type, (event) => events.push(event.detail));
  return events;
}

/** Look at the clock every few milliseconds, as frames of a page would; returns what was seen, and how far it was off. */
export async function watch(clock, ms) {
  const frames = [];
  for (const end = performance.now() + ms; performance.now() < end; await sleep(4)) {
    const shown = clock.current();
    if (shown.ready) frames.push({ ...shown, offMs: (shown.elapsedUs - api.elapsed(api.now())) / 1000 });
  }
  return frames;
}

export function neverBack(frames) {
  for (let i = 1; i < frames.length; i++) {
    assert.ok(frames[i].elapsedUs >= frames[i - 1].elapsedUs, `back from ${frames[i - 1].elapsedUs} to ${frames[i].elapsedUs}`);
  }
}

export const names = () => api.log.map(({ name }) => name);
