// A chat's page without a window: the real client, and a line for each frame of what would be on display.
// node page.js CLIENT ORIGIN USER CHAT ADVISOR TOKEN

const [client, url, userId, chatId, advisorId, token] = process.argv.slice(2);
const { ChatClock, formatDuration } = await import(client);

const clock = new ChatClock({ url, userId, chatId, advisorId, token });
setInterval(() => {
  if (!clock.shown.ready) return;
  const at = Math.round((performance.timeOrigin + performance.now()) * 1000);
  const text = formatDuration(clock.shown.elapsedUs);
  process.stdout.write(`${JSON.stringify({ at, elapsed_us: clock.current().elapsedUs, text })}\n`);
}, 20);
