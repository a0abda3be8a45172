/** Markdown, text first: fenced code, headings, lists, bold and inline code. All else stays as it was written.
 *
 * Scans go forwards and give up early: a model that repeats one character for ever must not hold up the page.
 */
import { copyButton, h } from "./dom.js";

const FENCE = /^(\s*)(```+|~~~+)\s*([\w+#.-]*)(.*)$/s;
const HEADING = /^(#{1,6})\s+(\S.*)$/s;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(\S.*)$/s;
const RENDER = { code, heading, list, paragraph };

/** A growing text in an element: blocks that have not changed keep their nodes, and with them a reader's selection. */
export class Markdown {
  #element;
  #sources = [];

  constructor(element) {
    this.#element = element;
  }

  update(text) {
    const blocks = blocksOf(text.split(/\r\n?|\n/));
    const shown = this.#element.children;
    blocks.forEach(({ kind, lines, source }, i) => {
      if (this.#sources[i] === source) return;
      const node = RENDER[kind](lines);
      if (shown[i]) shown[i].replaceWith(node);
      else this.#element.append(node);
    });
    while (shown.length > blocks.length) shown[shown.length - 1].remove();
    this.#sources = blocks.map((block) => block.source);
  }
}

function blocksOf(lines) {
  const blocks = [];
  for (let first = 0, end; first < lines.length; first = end) {
    const kind = kindOf(lines[first]);
    end = first + 1;
    if (kind === "blank") continue;
    if (kind === "code") end = endOfCode(lines, first);
    if (kind === "list") while (end < lines.length && staysInList(lines, first, end)) end += 1;
    if (kind === "paragraph") while (end < lines.length && kindOf(lines[end]) === "paragraph") end += 1;
    const own = lines.slice(first, end);
    blocks.push({ kind, lines: own, source: own.join("\n") });
  }
  return blocks;
}

/** Behind one of backticks there are none: ```a``` is code in a line. */
function fenceOf(line) {
  const match = line.match(FENCE);
  return match && !(match[2][0] === "`" && match[4].includes("`")) ? match : null;
}

function kindOf(line) {
  if (line.trim() === "") return "blank";
  if (fenceOf(line)) return "code";
  if (HEADING.test(line)) return "heading";
  return ITEM.test(line) ? "list" : "paragraph";
}

/** A block that nothing closes goes on to the end of what has come so far. */
function endOfCode(lines, first) {
  const fence = fenceOf(lines[first])[2];
  let end = first + 1;
  while (end < lines.length && !closes(lines[end].trim(), fence)) end += 1;
  return Math.min(end + 1, lines.length);
}

const closes = (line, fence) => line.startsWith(fence) && line.replaceAll(fence[0], "") === "";
const isOrdered = (item) => /\d/.test(item[2]);

function staysInList(lines, first, at) {
  if (lines[at].trim() === "") at += 1; // one blank line
  if (at === lines.length || fenceOf(lines[at])) return false;
  const item = lines[at].match(ITEM);
  if (item === null) return /^\s\s/.test(lines[at]) && lines[at].trim() !== "";
  return item[1] !== "" || isOrdered(item) === isOrdered(lines[first].match(ITEM));
}

function code(lines) {
  const [, indent, fence, language] = fenceOf(lines[0]);
  const inner = lines.slice(1, lines.length > 1 && closes(lines.at(-1).trim(), fence) ? -1 : undefined);
  const text = inner.map((line) => (line.startsWith(indent) ? line.slice(indent.length) : line)).join("\n");
  const label = language ? `Code, ${language}` : "Code";
  return h(
    "figure",
    { class: "code" },
    h("figcaption", {}, h("span", {}, language), copyButton(() => text)),
    h("pre", { tabindex: 0, role: "region", "aria-label": label }, h("code", {}, text)),
  );
}

function heading([line]) {
  const [, marks, title] = line.match(HEADING);
  return h(`h${Math.min(6, marks.length + 2)}`, {}, ...inline(title)); // below the page's own
}

function paragraph(lines) {
  return h("p", {}, ...inline(lines.join("\n")));
}

function list(lines) {
  const items = [];
  for (const line of lines) {
    const item = line.match(ITEM);
    if (item) items.push({ indent: item[1].length, ordered: isOrdered(item), start: parseInt(item[2]), text: item[3] });
    else if (line.trim() !== "") items.at(-1).text += `\n${line.trim()}`;
  }
  const open = []; // the lists around the next item, outermost first
  for (const { indent, ordered, start, text } of items) {
    while (open.length > 1 && indent < open.at(-1).indent) open.pop();
    if (open.length === 0 || indent > open.at(-1).indent + 1) {
      const element = h(ordered ? "ol" : "ul", { start: ordered && start !== 1 && start });
      open.at(-1)?.element.lastElementChild.append(element);
      open.push({ indent, element });
    }
    open.at(-1).element.append(h("li", {}, ...inline(text)));
  }
  return open[0].element;
}

/** Text nodes, <code> and <strong>. */
function inline(text) {
  const nodes = [];
  let plainFrom = 0;
  let at = 0;
  let canBeBold = true; // until nothing more closes it
  const put = (node, next) => {
    nodes.push(text.slice(plainFrom, at), node);
    at = plainFrom = next;
  };
  while (at < text.length) {
    if (text[at] === "`") {
      const length = runLength(text, at);
      const end = endOfRun(text, at + length, length);
      if (end === -1) at += length;
      else put(h("code", {}, trimmed(text.slice(at + length, end))), end + length);
    } else if (text.startsWith("**", at)) {
      const opens = canBeBold && /[^\s*]/.test(text[at + 2] ?? "");
      const end = opens ? endOfBold(text, at + 2) : -1;
      if (opens && end === -1) canBeBold = false;
      if (end === -1) at += runLength(text, at);
      else put(h("strong", {}, ...inline(text.slice(at + 2, end))), end + 2);
    } else {
      at += 1;
    }
  }
  nodes.push(text.slice(plainFrom));
  return nodes.filter((node) => node !== "");
}

function runLength(text, at) {
  let end = at;
  while (text[end] === text[at]) end += 1;
  return end - at;
}

/** Where the next run of exactly so many backticks begins. */
function endOfRun(text, from, length) {
  for (let at = text.indexOf("`", from); at !== -1; at = text.indexOf("`", at)) {
    const found = runLength(text, at);
    if (found === length) return at;
    at += found;
  }
  return -1;
}

/** Where the ** is that closes one before `from`; bold text neither begins nor ends with a space. */
function endOfBold(text, from) {
  for (let at = text.indexOf("**", from); at !== -1; at = text.indexOf("**", at + 2)) {
    if (/\S/.test(text[at - 1])) return at;
  }
  return -1;
}

/** `` `a` `` is `a` with its backticks. */
function trimmed(text) {
  const isPadded = text.startsWith(" ") && text.endsWith(" ") && text.trim() !== "";
  return isPadded ? text.slice(1, -1) : text;
}
