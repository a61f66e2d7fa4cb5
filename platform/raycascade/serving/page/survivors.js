/** The survivors of every stage as a table: rank, change of rank and score side by side. */

import { byId, count, items, make, score, unseen } from "./make.js";
import { lostAt } from "./reading.js";

const AT_ONCE = 100; // rows

/** `explain` is called with the id that was chosen, `point` with a row or null. */
export class Survivors {
  constructor({ explain, point }) {
    this.explain = explain;
    this.point = point;
    this.reading = null;
    byId("filters").addEventListener("submit", event => event.preventDefault());
    byId("text").addEventListener("input", () => this.list(AT_ONCE));
    byId("where").addEventListener("change", () => this.list(AT_ONCE));
    byId("more").addEventListener("click", () => this.more());
  }

  show(reading) {
    const chosen = byId("where").value;
    this.reading = reading;
    this.order = null;
    this.choices = choices(reading);
    byId("where").replaceChildren(...this.choices.map(({ value, label, rows }) =>
      make("option", { value }, `${label} (${count(rows.length)})`)));
    if (this.choices.some(({ value }) => value === chosen)) byId("where").value = chosen;
    this.list(AT_ONCE);
    byId("survivors").hidden = false;
  }

  /** The rows that the filters let through, at most `most` of them. */
  list(most) {
    const words = byId("text").value.trim().toLowerCase();
    const chosen = this.choices.find(({ value }) => value === byId("where").value);
    const found = this.ordered(chosen.rows.filter(row => row.id.toLowerCase().includes(words)));
    this.shown = Math.min(most, found.length);
    byId("ranks").tHead.replaceChildren(this.heading());
    byId("ranks").tBodies[0].replaceChildren(...found.slice(0, most).map(row => this.line(row)));
    byId("count").textContent = found.length === this.reading.rows.length ? items(found.length)
      : `${count(found.length)} of ${items(this.reading.rows.length)}`;
    byId("more").hidden = this.shown === found.length;
    byId("more").textContent = `Show ${count(Math.min(5 * AT_ONCE, found.length - this.shown))} more`;
  }

  more() {
    const next = this.shown;
    this.list(this.shown + 5 * AT_ONCE);
    byId("ranks").tBodies[0].rows[next]?.querySelector("button").focus();
  }

  ordered(rows) {
    if (this.order === null) return rows;
    const rank = row => row.places[this.order]?.rank ?? Infinity;
    return [...rows].sort((a, b) => rank(a) - rank(b) || 0);
  }

  heading() {
    const sorted = at => this.order === at ? "ascending" : null;
    return make("tr", {}, make("th", { scope: "col", "aria-sort": sorted(null), class: "final" },
      make("button", { type: "button", class: "sort", title: "Place in the answer", click: () => this.sort(null) }, "#",
        unseen(" place in the answer"))), make("th", { scope: "col", class: "item" }, "Item"),
      ...this.reading.stages.map((stage, at) => make("th", { scope: "col", "aria-sort": sorted(at) },
        make("button", { type: "button", class: "sort", click: () => this.sort(at) }, stage.name))));
  }

  /** Order by the rank at a stage; null: as the cascade ended. */
  sort(at) {
    this.order = at;
    this.list(this.shown);
    byId("ranks").tHead.querySelectorAll("button")[at === null ? 0 : at + 1].focus();
  }

  line(row) {
    const lost = lostAt(this.reading, row);
    const cells = this.reading.stages.map((stage, at) => {
      if (row.places[at]) return make("td", {}, ...place(row, at));
      if (stage.left) return make("td", { class: "gone" }, "left out");
      return stage.name === lost ? make("td", { class: "lost" }, "lost") : make("td", { class: "gone" },
        make("span", { "aria-hidden": "true" }, "·"), unseen("not seen"));
    });
    const button = make("button", { type: "button", class: "id", click: () => this.explain(row.id),
      focus: () => this.point(row), blur: () => this.point(null) }, row.id);
    return make("tr", { mouseenter: () => this.point(row), mouseleave: () => this.point(null) },
      make("td", { class: "final" }, row.final === null ? unseen("not in the answer") : count(row.final)),
      make("th", { scope: "row", class: "item" }, button), ...cells);
  }
}

/** Rank, change from the stage before, score. */
function place(row, at) {
  const { rank, score: value } = row.places[at];
  return [make("span", { class: "rank" }, unseen("rank "), count(rank)),
    at > 0 && row.places[at - 1] ? moved(row.places[at - 1].rank - rank) : null,
    make("span", { class: "score" }, unseen(", score "), score(value))];
}

/** How many places an item went up or down. */
export function moved(places) {
  const words = places > 0 ? ["up", `▲${count(places)}`]
    : places < 0 ? ["down", `▼${count(-places)}`] : ["same", "="];
  return make("span", { class: `moved ${words[0]}` }, make("span", { "aria-hidden": "true" }, words[1]),
    unseen(places ? `, ${words[0]} ${count(Math.abs(places))}` : ", unchanged"));
}

function choices(reading) {
  const { stages, rows } = reading;
  const ran = stages.filter(stage => !stage.left);
  const at = stage => stages.indexOf(stage);
  return [
    { value: "all", label: "all survivors", rows },
    { value: "answer", label: "in the answer", rows: rows.filter(row => row.final !== null) },
    ...ran.map(stage => ({ value: `kept ${stage.name}`, label: `kept by ${stage.name}`,
      rows: rows.filter(row => row.places[at(stage)]) })),
    ...ran.slice(1).map(stage => ({ value: `lost ${stage.name}`, label: `lost at ${stage.name}`,
      rows: rows.filter(row => lostAt(reading, row) === stage.name) })),
  ];
}
