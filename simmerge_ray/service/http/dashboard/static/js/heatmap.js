// One signal of all pairs: a table whose cells are coloured, so that it can be read, heard, and walked with arrow keys.

import { $, el, significant } from "./dom.js";
import { get, words } from "./api.js";

const MOST = 100; // checkpoints shown at once: ten thousand cells
const PAUSE_MS = 150; // in typing, before what was typed is asked for
// viridis of matplotlib (CC0): perceptually uniform, also for most colour-blind people, and in grey
const VIRIDIS = "440154 482878 3e4989 31688e 26828e 1f9e89 35b779 6ece58 b5de2b fde725"
  .split(" ")
  .map((hex) => [0, 2, 4].map((at) => Number.parseInt(hex.slice(at, at + 2), 16)));

function viridis(share) {
  const place = Math.min(Math.max(share, 0), 1) * (VIRIDIS.length - 1);
  const [low, high] = [Math.floor(place), Math.min(Math.floor(place) + 1, VIRIDIS.length - 1)];
  return VIRIDIS[low].map((value, at) => Math.round(value + (VIRIDIS[high][at] - value) * (place - low)));
}

// Relative, of sRGB, as WCAG 2 has it.
function luminance(rgb) {
  const [red, green, blue] = rgb.map((value) => {
    const share = value / 255;
    return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
}

// A function from a value to [0, 1]: between the smallest and the largest, or by its place among all.
function shares(values, byRank) {
  const [low, high] = [values[0], values.at(-1)];
  if (low === high) return () => 0.5;
  if (!byRank) return (value) => (value - low) / (high - low);
  const first = new Map();
  const last = new Map();
  values.forEach((value, at) => {
    if (!first.has(value)) first.set(value, at);
    last.set(value, at);
  });
  return (value) => (first.get(value) + last.get(value)) / 2 / (values.length - 1);
}

export class HeatMap {
  #answer = null;
  #asked = 0;
  #typing = 0;
  #take;

  // take: what to do with a pair that is chosen, a function of (left, right).
  constructor(take) {
    this.#take = take;
    for (const id of ["signal", "signal-task"]) $(id).addEventListener("change", () => this.load());
    $("signal-colour").addEventListener("change", () => this.#draw());
    $("signal-find").addEventListener("input", () => {
      clearTimeout(this.#typing);
      this.#typing = setTimeout(() => this.load(), PAUSE_MS);
    });
    $("signal-form").addEventListener("submit", (event) => event.preventDefault());
    const heat = $("heat");
    heat.addEventListener("mouseover", (event) => this.#read(event.target.closest("td")));
    heat.addEventListener("focusin", (event) => this.#read(event.target.closest("td")));
    heat.addEventListener("click", (event) => this.#choose(event.target.closest("td")));
    heat.addEventListener("keydown", (event) => this.#walk(event));
  }

  async load() {
    const turn = (this.#asked += 1);
    if (!$("signal").value) return this.#fail("The selector's table has no signals.");
    $("signal-task").disabled = "weights" in $("signal").selectedOptions[0].dataset; // the same for every task
    try {
      const part = $("signal-find").value.trim();
      const answer = await get("v1/signals", { signal: $("signal").value, task: this.#task(), part, limit: MOST });
      if (turn !== this.#asked) return; // another one was asked for meanwhile
      this.#answer = answer;
      this.#draw();
    } catch (error) {
      if (turn === this.#asked) this.#fail(words(error, true));
    }
  }

  #task() {
    return $("signal-task").disabled ? null : $("signal-task").value;
  }

  #fail(text) {
    this.#answer = null;
    $("heat").replaceChildren();
    $("legend").hidden = true;
    $("heat-empty").textContent = text;
    $("heat-empty").hidden = false;
  }

  #draw() {
    if (!this.#answer) return;
    const { checkpoints, values, signal, num_matching: matching } = this.#answer;
    const shown = [...checkpoints.keys()];
    const known = values.flat().filter((value) => value !== null);
    known.sort((one, other) => one - other);
    const notes = [];
    if (shown.length < matching)
      notes.push(`The first ${MOST} of ${matching} checkpoints: name a part of the id for others.`);
    if (!shown.length) notes.push("No checkpoint has this in its id.");
    else if (!known.length) notes.push("This signal has no values here.");
    $("heat-empty").textContent = notes.join(" ");
    $("heat-empty").hidden = !notes.length;
    const share = known.length ? shares(known, $("signal-colour").value === "rank") : () => 0;
    $("heat").replaceChildren(shown.length ? this.#table(shown, share, signal) : "");
    this.#legend(known);
  }

  #table(shown, share, signal) {
    const { checkpoints } = this.#answer;
    const size = shown.length <= 14 ? "large" : shown.length <= 40 ? "medium" : "small";
    const head = shown.map((at) => el("th", { scope: "col" }, el("span", {}, checkpoints[at])));
    const rows = shown.map((row, i) => {
      const cells = shown.map((column, j) => this.#cell(row, column, share, size, i + j === 0));
      return el("tr", { role: "row" }, el("th", { scope: "row" }, checkpoints[row]), ...cells);
    });
    const corner = el("td", { class: "corner", role: "presentation" });
    return el(
      "table",
      {
        class: `heat ${size}`,
        role: "grid",
        "aria-label": `${signal}: left checkpoint by row, right checkpoint by column`,
      },
      el("thead", {}, el("tr", { role: "row" }, corner, ...head)),
      el("tbody", {}, ...rows),
    );
  }

  #cell(row, column, share, size, first) {
    const { checkpoints, values } = this.#answer;
    const value = values[row][column];
    const properties = { role: "gridcell", tabindex: first ? 0 : -1, "data-row": row, "data-column": column };
    const td = el("td", properties);
    if (size === "large" && value !== null) td.textContent = significant(Number(value.toPrecision(3)));
    else {
      const text = row === column ? "the same checkpoint" : significant(value);
      td.setAttribute("aria-label", `${checkpoints[row]}, ${checkpoints[column]}: ${text}`);
    }
    if (value === null) td.className = "none";
    else {
      const rgb = viridis(share(value));
      td.style.backgroundColor = `rgb(${rgb})`;
      td.style.color = luminance(rgb) > 0.179 ? "#000" : "#fff"; // whichever has more contrast
    }
    return td;
  }

  #legend(known) {
    $("legend").hidden = !known.length;
    if (!known.length) return;
    $("legend-low").textContent = significant(known[0]);
    $("legend-high").textContent = significant(known.at(-1));
    $("legend-none").textContent = "striped: no value";
    const context = $("legend-bar").getContext("2d");
    const image = context.createImageData(256, 1);
    for (let at = 0; at < 256; at += 1) image.data.set([...viridis(at / 255), 255], 4 * at);
    context.putImageData(image, 0, 0);
  }

  #pair(td) {
    const { checkpoints, values } = this.#answer;
    const [row, column] = [Number(td.dataset.row), Number(td.dataset.column)];
    return {
      left: checkpoints[row],
      right: checkpoints[column],
      value: values[row][column],
      same: row === column,
    };
  }

  #read(td) {
    if (!td || !td.dataset.row) return;
    const { left, right, value, same } = this.#pair(td);
    const what = same ? "the same checkpoint" : `${this.#answer.signal} ${significant(value)}`;
    $("readout").textContent = `${left} (left), ${right} (right): ${what}`;
  }

  #choose(td) {
    if (!td || !td.dataset.row) return;
    const { left, right, same } = this.#pair(td);
    if (!same) this.#take(left, right);
  }

  #walk(event) {
    const td = event.target.closest("td");
    if (!td || !td.dataset.row) return;
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      return this.#choose(td);
    }
    const rows = [...$("heat").querySelectorAll("tbody tr")];
    const at = [rows.indexOf(td.parentElement), td.cellIndex - 1];
    const last = rows.length - 1;
    const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    const to = move ? at.map((place, axis) => Math.min(Math.max(place + move[axis], 0), last)) : at;
    if (event.key === "Home") to[1] = 0;
    else if (event.key === "End") to[1] = last;
    else if (!move) return;
    event.preventDefault();
    td.tabIndex = -1; // one stop of the Tab key for the whole table
    const next = rows[to[0]].cells[to[1] + 1];
    next.tabIndex = 0;
    next.focus();
  }
}
