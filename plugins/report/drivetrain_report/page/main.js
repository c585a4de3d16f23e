/* The page, put together. */

function everything() {
  redraw();
  for (const update of sections) update();
}

function header() {
  const facts = single ? factsOf(runs[0]) : [`${runs.length} runs`, `made ${date(data.made)} UTC`];
  const theme = make("button", { type: "button", id: "theme", title: "light or dark" }, "◐");
  theme.addEventListener("click", () => setTheme(isDark() ? "light" : "dark"));
  const print = make("button", { type: "button", title: "print", onclick: () => window.print() }, "Print");
  return make(
    "header",
    {},
    make(
      "div",
      {},
      make("p", { class: "kind" }, "Drivetrain report"),
      make("h1", {}, single ? plain(runs[0].name) : "Runs compared"),
      make("p", { class: "facts" }, ...facts.map((fact) => make("span", {}, fact))),
    ),
    make("div", { class: "actions no-print" }, theme, print),
  );
}
function factsOf(run) {
  const environment = new Map(run.environment);
  const device = [environment.get("hardware.device"), environment.get("hardware.name")].filter(Boolean).join(" ");
  const world = environment.get("processes.world_size");
  return [
    run.began === null ? null : `${date(run.began)} UTC`,
    device || null,
    environment.has("model.parameters") ? `${shown(Number(environment.get("model.parameters")))} parameters` : null,
    world && world !== "1" ? `${world} processes` : null,
    environment.has("versions.torch") ? `torch ${environment.get("versions.torch")}` : null,
    environment.has("versions.drivetrain-core") ? `drivetrain ${environment.get("versions.drivetrain-core")}` : null,
  ]
    .filter(Boolean)
    .map(plain);
}

const isDark = () => {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
};
function setTheme(name) {
  document.documentElement.dataset.theme = name;
  try {
    localStorage.setItem("drivetrain-report-theme", name);
  } catch {} // a browser may keep nothing for a file
}
try {
  const kept = localStorage.getItem("drivetrain-report-theme");
  if (kept === "light" || kept === "dark") document.documentElement.dataset.theme = kept;
} catch {}

function toolbar() {
  const chips = runs.map((run) => {
    const chip = make(
      "button",
      { type: "button", class: "chip", "aria-pressed": "true", title: "click: on and off; double click: this one alone" },
      swatch(run),
      plain(run.name),
    );
    chip.addEventListener("click", () => {
      if (!state.hidden.delete(run.index)) state.hidden.add(run.index);
      press();
    });
    chip.addEventListener("dblclick", () => {
      state.hidden = new Set(runs.filter((other) => other !== run).map((other) => other.index));
      press();
    });
    return chip;
  });
  const press = () => {
    chips.forEach((chip, i) => chip.setAttribute("aria-pressed", String(!state.hidden.has(i))));
    everything();
  };
  const axes = Object.keys(AXES)
    .filter(isKnown)
    .map((axis) =>
      make(
        "button",
        {
          type: "button",
          "data-axis": axis,
          "aria-pressed": String(axis === state.axis),
          onclick: () => {
            state.axis = axis;
            state.zoom = null;
            for (const one of axes) one.setAttribute("aria-pressed", String(one.dataset.axis === axis));
            redraw();
          },
        },
        AXES[axis].label,
      ),
    );
  const output = make("output", {}, state.smoothing.toFixed(2));
  const slider = make("input", { type: "range", id: "smoothing", min: 0, max: 0.99, step: 0.01, value: state.smoothing });
  slider.addEventListener("input", () => {
    state.smoothing = Number(slider.value);
    output.textContent = state.smoothing.toFixed(2);
    redraw();
  });
  const marks = make("input", { type: "checkbox", checked: state.marks });
  marks.addEventListener("change", () => {
    state.marks = marks.checked;
    redraw();
  });
  const back = make("button", { type: "button", class: "back", onclick: () => zoom(null) }, "Reset zoom");
  const hasEvents = runs.some((run) => run.events.length);
  return make(
    "nav",
    { class: "toolbar", "aria-label": "what the curves show" },
    single ? null : make("div", { class: "chips" }, ...chips),
    make(
      "div",
      { class: "knobs no-print" },
      axes.length > 1 ? make("div", { class: "segments", role: "group", "aria-label": "axis" }, ...axes) : null,
      make("label", {}, "Smoothing", slider, output),
      hasEvents ? make("label", {}, marks, "Events") : null,
      back,
    ),
  );
}

function curves() {
  const groups = chartGroups();
  if (!groups.length)
    return make(
      "section",
      { id: "curves" },
      make("h2", {}, "Curves"),
      make("p", { class: "quiet" }, "No metrics were recorded."),
    );
  const boxes = groups.map((group, at) => {
    const isLarge = (i) => at === 0 && i === 0;
    const details = make(
      "details",
      { open: at === 0 || group.charts.length <= 12 },
      make("summary", {}, group.title, make("small", {}, String(group.charts.length))),
      make("div", { class: "charts" }, ...group.charts.map((spec, i) => new Chart(spec, isLarge(i)).box)),
    );
    details.addEventListener("toggle", redraw);
    return details;
  });
  return make(
    "section",
    { id: "curves" },
    make("h2", {}, "Curves"),
    toolbar(),
    ...boxes,
    make(
      "p",
      { class: "quiet no-print" },
      "Drag to zoom, double-click or Escape to see all again; the arrow keys move along a curve.",
    ),
  );
}

const longest = Math.max(0, ...runs.map((run) => (run.series.get("train/loss") || { count: 0 }).count));
state.smoothing = longest > 100 ? 0.6 : 0;
const main = make(
  "main",
  {},
  header(),
  section("Overview", overview),
  curves(),
  section("Goodput", goodput),
  section("Evaluations", evaluations),
  section("Events", events),
  section("Configuration", () => settings("config", true)),
  section("Environment", () => settings("environment", false)),
  make(
    "footer",
    {},
    ...runs.map((run) => make("p", {}, plain(run.path))),
    make("p", {}, `drivetrain-report ${data.version}, ${date(data.made)} UTC`),
  ),
);
document.body.append(main, tooltip);

addEventListener("beforeprint", () => charts.forEach((chart) => chart.draw()));
addEventListener("afterprint", redraw);
