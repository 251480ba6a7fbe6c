// The settings of a request, and what the server says about one of them beside its field.

import { byId, put } from "./dom.js";

const NUMBERS = ["max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed"];
const FIELDS = Object.fromEntries(NUMBERS.map((name) => [name, name]));
const IDS = { ...FIELDS, stop: "stop-texts", prompt: "prompt" };

export class FieldError extends Error {
  constructor(param, message) {
    super(message);
    this.param = param;
  }
}

// The fields of a request. Throws FieldError for what is not a number; the rest is the server's to judge.
export function read() {
  const found = {};
  for (const name of NUMBERS) {
    const field = byId(IDS[name]);
    const value = field.value.trim();
    if (field.validity.badInput) throw new FieldError(name, "This is not a number.");
    if (!value) continue;
    if (name === "seed" && !Number.isSafeInteger(Number(value))) {
      throw new FieldError(name, "A whole number below 2^53.");
    }
    found[name] = Number(value);
  }
  const stop = byId(IDS.stop).value.split("\n").filter(Boolean).map(unescaped);
  return stop.length ? { ...found, stop } : found;
}

// What the fields hold, to be kept, and put back.
export const written = () => Object.fromEntries(Object.values(IDS).map((id) => [id, byId(id).value]));

export function restore(values = {}) {
  for (const id of Object.values(IDS)) if (typeof values[id] === "string") byId(id).value = values[id];
}

// Says it beside the field, and goes there. False if the page has no such field.
export function showError(param, message) {
  const id = IDS[param];
  if (!id) return false;
  const field = byId(id);
  put(byId(`${param}-error`), message);
  field.setAttribute("aria-invalid", "true");
  if (byId("settings").contains(field)) byId("settings").open = true;
  field.focus();
  return true;
}

export function clearErrors() {
  for (const [param, id] of Object.entries(IDS)) {
    put(byId(`${param}-error`), "");
    byId(id).removeAttribute("aria-invalid");
  }
}

const ESCAPES = { "\\n": "\n", "\\t": "\t", "\\\\": "\\" };
const unescaped = (line) => line.replace(/\\[nt\\]/g, (found) => ESCAPES[found]);
