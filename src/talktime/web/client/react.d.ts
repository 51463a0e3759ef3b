import type { ChatClock, ChatClockOptions, Shown } from "./index.js";

/**
 * A chat's clock in a React component: what to show, and the clock with its commands (null in the first render and on a
 * server). Another user, chat or server makes another clock; functions may be new ones in each render.
 */
export function useChatClock(options: ChatClockOptions): Shown & { clock: ChatClock | null };
