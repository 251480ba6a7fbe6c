// A run: one text, from its prompt on, through broken connections, stops and reloads.
//
//     idle ──generate──> running ──stop──> stopped ──go on──> running
//                        │   ^ the same request again, which the server knows
//                        └───┘                      running ──> done, failed

import { Continuation } from "./continuation.js";
import { ask, eventsOf, Interrupted, pause, ServerError } from "./server.js";

const SOONEST = 1;
const LATEST = 30;
const ALTERNATIVES = 5;
const SEEDS = 2 ** 32;

export class Run {
  state = "idle";
  // The request that runs, as the queue names it.
  id = null;
  // Why nothing comes at the moment, or why it ended.
  note = "";
  given = "";
  reason = null;
  #settled = [];
  #now = new Continuation();
  #body = null;
  #abort = null;
  // What stood here before a request that the server refuses.
  #before = null;
  #onChange;

  constructor(onChange, kept = null) {
    this.#onChange = onChange;
    if (kept) this.#restore({ ...kept, now: new Continuation(kept.now) });
  }

  get isRunning() {
    return this.state === "running";
  }

  get pieces() {
    return [...this.#settled, ...this.#now.pieces()];
  }

  get text() {
    return this.#settled.map((piece) => piece.text).join("") + this.#now.text;
  }

  // New tokens of the request that runs or ran last, and the most that it may get.
  get tokens() {
    return this.#now.tokens.length;
  }

  get most() {
    return this.#body?.max_tokens ?? null;
  }

  get seed() {
    return this.#body?.temperature ? this.#body.seed : null;
  }

  generate(prompt, settings) {
    this.#before = this.toJSON();
    this.given = prompt;
    this.#settled = [];
    return this.#begin(prompt, settings);
  }

  goOn(settings) {
    this.#before = this.toJSON();
    this.#settled = this.pieces;
    return this.#begin(this.given + this.text, settings);
  }

  // After a reload: the same request again.
  resume() {
    return this.#follow();
  }

  stop() {
    if (!this.isRunning) return;
    this.#end("stopped", "Stopped.");
    this.#abort?.abort();
  }

  toJSON() {
    const { given, state, note, reason } = this;
    return { given, state, note, reason, settled: this.#settled, now: this.#now, body: this.#body };
  }

  #begin(prompt, settings) {
    // A seed that is drawn here makes the request the same when it is sent again, and another than the last.
    const seed = settings.temperature && settings.seed === undefined ? { seed: draw() } : {};
    this.#body = { ...settings, ...seed, prompt, stream: true, logprobs: ALTERNATIVES };
    this.#now = new Continuation();
    this.state = "running";
    this.reason = null;
    return this.#follow();
  }

  async #follow() {
    const body = this.#body;
    this.#tell("");
    for (let failures = 0; this.#follows(body); ) {
      const abort = (this.#abort = new AbortController());
      try {
        await this.#read(body, abort, () => (failures = 0));
        return;
      } catch (error) {
        if (!this.#follows(body)) return;
        const again = error instanceof Interrupted || (error instanceof ServerError && error.mayPass);
        if (!again) {
          this.#fail(error);
          throw error;
        }
        await this.#wait(error, failures, body);
        failures += 1;
      }
    }
  }

  // Whether this request is still wanted.
  #follows(body) {
    return this.isRunning && this.#body === body;
  }

  async #wait(error, failures, body) {
    const seconds = error.retryAfter ?? Math.min(LATEST, SOONEST * 2 ** failures);
    const why = error instanceof Interrupted ? "The connection broke" : sentence(error.message);
    const waiting = (this.#abort = new AbortController());
    this.id = null;
    this.#tell(`${why}; trying again in ${seconds} s.`);
    await pause(1000 * seconds, waiting.signal);
    if (this.#follows(body)) this.#tell("Trying again.");
  }

  // What has come before the connection broke stays on the page until as much has come again.
  async #read(body, abort, onGrowth) {
    const response = await ask("/v1/completions", {
      method: "POST",
      headers: { "content-type": "application/json", accept: "text/event-stream" },
      body: JSON.stringify(body),
      signal: abort.signal,
    });
    if (!this.#follows(body)) return;
    this.id = response.headers.get("x-request-id");
    this.#before = null;
    this.#tell("");
    const coming = new Continuation();
    let reason = null;
    for await (const data of eventsOf(response, abort)) {
      if (!this.#follows(body)) return;
      if (data === "[DONE]") {
        this.#now = coming;
        this.#end("done", "", reason);
        return;
      }
      const { choices, error } = JSON.parse(data);
      if (error) throw new ServerError(error.code === "shutting_down" ? 503 : 500, error);
      for (const choice of choices) {
        coming.grow(choice);
        reason = choice.finish_reason ?? reason;
      }
      onGrowth();
      if (coming.length >= this.#now.length) this.#now = coming;
      this.#onChange(this);
    }
    throw new Interrupted();
  }

  // A request that was refused leaves everything as it was.
  #fail(error) {
    if (this.#before && error instanceof ServerError && error.status < 500) {
      this.#restore(this.#before);
      this.#tell(this.note);
    } else {
      this.#end("failed", error.message);
    }
  }

  #restore({ given, state, note, reason, settled, now, body }) {
    Object.assign(this, { given, state, note, reason });
    this.#settled = settled;
    this.#now = now;
    this.#body = body;
    this.id = null;
  }

  #tell(note) {
    this.note = note;
    this.#onChange(this);
  }

  #end(state, note, reason = null) {
    this.state = state;
    this.reason = reason;
    this.id = null;
    this.#tell(note);
  }
}

function draw() {
  return crypto.getRandomValues(new Uint32Array(1))[0] % SEEDS;
}

const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1);
