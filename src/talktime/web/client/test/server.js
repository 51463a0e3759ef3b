// A server on loopback that plays the API for one chat: enough of the meter to be asked, beaten, paused and stopped, an
// own clock that has nothing to do with this machine's, and answers that can be delayed, lost or refused.

import { createServer } from "node:http";

const written = (us) => `${new Date(Math.floor(us / 1000)).toISOString().slice(0, 19)}.${String(us % 1e6).padStart(6, "0")}Z`;
const credits = (micro) => (micro / 1e6).toFixed(6);

export class FakeApi {
  leaseUs = 1_500_000;
  heartbeatMs = 500;
  skewUs = 1_800_000_000_000_000; // the server's clock: 2027, while this process counts from its own start
  balance = 10_000_000;
  rate = 60_000_000; // a credit a second
  freeUs = 0;
  token = "good";
  taken = false; // another chat runs in this one's place
  log = [];
  /** (request) => {before, after} milliseconds, {lost: true}, or {status, body}. */
  rule = () => ({});
  chat = null;

  async listen() {
    this.server = createServer((request, response) => this.#answer(request, response));
    await new Promise((done) => this.server.listen(0, "127.0.0.1", done));
    this.url = `http://127.0.0.1:${this.server.address().port}`;
    return this;
  }

  async close() {
    this.server.closeAllConnections();
    await new Promise((done) => this.server.close(done));
  }

  now() {
    return Math.round(performance.now() * 1000) + this.skewUs;
  }

  /** Elapsed time at the server's instant `at`, as its clock would show it now. */
  elapsed(at) {
    const { chat } = this;
    if (!chat) return 0;
    return chat.elapsed + (chat.state === "running" ? Math.max(0, Math.min(at, this.#end()) - chat.opened) : 0);
  }

  #paid(elapsed) {
    return Math.max(0, elapsed - this.freeUs);
  }

  #exhausts() {
    return this.chat.opened + this.freeUs + (this.balance * 60_000_000) / this.rate - this.chat.elapsed;
  }

  #end() {
    return Math.min(this.chat.beat + this.leaseUs, this.#exhausts());
  }

  #halt(at, state, reason = state) {
    const { chat } = this;
    chat.elapsed += at - chat.opened;
    Object.assign(chat, { state, reason, stopped: at });
  }

  #settle(now) {
    const { chat } = this;
    if (chat?.state !== "running" || now < this.#end()) return;
    this.#halt(this.#end(), this.#end() === this.#exhausts() ? "exhausted" : "lapsed");
  }

  #open(now) {
    Object.assign(this.chat, { state: "running", opened: now, beat: now, stopped: null, reason: null });
  }

  /** Carry out a command at this very moment. */
  command(name) {
    const now = this.now();
    this.#settle(now);
    const { chat } = this;
    if (name === "start") {
      this.chat ??= { elapsed: 0, revision: 0, started: now };
      if (this.chat.state === "running") this.chat.beat = now;
      else this.#open(now);
      this.chat.revision++;
    } else if (name === "heartbeat") {
      if (chat.state === "running") chat.beat = now;
      if (chat.state === "lapsed" && !this.taken) {
        this.#open(now);
        chat.revision++;
      }
      return ["abandoned", "ended"].includes(chat.state) ? 409 : 200;
    } else if (name === "pause" || name === "stop") {
      const state = name === "pause" ? "paused" : "ended";
      if (chat.state === "running") this.#halt(now, state);
      chat.state = state;
      chat.revision++;
    }
    return 200;
  }

  reading() {
    const now = this.now();
    this.#settle(now);
    const { chat } = this;
    const runs = chat.state === "running";
    const elapsed = this.elapsed(now);
    const paid = this.#paid(elapsed);
    const end = runs ? this.#end() : null;
    const paidFrom = runs ? Math.max(now, now + this.freeUs - elapsed) : null;
    return {
      user_id: "u1", chat_id: "c1", advisor_id: "a1", state: chat.state, accruing: runs, revision: chat.revision,
      as_of: written(now), server_time: written(now),
      elapsed_us: elapsed, free_used_us: elapsed - paid, free_left_us: Math.max(0, this.freeUs - elapsed),
      credits_used: credits(Math.ceil((this.rate * paid) / 6e7)),
      balance: credits(this.balance - Math.ceil((this.rate * paid) / 6e7)),
      tariff: { credits_per_minute: credits(this.rate), first_seconds: 0, increment_seconds: 0 }, count_us: paid,
      accrues_until: runs ? written(end) : null, paid_from: runs && paidFrom < end ? written(paidFrom) : null,
      free_until: null, exhausts_at: runs ? written(this.#exhausts()) : null,
      started_at: written(chat.started), stopped_at: chat.stopped ? written(chat.stopped) : null,
      stop_reason: chat.reason ?? null, materialized_through: written(chat.started),
      heartbeat_seconds: this.heartbeatMs / 1000,
    };
  }

  async #answer(request, response) {
    let text = "";
    for await (const chunk of request) text += chunk;
    const name = request.url.split("/")[6] ?? "read";
    const entry = {
      name, method: request.method, at: performance.now(), headers: request.headers, body: text && JSON.parse(text),
    };
    this.log.push(entry);
    const rule = this.rule(entry, this.log.length) ?? {};
    if (rule.lost) return response.destroy();
    if (rule.before) await new Promise((done) => setTimeout(done, rule.before));
    let { status, body } = rule;
    if (!status && request.headers.authorization !== `Bearer ${this.token}`) [status, body] = [401, { code: "unauthorized", detail: "expired" }];
    if (!status && !this.chat && name !== "start") [status, body] = [404, { code: "chat-not-found", detail: "no such chat" }];
    if (!status) {
      status = this.command(name);
      body = status === 200 ? this.reading() : { code: "chat-not-active", detail: "over", reading: this.reading() };
    }
    if (rule.after) await new Promise((done) => setTimeout(done, rule.after));
    response.writeHead(status, { "content-type": "application/json", ...rule.headers });
    response.end(typeof body === "string" ? body : JSON.stringify(body));
  }
}
