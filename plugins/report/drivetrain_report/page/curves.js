/* The charts, and what a person does with them. */

const EVALUATED = new Set(["eval", "val", "valid", "test"]);
const LABELS = named({
  loss: "Loss",
  lr: "Learning rate",
  grad_norm: "Gradient norm",
  steps_per_second: "Steps per second",
  step_ms: "Step time (ms)",
  samples_per_second: "Samples per second",
  tokens_per_second: "Tokens per second",
  data_wait: "Share of time waiting for data",
  process_gb: "Process memory (GB)",
  process_peak_gb: "Process memory, peak (GB)",
  device_gb: "Device memory, peak (GB)",
  cpu_percent: "CPU use (%)",
  bits_per_byte: "Bits per byte",
  accuracy: "Accuracy",
  perplexity: "Perplexity",
});
const GROUPS = named({ train: "Training and evaluation", speed: "Throughput", memory: "Memory and machine", "": "Other" });
const ORDER = ["train", "anomaly", "speed", "memory"];
const FIRST = ["loss", "lr", "grad_norm", "tokens_per_second", "samples_per_second", "step_ms", "device_gb"];
const NEVER_SMOOTH = /(^|\/)lr$|^memory\/|^(eval|val|valid|test)\//;

function chartGroups() {
  const groups = new Map();
  for (const run of runs) {
    for (const [name, series] of run.series) {
      const [, head, rest] = /^([^/]*)\/([^]*)$/.exec(name) || [null, "", name];
      const isEvaluated = EVALUATED.has(head);
      const group = isEvaluated ? "train" : head === "system" ? "memory" : head;
      if (!groups.has(group)) groups.set(group, new Map());
      const charts = groups.get(group);
      if (!charts.has(rest)) charts.set(rest, { key: `${group}/${rest}`, label: rest, names: new Set(), lines: [] });
      charts.get(rest).names.add(name);
      charts.get(rest).lines.push({ run, name, series, isEvaluated, isSmoothed: !NEVER_SMOOTH.test(name) });
    }
  }
  const others = new Map();
  for (const [group, charts] of groups) {
    if (ORDER.includes(group) || charts.size > 1) continue;
    groups.delete(group); // a heading for one chart is one too many
    for (const chart of charts.values()) others.set(chart.key, { ...chart, label: [...chart.names][0] });
  }
  if (others.size) groups.set("", others);
  const place = (list, item) => (list.includes(item) ? list.indexOf(item) : list.length);
  const byPlace = (list, a, b) => place(list, a) - place(list, b) || (a < b ? -1 : 1);
  const evaluated = (chart) => chart.lines.some((line) => line.isEvaluated);
  return [...groups]
    .sort(([a], [b]) => !a - !b || byPlace(ORDER, a, b))
    .map(([group, charts]) => ({
      title: GROUPS[group] || plain(group),
      charts: [...charts.values()].sort(
        (a, b) =>
          (FIRST.includes(a.label) || FIRST.includes(b.label) ? 0 : evaluated(b) - evaluated(a)) ||
          byPlace(FIRST, a.label, b.label),
      ),
    }));
}

/* An exponential mean freed of its start (Kingma and Ba 2015, section 3); gaps stay gaps. */
function smooth(values, weight) {
  let mean = 0;
  let mass = 0;
  return values.map((value) => {
    if (value === null) return null;
    mean = mean * weight + value * (1 - weight);
    mass = mass * weight + 1 - weight;
    return mean / mass;
  });
}

/* Where the line from point i to the next one is at x; null when x is not between them. */
function between(xs, ys, i, x) {
  if (i < 0 || i + 1 >= xs.length) return null;
  const [a, b, from, to] = [xs[i], xs[i + 1], ys[i], ys[i + 1]];
  if (a === null || b === null || from === null || to === null || !(a < x && x < b)) return null;
  return from + ((to - from) * (x - a)) / (b - a);
}

function linearTicks(low, high, count) {
  const raw = (high - low) / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= raw * 0.7);
  return ticksEvery(step, low, high);
}
/* The multiples of a step, as many as a chart can have room for: beyond 2^53 adding 1 changes nothing. */
function ticksEvery(step, low, high) {
  const first = Math.ceil(low / step - 1e-9);
  const all = Array.from({ length: 40 }, (_, n) => (first + n) * step);
  return all.filter((value, i) => value <= high + step * 1e-9 && value !== all[i - 1]);
}
const TIMES = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400];
function timeTicks(low, high, count) {
  const raw = (high - low) / Math.max(1, count);
  if (raw < 1) return linearTicks(low, high, count);
  return ticksEvery(TIMES.find((n) => n >= raw) || Math.ceil(raw / 86400) * 86400, low, high);
}
function logTicks(low, high) {
  const found = [];
  const wide = high / low > 1e4;
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high) + 1e-9; power += 1) {
    for (const n of wide ? [1] : [1, 2, 5]) {
      const value = n * 10 ** power;
      if (value >= low * 0.999 && value <= high * 1.001) found.push(value);
    }
  }
  const every = Math.ceil(found.length / 9);
  return found.length > 1 ? found.filter((_, i) => i % every === 0) : linearTicks(low, high, 3);
}
function tickText(value, ticks) {
  const step = ticks.length > 1 ? Math.abs(ticks[1] - ticks[0]) : Math.abs(value);
  if (Math.abs(value) < step * 1e-6) return "0";
  if (Math.abs(value) >= 1e4)
    return significant(value, Math.max(2, Math.ceil(Math.log10(Math.abs(value) / step)) + 1)).replace(" ", "");
  if (step < 1e-4) return value.toExponential(1).replace(".0e", "e").replace("+", "");
  const decimals = Math.max(0, Math.ceil(-Math.log10(step) - 1e-9));
  return value.toFixed(
    Math.min(6, decimals + (Math.abs(step * 10 ** decimals - Math.round(step * 10 ** decimals)) > 1e-6 ? 1 : 0)),
  );
}

const MARGIN = { left: 56, right: 20, top: 10, bottom: 26 };
const charts = [];
const tooltip = make("div", { class: "tooltip", role: "status", hidden: true });
let scheduled = false;
function redraw() {
  if (scheduled) return;
  scheduled = true;
  requestAnimationFrame(() => {
    scheduled = false;
    document.body.classList.toggle("zoomed", state.zoom !== null);
    for (const chart of charts) chart.stale = true;
    for (const chart of charts) if (chart.isInView) chart.draw();
  });
}
const inView = new IntersectionObserver(
  (entries) => {
    for (const entry of entries) {
      const chart = charts.find((one) => one.box === entry.target);
      chart.isInView = entry.isIntersecting;
      if (chart.isInView && chart.stale) chart.draw();
    }
  },
  { rootMargin: "200px" },
);
const resized = new ResizeObserver(redraw);

class Chart {
  constructor(spec, isLarge) {
    Object.assign(this, spec, { isLarge, stale: true, isInView: false, id: charts.length });
    for (const line of this.lines) {
      const own = single && line.isEvaluated && this.names.size > 1;
      line.color = own ? "var(--c1)" : line.run.color;
      line.dash = line.isEvaluated && this.names.size > 1 && !own ? "5 3" : line.run.dash;
    }
    const title = make("h3", {}, LABELS[this.label] || plain(this.label));
    const names = make("span", { class: "names" }, this.names.has(this.label) ? "" : [...this.names].map(plain).join("  ·  "));
    this.button = make(
      "button",
      { type: "button", "aria-pressed": "false", title: "logarithmic scale", onclick: () => this.toggleLog() },
      "log",
    );
    this.box = make("figure", { class: isLarge ? "chart large" : "chart" }, make("figcaption", {}, title, names, this.button));
    this.svg = make("svg", { tabindex: "0", role: "img", "aria-label": `${title.textContent}: curve` });
    this.note = make("p", { class: "chart-note" });
    this.box.append(this.svg, this.note);
    this.listen();
    charts.push(this);
    inView.observe(this.box);
    resized.observe(this.box);
  }

  toggleLog() {
    const on = !state.logarithmic.delete(this.key);
    if (on) state.logarithmic.add(this.key);
    this.button.setAttribute("aria-pressed", String(on));
    this.draw();
  }

  /* The lines that can be drawn now, each with its points. */
  visible() {
    return this.lines
      .filter((line) => !state.hidden.has(line.run.index))
      .map((line) => ({ ...line, xs: positions(line.run, line.series.grid) }))
      .filter((line) => line.xs)
      .map((line) => ({
        ...line,
        ys: line.isSmoothed && state.smoothing ? smooth(line.series.values, state.smoothing) : line.series.values,
        isFaint: line.isSmoothed && state.smoothing > 0,
      }));
  }

  domain(lines) {
    const [left, right] = state.zoom || extent();
    let [low, high] = [Infinity, -Infinity];
    const isLog = state.logarithmic.has(this.key);
    const see = (y) => {
      if (!Number.isFinite(y) || (isLog && y <= 0)) return;
      low = Math.min(low, y);
      high = Math.max(high, y);
    };
    for (const { xs, ys, series } of lines) {
      const [first, end] = this.span(xs, left, right);
      for (let i = first; i < end; i += 1) {
        if (xs[i] === null || xs[i] < left || xs[i] > right) continue;
        see(series.low ? series.low[i] : series.values[i]);
        see(series.high ? series.high[i] : series.values[i]);
      }
      for (const values of new Set([ys, series.values])) {
        see(between(xs, values, first, left)); // what comes in from outside, and what leaves
        see(between(xs, values, end - 2, right));
      }
    }
    if (!(low <= high)) return { left, right, low: isLog ? 1 : 0, high: isLog ? 10 : 1, isLog, isEmpty: true };
    if (isLog) return { left, right, low: low / 1.1, high: inReach(high * 1.1), isLog };
    const pad = (high - low) * 0.06 || Math.abs(high) * 0.05 || 1;
    const floor = low >= 0 && low - pad < 0 ? 0 : low - pad;
    return { left, right, low: inReach(floor), high: inReach(high + pad), isLog };
  }

  draw() {
    this.stale = false;
    this.width = Math.max(240, this.svg.clientWidth || this.box.clientWidth - 24);
    this.height = this.isLarge ? 320 : 190;
    this.now = this.visible();
    const d = (this.d = this.domain(this.now));
    const [w, h] = [this.width - MARGIN.left - MARGIN.right, this.height - MARGIN.top - MARGIN.bottom];
    this.x = (x) => MARGIN.left + ((inReach(x) - d.left) / (d.right - d.left)) * w;
    const up = d.isLog
      ? (y) => (Math.log(y) - Math.log(d.low)) / (Math.log(d.high) - Math.log(d.low))
      : (y) => (inReach(y) - d.low) / (d.high - d.low);
    this.y = (y) => MARGIN.top + h - up(y) * h;
    this.svg.setAttribute("viewBox", `0 0 ${this.width} ${this.height}`);
    this.svg.setAttribute("height", this.height);
    const clip = make(
      "clipPath",
      { id: `clip${this.id}` },
      make("rect", { x: MARGIN.left - 6, y: MARGIN.top - 4, width: w + 12, height: h + 8 }),
    );
    const curves = make("g", { "clip-path": `url(#clip${this.id})` });
    if (state.marks) this.drawMarks(curves, h);
    for (const line of this.now) this.drawLine(curves, line);
    this.cross = make("g", { class: "cross" });
    this.brush = make("rect", { class: "brush", y: MARGIN.top, height: h, width: 0 });
    this.svg.replaceChildren(clip, this.axes(w, h), curves, this.cross, this.brush);
    this.note.textContent = this.remark();
  }

  axes(w, h) {
    const { left, right, low, high, isLog } = this.d;
    const group = make("g", { class: "axes" });
    const count = Math.max(2, Math.floor(w / 80));
    const xTicks = state.axis === "time" ? timeTicks(left, right, count) : linearTicks(left, right, count);
    const yTicks = isLog ? logTicks(low, high) : linearTicks(low, high, Math.max(2, Math.floor(h / 42)));
    for (const y of yTicks) {
      group.append(
        make("line", { class: "grid", x1: MARGIN.left, x2: MARGIN.left + w, y1: this.y(y), y2: this.y(y) }),
        make(
          "text",
          { x: MARGIN.left - 8, y: this.y(y) + 4, "text-anchor": "end" },
          isLog ? significant(y, 2) : tickText(y, yTicks),
        ),
      );
    }
    group.append(make("line", { class: "base", x1: MARGIN.left, x2: MARGIN.left + w, y1: MARGIN.top + h, y2: MARGIN.top + h }));
    for (const x of xTicks) {
      const at = this.x(x);
      const text = state.axis === "time" ? clock(x) : tickText(x, xTicks);
      const anchor = at + text.length * 3.5 > this.width ? "end" : "middle";
      group.append(
        make("line", { class: "base", x1: at, x2: at, y1: MARGIN.top + h, y2: MARGIN.top + h + 4 }),
        make("text", { x: at, y: MARGIN.top + h + 18, "text-anchor": anchor }, text),
      );
    }
    return group;
  }

  drawMarks(group, h) {
    this.marks = [];
    for (const run of shownRuns()) {
      for (const event of run.events.slice(0, 1000)) {
        const x = eventPosition(run, event);
        if (x === null || x < this.d.left || x > this.d.right) continue;
        const at = this.x(x);
        this.marks.push({ at, run, event });
        const bottom = MARGIN.top + h;
        if (event.kind === "checkpoint")
          group.append(make("path", { class: "mark checkpoint", d: `M${at - 3.5},${bottom}h7l-3.5,-6z`, color: run.color }));
        else
          group.append(make("line", { class: `mark ${KINDS[event.kind] || ""}`, x1: at, x2: at, y1: MARGIN.top, y2: bottom }));
      }
    }
  }

  /* The stretch of points in view, with one more on either side. */
  span(xs, left = this.d.left, right = this.d.right) {
    let [first, end] = [0, xs.length];
    while (first < end - 1 && (xs[first + 1] === null || xs[first + 1] < left)) first += 1;
    while (end > first + 1 && (xs[end - 2] === null || xs[end - 2] > right)) end -= 1;
    return [first, end];
  }

  path(xs, ys, [first, end]) {
    let d = "";
    let pen = false;
    for (let i = first; i < end; i += 1) {
      const [x, y] = [xs[i], ys[i]];
      if (x === null || y === null || (this.d.isLog && y <= 0)) {
        pen = false;
        continue;
      }
      d += `${pen ? "L" : "M"}${this.x(x).toFixed(1)},${this.y(y).toFixed(1)}`;
      pen = true;
    }
    return d;
  }

  band(xs, low, high, [first, end]) {
    let d = "";
    const floor = (y) => this.y(this.d.isLog ? Math.max(y, this.d.low) : y).toFixed(1);
    for (let i = first; i < end;) {
      let stop = i;
      while (stop < end && xs[stop] !== null && low[stop] !== null) stop += 1;
      const there = [];
      for (let j = i; j < stop; j += 1) there.push(`${this.x(xs[j]).toFixed(1)},${floor(high[j])}`);
      for (let j = stop - 1; j >= i; j -= 1) there.push(`${this.x(xs[j]).toFixed(1)},${floor(low[j])}`);
      if (there.length) d += `M${there.join("L")}Z`;
      i = Math.max(stop, i + 1);
    }
    return d;
  }

  drawLine(group, line) {
    const { xs, ys, series, run } = line;
    const span = this.span(xs);
    const of = (kind, more) => ({
      class: kind,
      color: line.color,
      "stroke-dasharray": line.dash || null,
      "data-run": run.index,
      ...more,
    });
    if (series.low) group.append(make("path", of("band", { d: this.band(xs, series.low, series.high, span) })));
    else if (line.isFaint) group.append(make("path", of("line faint", { d: this.path(xs, series.values, span) })));
    group.append(make("path", of("line", { d: this.path(xs, ys, span), "data-name": line.name })));
    if (ys.length <= 60 || line.isEvaluated) {
      for (let i = span[0]; i < span[1] && span[1] - span[0] <= 120; i += 1) {
        if (xs[i] === null || ys[i] === null || (this.d.isLog && ys[i] <= 0)) continue;
        group.append(make("circle", of("dot", { cx: this.x(xs[i]), cy: this.y(ys[i]), r: line.isEvaluated ? 3 : 2 })));
      }
    }
    for (const [i, word] of series.odd || []) {
      if (xs[i] === null || xs[i] < this.d.left || xs[i] > this.d.right) continue;
      const at = this.x(xs[i]);
      const y = word === "Infinity" ? MARGIN.top + 6 : this.height - MARGIN.bottom - 6;
      const d =
        word === "NaN"
          ? `M${at - 4},${y - 4}l8,8m0,-8l-8,8`
          : `M${at - 4},${y + (word[0] === "-" ? -3 : 3)}h8l-4,${word[0] === "-" ? 7 : -7}z`;
      group.append(make("path", of(word === "NaN" ? "odd nan" : "odd", { d, "stroke-dasharray": null })));
    }
  }

  remark() {
    const notes = [];
    const long = this.now.filter((line) => line.series.low);
    if (long.length) {
      const count = Math.max(...long.map((line) => Math.ceil(line.series.count / line.series.values.length)));
      notes.push(
        `Each point is the mean of ${count.toLocaleString("en")} values; the band reaches from their least to their greatest.`,
      );
    }
    const odd = new Map();
    for (const line of this.now) for (const [, word, n] of line.series.odd || []) odd.set(word, (odd.get(word) || 0) + n);
    if (odd.size) notes.push(`Not finite: ${[...odd].map(([word, n]) => `${n} × ${word}`).join(", ")}.`);
    if (this.d.isEmpty && !odd.size) notes.push(this.now.length ? "No value in view." : "No value on this axis.");
    const isMixed = this.names.size > 1 && this.now.some((line) => line.isEvaluated);
    if (isMixed) notes.push(single ? "Blue: training; orange with dots: evaluation." : "Dashed with dots: evaluation.");
    return notes.join(" ");
  }

  // what a person does

  at(event) {
    const box = this.svg.getBoundingClientRect();
    return ((event.clientX - box.left) * this.width) / box.width;
  }
  value(at) {
    const { left, right } = this.d;
    const part = (at - MARGIN.left) / (this.width - MARGIN.left - MARGIN.right);
    return left + Math.min(1, Math.max(0, part)) * (right - left);
  }

  listen() {
    const svg = this.svg;
    svg.addEventListener("pointermove", (event) => this.move(event));
    svg.addEventListener("pointerdown", (event) => {
      if (event.button !== 0 || !this.d) return;
      this.from = this.at(event);
      svg.setPointerCapture(event.pointerId);
    });
    svg.addEventListener("pointerup", (event) => this.release(this.at(event)));
    svg.addEventListener("pointercancel", () => this.release(null));
    svg.addEventListener("pointerleave", unhover);
    svg.addEventListener("blur", unhover);
    svg.addEventListener("dblclick", () => zoom(null));
    svg.addEventListener("keydown", (event) => this.press(event));
  }

  move(event) {
    if (!this.d) return;
    const at = this.at(event);
    if (this.from !== undefined) {
      this.brush.setAttribute("x", Math.max(MARGIN.left, Math.min(at, this.from)));
      const end = Math.min(this.width - MARGIN.right, Math.max(at, this.from));
      this.brush.setAttribute("width", Math.max(0, end - Math.max(MARGIN.left, Math.min(at, this.from))));
      return;
    }
    hover(this, this.value(at), at, event.clientX, event.clientY);
  }

  release(at) {
    const from = this.from;
    this.from = undefined;
    if (from === undefined) return;
    this.brush.setAttribute("width", 0);
    if (at === null || Math.abs(at - from) < 6) return;
    zoom([this.value(Math.min(at, from)), this.value(Math.max(at, from))]);
  }

  press(event) {
    if (!this.d || !this.now.length) return;
    const { xs } = this.now[0];
    if (event.key === "Escape") zoom(null);
    else if (event.key === "ArrowLeft" || event.key === "ArrowRight") {
      const here = this.cursor === undefined ? 0 : nearest(xs, this.cursor);
      const next = Math.min(xs.length - 1, Math.max(0, here + (event.key === "ArrowLeft" ? -1 : 1)));
      this.cursor = xs[next];
      const box = this.svg.getBoundingClientRect();
      const at = this.x(this.cursor);
      hover(this, this.cursor, at, box.left + (at * box.width) / this.width, box.top + 20);
    } else return;
    event.preventDefault();
  }

  crosshair(x) {
    if (!this.d || x < this.d.left || x > this.d.right) return this.cross && this.cross.replaceChildren();
    const at = this.x(x);
    const marks = [make("line", { x1: at, x2: at, y1: MARGIN.top, y2: this.height - MARGIN.bottom })];
    for (const line of this.now) {
      const i = nearest(line.xs, x);
      if (line.ys[i] === null || line.xs[i] < this.d.left || line.xs[i] > this.d.right || (this.d.isLog && line.ys[i] <= 0))
        continue;
      marks.push(make("circle", { class: "point", cx: this.x(line.xs[i]), cy: this.y(line.ys[i]), r: 3.5, color: line.color }));
    }
    this.cross.replaceChildren(...marks);
  }
}

function zoom(to) {
  state.zoom = to;
  unhover();
  redraw();
}

function unhover() {
  tooltip.hidden = true;
  for (const chart of charts) if (chart.cross) chart.cross.replaceChildren();
}

/* The values of all runs at one place of the axis, in the chart under the pointer; every other chart shows the place. */
function hover(chart, x, at, clientX, clientY) {
  if (!chart.now.length) return;
  const anchor = chart.now.reduce((best, line) => (line.xs.length > best.xs.length ? line : best));
  const snapped = anchor.xs[nearest(anchor.xs, x)];
  if (snapped === null) return unhover();
  for (const one of charts) if (one.isInView && !one.stale) one.crosshair(snapped);
  const rows = chart.now.map((line) => {
    const i = nearest(line.xs, snapped);
    const odd = (line.series.odd || []).find(([point]) => point === i);
    const raw = line.series.values[i];
    const value = raw === null ? (odd ? odd[1] : "—") : shown(line.ys[i]);
    const notes = [];
    if (line.series.low && raw !== null) notes.push(`${shown(line.series.low[i])} … ${shown(line.series.high[i])}`);
    else if (line.isFaint && raw !== null) notes.push(`here ${shown(raw)}`);
    if (odd && raw !== null) notes.push(`${odd[2]} × ${odd[1]}`);
    if (line.xs[i] !== snapped) notes.push(`at ${axisText(line.xs[i])}`);
    const name = single ? line.name : chart.names.size > 1 ? `${line.run.name} ${line.name.split("/")[0]}` : line.run.name;
    return make(
      "tr",
      {},
      make("td", {}, make("i", { class: "swatch", color: line.color })),
      make("td", { class: "what" }, plain(name)),
      make("td", { class: "value" }, value),
      make("td", { class: "aside" }, notes.join(", ")),
    );
  });
  const near = (state.marks ? chart.marks || [] : []).filter((mark) => Math.abs(mark.at - at) < 5).slice(0, 4);
  const events = near.map(({ run, event }) =>
    make(
      "p",
      {},
      `${single ? "" : `${plain(run.name)}: `}${plain(event.kind)} at step ${shown(event.step, "count")}: ${plain(event.text)}`,
    ),
  );
  tooltip.replaceChildren(
    make("b", {}, `${AXES[state.axis].label} ${axisText(snapped)}`),
    make("table", {}, make("tbody", {}, ...rows)),
    ...events,
  );
  tooltip.hidden = false;
  const box = tooltip.getBoundingClientRect();
  const left = clientX + 16 + box.width > innerWidth - 8 ? clientX - box.width - 16 : clientX + 16;
  tooltip.style.left = `${Math.max(8, left)}px`;
  tooltip.style.top = `${Math.max(8, Math.min(clientY + 12, innerHeight - box.height - 8))}px`;
}
