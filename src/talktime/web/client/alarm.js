const waiting = new Map();
let worker;
let last = 0;

function fire(id) {
  const ring = waiting.get(id);
  waiting.delete(id);
  ring?.();
}

// Rings in a hidden tab too. The page's own timer runs beside the worker's, which may not load.
export function alarm(ms, ring) {
  const id = ++last;
  waiting.set(id, ring);
  ms = Math.min(ms, 2 ** 31 - 1); // a longer one would ring at once
  const timer = setTimeout(fire, ms, id);
  try {
    worker ??= Object.assign(new Worker(new URL("./worker.js", import.meta.url)), { onmessage: ({ data }) => fire(data) });
    worker.postMessage([id, ms]);
  } catch {
    // none here, or not from this origin
  }
  return () => {
    clearTimeout(timer);
    waiting.delete(id);
  };
}
