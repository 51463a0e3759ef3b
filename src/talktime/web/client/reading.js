// Instants are exact in Numbers until the year 2255; a rate times a time soon passes 2 ** 53.

const MINUTE_US = 60_000_000n;

function parseInstant(text) {
  return text && Date.parse(`${text.slice(0, 19)}Z`) * 1000 + Number(text.slice(20, 26));
}

function parseCredits(text) {
  return text && BigInt(text.replace(".", ""));
}

function parseSeconds(seconds) {
  return BigInt(Math.round(seconds * 1e6));
}

export function parseReading(body) {
  const { tariff } = body;
  return {
    body,
    state: body.state,
    accruing: body.accruing,
    revision: body.revision,
    asOf: parseInstant(body.as_of),
    serverTime: parseInstant(body.server_time),
    elapsedUs: body.elapsed_us,
    freeLeftUs: body.free_left_us,
    creditsUsed: parseCredits(body.credits_used),
    balance: parseCredits(body.balance),
    tariff: {
      rate: parseCredits(tariff.credits_per_minute),
      firstUs: parseSeconds(tariff.first_seconds),
      incrementUs: parseSeconds(tariff.increment_seconds),
    },
    countUs: body.count_us,
    accruesUntil: parseInstant(body.accrues_until),
    paidFrom: parseInstant(body.paid_from),
    exhaustsAt: parseInstant(body.exhausts_at),
    heartbeatMs: body.heartbeat_seconds * 1000,
  };
}

export function cost({ rate, firstUs, incrementUs }, paidUs) {
  let blocks = BigInt(paidUs);
  if (blocks > 0n && blocks <= firstUs) {
    blocks = firstUs;
  } else if (blocks > firstUs && incrementUs > 0n) {
    blocks = firstUs + ((blocks - firstUs + incrementUs - 1n) / incrementUs) * incrementUs;
  }
  return (rate * blocks + MINUTE_US - 1n) / MINUTE_US;
}

export function show(reading, at) {
  let ran = 0;
  let paid = 0;
  let freeLeftUs = reading.freeLeftUs;
  if (reading.accruesUntil !== null) {
    const x = Math.min(at, reading.accruesUntil);
    ran = Math.max(0, x - reading.asOf);
    if (reading.paidFrom !== null && x > reading.paidFrom) {
      paid = x - reading.paidFrom;
      freeLeftUs = 0; // nobody pays while the allowance lasts
    } else {
      freeLeftUs -= ran;
    }
  }
  const spent = cost(reading.tariff, reading.countUs + paid) - cost(reading.tariff, reading.countUs);
  return {
    elapsedUs: reading.elapsedUs + ran,
    freeLeftUs,
    creditsUsed: reading.creditsUsed + spent,
    balance: reading.balance === null ? null : reading.balance - spent,
  };
}

export function formatCredits(amount) {
  const digits = String(amount < 0n ? -amount : amount).padStart(7, "0");
  return `${amount < 0n ? "-" : ""}${digits.slice(0, -6)}.${digits.slice(-6)}`;
}

export function formatDuration(us) {
  const seconds = Math.floor(us / 1e6);
  const [h, m, s] = [Math.floor(seconds / 3600), Math.floor(seconds / 60) % 60, seconds % 60];
  const two = (n) => String(n).padStart(2, "0");
  return h ? `${h}:${two(m)}:${two(s)}` : `${m}:${two(s)}`;
}
