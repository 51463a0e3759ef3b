// How the demo writes figures.

import { formatDuration } from "/client/index.js";

export const duration = formatDuration;

/** What is left of a time: rounded up, so that 0:00 means that nothing is. */
export function remaining(us) {
  return formatDuration(Math.ceil(us / 1e6) * 1e6);
}

/** A time with its milliseconds, `m:ss.mmm`. */
export function precise(us) {
  return `${formatDuration(us)}.${String(Math.floor(us / 1000) % 1000).padStart(3, "0")}`;
}

/** Credits with two decimals, and more only where they are. */
export function trimmed(credits) {
  return credits.replace(/(\.\d\d\d*?)0+$/, "$1");
}

export function initials(name) {
  return name
    .split(/[\s-]+/)
    .slice(0, 2)
    .map((word) => word[0].toUpperCase())
    .join("");
}

/** A rate card in a few words. */
export function price({ credits_per_minute, free_seconds, first_seconds, increment_seconds }) {
  const blocks = first_seconds || increment_seconds ? `, by ${first_seconds}/${increment_seconds} s` : "";
  const free = free_seconds ? `, first ${remaining(free_seconds * 1e6)} free` : "";
  return `${trimmed(credits_per_minute).replace(/\.00$/, "")} a minute${blocks}${free}`;
}
