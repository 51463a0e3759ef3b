import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";
import { cost, formatCredits, formatDuration, parseReading, show } from "../index.js";

const { cases } = JSON.parse(readFileSync(new URL("./vectors.json", import.meta.url)));

test("there are at least 200 cases", () => {
  assert.ok(cases.length >= 200);
});

for (const { name, reading, shown } of cases) {
  test(name, () => {
    const parsed = parseReading(reading);
    for (const { at, ...expected } of shown) {
      const instant = BigInt(Date.parse(`${at.slice(0, 19)}Z`)) * 1000n + BigInt(at.slice(20, 26));
      const { elapsedUs, freeLeftUs, creditsUsed, balance } = show(parsed, Number(instant));
      assert.deepEqual(
        { elapsed_us: elapsedUs, free_left_us: freeLeftUs, credits_used: formatCredits(creditsUsed), balance: formatCredits(balance) },
        expected,
        at,
      );
    }
  });
}

test("who may not see the balance sees none", () => {
  const reading = { ...cases.find(({ reading }) => reading.accruing).reading, balance: null, exhausts_at: null };
  assert.equal(show(parseReading(reading), Number.MAX_SAFE_INTEGER).balance, null);
});

test("blocks are whole, and costs are rounded up", () => {
  const tariff = { rate: 60_000_000n, firstUs: 60_000_000n, incrementUs: 6_000_000n };
  const seconds = [0, 0.000001, 60, 60.000001, 66, 66.000001];
  assert.deepEqual(seconds.map((s) => cost(tariff, Math.round(s * 1e6))), [0n, 60n, 60n, 66n, 66n, 72n].map((c) => c * 1_000_000n));
  assert.equal(cost({ rate: 1n, firstUs: 0n, incrementUs: 0n }, 1), 1n);
});

test("credits and durations are written as people read them", () => {
  assert.deepEqual([0n, 1n, -1n, 12_345_678n, -1_000_000n].map(formatCredits), ["0.000000", "0.000001", "-0.000001", "12.345678", "-1.000000"]);
  assert.deepEqual([0, 999_999, 59e6, 60e6, 3599e6, 3600e6, 36061e6].map(formatDuration), ["0:00", "0:00", "0:59", "1:00", "59:59", "1:00:00", "10:01:01"]);
});
