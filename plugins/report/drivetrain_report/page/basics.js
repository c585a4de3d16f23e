/* Draws a report from the data in the page. Every text of a run becomes a text node or an attribute, never markup. */

const data = JSON.parse(document.getElementById("data").textContent);
const COLORS = 8;
const runs = data.runs.map((run, index) => ({
  ...run,
  index,
  series: new Map(Object.entries(run.series)),
  color: `var(--c${index % COLORS})`,
  dash: ["", "7 3", "2 3"][Math.floor(index / COLORS) % 3],
}));
const state = { axis: "step", smoothing: 0, zoom: null, hidden: new Set(), logarithmic: new Set(), marks: true };
const shownRuns = () => runs.filter((run) => !state.hidden.has(run.index));
const single = runs.length === 1;

function make(tag, attributes = {}, ...children) {
  const svg = make.svg.has(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key === "color") node.style.setProperty("--color", value);
    else if (value !== null && value !== false) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}
make.svg = new Set(["svg", "g", "path", "line", "rect", "circle", "text", "clipPath"]);

/* What a font has no picture for, or what turns the direction of writing, as its number. */
const plain = (text) => String(text).replace(/[\p{C}\p{Zl}\p{Zp}]/gu, (c) => `\\u{${c.codePointAt(0).toString(16)}}`);

const trimmed = (text) => (text.includes(".") ? text.replace(/0+$/, "").replace(/\.$/, "") : text);

function significant(value, digits = 4, trim = trimmed) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size < 1e-4 || size >= 1e15) {
    const [mantissa, exponent] = value.toExponential(digits - 1).split("e");
    return `${trim(mantissa)}e${exponent.replace("+", "")}`;
  }
  for (const [letter, unit] of [
    ["T", 1e12],
    ["B", 1e9],
    ["M", 1e6],
    ["k", 1e5],
  ]) {
    if (size >= unit) return `${trim(precise(value / (letter === "k" ? 1e3 : unit), digits))} ${letter}`;
  }
  if (size >= 10 ** (digits - 1)) return Math.round(value).toLocaleString("en");
  return trim(precise(value, digits));
}
/* toPrecision without its powers of ten. */
function precise(value, digits) {
  const text = value.toPrecision(digits);
  return text.includes("e") ? String(Number(text)) : text;
}

function clock(seconds) {
  if (seconds < 60) return `${seconds.toFixed(1)} s`;
  const two = (n) => String(n).padStart(2, "0");
  let minutes = Math.floor(Math.round(seconds) / 60);
  const rest = Math.round(seconds) % 60;
  const hours = Math.floor(minutes / 60);
  minutes %= 60;
  if (hours >= 48) return `${Math.floor(hours / 24)} d ${two(hours % 24)}:${two(minutes)}`;
  return hours ? `${hours}:${two(minutes)}:${two(rest)}` : `${minutes}:${two(rest)}`;
}

function shown(value, unit = "number") {
  if (value === null || value === undefined) return "—";
  if (typeof value !== "number") return plain(value);
  if (unit === "seconds") return clock(value);
  if (unit === "share") return `${(100 * value).toFixed(1)} %`;
  if (unit === "gb") return `${significant(value, 3)} GB`;
  if (unit === "count" && Number.isInteger(value) && Math.abs(value) < 1e9) return value.toLocaleString("en");
  return significant(value);
}

const date = (seconds) =>
  seconds === null || Math.abs(seconds) > 8.64e12 ? "" : new Date(seconds * 1000).toISOString().replace("T", " ").slice(0, 19);

/* A table without the names that every object has, such as "constructor". */
const named = (entries) => Object.assign(Object.create(null), entries);

const swatch = (run) => make("i", { class: "swatch", color: run.color });
const runName = (run) => make("span", { class: "run" }, swatch(run), plain(run.name));
