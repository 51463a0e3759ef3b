import assert from "node:assert/strict";
import { test } from "node:test";
import { createElement, StrictMode } from "react";
import TestRenderer, { act } from "react-test-renderer";
import { formatDuration } from "../index.js";
import { useChatClock } from "../react.js";
import { FakeApi } from "./server.js";

globalThis.IS_REACT_ACT_ENVIRONMENT = true;

async function until(condition, ms = 3000) {
  for (const end = performance.now() + ms; !condition(); ) {
    assert.ok(performance.now() < end, `waited ${ms} ms for ${condition}`);
    await act(() => new Promise((done) => setTimeout(done, 5)));
  }
}

test("a component shows the clock, ticks, pauses, and follows to another chat", async (t) => {
  const api = await new FakeApi().listen();
  t.after(() => api.close());
  let renders = 0;
  let now;
  function Clock({ chatId }) {
    renders++;
    now = useChatClock({ url: api.url, userId: "u1", chatId, advisorId: "a1", token: () => "good" });
    return createElement("p", null, now.ready ? `${now.state} ${formatDuration(now.elapsedUs)}` : "...");
  }
  let root;
  const render = (chatId) => createElement(StrictMode, null, createElement(Clock, { chatId }));
  await act(() => (root = TestRenderer.create(render("c1"))));
  t.after(() => act(() => root.unmount())); // or it would go on for ever after a failure
  const text = () => root.toJSON().children.join("");
  await until(() => text() === "running 0:00");
  renders = 0;
  await until(() => text() === "running 0:01");
  assert.ok(renders <= 16, `${renders} renders within a second`); // in strict mode each counts twice
  const first = now.clock;
  // Well within the second: what was shown may be ahead by as much as the offset of the clocks is uncertain.
  await act(() => new Promise((done) => setTimeout(done, 200)));
  await act(() => first.pause());
  assert.equal(text(), "paused 0:01");

  await act(() => root.update(render("c2")));
  await until(() => now.clock && now.clock !== first && now.ready);
  await act(() => root.unmount());
  const asked = api.log.length;
  await new Promise((done) => setTimeout(done, 700));
  assert.equal(api.log.length, asked, "an unmounted clock asks nothing");
});

test("a token that is renewed is used", async (t) => {
  const api = await new FakeApi().listen();
  t.after(() => api.close());
  api.command("start");
  let now;
  function Clock({ token }) {
    now = useChatClock({ url: api.url, userId: "u1", chatId: "c1", token });
    return null;
  }
  let root;
  await act(() => (root = TestRenderer.create(createElement(Clock, { token: "stale" }))));
  t.after(() => act(() => root.unmount()));
  await until(() => now.problem?.code === "unauthorized");
  await act(() => root.update(createElement(Clock, { token: "good" })));
  await until(() => now.accruing);
});
