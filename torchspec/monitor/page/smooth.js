// Means that take the teeth out of figures which come a batch at a time.

const SHORTEST = 30;
const PART = 1 / 100;
const STRETCH = 0.04;

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

/** Mean over all of the time; null where nothing is known. */
export const mean = (times, values = []) => windowMean(times, values, Infinity).at(-1) ?? null;

/** Centred mean over a part of all steps, near the ends over what there is; a missing value stays one. */
export function smooth(steps, values) {
  const half = (STRETCH / 2) * ((steps.at(-1) ?? 0) - (steps[0] ?? 0));
  let sum = 0;
  let known = 0;
  let first = 0;
  let next = 0;
  const add = (i, sign) => {
    if (values[i] === null || values[i] === undefined) return;
    sum += sign * values[i];
    known += sign;
  };
  return steps.map((step, i) => {
    while (next < steps.length && steps[next] <= step + half) add(next++, 1);
    while (steps[first] < step - half) add(first++, -1);
    return values[i] === null || values[i] === undefined ? null : sum / known;
  });
}
