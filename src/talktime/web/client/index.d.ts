/** A duration or an instant in microseconds; instants count from 1970 (UTC). Whole numbers. */
export type Microseconds = number;

/** Micro-credits: exact, since sums pass what a Number holds. */
export type MicroCredits = bigint;

export type ChatState = "running" | "lapsed" | "paused" | "exhausted" | "abandoned" | "ended";
export type StopReason = "lapsed" | "exhausted" | "switched" | "paused" | "ended";

export interface Tariff {
  /** Micro-credits per minute. */
  rate: MicroCredits;
  /** The first block and the increments in which time is sold, in microseconds; 0 and 0: exact. */
  firstUs: bigint;
  incrementUs: bigint;
}

/** A reading as the API sends it: what one chat's clock and its user's balance show at the instant `as_of`. */
export interface ReadingBody {
  user_id: string;
  chat_id: string;
  advisor_id: string;
  state: ChatState;
  /** The clock runs at `as_of`. */
  accruing: boolean;
  revision: number;
  as_of: string;
  server_time: string;
  elapsed_us: Microseconds;
  free_used_us: Microseconds;
  free_left_us: Microseconds;
  credits_used: string;
  /** Null for those who may not see it. */
  balance: string | null;
  tariff: { credits_per_minute: string; first_seconds: number; increment_seconds: number };
  count_us: Microseconds;
  /** Where the clock stops if nothing more is heard; null where it stands still. */
  accrues_until: string | null;
  paid_from: string | null;
  free_until: string | null;
  exhausts_at: string | null;
  started_at: string;
  stopped_at: string | null;
  stop_reason: StopReason | null;
  materialized_through: string;
  heartbeat_seconds: number;
}

/** A reading with numbers in it, as far as a page goes on from it; `body` is all that the API sent. */
export interface Reading {
  body: ReadingBody;
  state: ChatState;
  accruing: boolean;
  revision: number;
  asOf: Microseconds;
  serverTime: Microseconds;
  elapsedUs: Microseconds;
  freeLeftUs: Microseconds;
  creditsUsed: MicroCredits;
  balance: MicroCredits | null;
  tariff: Tariff;
  countUs: Microseconds;
  accruesUntil: Microseconds | null;
  paidFrom: Microseconds | null;
  exhaustsAt: Microseconds | null;
  heartbeatMs: number;
}

/** Take a reading as the API sends it. */
export function parseReading(body: ReadingBody): Reading;

/** What is shown of a chat at one instant. Free time and balance lack what the user's other chats take meanwhile. */
export interface Figures {
  elapsedUs: Microseconds;
  freeLeftUs: Microseconds;
  creditsUsed: MicroCredits;
  balance: MicroCredits | null;
}

/** Go on from a reading to the server's instant `at` without asking: what the server itself would say then. */
export function show(reading: Reading, at: Microseconds): Figures;

/** Micro-credits for so much paid time: cumulative, in whole blocks, and rounded (up) once. */
export function cost(tariff: Tariff, paidUs: Microseconds): MicroCredits;

/** Write micro-credits as a decimal string with 6 decimals. */
export function formatCredits(amount: MicroCredits): string;

/** Write a duration as `m:ss`, from an hour on `h:mm:ss`; whole seconds, rounded down. */
export function formatDuration(us: Microseconds): string;

/** The server's time, from a monotonic local clock (milliseconds) and the round trips of answers. */
export class ServerTime {
  /** Take a round trip in: local times of sending and receiving, and the server's time in the answer. */
  sample(sentMs: number, receivedMs: number, serverUs: Microseconds): void;
  /** The server's time; null before the first sample. Small corrections are worked in slowly. */
  now(nowMs: number): Microseconds | null;
  /** How far off it may be. */
  uncertainty(nowMs: number): Microseconds;
}

/**
 * What is wrong. `offline`: no answer; `unavailable`: the server has trouble; `unauthorized`: the token is refused;
 * `forbidden`: it may not do this; else the `code` of the problem document, or `refused` where there is none.
 */
export interface Problem {
  code: string;
  /** A sentence for a person. */
  detail: string;
}

/** What the network, the token or the API refused. */
export class ClockError extends Error {
  constructor(code: string, status: number, detail?: string);
  code: string;
  /** The HTTP status; 0 if no answer came. */
  status: number;
  /** Whether trying again may help. */
  passing: boolean;
}

/** Before the first reading, and while the server's time is not known well enough to show a running clock. */
export interface NotReady {
  ready: false;
  /** `unknown`: the API has no such chat. */
  state: "unknown" | null;
  accruing: false;
  at?: undefined;
  elapsedUs?: undefined;
  freeLeftUs?: undefined;
  creditsUsed?: undefined;
  balance?: undefined;
  secondsLeft?: undefined;
  problem: Problem | null;
  reading: Reading | null;
}

export interface Ready {
  ready: true;
  /** `exhausted` from the foretold instant on, even while the server cannot be reached. */
  state: ChatState;
  /** The clock on display runs. If it does not though the state is `running`, the lease ended unrenewed. */
  accruing: boolean;
  /** The server's instant that is shown. */
  at: Microseconds;
  elapsedUs: Microseconds;
  freeLeftUs: Microseconds;
  /** Decimal strings with 6 decimals. */
  creditsUsed: string;
  balance: string | null;
  /** Until the credits run out, if all goes on as it does; null if they do not, or nothing runs. */
  secondsLeft: number | null;
  problem: Problem | null;
  reading: Reading;
}

export type Shown = NotReady | Ready;

export interface ChatClockOptions {
  /** The API's origin, such as `https://time.example`; default: the page's own. */
  url?: string;
  userId: string;
  chatId: string;
  /** Needed to start a chat that does not exist yet. */
  advisorId?: string;
  /** The bearer token, or a function that gets one. It is called for each request, so let it keep the token; it gets
   * the refused token when that is not taken any more. */
  token: string | ((refused?: string) => string | Promise<string>);
  /**
   * Asks the page's own server to start the chat, since only a service creates chats: it is to call the API's start
   * with this Idempotency-Key. It may give back a Response, the reading, or nothing, and is called again if a Response
   * is 429 or 5xx, or the promise is rejected (unless with an error that has a `code`: a refusal). Default: the page asks
   * the API itself.
   */
  start?: (idempotencyKey: string) => Promise<unknown>;
  /** Ask the page's own server to pause and to end the chat, where a page's token may not; as `start`. */
  pause?: () => Promise<unknown>;
  stop?: () => Promise<unknown>;
  /** Whether a chat that does not exist is started when the page loads; default true, but not for who only watches. */
  autoStart?: boolean;
  /** Only reads, and never beats: for an onlooker. */
  watch?: boolean;
  /** When `low` is told: seconds until the credits run out; default 60. */
  lowSeconds?: number;
}

export interface ChatClockEvents {
  /** Something on display changed: a whole second, a state, a problem. */
  change: Event;
  /** The credits run out in less than `lowSeconds`. Once, until there are more again. */
  low: Event & { detail: Ready };
  /** The credits have run out. */
  exhausted: Event & { detail: Ready };
  /** The token is refused. */
  unauthorized: Event & { detail: ClockError };
  /** The state of things refused a request: a heartbeat to a chat that is over, another advisor's chat. */
  conflict: Event & { detail: ClockError };
  /** Another problem began. */
  problem: Event & { detail: ClockError };
}

/**
 * One chat's clock on a page. It reads at once, starts a chat that does not exist yet, and beats while the clock runs;
 * it never starts a chat that was paused or ended.
 */
export class ChatClock extends EventTarget {
  constructor(options: ChatClockOptions);
  /** What to show as of the last change or whole second; the same object until the next "change". */
  readonly shown: Shown;
  /** What to show at this very instant. */
  current(): Shown;
  /** Call `listener` at each change; returns what ends that. */
  subscribe: (listener: () => void) => () => void;
  /** Start the clock or take it up again; the user's other clocks with this advisor stop at the same instant. */
  start(): Promise<Shown>;
  /** Pause the clock. The display stops at once, and then shows where the server's clock stopped. */
  pause(): Promise<Shown>;
  /** End the chat. */
  stop(): Promise<Shown>;
  /** Ask the server now. */
  refresh(): Promise<Shown>;
  /** End showing, beating and listening. The clock itself runs on until its lease ends. */
  close(): void;
  addEventListener<K extends keyof ChatClockEvents>(
    type: K,
    listener: (event: ChatClockEvents[K]) => void,
    options?: boolean | AddEventListenerOptions,
  ): void;
  addEventListener(
    type: string,
    listener: EventListenerOrEventListenerObject | null,
    options?: boolean | AddEventListenerOptions,
  ): void;
}
