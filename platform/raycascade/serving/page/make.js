/** Elements and figures. Whatever a server says becomes text, never markup. */

const SVG = "http://www.w3.org/2000/svg";

/** The element with this id. */
export const byId = id => document.getElementById(id);

/** An HTML element; properties are attributes, or listeners where they are functions; other children become text. */
export function make(tag, properties = {}, ...children) {
  return fill(document.createElement(tag), properties, children);
}

/** The same for SVG. */
export function draw(tag, properties = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), properties, children);
}

function fill(element, properties, children) {
  for (const [name, value] of Object.entries(properties)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value !== null && value !== undefined && value !== false) {
      element.setAttribute(name, value === true ? "" : value);
    }
  }
  element.append(...children.filter(child => child !== null));
  return element;
}

/** Text for screen readers only. */
export const unseen = text => make("span", { class: "unseen" }, text);

/** A number with a sign that is read aloud: a hyphen is not. */
const minus = text => text.replace("-", "\u2212");

/** How many. */
export const count = value => minus(value.toLocaleString("en"));

/** "1 item", "2 items". */
export const items = value => `${count(value)} item${value === 1 ? "" : "s"}`;

/** A score or a difference of scores: four decimals, powers of ten where that hides or drowns it. */
export function score(value) {
  if (value === null || value === undefined) return "\u2013";
  const size = Math.abs(value);
  return minus(size !== 0 && (size < 0.001 || size >= 1e6) ? value.toExponential(2) : value.toFixed(4));
}

/** The same with its sign. */
export const signed = value => (value > 0 ? "+" : "") + score(value);

/** Milliseconds. */
export function ms(value) {
  if (value === null || value === undefined) return "\u2013";
  return `${value < 9.95 ? value.toFixed(1) : count(Math.round(value))} ms`;
}

/** A share of a whole in per cent, two digits or more. */
export function share(part, whole) {
  const percent = 100 * part / whole;
  return `${percent >= 9.95 ? Math.round(percent) : Number(percent.toPrecision(2))} %`;
}
