// Pick checkpoints and a task; see what is predicted; decide.

import { $, announce, arm, el } from "./dom.js";
import { Once, post, words } from "./api.js";
import { armTable, bestFirst, influences, isKept, novelty, planTable } from "./ranking.js";

const TOP = 10;

export class Choose {
  #roles;
  #decided;
  #once = new Once();
  #turn = 0;
  #timer = null;

  // decided: what to do after a decision, a function of its id; called as (id, open) with open true for "show it now".
  constructor(roles, decided) {
    this.#roles = roles;
    this.#decided = decided;
    const may = roles.has("decide");
    $("asking").hidden = !may;
    $("no-decide").hidden = may;
    $("ask").addEventListener("submit", (event) => {
      event.preventDefault();
      this.rank();
    });
    $("ask").addEventListener("change", (event) => this.#changed(event.target));
    $("swap").addEventListener("click", () => this.take($("right").value, $("left").value));
    $("find").addEventListener("input", () => this.#find());
    $("decide").addEventListener("click", () => this.#decide());
    this.#count();
  }

  // Put a pair into the form and rank its arms.
  take(left, right) {
    $("ask").elements.form.value = "pair";
    this.#show();
    $("left").value = left;
    $("right").value = right;
    this.#soon();
  }

  #isPair() {
    return $("ask").elements.form.value === "pair";
  }

  #show() {
    $("ask-pair").hidden = !this.#isPair();
    $("ask-plan").hidden = this.#isPair();
  }

  #changed(field) {
    if (field.id === "explore" || field.id === "find") return;
    this.#show();
    this.#count();
    this.#soon();
  }

  #picked() {
    return [...$("picks").querySelectorAll("input:checked")].map((box) => box.value);
  }

  #count() {
    const { length } = this.#picked();
    $("picked").textContent = length ? `${length} picked` : "none picked: all of them";
  }

  #find() {
    const part = $("find").value.trim().toLowerCase();
    for (const label of $("picks").querySelectorAll("label"))
      label.hidden = !label.textContent.toLowerCase().includes(part) && !label.querySelector("input").checked;
  }

  #soon() {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.rank(), 250);
  }

  #task() {
    return $("task").value || null;
  }

  #payload() {
    if (this.#isPair()) return { left: $("left").value, right: $("right").value, task: this.#task() };
    const picked = this.#picked();
    const all = [...$("picks").querySelectorAll("input")].map((box) => box.value);
    return { checkpoints: picked.length ? picked : all, task: this.#task(), ways: $("ways").value };
  }

  // What stands against asking, in words, or nothing.
  #objection() {
    if (this.#isPair() && $("left").value === $("right").value) return "Pick two different checkpoints.";
    if (!this.#isPair() && this.#payload().checkpoints.length < 2) return "Pick at least two checkpoints.";
    return null;
  }

  #say(text, bad = true) {
    $("answer").replaceChildren(
      el("p", { class: bad ? "notice bad" : "empty", role: bad ? "alert" : null }, text),
    );
  }

  // Nothing was decided: what was shown before stays.
  #refused(text) {
    $("answer").querySelector(":scope > .notice")?.remove();
    $("answer").prepend(el("p", { class: "notice bad", role: "alert" }, text));
  }

  async rank() {
    if (!this.#roles.has("decide")) return;
    clearTimeout(this.#timer);
    const turn = (this.#turn += 1);
    const objection = this.#objection();
    if (objection) return this.#say(objection, false);
    const waiting = setTimeout(() => $("answer").classList.add("waiting"), 200);
    try {
      const payload = this.#payload();
      const pair = this.#isPair();
      const { body } = await post(pair ? "v1/rank" : "v1/plans", pair ? payload : { ...payload, top: TOP });
      if (turn === this.#turn) pair ? this.#showPair(body) : this.#showPlans(body);
    } catch (error) {
      if (turn === this.#turn) this.#say(words(error, true));
    } finally {
      clearTimeout(waiting);
      if (turn === this.#turn) $("answer").classList.remove("waiting");
    }
  }

  #showPair(answer) {
    const best = bestFirst(answer.arms)[0];
    const title = [arm(best.arm), " is predicted to be best"];
    if (best.arm !== answer.arm) title.push("; the safe choice is ", arm(answer.arm));
    $("answer").replaceChildren(
      el("h3", {}, ...title),
      el("p", { class: "dim" }, `${answer.left} + ${answer.right}, for ${answer.tasks.join(", ")}`),
      because(answer),
      armTable(answer, answer.arm, "safe choice"),
      novelty(answer) ?? "",
      ...why(answer.why),
    );
    announce(`${best.arm} is predicted to be best`);
  }

  #showPlans({ plans, num_considered: num, exhaustive }) {
    if (!plans.length) return this.#say("There is no plan of that size for these checkpoints.", false);
    const searched = exhaustive ? `all ${num} plans` : `${num} plans, by search: not all there are`;
    $("answer").replaceChildren(
      el("h3", {}, arm(plans[0].label), " is ranked first"),
      el("p", { class: "dim" }, `The first ${plans.length} of ${searched}.`),
      planTable(plans),
    );
    announce(`${plans.length} plans; ${plans[0].label} is ranked first`);
  }

  async #decide() {
    const objection = this.#objection();
    if (objection) return this.#say(objection, false);
    clearTimeout(this.#timer);
    this.#turn += 1; // a ranking that is still under way must not cover the decision
    $("decide").disabled = true;
    try {
      const { body } = await this.#once.post("v1/decisions", {
        ...this.#payload(),
        explore: $("explore").checked,
      });
      this.#showDecision(body);
      await this.#decided(body.decision_id, false);
    } catch (error) {
      this.#refused(words(error));
    } finally {
      $("decide").disabled = false;
    }
  }

  #showDecision(decision) {
    const what = decision.plan ? decision.plan.label : decision.arm;
    const open = el(
      "button",
      { type: "button", onclick: () => this.#decided(decision.decision_id, true) },
      "Open the decision",
    );
    $("answer").replaceChildren(
      el("p", { class: "notice good" }, `Decided and recorded: ${isKept(decision) ? "" : "make "}`, arm(what)),
      el("p", { class: "dim" }, "Decision ", el("code", { id: "decided" }, decision.decision_id)),
      because(decision),
      el("div", { class: "buttons" }, open),
      decision.plans?.length
        ? planTable(decision.plans, decision.plan?.id)
        : armTable(decision, decision.arm),
      novelty(decision) ?? "",
    );
    announce(`Decision recorded: ${what}`);
    open.focus({ preventScroll: true });
  }
}

const why = (list) =>
  list?.length ? [el("h4", {}, "The signals that move the predictions most"), influences(list)] : [];

const because = ({ reason }) => (reason ? el("p", { class: "because" }, el("b", {}, "Why: "), reason) : "");
