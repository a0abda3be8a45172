/** Elements from text, never from markup: what a model or a server says can only become a text node. */

/** An element with attributes (functions are listeners: onclick) and children, of which strings become text. */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}

/** Leaves the node alone where it says so already. */
export function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** A button that copies what `text` gives when it is pressed. */
export function copyButton(text, label = "Copy") {
  const button = h("button", { type: "button", class: "plain", onclick: copy }, label);
  async function copy() {
    say(button, (await toClipboard(text())) ? "Copied" : "Not copied");
    setTimeout(() => say(button, label), 1500);
    button.focus();
  }
  return button;
}

async function toClipboard(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Over plain http from another machine there is no navigator.clipboard.
    const area = h("textarea", { class: "unseen" });
    area.value = text;
    document.body.append(area);
    area.select();
    const isDone = document.execCommand("copy");
    area.remove();
    return isDone;
  }
}
