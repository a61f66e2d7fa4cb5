/** An answer of the API as the page shows it. Ids are text here: they are compared and shown, never computed with. */

import { Problem } from "./endpoint.js";

/**
 * {answer, model, came, stages: [{name, model, saw, keep, kept, ms, left, items}], rows: [{id, places, depth, final}]}.
 *
 * `left`: why the stage was left out, null where it ran. `places` has {rank, score} per stage, null where the item is
 * gone; `depth` is how many stages kept it; `final` its rank in the answer, null if it is not there. Rows are in the
 * order in which the cascade ended.
 */
export function read(answer, model) {
  if (!Array.isArray(answer?.trace)) {
    throw new Problem("No trace", 'the answer does not say what the stages kept; ask with "trace": true');
  }
  const known = model?.version === answer.version ? model : null;
  const stages = stagesOf(answer, known);
  const final = new Map(answer.items.map((item, position) => [String(item.item_id), position + 1]));
  return { answer, model: known, came: known?.items ?? null, stages, rows: rowsOf(stages, final), final };
}

function stagesOf(answer, model) {
  const traced = new Map(answer.trace.map(stage => [stage.stage, stage]));
  const planned = model?.stages ?? answer.trace.map(({ stage, keep }) => ({ name: stage, keep, model: "" }));
  let before = model?.items ?? null;
  let late = false;
  return planned.map(({ name, keep, model: kind }) => {
    late ||= answer.degraded && (answer.degraded_at === name || !traced.has(name));
    const left = late ? answer.reason ?? "no answer" : null;
    const ran = traced.get(name);
    const items = (left ? [] : ran.items).map(item => ({ id: String(item.item_id), score: item.score }));
    const kept = left ? Math.min(before ?? keep, keep) : items.length;
    const stage = { name, model: kind, keep, saw: before, kept, left, ms: answer.timings_ms?.[name] ?? null, items };
    before = stage.kept;
    return stage;
  });
}

function rowsOf(stages, final) {
  const rows = new Map();
  stages.forEach(({ items }, at) => items.forEach(({ id, score }, position) => {
    if (!rows.has(id)) rows.set(id, { id, places: stages.map(() => null), depth: 0, final: final.get(id) ?? null });
    const row = rows.get(id);
    row.places[at] = { rank: position + 1, score };
    row.depth = at + 1;
  }));
  for (const [id, rank] of final) {
    if (!rows.has(id)) rows.set(id, { id, places: stages.map(() => null), depth: 0, final: rank });
  }
  const last = row => row.depth ? row.places[row.depth - 1].rank : row.final;
  return [...rows.values()].sort((a, b) => b.depth - a.depth || last(a) - last(b));
}

/** The stages as the model plans them, before anybody has asked. */
export function plan(model) {
  let before = model.items;
  const stages = model.stages.map(({ name, keep, model: kind }) => {
    const kept = Math.min(keep, before);
    const stage = { name, model: kind, keep, saw: before, kept, ms: null, left: null, items: [] };
    before = kept;
    return stage;
  });
  return { model, came: model.items, stages, rows: [], final: new Map() };
}

/** The stage that lost an item of the answer; null: none of those that ran. */
export function lostAt(reading, row) {
  const next = reading.stages[row.depth];
  return next && !next.left ? next.name : null;
}
