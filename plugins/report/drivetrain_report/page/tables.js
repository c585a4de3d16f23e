/* Everything besides the curves: figures, goodput, evaluations, events, configuration, environment. */

/* Rows of cells (texts or nodes) under a head; what is beyond `most` is there after a click. */
function table(head, rows, { most = Infinity, kind = "", numbers = [] } = {}) {
  const cell = (tag) => (content, i) => make(tag, { class: numbers.includes(i) ? "number" : null }, content);
  const body = make("tbody");
  const fill = (count) =>
    body.replaceChildren(
      ...rows.slice(0, count).map((row) => (row instanceof Node ? row : make("tr", {}, ...row.map(cell("td"))))),
    );
  const box = make(
    "div",
    { class: `table ${kind}` },
    make("table", {}, make("thead", {}, make("tr", {}, ...head.map(cell("th")))), body),
  );
  fill(most);
  if (rows.length > most) {
    const more = make("button", { type: "button", class: "more" }, `Show all ${rows.length}`);
    more.addEventListener("click", () => {
      fill(Infinity);
      more.remove();
    });
    box.append(more);
  }
  return box;
}

const sections = [];
function section(title, fill) {
  const body = make("div");
  const box = make("section", { id: title.toLowerCase() }, make("h2", {}, title), body);
  const update = () => {
    const content = fill();
    box.hidden = content === null;
    body.replaceChildren(...(content || []));
  };
  sections.push(update);
  update();
  return box;
}

function overview() {
  const seen = shownRuns();
  if (single) return [make("div", { class: "tiles" }, ...runs[0].figures.map(tile)), ...notes()];
  const heads = new Map();
  for (const run of runs) for (const figure of run.figures) heads.set(figure.label, figure);
  const best = new Map();
  for (const [label, { better }] of heads) {
    const values = seen.flatMap((run) => run.figures.filter((f) => f.label === label).map((f) => f.value));
    if (better && values.length > 1 && new Set(values).size > 1) best.set(label, Math[better](...values));
  }
  const rows = runs.map((run) => {
    const cells = [...heads.keys()].map((label) => {
      const figure = run.figures.find((f) => f.label === label);
      if (!figure) return "—";
      const isBest = seen.includes(run) && best.get(label) === figure.value;
      return make(
        "span",
        { class: isBest ? "best" : null, title: figure.note ? plain(figure.note) : null },
        shown(figure.value, figure.unit),
      );
    });
    const numbers = cells.map((content) => make("td", { class: "number" }, content));
    return make("tr", { class: seen.includes(run) ? null : "off" }, make("td", {}, runName(run)), ...numbers);
  });
  return [
    table(["run", ...[...heads.keys()].map(plain)], rows, { kind: "wide", numbers: [...heads.keys()].map((_, i) => i + 1) }),
    ...notes(),
  ];
}
const tile = (figure) =>
  make(
    "div",
    { class: "tile" },
    make("span", { title: plain(figure.label) }, plain(figure.label)),
    make("strong", {}, shown(figure.value, figure.unit)),
    make("small", {}, plain(figure.note)),
  );
const notes = () =>
  runs.flatMap((run) =>
    run.notes.map((note) => make("p", { class: "warning" }, single ? plain(note) : `${plain(run.name)}: ${plain(note)}`)),
  );

const PARTS = named({
  "forward and backward": "compute",
  optimizer: "update",
  "data wait": "wait",
  transfer: "transfer",
  evaluation: "evaluate",
  logging: "log",
  start: "start",
  rest: "rest",
  down: "down",
});
const partColor = (name, others) => (PARTS[name] ? `var(--g-${PARTS[name]})` : `var(--g-other${others.indexOf(name) % 4})`);

function goodput() {
  const seen = shownRuns().filter((run) => run.goodput);
  if (!seen.length) return null;
  const all = new Map();
  for (const run of seen) for (const [name, s] of Object.entries(run.goodput.parts)) all.set(name, (all.get(name) || 0) + s);
  const place = (name) => (PARTS[name] ? Object.keys(PARTS).indexOf(name) : 4.5);
  const names = [...all.keys()].sort((a, b) => place(a) - place(b) || all.get(b) - all.get(a));
  const others = names.filter((name) => !PARTS[name]);
  const whole = (run) => Object.values(run.goodput.parts).reduce((a, b) => a + b, 0);
  const bars = seen.map((run) => {
    const bar = make("div", { class: "bar", role: "img", "aria-label": `${plain(run.name)}: where the time went` });
    for (const name of names) {
      const share = (run.goodput.parts[name] || 0) / whole(run);
      if (share < 0.0005) continue;
      const text = share > 0.07 ? `${(100 * share).toFixed(0)} %` : "";
      const part = make(
        "span",
        {
          color: partColor(name, others),
          title: `${plain(name)}: ${clock(run.goodput.parts[name])}, ${(100 * share).toFixed(1)} %`,
        },
        text,
      );
      part.style.flexGrow = share;
      bar.append(part);
    }
    const sittings = run.goodput.sittings > 1 ? `, ${run.goodput.sittings} sittings` : "";
    return make(
      "div",
      { class: "bar-row" },
      make("div", { class: "bar-name" }, single ? "" : runName(run), make("small", {}, `${clock(whole(run))}${sittings}`)),
      bar,
    );
  });
  const isSmall = (name) => seen.every((run) => (run.goodput.parts[name] || 0) < 0.0005 * whole(run));
  const small = names.filter(isSmall);
  const rows = names
    .filter((name) => !isSmall(name))
    .map((name) => [
      make("span", { class: "run" }, make("i", { class: "swatch square", color: partColor(name, others) }), plain(name)),
      ...seen.flatMap((run) => {
        const seconds = run.goodput.parts[name];
        return seconds === undefined ? ["—", "—"] : [clock(seconds), `${((100 * seconds) / whole(run)).toFixed(1)} %`];
      }),
    ]);
  const head = ["part", ...seen.flatMap((run) => [single ? "time" : runName(run), "share"])];
  const rest = small.length ? [make("p", { class: "quiet" }, `Less than 0.05 % each: ${small.map(plain).join(", ")}.`)] : [];
  return [make("div", { class: "bars" }, ...bars), table(head, rows, { numbers: head.map((_, i) => i).slice(1) }), ...rest];
}

function evaluations() {
  const seen = shownRuns().filter((run) => run.evaluations.rows.length);
  if (!seen.length) return null;
  const names = [...new Set(seen.flatMap((run) => run.evaluations.names))];
  const direction = (name) => seen.map((run) => run.evaluations.better[run.evaluations.names.indexOf(name)]).find(Boolean);
  const values = (run, name) =>
    run.evaluations.rows.map((row) => row[3 + run.evaluations.names.indexOf(name)]).filter((v) => typeof v === "number");
  const best = new Map();
  for (const name of names) {
    const found = seen.flatMap((run) => (run.evaluations.names.includes(name) ? values(run, name) : []));
    if (direction(name) && found.length > 1)
      best.set(
        name,
        found.reduce((a, b) => Math[direction(name)](a, b)),
      );
  }
  const rows = seen.flatMap((run) =>
    run.evaluations.rows.map((row) => [
      ...(single ? [] : [runName(run)]),
      shown(row[0], "count"),
      row[2] === null ? "—" : row[2].toFixed(4),
      row[1] === null ? "—" : clock(row[1] - run.began),
      ...names.map((name) => {
        const at = run.evaluations.names.indexOf(name);
        const value = at < 0 ? null : row[3 + at];
        const text = typeof value === "number" && !Number.isInteger(value) ? significant(value, 4, String) : shown(value);
        return make("span", { class: value !== null && best.get(name) === value ? "best" : null }, text);
      }),
    ]),
  );
  const head = [...(single ? [] : ["run"]), "step", "epoch", "time", ...names.map((name) => plain(name.replace("/", " ")))];
  const older = seen.reduce((sum, run) => sum + run.evaluations.left_out, 0);
  const left = older
    ? [make("p", { class: "quiet" }, `${older} older evaluations are in metrics.jsonl; the curves show all.`)]
    : [];
  return [table(head, rows, { most: 24, numbers: head.map((_, i) => i).slice(single ? 0 : 1) }), ...left];
}

const KINDS = named({ anomaly: "bad", hang: "bad", restart: "warn", checkpoint: "calm" });
function events() {
  const found = shownRuns().flatMap((run) => run.events.map((event) => ({ run, event })));
  if (!found.length) return null;
  found.sort((a, b) => (a.event.step || 0) - (b.event.step || 0));
  const rows = found.map(({ run, event }) => [
    ...(single ? [] : [runName(run)]),
    make("span", { class: `badge ${KINDS[event.kind] || ""}` }, plain(event.kind)),
    shown(event.step, "count"),
    event.time === null ? "—" : clock(Math.max(0, event.time - (run.began || event.time))),
    plain(event.text),
  ]);
  const head = [...(single ? [] : ["run"]), "event", "step", "time", "what"];
  return [table(head, rows, { most: 40, kind: "texts", numbers: single ? [1, 2] : [2, 3] })];
}

const search = { config: "", environment: "" };
const onlySome = { config: !single, environment: !single };

/* Keys with the values of all runs side by side; what differs stands out. */
function settings(which, hasOrigin) {
  const seen = shownRuns().filter((run) => run[which].length);
  if (!seen.length) return [make("p", { class: "quiet" }, "Not recorded: a run's checkpoints keep it, and these have none.")];
  const maps = seen.map((run) => new Map(run[which].map(([key, value, origin]) => [key, { value, origin }])));
  const keys = [...new Set(maps.flatMap((map) => [...map.keys()]))];
  /* A default of a component that another run does not have is no difference worth a row. */
  const differs = (key) => {
    const there = maps.filter((map) => map.has(key)).map((map) => map.get(key));
    if (there.length < maps.length) return there.some((entry) => entry.origin !== "default");
    return new Set(there.map((entry) => entry.value)).size > 1;
  };
  const isSet = (key) => maps.some((map) => map.get(key).origin !== "default");
  const body = make("tbody");
  const value = (entry) => (entry ? make("code", {}, plain(entry.value)) : make("span", { class: "quiet" }, "not there"));
  const origin = (entry) =>
    make("span", { class: entry && entry.origin !== "default" ? "origin" : "quiet" }, entry ? plain(entry.origin) : "");
  const fill = () => {
    const words = search[which].toLowerCase();
    const wanted = keys.filter(
      (key) =>
        (!onlySome[which] || (single ? isSet(key) : differs(key))) &&
        (!words ||
          key.toLowerCase().includes(words) ||
          maps.some((map) => map.has(key) && map.get(key).value.toLowerCase().includes(words))),
    );
    body.replaceChildren(
      ...wanted.map((key) => {
        const entries = maps.map((map) => map.get(key));
        const cells = single
          ? [make("td", {}, value(entries[0])), ...(hasOrigin ? [make("td", {}, origin(entries[0]))] : [])]
          : entries.map((entry) =>
              make("td", {}, value(entry), hasOrigin && entry && entry.origin ? make("small", {}, origin(entry)) : null),
            );
        return make(
          "tr",
          { class: !single && differs(key) ? "differs" : null },
          make("th", { scope: "row" }, plain(key)),
          ...cells,
        );
      }),
    );
    if (!wanted.length)
      body.append(
        make("tr", {}, make("td", { colspan: 1 + seen.length, class: "quiet" }, words ? "nothing fits" : "no difference")),
      );
  };
  fill();
  const head = ["key", ...(single ? ["value", ...(hasOrigin ? ["origin"] : [])] : seen.map(runName))];
  const filter = make("input", {
    type: "search",
    placeholder: "Filter",
    "aria-label": `filter ${which}`,
    value: search[which],
  });
  filter.addEventListener("input", () => {
    search[which] = filter.value;
    fill();
  });
  const box = make("input", { type: "checkbox", checked: onlySome[which] });
  box.addEventListener("change", () => {
    onlySome[which] = box.checked;
    fill();
  });
  const choice = single && !hasOrigin ? null : make("label", {}, box, single ? "only what is no default" : "only differences");
  const controls = make("div", { class: "controls no-print" }, filter, choice);
  const kind = single ? "settings" : "settings several";
  return [
    controls,
    make(
      "div",
      { class: `table ${kind}` },
      make("table", {}, make("thead", {}, make("tr", {}, ...head.map((one) => make("th", {}, one)))), body),
    ),
  ];
}
