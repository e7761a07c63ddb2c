// Elements from data. Text becomes text nodes only, so nothing that a prompt holds is ever read as markup.

const SVG = "http://www.w3.org/2000/svg";

/** An HTML element. Attributes: `class`, `text`, `on` (listeners), any other attribute; false and null leave it out. */
export function h(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** An SVG element, likewise. */
export function s(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === false || value === null || value === undefined) continue;
    if (name === "text") element.textContent = value;
    else if (name === "on") for (const [event, call] of Object.entries(value)) element.addEventListener(event, call);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** Set an element's text where it has changed, so that selections and screen readers are left alone. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Make `parent`'s children those of `keys`, in their order, creating and removing as few as possible. */
export function reconcile(parent, keys, create) {
  const known = (parent.known ??= new Map());
  const wanted = new Set(keys);
  for (const [key, element] of known) {
    if (!wanted.has(key)) {
      element.remove();
      known.delete(key);
    }
  }
  keys.forEach((key, i) => {
    let element = known.get(key);
    if (!element) known.set(key, (element = create(key)));
    if (parent.children[i] !== element) parent.insertBefore(element, parent.children[i] ?? null);
  });
  return keys.map((key) => known.get(key));
}
