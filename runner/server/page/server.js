// The server: requests with the key, errors with the field that they are about, and server-sent events.

import { byId, put } from "./dom.js";

const KEY = "bloomdesk.key";
// The server says something every 15 s; whoever hears nothing for this long has lost the connection.
const SILENCE = 45_000;

export class ServerError extends Error {
  constructor(status, error = {}, retryAfter = null) {
    super(error.message || `the server answered with status ${status}`);
    this.status = status;
    this.param = error.param ? String(error.param).split(".")[0] : null;
    this.code = error.code ?? null;
    this.retryAfter = retryAfter;
  }

  // Whether the same request may succeed later.
  get mayPass() {
    return [408, 429, 502, 503, 504].includes(this.status);
  }
}

export class Interrupted extends Error {
  constructor() {
    super("the connection broke");
  }
}

// A response that is not an error; asks for the key if the server wants one. Throws ServerError or Interrupted.
export async function ask(path, options = {}) {
  for (;;) {
    const key = storedKey();
    const response = await fetchOrInterrupted(path, {
      ...options,
      cache: "no-store",
      headers: { ...(key ? { authorization: `Bearer ${key}` } : {}), ...options.headers },
    });
    if (response.ok) return response;
    const error = await errorOf(response);
    if (error.status !== 401) throw error;
    await askForKey(key);
  }
}

export async function askJson(path, options = {}) {
  const response = await ask(path, options);
  return response.json();
}

// The data of each event. Throws Interrupted if the connection breaks, or is silent for too long.
export async function* eventsOf(response, abort) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  try {
    for (;;) {
      const { done, value } = await withinSilence(reader.read(), abort);
      if (done) return;
      buffer += value;
      const events = buffer.split("\n\n");
      buffer = events.pop();
      for (const event of events) {
        if (event.startsWith("data: ")) yield event.slice(6);
      }
    }
  } finally {
    abort.abort();
  }
}

export const pause = (milliseconds, signal) =>
  new Promise((resolve) => {
    const timer = setTimeout(resolve, milliseconds);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      resolve();
    });
  });

async function fetchOrInterrupted(path, options) {
  try {
    return await fetch(path, options);
  } catch {
    throw new Interrupted();
  }
}

async function withinSilence(read, abort) {
  const timer = setTimeout(() => abort.abort(), SILENCE);
  try {
    return await read;
  } catch {
    throw new Interrupted();
  } finally {
    clearTimeout(timer);
  }
}

async function errorOf(response) {
  const after = Number(response.headers.get("retry-after")) || null;
  try {
    return new ServerError(response.status, (await response.json()).error, after);
  } catch {
    return new ServerError(response.status, {}, after);
  }
}

// A browser may refuse to store anything; then the key lasts as long as the page.
let keyOfPage = null;

function storedKey() {
  try {
    return sessionStorage.getItem(KEY) ?? keyOfPage;
  } catch {
    return keyOfPage;
  }
}

function storeKey(key) {
  keyOfPage = key;
  try {
    sessionStorage.setItem(KEY, key);
  } catch {
    // See above.
  }
}

let asking = null;

// Resolves when there is a key other than the one that was refused; all who ask meanwhile share one dialog.
function askForKey(refused) {
  if (storedKey() !== refused) return Promise.resolve();
  asking ??= new Promise((resolve) => {
    const dialog = byId("key-dialog");
    const input = byId("key");
    put(byId("key-error"), refused ? "The server does not know this key." : "");
    input.setAttribute("aria-invalid", String(Boolean(refused)));
    dialog.addEventListener("cancel", (event) => event.preventDefault());
    byId("key-form").addEventListener(
      "submit",
      () => {
        storeKey(input.value.trim());
        input.value = "";
        asking = null;
        resolve();
      },
      { once: true },
    );
    dialog.showModal();
  });
  return asking;
}
