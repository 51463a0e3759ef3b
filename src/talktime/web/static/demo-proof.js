// What the server says, beside what the page shows: asked each second, on a line that the button does not cut.

import { precise } from "./demo-words.js";

const EVERY_MS = 1000;
const KEEP = 60;
const EDGE_US = 100_000;

const $ = (id) => document.getElementById(id);

export class Proof {
  #token;
  #fetch;
  #clock = null;
  #trace = [];
  #asking = false;

  constructor({ token, fetch }) {
    this.#token = token;
    this.#fetch = fetch;
    setInterval(() => this.#ask(), EVERY_MS);
  }

  /** Look at this clock from now on. */
  follow(clock) {
    if (clock === this.#clock) return;
    this.#clock = clock;
    this.#trace = [];
    for (const id of ["page-time", "server-time", "difference"]) $(id).textContent = "–";
    this.#draw();
    this.#ask();
  }

  async #ask() {
    const clock = this.#clock;
    if (this.#asking || !clock?.shown.ready || document.hidden) return;
    this.#asking = true;
    const { user_id, chat_id } = clock.shown.reading.body;
    try {
      const headers = { Authorization: `Bearer ${await this.#token()}` };
      const before = clock.current();
      const sent = performance.now();
      const response = await this.#fetch(`/v1/users/${user_id}/chats/${encodeURIComponent(chat_id)}`, {
        headers,
        cache: "no-store",
        signal: AbortSignal.timeout(5 * EVERY_MS),
      });
      const received = performance.now();
      const after = clock.current();
      const reading = await response.json();
      if (!response.ok || clock !== this.#clock) return;
      // The server looked at its clock some time between, so the middle is as good a guess as any, and half the time
      // on the way is how far off it can be.
      const page = (before.elapsedUs + after.elapsedUs) / 2;
      const difference = page - reading.elapsed_us;
      const doubt = (after.elapsedUs - before.elapsedUs) / 2;
      this.#trace = [...this.#trace, difference].slice(-KEEP);
      $("page-time").textContent = precise(page);
      $("server-time").textContent = precise(reading.elapsed_us);
      const ms = difference / 1000;
      $("difference").textContent = `${ms > 0.5 ? "+" : ms < -0.5 ? "−" : ""}${Math.abs(ms).toFixed(0)} ms ± ${Math.ceil(doubt / 1000)}`;
      $("difference").title = `the answer took ${(received - sent).toFixed(1)} ms`;
      document.querySelector(".proof").classList.toggle("off", Math.abs(difference) > 250_000 + doubt);
      this.#draw();
    } catch {
      $("server-time").textContent = "no answer";
      $("difference").textContent = "–";
    } finally {
      this.#asking = false;
    }
  }

  #draw() {
    const points = this.#trace.map((us, i) => {
      const x = 240 - (this.#trace.length - 1 - i) * (240 / (KEEP - 1));
      return `${x.toFixed(1)},${(32 - Math.max(-30, Math.min(30, (us / EDGE_US) * 30))).toFixed(1)}`;
    });
    document.querySelector("#trace polyline").setAttribute("points", points.join(" "));
  }
}
