const DRIFT = 1e-4; // of one quartz clock against another, at most
const GRAIN_US = 1000; // browsers blur performance.now()
const SLEW = 0.1; // how fast a small correction is worked in
const STEP_US = 1e6; // a larger one means that a clock was set, or slept

// The server's clock was read within the round trip. So each one bounds the distance of the two clocks, quick ones closely.
export class ServerTime {
  #low = -Infinity;
  #high = Infinity;
  #sampled = 0;
  #offset = null; // as shown
  #shown = 0;

  sample(sentMs, receivedMs, serverUs) {
    const spread = Math.max(0, receivedMs - this.#sampled) * 1000 * DRIFT;
    const [low, high] = [serverUs - receivedMs * 1000 - GRAIN_US, serverUs - sentMs * 1000 + GRAIN_US];
    this.#low = Math.max(low, this.#low - spread);
    this.#high = Math.min(high, this.#high + spread);
    if (this.#low > this.#high) {
      [this.#low, this.#high] = [low, high];
    }
    this.#sampled = receivedMs;
  }

  uncertainty(nowMs) {
    return (this.#high - this.#low) / 2 + Math.max(0, nowMs - this.#sampled) * 1000 * DRIFT;
  }

  now(nowMs) {
    if (this.#high === Infinity) return null;
    this.#offset ??= this.#middle;
    const late = this.#middle - this.#offset;
    const most = Math.max(0, nowMs - this.#shown) * 1000 * SLEW;
    this.#offset += Math.abs(late) > STEP_US ? late : Math.max(-most, Math.min(most, late));
    this.#shown = Math.max(this.#shown, nowMs);
    return Math.floor(nowMs * 1000 + this.#offset);
  }

  get #middle() {
    return (this.#low + this.#high) / 2;
  }
}
