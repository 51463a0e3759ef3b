import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";
import { gzipSync } from "node:zlib";

test("all that a page loads is under 6 KB gzipped, comments included", () => {
  const names = ["index.js", "clock.js", "reading.js", "time.js", "alarm.js", "worker.js"];
  const source = names.map((name) => readFileSync(new URL(`../${name}`, import.meta.url), "utf8")).join("");
  const imported = [...source.matchAll(/"\.\/(\w+\.js)"/g)].map(([, name]) => name);
  assert.deepEqual([...new Set(imported)].filter((name) => !names.includes(name)), [], "a file that is not counted");
  const bytes = gzipSync(source, { level: 9 }).length;
  assert.ok(bytes < 6 * 1024, `${bytes} bytes`);
});
