// Counts, the curve of rewards, and the posterior of each arm.

import { $, arm, cell, count, el, interval, signed, significant, utility } from "./dom.js";
import { get } from "./api.js";

const POINTS = 300;
const TABLE_ROWS = 20;

export function showPolicy(policy) {
  for (const [id, value] of Object.entries({
    namespace: policy.namespace,
    model: policy.model_version ?? "none",
    epoch: policy.epoch,
    seq: count(policy.seq),
    "num-decisions": count(policy.num_decisions),
    "num-rewards": count(policy.num_rewards),
    "num-open": count(policy.num_open),
    "num-closed": count(policy.num_closed),
  }))
    $(id).textContent = value;
  $("alarm").hidden = !policy.alarm?.linear;
  showGain(policy.regret);
  showPosteriors(policy);
}

function showGain(regret) {
  $("gain").textContent = regret && regret.gain !== null ? signed(regret.gain) : "–";
  if (!regret || regret.gain === null) {
    $("gain-note").textContent = "not enough rewards of decisions that explored";
    return;
  }
  const [low, high] = regret.interval ?? [null, null];
  const range = low === null ? "" : `95 %: ${signed(low)} to ${signed(high)}, `;
  $("gain-note").textContent = `${range}over ${count(regret.num)} rewards`;
}

function showPosteriors({ arms, safe, floor, noise_sd }) {
  const known = arms.filter((one) => one.mean !== null && one.sd !== null);
  const reach = Math.max(0.05, ...known.map((one) => Math.abs(one.mean) + 1.96 * one.sd));
  const rows = arms.map((one) => {
    const [low, high] = [one.mean - 1.96 * one.sd, one.mean + 1.96 * one.sd];
    const label = `${one.arm}: ${signed(one.mean)}, 95 % from ${signed(low)} to ${signed(high)}`;
    const plot = known.includes(one)
      ? interval({ low, mid: one.mean, high, from: -reach, to: reach, marks: [0], label })
      : null;
    const fixed = safe?.fixed === one.arm ? el("span", { class: "badge" }, "best fixed") : null;
    return el(
      "tr",
      {},
      el("th", { scope: "row", "data-label": "Arm" }, arm(one.arm), fixed),
      cell("Contrast, 95 %", { class: "wide" }, plot),
      cell("Mean", { class: "num" }, signed(one.mean)),
      cell("sd", { class: "num" }, utility(one.sd)),
      cell("Seen", { class: "num" }, count(one.count)),
      cell("Weight", { class: "num" }, one.weight.toFixed(1)),
    );
  });
  $("posterior").tBodies[0].replaceChildren(...rows);
  const parts = [];
  if (safe) {
    const leaves = safe.threshold === null || !Number.isFinite(safe.threshold);
    parts.push(
      leaves
        ? `${safe.fixed} is left only to explore: leaving it has not paid.`
        : `${safe.fixed} is left where a draw exceeds its own by ${significant(safe.threshold)}.`,
    );
  }
  if (floor) parts.push(`Every arm is played with a probability of at least ${utility(floor)}.`);
  if (noise_sd) parts.push(`Noise of one reward: sd ${utility(noise_sd)}.`);
  $("safe").textContent = parts.join(" ");
}

// Where neither is better.
const zeroLine = (colour) => (plot) => {
  const { left, top, width, height } = plot.bbox;
  const y = Math.round(plot.valToPos(0, "y", true)) + 0.5;
  if (y < top || y > top + height) return;
  const { ctx } = plot;
  ctx.save();
  ctx.strokeStyle = colour;
  ctx.lineWidth = devicePixelRatio;
  ctx.setLineDash([3 * devicePixelRatio, 3 * devicePixelRatio]);
  ctx.beginPath();
  ctx.moveTo(left, y);
  ctx.lineTo(left + width, y);
  ctx.stroke();
  ctx.restore();
};

export class Curve {
  #plot = null;
  #curve = null;
  #seq = null;
  #scheme = matchMedia("(prefers-color-scheme: dark)");

  constructor() {
    this.#scheme.addEventListener("change", () => this.#draw());
    $("curve-kind").addEventListener("change", () => this.#draw());
    $("curve-table").addEventListener("toggle", () => this.#tabulate());
    new ResizeObserver(() => this.#fit()).observe($("curve"));
  }

  async refresh(seq) {
    if (seq === this.#seq) return;
    const curve = await get("v1/rewards/curve", { points: POINTS });
    const before = this.#curve;
    [this.#curve, this.#seq] = [curve, seq];
    const same =
      before && before.num === curve.num && JSON.stringify(before.seq) === JSON.stringify(curve.seq);
    if (!same) this.#draw();
  }

  #series() {
    const { seq, reward, best_fixed: fixed } = this.#curve;
    if ($("curve-kind").querySelector(":checked").value === "both")
      return { names: ["rewards", "best fixed, estimated"], data: [seq, reward, fixed] };
    const gain = reward.map((value, at) => (fixed[at] === null ? null : value - fixed[at]));
    return { names: ["rewards less best fixed"], data: [seq, gain] };
  }

  #draw() {
    this.#plot?.destroy();
    this.#plot = null;
    const empty = !this.#curve || this.#curve.seq.length === 0;
    $("curve-empty").hidden = !empty;
    $("curve").hidden = empty;
    $("curve-table").hidden = empty;
    if (empty) return;
    const { names, data } = this.#series();
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim();
    const font = '12px system-ui, "Segoe UI", Roboto, Arial, sans-serif';
    const axis = {
      stroke: colour("--dim"),
      grid: { stroke: colour("--grid"), width: 1 },
      ticks: { show: false },
      font,
    };
    const lines = names.map((label, at) => ({
      label,
      stroke: colour(at === 0 ? "--accent" : "--second"),
      width: 2,
      dash: at === 0 ? undefined : [6, 4],
      points: { show: data[0].length < 3 },
      value: (_, value) => (value === null ? "–" : names.length === 1 ? signed(value, 2) : utility(value, 2)),
    }));
    const options = {
      ...this.#size(),
      cursor: { drag: { x: false, y: false } },
      scales: { x: { time: false } },
      axes: [axis, { ...axis, size: 52 }],
      hooks: { drawAxes: [zeroLine(colour("--dim"))] },
      series: [{ label: "event", value: (_, value) => (value === null ? "–" : count(value)) }, ...lines],
    };
    this.#plot = new uPlot(options, data, $("curve"));
    const last = data.slice(1).map((values, at) => `${names[at]} ${utility(values.at(-1), 2)}`);
    const canvas = $("curve").querySelector("canvas");
    canvas.setAttribute("role", "img");
    canvas.setAttribute(
      "aria-label",
      `Curve over ${count(this.#curve.num)} rewards; at its end ${last.join(", ")}`,
    );
    this.#tabulate();
  }

  #size() {
    const width = $("curve").clientWidth || 320;
    return { width, height: width < 420 ? 210 : 260 };
  }

  #fit() {
    if (this.#plot && this.#plot.width !== $("curve").clientWidth) this.#plot.setSize(this.#size());
  }

  #tabulate() {
    const [details, curve] = [$("curve-table"), this.#curve];
    if (!details.open || !curve) return;
    const step = Math.max(1, Math.ceil((curve.seq.length - 1) / (TABLE_ROWS - 1)));
    const shown = curve.seq.map((_, at) => at).filter((at) => at % step === 0 || at === curve.seq.length - 1);
    const head = ["Event", "Rewards", "Best fixed, estimated", "Difference"];
    const difference = (at) =>
      curve.best_fixed[at] === null ? null : curve.reward[at] - curve.best_fixed[at];
    const rows = shown.map((at) =>
      el(
        "tr",
        {},
        el("th", { scope: "row", class: "num" }, count(curve.seq[at])),
        el("td", { class: "num" }, utility(curve.reward[at], 2)),
        el("td", { class: "num" }, utility(curve.best_fixed[at], 2)),
        el("td", { class: "num" }, signed(difference(at), 2)),
      ),
    );
    const table = el(
      "table",
      {},
      el("thead", {}, el("tr", {}, ...head.map((name) => el("th", { scope: "col", class: "num" }, name)))),
      el("tbody", {}, ...rows),
    );
    details.querySelector(".scroll").replaceChildren(table);
  }
}
