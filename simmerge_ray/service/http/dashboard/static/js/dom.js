// Building blocks of the page. Data becomes text here, never markup: there is no innerHTML in these files.

const SVG = "http://www.w3.org/2000/svg";

export const $ = (id) => document.getElementById(id);

function fill(node, properties, children) {
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

// An element with attributes (`onclick` and the like: listeners) and children (strings become text).
export const el = (tag, properties = {}, ...children) =>
  fill(document.createElement(tag), properties, children);

export const svg = (tag, properties = {}, ...children) =>
  fill(document.createElementNS(SVG, tag), properties, children);

// A cell of a table that becomes a list of cards on a phone, where the head of the column is shown beside the value.
export const cell = (label, properties, ...children) =>
  el("td", { "data-label": label, ...properties }, ...children);

export const utility = (value, digits = 3) =>
  value === null || value === undefined ? "–" : value.toFixed(digits);

// With a sign; of what is small, a digit more.
export function signed(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  return (value < 0 ? "−" : "+") + size.toFixed(size < 0.01 && size > 0 ? digits + 1 : digits);
}

// Four significant digits, for signals of any scale.
export function significant(value) {
  if (value === null || value === undefined) return "none";
  const size = Math.abs(value);
  if (size !== 0 && (size >= 1e5 || size < 1e-3)) return value.toExponential(2).replace("-", "−");
  return Number(value.toPrecision(4)).toString().replace("-", "−");
}

const whole = new Intl.NumberFormat("en");
export const count = (value) => whole.format(value);

const moment = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "medium" });
const clock = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit", second: "2-digit" });
const day = new Intl.DateTimeFormat(undefined, {
  month: "short",
  day: "numeric",
  hour: "2-digit",
  minute: "2-digit",
});

// Seconds since 1970 or an ISO date, as the API has it.
export const toDate = (at) => new Date(typeof at === "number" ? at * 1000 : at);

export function time(at) {
  if (at === null || at === undefined) return document.createTextNode("–");
  const date = toDate(at);
  const today = date.toDateString() === new Date().toDateString();
  return el(
    "time",
    { datetime: date.toISOString(), title: moment.format(date) },
    (today ? clock : day).format(date),
  );
}

export const clockTime = (date) => clock.format(date);

// An id in short, the whole of it for those who point at it, copy it or hear it.
export const short = (id) => (id.length > 10 ? `${id.slice(0, 8)}…` : id);

export function announce(text) {
  $("announce").textContent = text;
}

// The name of an arm, which may be broken before its parameters, or of a plan, which has spaces for that.
export function arm(name) {
  const parts = name.includes(" ") ? [name] : name.split(/(?<=[(,])/).flatMap((part) => [el("wbr"), part]);
  return el("b", { class: "arm" }, ...parts);
}

// Mean and interval as a dot on a line. Positions are attributes in percent, so a style is not needed.
// marks: values with a line across. other: a second mean, drawn as a ring.
export function interval({ low, mid, high, from, to, marks = [], other = null, label }) {
  const at = (value) => `${(100 * (Math.min(Math.max(value, from), to) - from)) / (to - from || 1)}%`;
  const parts = [svg("line", { class: "axis", x1: "0%", x2: "100%", y1: 10, y2: 10 })];
  for (const mark of marks)
    parts.push(svg("line", { class: "mark", x1: at(mark), x2: at(mark), y1: 1, y2: 19 }));
  if (low !== null && low !== undefined)
    parts.push(svg("line", { class: "range", x1: at(low), x2: at(high), y1: 10, y2: 10 }));
  if (other !== null) parts.push(svg("circle", { class: "other", cx: at(other), cy: 10, r: 4 }));
  if (mid !== null && mid !== undefined)
    parts.push(svg("circle", { class: "mean", cx: at(mid), cy: 10, r: 4.5 }));
  return svg(
    "svg",
    { class: "interval", role: "img", "aria-label": label, height: 20, width: "100%" },
    ...parts,
  );
}
