"""Rules of accessibility (WCAG 2.2, level AA) that a machine can check, applied to what is visible of a page now."""

from tests.page_visitor import Visitor

NAMES_AND_ROLES = """
const shown = one => one.checkVisibility({ visibilityProperty: true }), found = [];
const say = (rule, one) => found.push(`${rule}: ${one.outerHTML.slice(0, 120)}`);
const all = selector => [...document.querySelectorAll(selector)].filter(shown);
const rule = (name, selector, holds) => all(selector).forEach(one => holds(one) || say(name, one));

if (!document.documentElement.lang) found.push("no language");
if (!document.title.trim()) found.push("no title");
for (const selector of ["h1", "main", "body > header", "body > footer"]) {
  if (all(selector).length !== 1) found.push(`not one ${selector}`);
}
const levels = all("h1, h2, h3, h4, h5, h6").map(one => Number(one.tagName[1]));
levels.forEach((level, at) => at && level > levels[at - 1] + 1 && found.push(`heading of level ${level} skips one`));

const ids = [...document.querySelectorAll("[id]")].map(one => one.id);
ids.filter((id, at) => ids.indexOf(id) !== at).forEach(id => found.push(`two elements have id ${id}`));
for (const name of ["aria-labelledby", "aria-describedby", "aria-controls", "for"]) {
  rule(`${name} leads nowhere`, `[${name}]`, one => one.getAttribute(name).split(" ").every(id => ids.includes(id)));
}
rule("a section without a name", "section", one => one.hasAttribute("aria-labelledby"));
rule("a control without a label", "input, select, textarea",
  one => [...one.labels].some(label => label.textContent.trim()));
rule("a label that is only a placeholder", "[placeholder]", one => one.labels.length > 0);
rule("nothing to read on it", "button, a[href], summary", one => one.textContent.trim());
rule("a group of choices without a name", "fieldset", one => one.querySelector("legend")?.textContent.trim());
rule("a picture without a name and a description", "svg:not([aria-hidden])",
  one => one.getAttribute("role") === "img" && one.querySelector("title") && one.querySelector("desc")?.textContent);
rule("a table without a caption", "table", one => one.caption?.textContent.trim());
rule("a heading cell without a scope", "th", one => ["row", "col"].includes(one.getAttribute("scope")));
rule("a row without a heading", "tbody tr", one => one.querySelector("th[scope=row]"));
rule("a row with another number of cells", "tbody tr",
  one => one.cells.length === one.closest("table").tHead.rows[0].cells.length);
rule("an order of its own", "[tabindex]", one => one.tabIndex <= 0);
rule("hidden and yet reachable", "[aria-hidden=true]", one => !one.querySelector("a, button, input, [tabindex]"));
rule("what scrolls cannot be reached", "body *", one => {
  const scrolls = /auto|scroll/.test(getComputedStyle(one).overflowX) && one.scrollWidth > one.clientWidth + 1;
  return !scrolls || one.tabIndex >= 0 || one.querySelector("a, button, input");
});
rule("too small to hit", "button, select, textarea, summary, input", one => {
  const { width, height } = (one.closest("label") ?? one).getBoundingClientRect();
  return width >= 24 && height >= 24 - 0.5;
});
return found;
"""

CONTRASTS = """
const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
const found = [];
function rgba(text) {
  canvas.clearRect(0, 0, 1, 1);
  canvas.fillStyle = text;
  canvas.fillRect(0, 0, 1, 1);
  const [red, green, blue, alpha] = canvas.getImageData(0, 0, 1, 1).data;
  return [red, green, blue, alpha / 255];
}
const over = (top, under) => top.slice(0, 3).map((value, at) => value * top[3] + under[at] * (1 - top[3]));
function behind(one) {
  if (one === null) return [255, 255, 255];
  const own = rgba(getComputedStyle(one).backgroundColor);
  return own[3] === 1 ? own.slice(0, 3) : over(own, behind(one.parentElement));
}
const light = rgb => rgb.map(value => value / 255).map(value => value <= 0.04045 ? value / 12.92
  : ((value + 0.055) / 1.055) ** 2.4).reduce((sum, value, at) => sum + value * [0.2126, 0.7152, 0.0722][at], 0);
const ratio = (a, b) => (Math.max(light(a), light(b)) + 0.05) / (Math.min(light(a), light(b)) + 0.05);
function check(one, colour, grounds, least, what) {
  for (const ground of grounds) {
    const got = ratio(over(rgba(colour), ground), ground);
    if (got < least) found.push(`contrast of ${what} is ${got.toFixed(2)}, not ${least}: ${one.outerHTML}`);
  }
}

const shown = one => one.checkVisibility({ visibilityProperty: true });
const styles = getComputedStyle(document.documentElement);
const tint = rgba(styles.getPropertyValue("--tint")).slice(0, 3);
const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
for (let node = texts.nextNode(); node; node = texts.nextNode()) {
  const one = node.parentElement, style = getComputedStyle(one), size = parseFloat(style.fontSize);
  const elsewhere = one.closest(".unseen, caption, option, title, desc, noscript");
  if (!node.textContent.trim() || !shown(one) || elsewhere) continue;
  if (one.closest("label")?.querySelector(":disabled")) continue; // a control that is off has no demand of contrast
  const large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700), svg = one.closest("svg");
  const ground = behind(svg ? svg.parentElement : one);
  check(one, svg ? style.fill : style.color, svg ? [ground, tint] : [ground], large ? 3 : 4.5, "text");
}
for (const one of document.querySelectorAll("input:not([type=radio], [type=checkbox]), select, textarea, button")) {
  const style = getComputedStyle(one);
  if (!shown(one) || style.borderTopWidth === "0px") continue;
  check(one, style.borderTopColor, [behind(one.parentElement)], 3, "border");
}
for (const one of document.querySelectorAll(".rim, .line.final, .way .path, .way .cross")) {
  const ground = behind(one.closest("svg").parentElement);
  check(one, getComputedStyle(one).stroke, [ground, tint], 3, "line");
}
return [...new Set(found)];
"""

CUT_OFF = """
const found = [], page = document.documentElement;
if (page.scrollWidth > page.clientWidth) found.push(`the page is ${page.scrollWidth} wide`);
for (const svg of document.querySelectorAll("svg[role=img]")) {
  if (!svg.checkVisibility()) continue;
  const box = svg.getBoundingClientRect();
  for (const text of svg.querySelectorAll("text")) {
    const { left, right, top, bottom } = text.getBoundingClientRect();
    if (left < box.left - 1 || right > box.right + 1 || top < box.top - 2 || bottom > box.bottom + 2) {
      found.push(`cut off: ${text.textContent}`);
    }
  }
}
for (const one of document.querySelectorAll("button, label, h1, h2, h3, dd, li, #about, #said, #verdict")) {
  if (one.checkVisibility() && !one.closest(".scroll, .unseen") && one.scrollWidth > one.clientWidth + 1
    && getComputedStyle(one).display !== "inline") found.push(`does not fit: ${one.textContent}`);
}
return found;
"""


def violations(visitor: Visitor) -> list[str]:
    """What is wrong with names, roles and structure, with contrast, and with what does not fit."""
    return [text for code in (NAMES_AND_ROLES, CONTRASTS, CUT_OFF) for text in visitor.script(code)]


def landmarks(visitor: Visitor) -> list[tuple[str, str]]:
    """Role and name of every landmark, in the browser's own accessibility tree."""
    visitor.driver.execute_cdp_cmd("Accessibility.enable", {})
    nodes = visitor.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    roles = {"banner", "main", "contentinfo", "region", "search"}
    found = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if not node["ignored"]]
    return [(role, name) for role, name in found if role in roles]
