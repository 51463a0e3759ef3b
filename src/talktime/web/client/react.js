import { useEffect, useRef, useState, useSyncExternalStore } from "react";
import { ChatClock } from "./clock.js";

const NOTHING = { ready: false, state: null, accruing: false, problem: null, reading: null };
const never = () => () => {};

/**
 * A chat's clock in a React component: what to show, and the clock with its commands (null in the first render and on a
 * server). Another user, chat or server makes another clock; functions may be new ones in each render.
 */
export function useChatClock(options) {
  const { url, userId, chatId } = options;
  const latest = useRef(options);
  const [clock, setClock] = useState(null);
  useEffect(() => {
    latest.current = options;
  });
  useEffect(() => {
    const own = { ...latest.current };
    for (const name of ["token", "start", "pause", "stop"]) {
      if (typeof own[name] === "function") own[name] = (argument) => latest.current[name](argument);
    }
    const made = new ChatClock(own);
    setClock(made);
    return () => {
      setClock(null);
      made.close();
    };
  }, [url, userId, chatId]);
  const shown = useSyncExternalStore(
    clock ? clock.subscribe : never,
    () => (clock ? clock.shown : NOTHING),
    () => NOTHING,
  );
  return { ...shown, clock };
}
