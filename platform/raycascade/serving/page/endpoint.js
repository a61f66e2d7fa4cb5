/** Calls of the API. */

const PATIENCE_MS = 60000;

/** What went wrong, in words for the reader. */
export class Problem extends Error {
  constructor(title, detail, { status = null, retryAfter = null } = {}) {
    super(detail);
    Object.assign(this, { title, detail, status, retryAfter });
  }

  /** One line. */
  get line() {
    const again = this.retryAfter ? ` Try again in ${this.retryAfter} s.` : "";
    return `${this.title}${this.status ? ` (${this.status})` : ""}: ${this.detail}${again}`;
  }
}

/** One server. Its key lives in the session storage of this tab and goes to this server only. */
export class Endpoint {
  constructor(address = "") {
    const here = new URL(".", document.baseURI);
    let url;
    try {
      url = new URL(address.trim() || ".", here);
    } catch {
      throw new Problem("Endpoint", `${address} is no address; give a path such as /candidate or a whole URL`);
    }
    if (!/^https?:$/.test(url.protocol)) throw new Problem("Endpoint", `${address} is neither http nor https`);
    this.base = `${url.origin}${url.pathname.replace(/\/?$/, "/")}`;
  }

  get key() {
    return sessionStorage.getItem(this.slot) ?? "";
  }

  set key(value) {
    if (value) sessionStorage.setItem(this.slot, value);
    else sessionStorage.removeItem(this.slot);
  }

  get slot() {
    return `raycascade key of ${this.base}`;
  }

  /** The JSON at a path; a body (text) makes it a POST. */
  async ask(path, body = null) {
    const headers = { accept: "application/json" };
    if (this.key) headers.authorization = `Bearer ${this.key}`;
    if (body !== null) headers["content-type"] = "application/json";
    const options = { method: body === null ? "GET" : "POST", headers, body, credentials: "omit", cache: "no-store",
      signal: AbortSignal.timeout(PATIENCE_MS) };
    let reply, text;
    try {
      reply = await fetch(this.base + path, options);
      text = await reply.text();
    } catch (error) {
      const late = error.name === "TimeoutError";
      throw new Problem("No answer", late ? `${this.base} was silent for ${PATIENCE_MS / 1000} s`
        : `${this.base} cannot be reached from here; is it up, and one of page.peers?`);
    }
    return opened(reply, text);
  }
}

function opened(reply, text) {
  let content = null;
  try {
    content = parse(text);
  } catch {
    content = null;
  }
  if (reply.ok && content !== null) return content;
  const title = content?.title ?? reply.statusText ?? "";
  const detail = content?.detail ?? "the reply is not of this API; is the address right?";
  throw new Problem(title || "Failed", String(detail),
    { status: reply.status, retryAfter: reply.headers.get("retry-after") });
}

/** JSON whose whole numbers beyond 2^53, such as ids of 64 bits, stay exact: they become text. */
export function parse(text) {
  return JSON.parse(text, (name, value, context) =>
    Number.isInteger(value) && !Number.isSafeInteger(value) && /^-?\d+$/.test(context?.source ?? "")
      ? context.source : value);
}

/** A request with fields that it does not have yet; the rest stays as it was typed, for the sake of long numbers. */
export function withFields(text, fields) {
  let body;
  try {
    body = JSON.parse(text);
  } catch (error) {
    throw new Problem("Not valid JSON", error.message);
  }
  if (body === null || typeof body !== "object" || Array.isArray(body)) {
    throw new Problem("Not a request", 'give a JSON object such as {"user_id": 100}');
  }
  const more = Object.entries(fields).filter(([name]) => !(name in body));
  if (!more.length) return text;
  const front = more.map(([name, value]) => `${JSON.stringify(name)}: ${JSON.stringify(value)}`).join(", ");
  return `{${front}${Object.keys(body).length ? ", " : ""}${text.trim().slice(1)}`;
}
