// The JSON API, as any client sees it; the browser adds the cookie.

const TIMEOUT_MS = 20000;

export class ApiError extends Error {
  // status: of HTTP, 0 where there was no answer. detail: what the service said. retryAfter: seconds, or null.
  constructor(status, detail, retryAfter = null) {
    super(detail);
    Object.assign(this, { status, detail, retryAfter });
  }
}

function detailOf(body, status) {
  const detail = body?.detail;
  if (typeof detail === "string") return detail;
  if (Array.isArray(detail)) return detail.map((one) => one.msg ?? String(one)).join("; ");
  return `the service answered with status ${status}`;
}

async function call(path, options = {}) {
  let response;
  try {
    response = await fetch(path, { ...options, signal: AbortSignal.timeout(TIMEOUT_MS), cache: "no-store" });
  } catch (error) {
    const late = error.name === "TimeoutError";
    throw new ApiError(0, late ? "the service did not answer in time" : "the service cannot be reached");
  }
  const body = await response.json().catch(() => null);
  if (!response.ok) {
    const wait = Number.parseFloat(response.headers.get("retry-after"));
    throw new ApiError(response.status, detailOf(body, response.status), Number.isFinite(wait) ? wait : null);
  }
  if (body === null) throw new ApiError(0, "the answer was cut off");
  return { status: response.status, body };
}

export async function get(path, parameters = {}) {
  const given = Object.entries(parameters).filter(([, value]) => value !== null && value !== undefined);
  const query = new URLSearchParams(given).toString();
  return (await call(query ? `${path}?${query}` : path)).body;
}

export const post = (path, payload, key = null) =>
  call(path, {
    method: "POST",
    headers: { "Content-Type": "application/json", ...(key ? { "Idempotency-Key": key } : {}) },
    body: JSON.stringify(payload),
  });

function newKey() {
  // crypto.randomUUID is missing on plain HTTP.
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return `page-${Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("")}`;
}

// Posts that count once: a payload keeps its key until the service has said yes or no, so that pressing the button
// again after a lost connection repeats the request instead of making a second one.
export class Once {
  #keys = new Map();

  async post(path, payload) {
    const what = `${path} ${JSON.stringify(payload)}`;
    if (!this.#keys.has(what)) this.#keys.set(what, newKey());
    try {
      const answer = await post(path, payload, this.#keys.get(what));
      this.#keys.delete(what);
      return answer;
    } catch (error) {
      if (error.status >= 400 && error.status < 500 && error.status !== 429) this.#keys.delete(what);
      throw error;
    }
  }
}

const WORDS = {
  0: (detail) => `No answer: ${detail}. It is not known whether this was recorded; pressing again is safe.`,
  401: () => "Your token is not accepted any more. Log in again.",
  403: (detail) => `Your token may not do this: ${detail}`,
  404: (detail) => `Not found: ${detail}`,
  409: (detail) => `This contradicts what is recorded: ${detail}`,
  410: (detail) => `Too late: ${detail}`,
  413: (detail) => `Too much at once: ${detail}`,
  422: (detail) => `This was not accepted: ${detail}`,
  429: (detail) => `Too many requests: ${detail}`,
  503: (detail) => `The service cannot record this now: ${detail}`,
};

// What went wrong, for a person.
export function words(error, reading = false) {
  if (!(error instanceof ApiError)) throw error;
  if (reading && error.status === 0) return `No answer: ${error.detail}.`;
  const say =
    reading && error.status === 503
      ? (detail) => `The service cannot answer now: ${detail}`
      : WORDS[error.status];
  const text = say ? say(error.detail) : `The service failed (${error.status}): ${error.detail}`;
  return error.retryAfter ? `${text} (try again in ${Math.ceil(error.retryAfter)} s)` : text;
}
