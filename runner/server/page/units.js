// Numbers with their units, as the command line writes them.

const PREFIXES = ["", "k", "M", "G", "T"];

export function rate(bytesPerSecond) {
  let value = bytesPerSecond;
  let step = 0;
  while (value >= 999.5 && step < PREFIXES.length - 1) {
    value /= 1000;
    step += 1;
  }
  const digits = step === 0 ? 0 : value < 9.995 ? 2 : value < 99.95 ? 1 : 0;
  return `${value.toFixed(digits)} ${PREFIXES[step]}B/s`;
}

export function duration(seconds) {
  if (seconds < 9.95) return `${Math.max(0, seconds).toFixed(1)} s`;
  const whole = Math.round(seconds);
  if (whole < 60) return `${whole} s`;
  const pad = (number) => String(number).padStart(2, "0");
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${pad(whole % 60)} s`;
  const minutes = Math.round(whole / 60);
  return `${Math.floor(minutes / 60)} h ${pad(minutes % 60)} min`;
}

export function percent(probability) {
  const value = 100 * probability;
  if (value >= 99.95) return "100%";
  if (value >= 9.95) return `${value.toFixed(0)}%`;
  if (value >= 0.095) return `${value.toFixed(1)}%`;
  return value >= 0.0095 ? `${value.toFixed(2)}%` : "<0.01%";
}

export const count = (number) => number.toLocaleString("en");
