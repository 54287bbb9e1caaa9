// Asks for news every few seconds, less often where that fails, not at all in a hidden tab; says how old the page is.

import { $, announce, clockTime } from "./dom.js";
import { ApiError } from "./api.js";

const EVERY_MS = 3000;
const LONGEST_MS = 60000;

export class Live {
  #refresh;
  #timer = null;
  #failures = 0;
  #updated = null;
  #state = "waiting";
  #running = false;
  #again = false;

  // refresh: an async function that fetches and shows what is new.
  constructor(refresh) {
    this.#refresh = refresh;
    document.addEventListener("visibilitychange", () => (document.hidden ? this.#stop() : this.now()));
    addEventListener("online", () => this.now());
    setInterval(() => this.#say(), 1000);
  }

  // Ask now, and go on from here. A second call while one is under way asks once more after it.
  async now() {
    this.#stop();
    if (this.#running) {
      this.#again = true;
      return;
    }
    this.#running = true;
    let wait = EVERY_MS;
    try {
      await this.#refresh();
      this.#failures = 0;
      this.#updated = new Date();
      this.#become("live");
    } catch (problem) {
      let error = problem;
      if (!(problem instanceof ApiError)) {
        console.error(problem); // a mistake of this page's own must not pass for silence
        error = new ApiError(null, "this page cannot show what it answers, see the console of the browser");
      }
      this.#failures += 1;
      wait = Math.min(EVERY_MS * 2 ** this.#failures, LONGEST_MS) * (0.8 + 0.4 * Math.random());
      if (error.retryAfter) wait = Math.max(wait, error.retryAfter * 1000);
      this.#become(error.status === 401 ? "out" : error.status === 0 ? "lost" : "trouble", error);
    } finally {
      this.#running = false;
    }
    if (this.#again) {
      this.#again = false;
      return this.now();
    }
    if (this.#state !== "out" && !document.hidden) this.#timer = setTimeout(() => this.now(), wait);
  }

  #stop() {
    clearTimeout(this.#timer);
    this.#timer = null;
  }

  #become(state, error = null) {
    const changed = this.#state !== state;
    this.#state = state;
    $("connection").dataset.state = state;
    const notice = $("trouble");
    if (state === "live") {
      if (!notice.hidden) announce("The connection is back.");
      notice.hidden = true;
    } else {
      const since = this.#updated ? ` What you see is from ${clockTime(this.#updated)}.` : "";
      const text = {
        out: "Your token is not accepted any more: load the page again to log in.",
        lost: `Connection lost: ${error.detail}.${since} The page keeps trying.`,
        trouble: `The service cannot answer now: ${error.detail}.${since} The page keeps trying.`,
      }[state];
      if (changed || notice.textContent !== text) notice.textContent = text; // an alert speaks when it changes
      notice.hidden = false;
    }
    this.#say();
  }

  #say() {
    const text = $("connection-text");
    if (this.#state === "lost") text.textContent = "connection lost";
    else if (this.#state === "trouble") text.textContent = "service in trouble";
    else if (this.#state === "out") text.textContent = "logged out";
    else if (this.#updated) {
      const seconds = Math.round((Date.now() - this.#updated) / 1000);
      text.textContent = seconds < 5 ? "live" : `updated ${seconds} s ago`;
      $("connection").title = `Last updated ${clockTime(this.#updated)}`;
    }
  }
}
