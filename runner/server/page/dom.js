// The document: elements by their ids, and new ones whose content is text, never HTML.

export const byId = (id) => document.getElementById(id);

export function element(name, properties = {}, ...children) {
  const found = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key === "class") found.className = value;
    else if (key === "data") Object.assign(found.dataset, value);
    else if (key.startsWith("on")) found.addEventListener(key.slice(2), value);
    else if (key in found) found[key] = value;
    else found.setAttribute(key, value);
  }
  found.append(...children);
  return found;
}

// Changes the document only if there is something new, so that nothing that is selected or read aloud is disturbed.
export function put(found, text) {
  if (found.textContent !== text) found.textContent = text;
}
