/** Two answers side by side: A is the current one. */

import { Endpoint, Problem, parse } from "./endpoint.js";
import { Funnel } from "./funnel.js";
import { byId, count, make, ms, score, share, unseen } from "./make.js";
import { lostAt, read } from "./reading.js";
import { moved } from "./survivors.js";

const MOST_ROWS = 500;

/** `now` gives {endpoint, model, reading, body, name}; `ask(endpoint, model, body)` {reading, name}. */
export class Comparison {
  constructor({ now, ask, earlier }) {
    Object.assign(this, { now, ask, earlier });
    this.funnels = ["a", "b"].map(side => new Funnel(byId(`funnel-${side}`), `Funnel of answer ${side.toUpperCase()}`));
    byId("against").addEventListener("submit", event => this.run(event));
    byId("against").addEventListener("change", event => event.target.name === "with" && this.choose());
    byId("at").addEventListener("change", () => this.moves());
    byId("changed").addEventListener("change", () => this.moves());
  }

  get kind() {
    return byId("against").elements.with.value;
  }

  /** Makes the form fit a new answer; a comparison with the one before would be of no use. */
  offer() {
    this.clear();
    byId("compare").hidden = false;
    byId("other").value = this.now().body;
    const named = this.earlier.map(({ name }, at) => make("option", { value: at }, name)).reverse();
    byId("earlier").replaceChildren(...named);
    const radio = byId("against").querySelector("[value=earlier]");
    radio.disabled = !named.length;
    this.choose();
  }

  clear() {
    byId("against-error").textContent = byId("differs").textContent = "";
    byId("difference").hidden = true;
  }

  choose() {
    for (const part of byId("against").querySelectorAll("[data-with]")) part.hidden = part.dataset.with !== this.kind;
  }

  async run(event) {
    event.preventDefault();
    this.clear();
    try {
      this.show(this.now(), await this.other());
    } catch (error) {
      if (!(error instanceof Problem)) throw error;
      byId("against-error").textContent = error.line;
    }
  }

  /** The other answer: {name, reading}. */
  async other() {
    const { endpoint, model, body } = this.now();
    if (this.kind === "earlier") return this.earlier[Number(byId("earlier").value)];
    if (this.kind === "request") return this.ask(endpoint, model, byId("other").value);
    if (this.kind === "saved") {
      const answer = saved(byId("saved").value);
      return { name: `saved answer, ${answer.model}`, reading: read(answer, model) };
    }
    if (!byId("url").value.trim()) throw new Problem("Endpoint", "give the address of the other server");
    const there = new Endpoint(byId("url").value);
    if (byId("url-key").value) there.key = byId("url-key").value;
    return this.ask(there, await there.ask("v1/model"), body);
  }

  show(a, b) {
    this.pair = [a.reading, b.reading];
    byId("name-a").textContent = `A: ${a.name}`;
    byId("name-b").textContent = `B: ${b.name}`;
    byId("difference").hidden = false;
    this.pair.forEach((reading, side) => this.funnels[side].show(reading));
    this.names = [...new Set(this.pair.flatMap(({ stages }) => stages.map(({ name }) => name)))];
    byId("at").replaceChildren(make("option", { value: "" }, "the answer"),
      ...this.names.map(name => make("option", { value: name }, name)));
    byId("overlap").tBodies[0].replaceChildren(...["", ...this.names].map(name => this.overlap(name)));
    const [left, right] = this.pair.map(reading => ranked(reading, ""));
    const both = [...left.keys()].filter(id => right.has(id)).length;
    byId("differs").textContent = same(left, right) ? "Both answers hold the same items in the same order."
      : `${count(both)} of ${count(left.size)} items of A are in B (${share(both, left.size || 1)}).`;
    this.moves();
  }

  overlap(name) {
    const [left, right] = this.pair.map(reading => ranked(reading, name));
    const both = left && right ? [...left.keys()].filter(id => right.has(id)).length : null;
    const cell = (one, { stages }) => {
      const taken = stages.find(stage => stage.name === name)?.ms;
      const time = make("span", { class: "note" }, taken ? ` in ${ms(taken)}` : "");
      return make("td", {}, one ? count(one.size) : "–", time);
    };
    return make("tr", {}, make("th", { scope: "row" }, name || "the answer"), cell(left, this.pair[0]),
      cell(right, this.pair[1]), make("td", {}, both === null ? "–" : count(both)));
  }

  /** Every item at the chosen stage, with its rank on both sides. */
  moves() {
    const name = byId("at").value;
    const [left, right] = this.pair.map(reading => ranked(reading, name) ?? new Map());
    const ids = [...new Set([...left.keys(), ...right.keys()])];
    const changed = ids.filter(id => left.get(id)?.rank !== right.get(id)?.rank);
    const listed = byId("changed").checked ? changed : ids;
    byId("changes").textContent = `${count(changed.length)} of ${count(ids.length)} differ`
      + (listed.length > MOST_ROWS ? `; the first ${MOST_ROWS} are listed` : "");
    byId("moves").tBodies[0].replaceChildren(...listed.slice(0, MOST_ROWS).map(id => {
      const [a, b] = [left.get(id), right.get(id)];
      const gone = a && b ? null : make("span", { class: "note" }, a ? "only in A" : "only in B");
      return make("tr", {}, make("th", { scope: "row" }, id), this.side(a, 0, id), this.side(b, 1, id),
        make("td", {}, gone ?? moved(a.rank - b.rank)));
    }));
  }

  side(place, at, id) {
    if (place) return make("td", {}, make("span", { class: "rank" }, unseen("rank "), count(place.rank)),
      make("span", { class: "score" }, unseen(", score "), score(place.score)));
    const row = this.pair[at].rows.find(one => one.id === id);
    const lost = row && lostAt(this.pair[at], row);
    return make("td", { class: "gone" }, !row ? "kept by no stage" : lost ? `lost at ${lost}` : "not asked for");
  }
}

function saved(text) {
  try {
    return parse(text);
  } catch (error) {
    throw new Problem("Not valid JSON", error.message);
  }
}

/** Rank and score by item at a stage, or in the answer; null where there is no such stage. */
function ranked({ stages, answer }, name) {
  if (!name) return places(answer.items.map(item => ({ id: String(item.item_id), score: item.score })));
  const stage = stages.find(one => one.name === name);
  return stage && !stage.left ? places(stage.items) : null;
}

const places = list => new Map(list.map(({ id, score: value }, at) => [id, { rank: at + 1, score: value }]));

const same = (left, right) => left.size === right.size
  && [...left].every(([id, { rank }]) => right.get(id)?.rank === rank);
