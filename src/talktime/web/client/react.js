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
  const name = JSON.stringify([url, userId, chatId]);
  const latest = useRef(options);
  const [opened, setOpened] = useState(null);
  const clock = opened?.name === name ? opened.clock : null; // not the last chat's, for one render
  useEffect(() => {
    latest.current = options;
  });
  useEffect(() => {
    const own = { ...latest.current };
    for (const name of ["start", "pause", "stop"]) {
      if (typeof own[name] === "function") own[name] = (argument) => latest.current[name](argument);
    }
    own.token = (refused) => {
      const { token } = latest.current;
      return typeof token === "function" ? token(refused) : token;
    };
    const made = new ChatClock(own);
    setOpened({ name, clock: made });
    return () => {
      setOpened(null);
      made.close();
    };
  }, [name]);
  const shown = useSyncExternalStore(
    clock ? clock.subscribe : never,
    () => (clock ? clock.shown : NOTHING),
    () => NOTHING,
  );
  return { ...shown, clock };
}
