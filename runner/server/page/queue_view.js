// Who is in the pass, and who waits for it.

import { byId, element, put } from "./dom.js";
import { count } from "./units.js";

const MOST = 8;

export function showQueue(state, run) {
  const requests = state?.requests ?? [];
  const all = (state?.active ?? 0) + (state?.waiting ?? 0);
  const counts = all ? `${count(state.active)} in the pass, ${count(state.waiting)} waiting` : "Nobody waits.";
  const more = all - Math.min(requests.length, MOST);
  put(byId("queue-counts"), more > 0 ? `${counts}; the first ${MOST}:` : counts);
  const list = byId("queue");
  const shown = requests.slice(0, MOST);
  while (list.children.length > shown.length) list.lastChild.remove();
  while (list.children.length < shown.length) list.append(newRow());
  shown.forEach((request, place) => fill(list.children[place], request, request.id && request.id === run?.id));
}

function newRow() {
  const bar = element("span", { class: "bar", "aria-hidden": "true" });
  return element("li", {}, element("span", { class: "name" }), element("span", { class: "figure" }), bar);
}

function fill(row, request, isMine) {
  const [name, figure, bar] = row.children;
  row.dataset.state = request.active ? "active" : "waiting";
  row.classList.toggle("mine", Boolean(isMine));
  put(name, isMine ? "this page" : request.id ? `…${request.id.slice(-6)}` : "a job's line");
  put(figure, request.active ? `${count(request.tokens)} of ${count(request.max_tokens)}` : "waiting");
  bar.style.setProperty("--share", request.max_tokens ? request.tokens / request.max_tokens : 0);
}
