// The list of decisions, live and in pages, and one decision with what can be done about it.

import { $, announce, arm, cell, el, short, time, toDate, utility } from "./dom.js";
import { get, Once, words } from "./api.js";
import { armTable, isKept, novelty, planTable } from "./ranking.js";

const LIMIT = 20;
const STATUS = { open: "open", rewarded: "rewarded", closed: "closed", expired: "expired" };
const STYLE = { open: "badge open", rewarded: "badge good", closed: "badge", expired: "badge" };
const EVENTS = {
  decision: "decided",
  reward: "rewarded",
  reward_voided: "reward taken back",
  decision_closed: "closed",
};

export class Decisions {
  #open;
  #befores = [null]; // of the pages up to this one
  #next = null;
  #seq = null;
  #rows = new Map();

  // open: shows a decision, a function of its id.
  constructor(open) {
    this.#open = open;
    $("older").addEventListener("click", () => this.#turn([...this.#befores, this.#next]));
    $("newer").addEventListener("click", () => this.#turn(this.#befores.slice(0, -1)));
    $("newest").addEventListener("click", () => this.#turn([null]));
    $("lookup").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#open($("lookup-id").value.trim());
    });
  }

  // The present page, if something has happened since it was asked for.
  async refresh(seq) {
    if (seq === this.#seq) return;
    await this.#load();
    this.#seq = seq;
  }

  async #turn(befores) {
    const had = this.#befores;
    this.#befores = befores;
    try {
      await this.#load();
      announce(befores.length > 1 ? `Page ${befores.length} of decisions` : "The newest decisions");
    } catch (error) {
      this.#befores = had;
      $("decisions-note").textContent = words(error, true);
    }
  }

  async #load() {
    const before = this.#befores.at(-1);
    const answer = await get("v1/decisions", { limit: LIMIT, before });
    if (before !== this.#befores.at(-1)) return; // the page was turned meanwhile
    this.#next = answer.next_before;
    this.#show(answer.decisions);
    const page = this.#befores.length;
    $("newest").disabled = $("newer").disabled = page === 1;
    $("older").disabled = this.#next === null;
    $("decisions-note").textContent =
      page === 1 ? "newest first, live" : `page ${page}: older ones, newest first`;
    $("decisions-empty").hidden = answer.decisions.length > 0;
    $("decisions-table").hidden = answer.decisions.length === 0;
  }

  #show(decisions) {
    const first = this.#rows.size === 0 || this.#befores.length > 1;
    const focused = document.activeElement?.dataset?.decision;
    const rows = new Map();
    for (const one of decisions) {
      const what = JSON.stringify(one);
      const had = this.#rows.get(one.decision_id);
      rows.set(one.decision_id, had?.what === what ? had : { what, row: this.#row(one, !first) });
    }
    this.#rows = rows;
    const all = [...rows.values()].map(({ row }) => row);
    $("decisions-table").tBodies[0].replaceChildren(...all);
    // Rows that are put in again lose the focus of the keyboard.
    if (focused) rows.get(focused)?.row.querySelector("button").focus({ preventScroll: true });
  }

  #row(one, isNew) {
    const id = one.decision_id;
    const opener = el(
      "button",
      {
        type: "button",
        class: "link",
        "data-decision": id,
        onclick: () => this.#open(id),
      },
      el("span", { class: "hidden" }, "Open decision "),
      short(id),
    );
    const pair = one.kind === "plan" && !one.right ? (one.left ?? "several") : `${one.left} + ${one.right}`;
    return el(
      "tr",
      { class: isNew ? "new" : null },
      el("th", { scope: "row", "data-label": "Decision", title: id }, opener),
      cell("When", {}, time(one.at)),
      cell("Checkpoints", { class: "names" }, pair),
      cell("Task", { class: "names" }, (one.tasks ?? []).join(", ") || "–"),
      cell("Arm", {}, arm(one.arm), one.explored ? null : el("span", { class: "badge" }, "not drawn")),
      cell(
        "Status",
        {},
        el("span", { class: STYLE[one.status] ?? "badge" }, STATUS[one.status] ?? one.status),
      ),
      cell("Reward", { class: "num" }, utility(one.utility)),
    );
  }
}

export class Detail {
  #roles;
  #changed;
  #once = new Once();
  #dialog = $("detail");
  #id = null;

  // changed: what to do after a reward, a close or a void.
  constructor(roles, changed) {
    this.#roles = roles;
    this.#changed = changed;
    this.#dialog.addEventListener("click", (event) => event.target === this.#dialog && this.#dialog.close());
  }

  async open(id) {
    this.#id = id;
    this.#fill([el("p", { class: "empty" }, "…")]);
    if (!this.#dialog.open) this.#dialog.showModal();
    await this.#load();
  }

  async #load(done = null) {
    const id = this.#id;
    try {
      const answer = await get(`v1/decisions/${encodeURIComponent(id)}`);
      if (id === this.#id) this.#fill(this.#contents(answer, done));
    } catch (error) {
      if (id === this.#id) this.#fill([el("p", { class: "notice bad", role: "alert" }, words(error, true))]);
    }
    if (!this.#dialog.contains(document.activeElement)) this.#dialog.querySelector("button").focus();
  }

  #fill(contents) {
    const title = el("h2", { id: "detail-title" }, "Decision ", el("code", {}, this.#id));
    const close = el(
      "button",
      { type: "button", class: "plain", onclick: () => this.#dialog.close() },
      "Close window",
    );
    this.#dialog.replaceChildren(
      el("div", { class: "inside" }, el("div", { class: "head" }, title, close), ...contents),
    );
  }

  #contents({ decision, status, utility: reward, closed_reason: closed, events }, done) {
    const what = decision.plan ? decision.plan.label : decision.arm;
    const list = (facts) => {
      const known = facts.filter(([, value]) => value !== null && value !== undefined && value !== "");
      return el(
        "dl",
        { class: "facts" },
        ...known.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]),
      );
    };
    const first = [
      [
        "Status",
        el("span", { class: STYLE[status] ?? "badge", id: "detail-status" }, STATUS[status] ?? status),
      ],
      isKept(decision) ? ["Keep", arm(decision.plan.plan.source)] : ["Make", arm(what)],
      ["Reward", reward === null || reward === undefined ? null : utility(reward, 4)],
      ["Closed because", closed],
      ["Checkpoints", decision.kind === "plan" ? null : `${decision.left} + ${decision.right}`],
      ["Tasks", (decision.tasks ?? []).join(", ")],
      ["Why", decision.reason],
    ];
    const more = [
      ["Drawn", decision.explored ? "yes, by the chances above" : "no: what is expected to be best"],
      ["Best fixed arm", decision.best_fixed],
      [
        "Selector",
        `${decision.model_version ?? "–"}, epoch ${decision.epoch}, knew events up to ${decision.seq_seen}`,
      ],
      ["Reward expected until", decision.expires_at ? time(decision.expires_at) : "no limit"],
    ];
    return [
      done ? el("p", { class: "notice good", role: "status" }, done) : null,
      list(first),
      ...this.#actions(status, decision),
      el("h3", {}, decision.plans?.length ? "Plans it was drawn from" : "Arms"),
      decision.plans?.length
        ? planTable(decision.plans, decision.plan?.id)
        : armTable(decision, decision.arm),
      novelty(decision),
      decision.plan
        ? el(
            "details",
            {},
            el("summary", {}, "The plan, as simmerge merge reads it"),
            el("pre", { tabindex: 0 }, JSON.stringify(decision.plan.plan ?? {}, null, 2)),
          )
        : null,
      el("h3", {}, "How it came about"),
      list(more),
      el(
        "ol",
        { class: "events" },
        ...events.map((one) =>
          el(
            "li",
            {},
            time(one.at),
            ` ${EVENTS[one.kind] ?? one.kind} `,
            el("span", { class: "dim" }, `event ${one.seq}`),
          ),
        ),
      ),
    ].filter((one) => one !== null);
  }

  // What may still be done: forms for the roles that this token has.
  #actions(status, decision) {
    const path = `v1/decisions/${encodeURIComponent(decision.decision_id)}`;
    if (status === "open" && this.#roles.has("reward")) {
      const value = el("input", {
        id: "reward-value",
        type: "number",
        min: 0,
        max: 1,
        step: "any",
        required: true,
        inputmode: "decimal",
        "aria-describedby": "reward-help",
      });
      const reward = this.#form(
        "reward",
        "Record the reward",
        [
          el("label", { for: "reward-value" }, "Measured utility"),
          value,
          el("p", { class: "note", id: "reward-help" }, "Between 0 and 1, of the merge that was decided on."),
        ],
        () => [`${path}/reward`, { utility: value.valueAsNumber }, `The reward ${value.value} is recorded.`],
      );
      const why = el("input", {
        id: "close-reason",
        type: "text",
        required: true,
        maxlength: 500,
        placeholder: "infeasible: …",
        autocomplete: "off",
      });
      const close = this.#form(
        "close",
        "Close without a reward",
        [el("label", { for: "close-reason" }, "Or there will be none, because"), why],
        () => [`${path}/close`, { reason: why.value.trim() }, "The decision is closed."],
        "second",
      );
      return [el("div", { class: "actions" }, reward, close)];
    }
    if (status === "rewarded" && this.#roles.has("admin")) {
      const why = el("input", {
        id: "void-reason",
        type: "text",
        required: true,
        maxlength: 500,
        autocomplete: "off",
      });
      const take = this.#form(
        "void",
        "Take the reward back",
        [el("label", { for: "void-reason" }, "The reward is wrong, because"), why],
        () => [
          `${path}/void`,
          { reason: why.value.trim() },
          "The reward is taken back; another one may follow.",
        ],
        "second",
      );
      return [el("div", { class: "actions" }, take)];
    }
    const words = {
      open: "It waits for a reward. Your token may not give one: it has not the role “reward”.",
      rewarded: "To correct a reward, an admin takes it back first.",
      expired: `Its time was over ${decision.expires_at ? toDate(decision.expires_at).toLocaleString() : ""}: a first reward is refused now.`,
      closed: "It is closed: a reward is refused now.",
    };
    return [el("p", { class: "note" }, words[status] ?? "")];
  }

  #form(name, label, fields, request, style = null) {
    const trouble = el("p", { class: "notice bad", role: "alert", hidden: true });
    const button = el("button", { type: "submit", class: style }, label);
    const submit = async (event) => {
      event.preventDefault();
      const [path, payload, done] = request();
      button.disabled = true;
      trouble.hidden = true;
      try {
        await this.#once.post(path, payload);
        await this.#load(done);
        announce(done);
        await this.#changed();
      } catch (error) {
        trouble.textContent = words(error);
        trouble.hidden = false;
      } finally {
        button.disabled = false;
      }
    };
    return el("form", { class: "action", "data-action": name, onsubmit: submit }, ...fields, button, trouble);
  }
}
