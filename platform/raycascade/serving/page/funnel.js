/**
 * The funnel as a picture: stages along it, ranks across it on a logarithmic scale, 1 first. A stage is as wide as what
 * it saw where it begins and as what it kept where it ends; a line through it is an item whose rank changes there.
 */

import { count, draw, items, ms } from "./make.js";

const ROOMY = 150; // pixels along for a stage and its labels; with less, the stages stand below one another
const MOST_LINES = 240;

/** Draws a reading (or a plan) into a box, and again when the width changes. */
export class Funnel {
  constructor(box, title) {
    this.box = box;
    this.title = title;
    this.reading = null;
    this.path = null;
    this.width = 0;
    new ResizeObserver(() => box.clientWidth !== this.width && this.draw()).observe(box);
  }

  show(reading) {
    this.reading = reading;
    this.path = null;
    this.draw();
  }

  /** Marks the way of one item: [{rank, state: "kept" | "lost" | "after"}] per stage, null where it is not known. */
  mark(path, name = "") {
    this.path = path;
    this.name = name;
    this.box.querySelector(".way")?.remove();
    if (path && this.frame) this.box.firstChild.append(way(this.frame, path, name));
  }

  draw() {
    this.width = this.box.clientWidth;
    if (!this.reading || !this.width) return;
    const { stages } = this.reading;
    this.frame = this.width < 56 + ROOMY * stages.length + 70 ? below(this.reading, this.width)
      : beside(this.reading, this.width);
    const { width, height } = this.frame;
    const picture = draw("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img" },
      draw("title", {}, this.title), draw("desc", {}, inWords(this.reading)), ...this.frame.scale(),
      ...stages.flatMap((stage, at) => body(this.frame, this.reading, stage, at)));
    this.box.replaceChildren(picture);
    this.mark(this.path, this.name);
  }
}

/** What the picture shows, for those who do not see it. */
export function inWords({ came, stages }) {
  const parts = stages.map(({ name, saw, kept, ms: taken, left }) => left
    ? `${name} was left out: ${left}` : `${name} ${saw === null ? "" : `saw ${count(saw)} and `}kept ${count(kept)}`
      + (taken === null ? "" : ` in ${ms(taken)}`));
  return `${came === null ? "" : `${items(came)} came in; `}${parts.join("; ")}.`;
}

/** The most items anywhere, which the scale has to hold. */
const widest = ({ came, stages }) => Math.max(10, came ?? 0, ...stages.flatMap(stage => [stage.saw ?? 0, stage.kept]));

/** Place of a rank between 0 (before the first) and 1. */
const logarithmic = most => rank => Math.min(1, Math.log1p(rank) / Math.log1p(most));

function ticks(most) {
  const powers = [];
  for (let rank = 1; rank <= most; rank *= 10) powers.push(rank);
  return powers;
}

const brief = rank => rank >= 1e6 ? `${rank / 1e6}M` : rank >= 1e3 ? `${rank / 1e3}k` : String(rank);

/** Stages beside one another, ranks downwards. */
function beside(reading, width) {
  const most = widest(reading), share = logarithmic(most);
  const left = 42, right = 66, top = 46, deep = 230, height = top + deep + 44;
  const step = (width - left - right) / reading.stages.length;
  const y = rank => top + share(rank) * deep;
  return {
    width, height, corners: true,
    span: at => [left + at * step, left + (at + 1) * step],
    place: (along, rank) => [along, y(rank)],
    scale: () => [
      draw("text", { class: "soft end", x: left - 8, y: top - 8 }, "rank"),
      ...ticks(most).flatMap(rank => [
        draw("path", { class: "grid", d: `M${left} ${y(rank)}H${width - right}` }),
        draw("text", { class: "soft end", x: left - 8, y: y(rank) + 4 }, brief(rank))]),
      reading.came === null ? "" : draw("text", { class: "strong", x: left + 6, y: y(reading.came) + 16 },
        items(reading.came)),
    ],
    labels: (stage, at) => {
      const [from, to] = [left + at * step, left + (at + 1) * step];
      return [
        text(from + 6, 14, "strong", stage.name, step - 12),
        text(from + 6, 30, "soft", stage.left ? `left out: ${stage.left}` : stage.model, step - 12),
        text(to + 6, y(stage.kept) + 15, "strong", count(stage.kept), 60),
        ...latency(stage, reading, from + 6, height - 12, step - 12),
      ];
    },
  };
}

/** Stages below one another, ranks to the right. */
function below(reading, width) {
  const most = widest(reading), share = logarithmic(most);
  const head = 20, label = 46, tall = 52, step = label + tall;
  const x = rank => 1 + share(rank) * (width - 2);
  const height = head + step * reading.stages.length + 6;
  return {
    width, height, corners: false,
    span: at => [head + at * step + label, head + (at + 1) * step],
    place: (along, rank) => [x(rank), along],
    scale: () => [
      text(1, 12, "soft", "rank 1 … (logarithmic)", width * 0.6),
      reading.came === null ? "" : draw("text", { class: "strong end", x: width - 1, y: 12 }, items(reading.came)),
    ],
    labels: (stage, at) => {
      const from = head + at * step;
      const says = stage.left ? `left out: ${stage.left}` : ms(stage.ms);
      const flow = `${stage.saw === null ? "" : `${count(stage.saw)} → `}${count(stage.kept)}`;
      return [
        text(1, from + 19, "strong", stage.name, width - 100), draw("text", { class: "strong end", x: width - 1,
          y: from + 19 }, flow),
        text(1, from + 35, "soft", stage.model, width - 120), draw("text", { class: "soft end", x: width - 1,
          y: from + 35 }, says),
      ];
    },
  };
}

/** A text, cut where there is no room; the table of stages has the whole one. */
function text(x, y, kind, words, room) {
  const fits = Math.max(3, Math.floor(room / 6.6));
  return draw("text", { class: kind, x, y }, words.length <= fits ? words : `${words.slice(0, fits - 1)}…`);
}

function latency(stage, { stages }, x, y, room) {
  if (stage.ms === null) return [];
  const longest = Math.max(...stages.map(one => one.ms ?? 0));
  const length = Math.max(1.5, (room - 58) * stage.ms / longest);
  return [draw("rect", { class: "time", x, y: y - 9, width: length, height: 8, rx: 1.5 }),
    draw("text", { class: "soft", x: x + length + 6, y }, ms(stage.ms))];
}

function body(frame, reading, stage, at) {
  const [from, to] = frame.span(at);
  const saw = stage.saw ?? stage.kept, half = (from + to) / 2;
  const corner = (along, rank) => frame.place(along, rank).join(" ");
  const edge = `C${corner(half, stage.kept)} ${corner(half, saw)} ${corner(from, saw)}`;
  const shape = `M${corner(from, 0)}L${corner(to, 0)}L${corner(to, stage.kept)}${edge}Z`;
  return [
    draw("path", { class: stage.left ? "body left" : "body", d: shape }),
    ...(stage.left ? [] : lines(frame, reading, at)),
    draw("path", { class: stage.left ? "rim left" : "rim", d: `M${corner(to, 0)}L${corner(to, stage.kept)}${edge}` }),
    ...frame.labels(stage, at),
  ];
}

/** The items that came through a stage, from their rank before it to that behind it; the answer's on top. */
function lines(frame, { rows }, at) {
  if (at === 0) return [];
  const [from, to] = frame.span(at), half = (from + to) / 2;
  const through = rows.filter(row => row.places[at] && row.places[at - 1]);
  return through.slice(0, MOST_LINES).reverse().map(row => {
    const before = row.places[at - 1].rank, behind = row.places[at].rank;
    const [start, out, into, end] = [[from, before], [half, before], [half, behind], [to, behind]]
      .map(([along, rank]) => frame.place(along, rank).join(" "));
    return draw("path", { class: row.final ? "line final" : "line", d: `M${start}C${out} ${into} ${end}` });
  });
}

/** The way of one item over the picture. */
function way(frame, path, name) {
  const stops = path.flatMap((stop, at) => stop ? [{ ...stop, place: frame.place(frame.span(at)[1], stop.rank) }] : []);
  const group = draw("g", { class: "way" });
  stops.forEach((stop, at) => {
    if (at === 0) return;
    const ends = [stops[at - 1].place, stop.place].map(place => place.join(" "));
    group.append(draw("path", { class: stop.state === "after" ? "path after" : "path", d: `M${ends.join("L")}` }));
  });
  for (const { place: [x, y], state, rank } of stops) {
    group.append(state === "lost" ? draw("path", { class: "cross", d: `M${x - 5} ${y - 5}l10 10m0 -10l-10 10` })
      : draw("circle", { class: state === "after" ? "dot after" : "dot", cx: x, cy: y, r: 4.5 }));
    // Right below a corner stands its count.
    const out = frame.corners && state !== "kept", left = out || x > frame.width - 90;
    group.append(draw("text", { class: left ? "halo end" : "halo", x: left ? x - 9 : x + 9, y: out ? y + 16 : y - 7 },
      `${state === "lost" ? "lost: " : ""}#${count(rank)}`));
  }
  if (name) group.prepend(draw("title", {}, name));
  return group;
}
