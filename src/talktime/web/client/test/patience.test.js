import assert from "node:assert/strict";
import { test } from "node:test";
import { api, open, until } from "./page.js";

test("a tab that dies while it starts another chat does not hold this clock for ever", async () => {
  const clock = open();
  await until(() => clock.shown.accruing);
  const other = new BroadcastChannel(`talktime ${api.url} u1`);
  other.postMessage({ from: "c2", advisorId: "a1", starting: "k" });
  await until(() => !clock.shown.accruing);
  other.close();
  await until(() => clock.shown.accruing, 15_000);
});

test("a function of the page's own that hangs is asked again", async () => {
  let asked = 0;
  const pause = () => (asked++ ? Promise.resolve(void api.command("pause")) : new Promise(() => {}));
  const clock = open({ pause });
  await until(() => clock.shown.accruing);
  assert.equal((await clock.pause()).state, "paused");
  assert.equal(asked, 2);
});
