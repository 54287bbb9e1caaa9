// How answers are shown: ranked arms and plans with intervals, and why.

import { arm, cell, el, interval, signed, svg, utility } from "./dom.js";

// A common axis for all rows, a little wider than what is on it.
function reachOf(rows) {
  const ends = rows
    .flatMap((one) => [...(one.interval ?? []), one.utility, one.expected])
    .filter((value) => value !== null && value !== undefined);
  if (!ends.length) return { from: 0, to: 1 };
  const [low, high] = [Math.min(...ends), Math.max(...ends)];
  const margin = Math.max(0.02, 0.05 * (high - low));
  return { from: Math.max(0, low - margin), to: Math.min(1, high + margin) };
}

function plot(name, one, reach) {
  const [low, high] = one.interval ?? [null, null];
  const range = low === null ? "" : `, interval ${utility(low)} to ${utility(high)}`;
  const taught = one.expected ?? null;
  return interval({
    ...reach,
    low,
    mid: one.utility,
    high,
    other: taught,
    label: `${name}: ${utility(one.utility)}${range}${taught === null ? "" : `, with rewards ${utility(taught)}`}`,
  });
}

const percent = (value) =>
  value === null || value === undefined ? "–" : `${(100 * value).toFixed(value < 0.1 ? 1 : 0)} %`;

// Groups of signals and how far each moves a prediction, as bars on both sides of a line.
export function influences(why) {
  const most = Math.max(...why.map((one) => Math.abs(one.effect)), 1e-9);
  const items = why.map((one) => {
    const size = (50 * Math.abs(one.effect)) / most;
    const side = one.effect < 0 ? "less" : "more";
    const bar = svg(
      "svg",
      { class: "effect", "aria-hidden": "true", width: "100%", height: 14 },
      svg("line", { class: "axis", x1: "50%", x2: "50%", y1: 0, y2: 14 }),
      svg("rect", {
        class: side,
        x: `${side === "less" ? 50 - size : 50}%`,
        y: 3,
        width: `${size}%`,
        height: 8,
      }),
    );
    return el(
      "li",
      {},
      el("span", { class: "signal" }, one.signal),
      bar,
      el("span", { class: "num" }, signed(one.effect)),
    );
  });
  return el("ul", { class: "why" }, ...items);
}

function table(head, rows) {
  const columns = head.map(([name, kind]) => el("th", { scope: "col", class: kind }, name));
  return el(
    "table",
    { class: "cards ranked" },
    el("thead", {}, el("tr", {}, ...columns)),
    el("tbody", {}, ...rows),
  );
}

// An arm that the selector was not trained on has no prediction, only what rewards have taught.
const valueOf = (one) => one.utility ?? one.expected ?? -1;

// Whether a checkpoint of a pair stays as it is: the answer has a plan then, and no merge to make.
export const isKept = (decision) => decision.kind === "pair" && Boolean(decision.plan);

export const bestFirst = (arms) => [...arms].sort((one, other) => valueOf(other) - valueOf(one));

// Arms of a decision or a ranking, best first; `chosen` is marked with a word.
export function armTable(answer, chosen, mark = "taken") {
  const arms = bestFirst(answer.arms);
  const reach = reachOf(arms);
  const taught = arms.some((one) => one.expected !== null && one.expected !== undefined);
  const chances = arms.some((one) => one.propensity !== null && one.propensity !== undefined);
  const scale = `Predicted utility, ${utility(reach.from, 2)} to ${utility(reach.to, 2)}`;
  const head = [["Arm"], [scale, "wide"], ["Utility", "num"], ["sd", "num"]];
  if (taught) head.push(["With rewards", "num"]);
  if (chances) head.push(["Chance", "num"]);
  const rows = arms.map((one) =>
    el(
      "tr",
      { class: one.arm === chosen ? "chosen" : null },
      el(
        "th",
        { scope: "row", "data-label": "Arm" },
        arm(one.arm),
        one.arm === chosen ? el("span", { class: "badge good" }, mark) : null,
        one.arm === answer.best_fixed ? el("span", { class: "badge" }, "best fixed") : null,
      ),
      cell(scale, { class: "wide" }, plot(one.arm, one, reach)),
      cell("Utility", { class: "num" }, utility(one.utility)),
      cell("sd", { class: "num" }, utility(one.sd)),
      taught ? cell("With rewards", { class: "num" }, utility(one.expected)) : null,
      chances ? cell("Chance", { class: "num" }, percent(one.propensity)) : null,
    ),
  );
  const legend = taught
    ? "● predicted by the selector, the line its interval; ○ with what rewards have taught."
    : "● predicted by the selector, the line its interval.";
  return el("div", {}, table(head, rows), el("p", { class: "note" }, legend));
}

const brief = (why) =>
  el(
    "p",
    { class: "note" },
    why
      .slice(0, 3)
      .map((one) => `${one.signal} ${signed(one.effect)}`)
      .join(" · "),
  );

// Plans, best first; `chosen` is the id of the one taken.
export function planTable(plans, chosen = null) {
  const reach = reachOf(plans);
  const scale = `Predicted utility, ${utility(reach.from, 2)} to ${utility(reach.to, 2)}`;
  const chances = plans.some((one) => one.propensity !== null && one.propensity !== undefined);
  const head = [["Plan"], [scale, "wide"], ["Utility", "num"], ["sd", "num"]];
  if (chances) head.push(["Chance", "num"]);
  const rows = plans.map((one) =>
    el(
      "tr",
      { class: one.id === chosen ? "chosen" : null },
      el(
        "th",
        { scope: "row", "data-label": "Plan" },
        arm(one.label),
        one.id === chosen ? el("span", { class: "badge good" }, "taken") : null,
        one.why?.length ? brief(one.why) : null,
      ),
      cell(scale, { class: "wide" }, plot(one.label, one, reach)),
      cell("Utility", { class: "num" }, utility(one.utility)),
      cell("sd", { class: "num" }, utility(one.sd)),
      chances ? cell("Chance", { class: "num" }, percent(one.propensity)) : null,
    ),
  );
  const legend =
    "Ranked by utility less a part of its spread. The line: how far the selector's ensemble agrees, not how far it errs.";
  return el("div", {}, table(head, rows), el("p", { class: "note" }, legend));
}

// How near the pair is to what the selector was trained on.
export function novelty({ distance, limit }) {
  if (distance === null || distance === undefined || limit === null || limit === undefined) return null;
  const far = distance > limit;
  const text = `Distance to the training data ${utility(distance, 2)}, limit ${utility(limit, 2)}`;
  return el(
    "p",
    { class: far ? "note bad" : "note" },
    far ? `${text}: unlike what the selector was trained on.` : `${text}.`,
  );
}
