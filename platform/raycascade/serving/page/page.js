/** The page: asks the server and hands what it says to the parts that show it. */

import { Comparison } from "./compare.js";
import { Endpoint, Problem, withFields } from "./endpoint.js";
import { Funnel } from "./funnel.js";
import { showDetails, showExplanation, wayOf } from "./item.js";
import { byId, count, items, make, ms, share } from "./make.js";
import { plan, read } from "./reading.js";
import { Survivors } from "./survivors.js";

const MOST_EARLIER = 10;
const EXPLAIN_MS = 20000; // an explanation looks at the whole catalogue
const SOURCES = { store: "known user", request: "history from the request", unknown: "unknown user",
  unavailable: "the user store did not answer" };

const endpoint = new Endpoint();
const earlier = []; // {name, reading}, the newest last
const now = { endpoint, model: null, reading: null, body: "", name: "" };
const asked = { ask: 0, find: 0, details: 0 }; // how often; a reply that is not to the newest question is dropped

const funnel = new Funnel(byId("funnel"), "Funnel of the request");
const survivors = new Survivors({ explain: id => choose(id), point: row => point(row) });
const comparison = new Comparison({ now: () => now, ask: askThere, earlier });

/** Runs what a form asks for; a problem is shown beside it. */
async function attempt(place, form, work) {
  const button = form?.querySelector("button[type=submit]");
  byId(place).textContent = "";
  button?.setAttribute("aria-busy", "true");
  try {
    await work();
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    byId(place).textContent = error.line;
  } finally {
    button?.removeAttribute("aria-busy");
  }
}

// ---- what is served
async function about() {
  try {
    now.model = await endpoint.ask("v1/model");
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    byId("about").textContent = error.line;
    byId("about").classList.add("error");
    return;
  }
  const { model, version, stages } = now.model;
  byId("about").classList.remove("error");
  byId("about").replaceChildren(make("strong", {}, model),
    ` ${version} · ${items(now.model.items)} · ${stages.map(stage => stage.name).join(" → ")}`);
  if (!now.reading) funnel.show(plan(now.model));
}

// ---- the request
const form = () => byId("ask").elements.by.value;

/** The request as text, without what the page adds. */
function body() {
  if (form() === "json") return byId("body").value;
  const user = byId("user").value.trim(), k = byId("k").value.trim();
  if (!user) throw new Problem("User id", "give the id of a user; one that nobody knows is served as well");
  if (k && !/^[1-9]\d{0,8}$/.test(k)) throw new Problem("Items", `${k} is no whole number above 0`);
  // Ids go as text: the server reads them in the type of the training log, and none is too long for a number.
  return JSON.stringify({ user_id: user, ...(k ? { k: Number(k) } : {}) });
}

async function askThere(server, model, text) {
  const began = performance.now();
  const answer = await server.ask("v1/recommend", withFields(text, { trace: true }));
  const tripMs = performance.now() - began;
  const name = `user ${answer.user_id}, ${answer.model} ${answer.version}`
    + (server.base === endpoint.base ? "" : ` at ${server.base}`);
  const described = model?.version === answer.version ? model : await server.ask("v1/model"); // swapped meanwhile
  return { name, reading: read(answer, described), tripMs, model: described };
}

async function ask() {
  const turn = ++asked.ask, text = body();
  const found = await askThere(endpoint, now.model, text);
  if (turn !== asked.ask) return;
  if (now.reading) earlier.push({ name: `${now.at}, ${now.name}`, reading: now.reading });
  earlier.splice(0, earlier.length - MOST_EARLIER);
  const swapped = now.model && found.model !== now.model;
  Object.assign(now, found, { body: text, at: new Date().toLocaleTimeString() });
  if (swapped) await about();
  byId("explained").hidden = true;
  byId("verdict").textContent = "";
  showAnswer(found);
  remember();
  comparison.offer();
  if (byId("answer").getBoundingClientRect().top > innerHeight / 2) byId("answer").scrollIntoView();
}

function showAnswer({ reading, tripMs }) {
  const { answer, stages } = reading;
  funnel.show(reading);
  const left = stages.filter(stage => stage.left);
  byId("said").textContent = `User ${answer.user_id}: ${items(answer.items.length)}`
    + (reading.came === null ? "" : ` of ${count(reading.came)}`)
    + (left.length ? `. Degraded: ${left.map(stage => stage.name).join(", ")} left out (${left[0].left}).` : ".");
  byId("said").classList.toggle("warning", left.length > 0);
  const other = Object.entries(answer.timings_ms ?? {}).filter(([name]) => !stages.some(stage => stage.name === name));
  byId("facts").replaceChildren(...[
    SOURCES[answer.user_source], ...other.map(([name, value]) => `${name} ${ms(value)}`), `round trip ${ms(tripMs)}`,
    `request ${answer.request_id}`,
  ].map(fact => make("li", {}, fact)));
  byId("stages").tBodies[0].replaceChildren(...stages.map(stageLine));
  byId("stages").hidden = false;
  byId("raw").hidden = false;
  showRaw();
  survivors.show(reading);
}

/** As JSON, once somebody wants to see it: it can be long. */
function showRaw() {
  byId("raw").querySelector("pre").textContent = byId("raw").open ? JSON.stringify(now.reading.answer, null, 1) : "";
}

function stageLine({ name, model, saw, kept, ms: taken, left }) {
  const part = saw && !left ? make("span", { class: "note" }, ` ${share(kept, saw)}`) : null;
  return make("tr", { class: left ? "left" : null }, make("th", { scope: "row" }, name, make("span", { class: "note" },
    ` ${model}`)), make("td", {}, saw === null ? "–" : count(saw)),
    make("td", {}, left ? `left out: ${left}` : count(kept), part), make("td", {}, ms(taken)));
}

// ---- one item
let back = null; // where Escape leads from an explanation

/** From the table: the same as typing the id, and on to what it says. */
async function choose(id) {
  byId("item").value = id;
  const opener = document.activeElement;
  await find();
  if (byId("explained").hidden) return byId("item").focus();
  back = opener;
  byId("verdict").focus();
}

const find = () => attempt("find-error", byId("find"), async () => {
  const id = byId("item").value.trim(), turn = ++asked.find;
  if (!id) throw new Problem("Item id", "give the id of an item of the catalogue");
  if (!now.reading) await ask();
  const found = await endpoint.ask("v1/explain", withFields(now.body, { item_id: id, deadline_ms: EXPLAIN_MS }));
  if (turn !== asked.find) return;
  showExplanation(found, now.reading);
  funnel.mark(wayOf(found), `Item ${id}`);
  remember(id);
  await attempt("details-error", null, async () => {
    showDetails(await endpoint.ask(`v1/items/${encodeURIComponent(id)}`));
  });
});

/** The way of a row of the table under the pointer or the focus. */
function point(row) {
  const path = row?.places.map(place => place && { rank: place.rank, state: "kept" });
  funnel.mark(path, row ? `Item ${row.id}` : "");
}

// ---- links
/** The address leads a colleague to the same view. What stands behind # is not sent to any server. */
function remember(item = "") {
  const parts = form() === "json" ? { request: byId("body").value } : { user: byId("user").value.trim(),
    ...(byId("k").value.trim() ? { k: byId("k").value.trim() } : {}) };
  history.replaceState(null, "", `#${new URLSearchParams({ ...parts, ...(item ? { item } : {}) })}`);
}

async function recall() {
  const parts = new URLSearchParams(location.hash.slice(1));
  const given = name => parts.get(name) ?? "";
  if (!parts.has("user") && !parts.has("request")) return;
  byId("ask").elements.by.value = parts.has("request") ? "json" : "user";
  [byId("body").value, byId("user").value, byId("k").value, byId("item").value] =
    [given("request"), given("user"), given("k"), given("item")];
  chooseForm({ fresh: false });
  await attempt("ask-error", byId("ask"), ask);
  if (given("item") && now.reading) await find();
}

// ---- events
function chooseForm({ fresh }) {
  const json = form() === "json";
  byId("by-user").hidden = json;
  byId("by-json").hidden = !json;
  if (json && fresh && !byId("body").value.trim()) {
    byId("body").value = JSON.stringify({ user_id: byId("user").value.trim() || 100 }, null, 2);
  }
}

byId("key").value = endpoint.key;
byId("key").addEventListener("change", () => {
  endpoint.key = byId("key").value.trim();
  about();
});
byId("ask").addEventListener("change", event => event.target.name === "by" && chooseForm({ fresh: true }));
byId("ask").addEventListener("submit", event => {
  event.preventDefault();
  attempt("ask-error", byId("ask"), ask);
});
byId("find").addEventListener("submit", event => {
  event.preventDefault();
  find();
});
byId("one").addEventListener("keydown", event => event.key === "Escape" && back?.focus());
byId("raw").addEventListener("toggle", showRaw);
window.addEventListener("hashchange", recall);

// What can be scrolled can be scrolled with the keyboard; what cannot is no stop on its way.
const widths = new ResizeObserver(seen => seen.forEach(({ target }) => {
  const box = target.closest(".scroll");
  const wide = box.scrollWidth > box.clientWidth;
  const named = { tabindex: 0, role: "group", "aria-label": box.querySelector("caption").textContent };
  for (const [name, value] of Object.entries(named)) {
    if (wide) box.setAttribute(name, value);
    else box.removeAttribute(name);
  }
}));
document.querySelectorAll(".scroll, .scroll > table").forEach(one => widths.observe(one));

await about();
await recall();
