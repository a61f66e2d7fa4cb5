/** One item: where the cascade lost it for the current request, by how much, and what the catalogue knows of it. */

import { byId, count, make, score, signed } from "./make.js";

/** Fills the panel with an explanation (POST /v1/explain). */
export function showExplanation(found, reading) {
  const other = reading.answer.version === found.version ? "" : ` (By version ${found.version}, not the answer's.)`;
  byId("verdict").textContent = verdict(found) + other;
  byId("margins").tBodies[0].replaceChildren(...found.stages.map(fate => line(fate, found, reading)));
  byId("explained").hidden = false;
}

/** In one or two sentences: where, and by how much. */
export function verdict(found) {
  const id = `Item ${found.item_id}`, { stages } = found, lost = lossOf(found);
  if (lost === null) return `${id} is recommended: rank ${count(stages.at(-1).rank)} at ${stages.at(-1).stage}.`;
  if (lost === "excluded") return `${id} is excluded: this user must not get it, so no stage was asked to keep it.`;
  const fate = stages.find(stage => stage.stage === lost);
  const places = fate.rank - fate.keep;
  const ranks = `${id} was lost at ${lost}: rank ${count(fate.rank)}, where ${count(fate.keep)} are kept`;
  const short = fate.cut === undefined ? "" : `, and its score is ${score(fate.cut - fate.score)} below the cut`;
  // An approximate index can miss an item whose score is above the cut.
  if (fate.score > fate.cut) {
    return `${id} was lost at ${lost}: its score is above the cut, but the index did not find it.`;
  }
  return `${ranks}${places > 0 ? `, ${count(places)} too low` : ""}${short}.`;
}

function line(fate, found, reading) {
  const state = stateOf(fate, found);
  const saw = reading.stages.find(stage => stage.name === fate.stage)?.saw ?? null;
  const margin = fate.cut === undefined ? null : fate.score - fate.cut;
  const words = { kept: "kept", lost: "lost here", after: "not reached" };
  return make("tr", { class: state },
    make("th", { scope: "row" }, fate.stage, make("span", { class: "note" }, ` ${words[state]}`)),
    make("td", {}, count(fate.rank), ...[saw === null ? "" : ` of ${count(saw)},`, ` keeps ${count(fate.keep)}`]
      .map(text => make("span", { class: "note" }, text))),
    make("td", {}, score(fate.score)), make("td", {}, score(fate.cut)),
    make("td", { class: "margin" }, margin === null ? "–" : signed(margin)));
}

/** The name of a stage, "excluded", or null: the API leaves out what is null. */
const lossOf = found => found.lost_at ?? null;

function stateOf(fate, found) {
  const { stages } = found, lost = lossOf(found);
  if (lost === "excluded") return "after";
  const end = lost === null ? stages.length : stages.findIndex(stage => stage.stage === lost);
  const at = stages.indexOf(fate);
  return at < end ? "kept" : at === end ? "lost" : "after";
}

/** The way of the item for the picture of the funnel. */
export const wayOf = found => found.stages.map(fate => ({ rank: fate.rank, state: stateOf(fate, found) }));

/** Fills the panel with what is known of the item (GET /v1/items/{id}). */
export function showDetails({ features = {}, counts = {} }) {
  const entry = ([name, value]) => [make("dt", {}, name), make("dd", {}, plain(value))];
  const pairs = [...Object.entries(features), ...Object.entries(counts)].flatMap(entry);
  byId("details").replaceChildren(...pairs);
  byId("details-error").textContent = "";
}

function plain(value) {
  if (value === null) return "–";
  if (Array.isArray(value)) return value.length ? value.map(plain).join(", ") : "none";
  return typeof value === "number" && !Number.isInteger(value) ? String(Number(value.toPrecision(6))) : String(value);
}
