export { ChatClock, ClockError } from "./clock.js";
export { cost, formatCredits, formatDuration, parseReading, show } from "./reading.js";
export { ServerTime } from "./time.js";
