/* Where a value stands: by step, time, epoch, samples or tokens. */

const per = (run, grid, what) =>
  run.per_step[what] && grid.step ? grid.step.map((step) => (step === null ? null : step * run.per_step[what])) : null;
const AXES = {
  step: { label: "Step", of: (run, grid) => grid.step },
  time: { label: "Time", of: (run, grid) => grid.time && grid.time.map((t) => (t === null ? null : t - run.began)) },
  epoch: { label: "Epoch", of: (run, grid) => grid.epoch },
  samples: { label: "Samples", of: (run, grid) => per(run, grid, "samples") },
  tokens: { label: "Tokens", of: (run, grid) => per(run, grid, "tokens") },
};
const cached = new Map();
function positions(run, grid) {
  const key = `${state.axis} ${run.index} ${grid}`;
  if (!cached.has(key)) cached.set(key, AXES[state.axis].of(run, run.grids[grid]));
  return cached.get(key);
}
const isKnown = (axis) => runs.some((run) => run.grids.some((grid) => AXES[axis].of(run, grid)));
const axisText = (x) => (x === null ? "—" : state.axis === "time" ? clock(x) : shown(x, "count"));

/* Where an event stands on the axis: by its step, between the logged ones. */
function eventPosition(run, event) {
  if (state.axis === "time" && event.time !== null) return event.time - run.began;
  if (event.step === null) return null;
  if (state.axis === "step") return event.step;
  const longest = run.grids.reduce(
    (best, grid) => (!best || (grid.step && grid.step.length > best.step.length) ? grid : best),
    null,
  );
  const xs = longest && AXES[state.axis].of(run, longest);
  if (!xs) return null;
  const at = Math.min(longest.step.length - 1, nearest(longest.step, event.step));
  const scale = longest.step[at] ? event.step / longest.step[at] : 1;
  return xs[at] === null ? null : state.axis === "time" ? xs[at] : xs[at] * scale;
}

/* A number whose difference from any other one is a number too. */
const inReach = (value) => Math.min(8e307, Math.max(-8e307, value));

/* From the first to the last position of the runs that are shown, the same in all charts; from 0 when that is near. */
function extent() {
  let [left, right] = [Infinity, -Infinity];
  for (const run of shownRuns()) {
    run.grids.forEach((_, i) => {
      for (const x of positions(run, i) || []) if (x !== null) [left, right] = [Math.min(left, x), Math.max(right, x)];
    });
  }
  if (left > right) return [0, 1];
  if (left > 0 && left < 0.1 * right) left = 0;
  if (left === right) return [left - (Math.abs(left) || 1), right + (Math.abs(right) || 1)].map(inReach);
  return [inReach(left), inReach(right)];
}

function nearest(xs, x) {
  let low = 0;
  let high = xs.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (xs[middle] <= x) low = middle;
    else high = middle;
  }
  return Math.abs(xs[high] - x) < Math.abs(x - xs[low]) ? high : low;
}
