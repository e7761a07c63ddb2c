// Means that take the teeth out of figures which come a batch at a time.

const SHORTEST = 30;
const PART = 1 / 100;
const KEEP = 0.94;

/** Mean over the last while: a hundredth of what is shown, 30 seconds at least; rows count by the time they cover. */
export function windowMean(times, values, seconds = reach(times)) {
  let sum = 0;
  let weight = 0;
  let first = 0;
  const covers = (i) => (i ? times[i] - times[i - 1] : 0);
  const add = (i, sign) => {
    if (values[i] === null || values[i] === undefined) return;
    sum += sign * covers(i) * values[i];
    weight += sign * covers(i);
  };
  return times.map((time, i) => {
    add(i, 1);
    while (first < i && times[first] <= time - seconds) add(first++, -1);
    return weight > 1e-6 ? sum / weight : null;
  });
}

function reach(times) {
  return Math.max(SHORTEST, PART * ((times.at(-1) ?? 0) - (times[0] ?? 0)));
}

/** Exponential mean over steps, corrected for its start; a missing value stays one. */
export function smooth(values) {
  let sum = 0;
  let weight = 0;
  return values.map((value) => {
    if (value === null) return null;
    sum = KEEP * sum + (1 - KEEP) * value;
    weight = KEEP * weight + (1 - KEEP);
    return sum / weight;
  });
}
