// Read by the type checker alone: what a user of the package writes.
import { ChatClock, type Shown, cost, formatCredits, parseReading, type ReadingBody, ServerTime, show } from "talktime-client";
import { useChatClock } from "talktime-client/react";

const clock = new ChatClock({
  url: "https://time.example",
  userId: "u1",
  chatId: "c1",
  advisorId: "a1",
  token: async (refused?: string) => refused ?? "token",
  start: async (idempotencyKey) => fetch(`/start/${idempotencyKey}`),
  lowSeconds: 90,
});
clock.addEventListener("low", ({ detail }) => detail.secondsLeft?.toFixed());
clock.addEventListener("conflict", ({ detail }) => detail.code.length + detail.status);
const unsubscribe: () => void = clock.subscribe(() => {});
unsubscribe();

export function text(shown: Shown): string {
  if (!shown.ready) return shown.problem?.detail ?? "";
  return `${shown.state} ${shown.elapsedUs} ${shown.creditsUsed} ${shown.balance ?? ""}`;
}

export async function go(body: ReadingBody): Promise<bigint> {
  const paused: Shown = await clock.pause();
  text(paused);
  const time = new ServerTime();
  time.sample(1, 2, 3);
  const reading = parseReading(body);
  formatCredits(show(reading, time.now(5) ?? 0).creditsUsed);
  return cost(reading.tariff, 60_000_000);
}

export function Component(): string {
  const { clock, ...shown } = useChatClock({ userId: "u1", chatId: "c1", token: "t" });
  clock?.stop();
  return text(shown as Shown);
}

// @ts-expect-error a user is needed
new ChatClock({ chatId: "c1", token: "t" });
// @ts-expect-error what is shown is not changed
clock.shown = null;
