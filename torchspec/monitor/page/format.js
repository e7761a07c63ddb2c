// Figures as people read them; the same forms as the command line's (torchspec/cli/units.py).

const DASH = "–";
const known = (value) => value !== null && value !== undefined && Number.isFinite(value);
const form = (value, digits) =>
  value.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits });

/** 12345 becomes "12,345", 12345678 "12.3M". */
export function count(value) {
  if (!known(value)) return DASH;
  for (const [limit, unit] of [
    [1e12, "T"],
    [1e9, "G"],
    [1e6, "M"],
  ])
    if (value >= limit) return form(value / limit, 1) + unit;
  return form(value, 0);
}

/** As `count`, in the room of six digits: 123456 becomes "123k". */
export const brief = (value) => (value >= 99_999.5 && value < 999_500 ? `${form(value / 1e3, 0)}k` : count(value));

/** Three digits that matter: 0.123, 4.56, 78.9, 1,234. */
export function rate(value) {
  if (!known(value)) return DASH;
  if (value === 0) return "0";
  if (value >= 99.95) return count(value);
  return form(value, value >= 9.995 ? 1 : value >= 0.9995 ? 2 : 3);
}

/** An axis' figure: no digits that say nothing. */
export const short = (value) => (known(value) ? value.toLocaleString("en-US", { maximumSignificantDigits: 3 }) : DASH);

export function bytes(value) {
  if (!known(value)) return DASH;
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let i = 0;
  while (value >= 1023.95 && i < 4) ((value /= 1024), i++);
  return `${form(value, i === 0 || value >= 99.95 ? 0 : 1)} ${units[i]}`;
}

export const bandwidth = (value) => (known(value) ? `${bytes(value)}/s` : DASH);
export const percent = (value) => (known(value) ? `${form(100 * value, 0)}%` : DASH);
export const fixed = (digits) => (value) => (known(value) ? form(value, digits) : DASH);
export const plural = (n, noun) => `${count(n)} ${noun}${n === 1 ? "" : "s"}`;
export const scientific = (value) =>
  !known(value) ? DASH : value === 0 ? "0" : value.toExponential(value >= 1e-3 ? 1 : 2).replace("e-", "e−");

/** 0.0095 becomes "9.5 ms", 75 "1m15s", 7500 "2h05m". */
export function duration(seconds) {
  if (!known(seconds)) return DASH;
  if (seconds < 0.9995) return `${form(1000 * seconds, seconds < 0.00995 ? 1 : 0)} ms`;
  if (seconds < 9.95) return `${form(seconds, 1)} s`;
  return span(seconds);
}

/** Whole units only: "0s", "41s", "1m15s", "2h05m", "3d04h". */
export function span(seconds) {
  if (!known(seconds)) return DASH;
  const whole = Math.round(Math.max(0, seconds));
  const two = (value) => String(Math.floor(value)).padStart(2, "0");
  if (whole < 60) return `${whole}s`;
  if (whole < 3600) return `${Math.floor(whole / 60)}m${two(whole % 60)}s`;
  if (whole < 48 * 3600) return `${Math.floor(whole / 3600)}h${two((whole % 3600) / 60)}m`;
  return `${Math.floor(whole / 86400)}d${two((whole % 86400) / 3600)}h`;
}

export const clock = (time, seconds = true) =>
  new Date(1000 * time).toLocaleTimeString("en-GB", {
    hour: "2-digit",
    minute: "2-digit",
    ...(seconds && { second: "2-digit" }),
  });

/** The time of day, with the date where it is another day than today. */
export function moment(time, now = Date.now() / 1000) {
  const date = new Date(1000 * time);
  const day = date.toLocaleDateString("en-GB", { day: "numeric", month: "short" });
  return date.toDateString() === new Date(1000 * now).toDateString()
    ? clock(time, false)
    : `${day} ${clock(time, false)}`;
}
