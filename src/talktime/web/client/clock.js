import { alarm } from "./alarm.js";
import { formatCredits, parseReading, show } from "./reading.js";
import { ServerTime } from "./time.js";

const SURE_US = 200_000; // so well the time must be known to be shown,
const SAMPLES_MAX = 4; // or so often asked for
const BEAT_MS = 5000;
const ASK_MS = 600_000; // how long a tab may only listen
const ANSWER_MS_MAX = 10_000;
const TRIES = 4;

const SAID = {
  offline: "The server cannot be reached. The clock stops by itself, and goes on when it can.",
  unavailable: "The server has trouble. The clock stops by itself, and goes on when it can.",
  unauthorized: "You are not signed in any more.",
  forbidden: "This is not allowed.",
};

export class ClockError extends Error {
  constructor(code, status, detail) {
    super(SAID[code] ?? detail ?? code);
    this.code = code;
    this.status = status;
    this.passing = code === "offline" || code === "unavailable";
  }
}

export class ChatClock extends EventTarget {
  #options;
  #url;
  #time = new ServerTime();
  #samples = 0;
  #reading = null;
  #unknown = false; // there is no such chat yet
  #watch;
  #resume = true; // takes a lapsed clock up again
  #problem = null;
  #rounds = 0;
  #asked = 0;
  #failures = 0;
  #heard = -Infinity; // when the last answer came
  #floor = 0; // the latest instant that was shown
  #hold = null; // the instant at which the display waits,
  #holds = new Set(); // and for which commands
  #low = false;
  #exhausted = false;
  #shown;
  #ticker;
  #cancel;
  #channel;
  #leads = true;
  #release;
  #closed = new AbortController();

  constructor(options) {
    super();
    const { url = "", userId, chatId, watch, autoStart = !watch, lowSeconds = 60 } = options;
    this.#options = { ...options, autoStart, lowSeconds };
    this.#watch = watch;
    this.#url = `${url}/v1/users/${encodeURIComponent(userId)}/chats/${encodeURIComponent(chatId)}`;
    this.#shown = this.current();
    const name = `talktime ${url} ${userId}`;
    const { signal } = this.#closed;
    if (globalThis.BroadcastChannel) {
      this.#channel = new BroadcastChannel(name);
      this.#channel.onmessage = ({ data }) => this.#hear(data);
      const locks = globalThis.navigator?.locks;
      this.#leads = !locks;
      const lead = () => {
        this.#leads = true;
        if (this.#reading) this.#wake(0);
        return new Promise((release) => (this.#release = release));
      };
      if (!watch) locks?.request(`${name} ${chatId}`, { signal }, lead).catch(() => {});
    }
    const nudge = () => {
      if (!globalThis.document?.hidden && performance.now() > this.#heard + 1000) this.#wake(0);
    };
    globalThis.addEventListener?.("online", nudge, { signal });
    globalThis.document?.addEventListener("visibilitychange", nudge, { signal });
    this.#wake(0);
  }

  get shown() {
    return this.#shown;
  }

  subscribe = (listener) => {
    this.addEventListener("change", listener);
    return () => this.removeEventListener("change", listener);
  };

  current() {
    const reading = this.#reading;
    const problem = this.#problem && { code: this.#problem.code, detail: this.#problem.message };
    const ready = Boolean(reading) && (this.#samples >= SAMPLES_MAX || !reading.accruing);
    if (!ready) return { ready, state: this.#unknown ? "unknown" : null, accruing: false, problem, reading };
    const at = this.#at();
    const { elapsedUs, freeLeftUs, creditsUsed, balance } = show(reading, at);
    const over = reading.accruing && at >= reading.accruesUntil;
    return {
      ready,
      state: over && reading.accruesUntil === reading.exhaustsAt ? "exhausted" : reading.state,
      accruing: reading.accruing && !over && this.#hold === null,
      at,
      elapsedUs,
      freeLeftUs,
      creditsUsed: formatCredits(creditsUsed),
      balance: balance === null ? null : formatCredits(balance),
      secondsLeft: reading.exhaustsAt === null ? null : Math.max(0, (reading.exhaustsAt - at) / 1e6),
      problem,
      reading,
    };
  }

  // Never earlier than shown before, nor later than a command that waits for its answer.
  #at() {
    const { accruing, asOf } = this.#reading;
    const now = (accruing && this.#time.now(performance.now())) || asOf;
    return (this.#floor = Math.max(this.#floor, Math.min(now, this.#hold ?? now)));
  }

  #change() {
    clearTimeout(this.#ticker);
    if (this.#closed.signal.aborted) return;
    const shown = (this.#shown = this.current());
    if (shown.accruing) {
      // To the next whole second, or to where the clock stops.
      const us = Math.min(1e6 - (shown.elapsedUs % 1e6), shown.reading.accruesUntil - shown.at);
      this.#ticker = setTimeout(() => this.#change(), Math.ceil(us / 1000));
      const low = shown.secondsLeft !== null && shown.secondsLeft < this.#options.lowSeconds;
      if (low && !this.#low) this.#emit("low", shown);
      this.#low = low;
    }
    const exhausted = shown.state === "exhausted";
    if (exhausted && !this.#exhausted) this.#emit("exhausted", shown);
    if (shown.ready) this.#exhausted = exhausted;
    this.dispatchEvent(new Event("change"));
  }

  #emit(type, detail) {
    this.dispatchEvent(Object.assign(new Event(type), { detail }));
  }

  async start() {
    const { chatId, advisorId = this.#reading?.body.advisor_id } = this.#options;
    const key = globalThis.crypto?.randomUUID?.() ?? String(Math.random());
    this.#channel?.postMessage({ from: chatId, advisorId, starting: key });
    try {
      return await this.#order("start", key, { advisor_id: advisorId });
    } finally {
      this.#channel?.postMessage({ from: chatId, started: key });
    }
  }

  pause() {
    return this.#stand("pause");
  }

  stop() {
    return this.#stand("stop");
  }

  refresh() {
    return this.#command(() => this.#send("GET", ""));
  }

  close() {
    this.#closed.abort();
    this.#release?.();
    this.#channel = this.#channel?.close();
    this.#cancel?.();
    clearTimeout(this.#ticker);
  }

  async #stand(name) {
    const command = this.#freeze({});
    try {
      return await this.#order(name);
    } finally {
      this.#thaw(command);
    }
  }

  async #order(name, key, body) {
    const own = this.#options[name];
    if (!own) return this.#command(() => this.#send("POST", `/${name}`, body, key));
    await this.#command(() =>
      this.#ask(async () => {
        const sent = performance.now();
        const answer = await Promise.race([own(key), new Promise((_, no) => alarm(ANSWER_MS_MAX, no))]);
        const body = answer?.json ? await answer.json().catch(() => {}) : answer;
        return { status: answer?.ok === false ? answer.status : 200, sent, body };
      }),
    );
    return this.refresh();
  }

  async #command(ask) {
    for (let tried = 1; ; tried++) {
      try {
        await ask();
        this.#wake(this.#shown.ready ? this.#every : 0);
        return this.#shown;
      } catch (error) {
        if (!error.passing || tried === TRIES) throw error;
        const ms = Math.max(250 * 2 ** tried * (0.5 + Math.random()), Math.min(error.retryMs || 0, ANSWER_MS_MAX));
        await new Promise((again) => alarm(ms, again));
        if (this.#closed.signal.aborted) throw error;
      }
    }
  }

  #freeze(command) {
    this.#holds.add(command);
    if (this.#shown.accruing) this.#hold = this.#at();
    this.#change();
    return command;
  }

  #thaw(command) {
    this.#holds.delete(command);
    if (!this.#holds.size) this.#hold = null;
    this.#change();
  }

  #hear({ from, advisorId, body, starting, started }) {
    if (from === this.#options.chatId) {
      if (!body || !this.#apply(body)) return;
      // After the one that spoke; at once if the device slept.
      const now = performance.now();
      const lost = this.#time.now(now) < this.#reading.serverTime - 1e6 || now > this.#asked + ASK_MS;
      this.#wake(lost ? 0 : 1.3 * this.#every);
    } else if (starting && advisorId === this.#reading?.body.advisor_id) {
      this.#freeze(starting);
      alarm(ANSWER_MS_MAX, () => this.#thaw(starting));
    } else if (started) {
      const thaw = () => this.#thaw(started);
      this.refresh().then(thaw, thaw);
    }
  }

  // Who does not lead steps in if the one who does falls silent.
  get #every() {
    return (this.#reading?.heartbeatMs ?? BEAT_MS) * (this.#leads ? 1 : 1.5);
  }

  #wake(ms) {
    this.#cancel?.();
    if (!this.#closed.signal.aborted) this.#cancel = alarm(ms, () => this.#round());
  }

  get #beats() {
    const { state } = this.#reading ?? {};
    return !this.#watch && !this.#holds.size && (state === "running" || (state === "lapsed" && this.#resume));
  }

  async #round() {
    const round = ++this.#rounds;
    const asked = (this.#asked = performance.now());
    const beats = this.#beats;
    this.#wake(this.#every); // should it hang
    try {
      const { state } = await (beats ? this.#send("POST", "/heartbeat") : this.#send("GET", ""));
      const lapsed = state === "lapsed";
      // Another chat runs in its place, whose end must not start this one.
      if (beats && lapsed) this.#resume = false;
      const next = !this.#shown.ready || (lapsed && this.#beats) ? 0 : asked + this.#every - performance.now();
      if (round === this.#rounds) this.#wake(next);
    } catch (error) {
      if (beats && error.code === "forbidden") {
        this.#watch = true;
        this.#wake(0);
      } else if (this.#unknown && this.#options.autoStart) {
        this.#options.autoStart = false;
        this.start().catch(({ passing }) => (this.#options.autoStart = passing));
      } else if (this.#failures) {
        const backoff = this.#every * 2 ** Math.min(this.#failures - 2, 1) * (0.75 + 0.5 * Math.random());
        this.#wake(Math.max(backoff, error.retryMs || 0));
      }
    }
  }

  async #send(method, path, body, key) {
    const { token } = this.#options;
    const bearer = (refused) => (typeof token === "function" ? token(refused) : token);
    const fetched = async (bearer) => {
      const headers = { Authorization: `Bearer ${bearer}` };
      if (body) headers["Content-Type"] = "application/json";
      if (key) headers["Idempotency-Key"] = key;
      const giveUp = new AbortController();
      const cancel = alarm(ANSWER_MS_MAX, () => giveUp.abort());
      try {
        const sent = performance.now();
        const init = { method, headers, body: body && JSON.stringify(body), cache: "no-store", signal: giveUp.signal };
        const response = await fetch(this.#url + path, init);
        const received = performance.now();
        const retryMs = response.headers.get("Retry-After") * 1000;
        const answer = await response.json().catch(() => ({}));
        return { status: response.status, body: answer, sent, received, retryMs };
      } finally {
        cancel();
      }
    };
    return this.#ask(async () => {
      const first = await bearer();
      const answer = await fetched(first);
      const fresh = answer.status === 401 ? await bearer(first) : first;
      return fresh === first ? answer : fetched(fresh);
    }, path || "/");
  }

  async #ask(request, path) {
    const asked = performance.now();
    let error;
    try {
      const { status, body, sent, received = performance.now(), retryMs } = await request();
      const good = status === 200;
      const reading = good ? body : body?.reading;
      if (reading?.server_time) {
        this.#time.sample(sent, received, parseReading(reading).serverTime);
        // Known well once, it stays so.
        this.#samples += this.#time.uncertainty(received) > SURE_US ? 1 : SAMPLES_MAX;
        if (this.#apply(reading) && !this.#watch) this.#channel?.postMessage({ from: this.#options.chatId, body: reading });
      }
      if (good && (reading?.server_time || !path)) return reading;
      const passing = good || status === 429 || status >= 500;
      const code = passing ? "unavailable" : (body?.code ?? (status === 401 ? "unauthorized" : "refused"));
      error = new ClockError(code, status, body?.detail);
      error.retryMs = retryMs;
    } catch (thrown) {
      error = typeof thrown?.code === "string" ? thrown : new ClockError("offline", 0);
    }
    this.#fail(error, asked, path);
    throw error;
  }

  #fail(error, asked, path) {
    if (this.#closed.signal.aborted) return;
    const { code, status } = error;
    if (/^(chat|user)-not-found$/.test(code) && !this.#reading) {
      this.#failures = 0;
      this.#unknown = true;
      if (this.#problem?.passing && !this.#options.autoStart) this.#problem = null;
    } else if (status === 409) {
      this.#failures = 0;
      this.#emit("conflict", error);
    } else if (asked > this.#heard && !(status === 403 && path === "/heartbeat")) {
      this.#failures++;
      const news = this.#problem?.code !== code;
      this.#problem = error;
      if (news) this.#emit(status === 401 ? "unauthorized" : "problem", error);
    }
    this.#change();
  }

  #apply(body) {
    const reading = parseReading(body);
    this.#heard = performance.now();
    this.#failures = 0;
    this.#problem = null;
    const was = this.#reading;
    const newer = !was || (reading.revision - was.revision || reading.asOf - was.asOf) >= 0;
    if (newer) {
      this.#reading = reading;
      this.#unknown = false;
      if (reading.state === "running") this.#resume = true;
      if (this.#holds.size) this.#hold ??= reading.asOf;
    }
    this.#change();
    return newer;
  }
}
