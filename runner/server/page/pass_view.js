// The pass on the page: a cell for each block, the disk's rate, and how long the next token takes.

import { byId, element, put } from "./dom.js";
import { count, duration, rate } from "./units.js";

const TICK = 500;
const NONE = "–";

export class PassView {
  #cells = byId("cells");
  #state = null;
  #seen = 0;
  #run = null;

  constructor() {
    setInterval(() => this.#time(), TICK);
  }

  show(state, run) {
    this.#state = state;
    this.#run = run;
    this.#seen = performance.now();
    const pass = state?.pass ?? null;
    this.#draw(state?.blocks ?? 0, pass);
    put(byId("pass-title"), pass?.number ? `Pass ${count(pass.number)}` : "Pass");
    put(byId("figure-block"), pass ? `${pass.block} of ${state.blocks}` : NONE);
    put(byId("figure-rate"), pass ? speed(pass) : NONE);
    this.tokens(run);
    this.#time();
  }

  tokens(run) {
    put(byId("figure-tokens"), run?.most ? `${count(run.tokens)} of ${count(run.most)}` : NONE);
    const [label, place] = placeOf(this.#state, run);
    put(byId("label-place"), label);
    put(byId("figure-place"), place);
  }

  #draw(blocks, pass) {
    const cells = this.#cells;
    while (cells.children.length > blocks) cells.lastChild.remove();
    while (cells.children.length < blocks) cells.append(element("span", { class: "cell" }));
    const done = pass?.block ?? 0;
    Array.from(cells.children).forEach((cell, place) => {
      const state = !pass || place > done ? "ahead" : place < done ? "done" : "now";
      if (cell.dataset.state !== state) cell.dataset.state = state;
    });
    cells.setAttribute("aria-valuemax", blocks);
    cells.setAttribute("aria-valuenow", done);
    cells.setAttribute("aria-valuetext", pass ? `block ${done} of ${blocks}` : "no pass");
  }

  // Between two words of the server, the clock goes on.
  #time() {
    const pass = this.#state?.pass;
    const elapsed = (performance.now() - this.#seen) / 1000;
    const left = pass?.seconds_left || (pass && !pass.block && this.#state.seconds_a_pass) || 0;
    put(byId("figure-next"), left ? duration(left - elapsed) : NONE);
  }
}

const speed = (pass) => (pass.bytes_per_second ? rate(pass.bytes_per_second) : pass.block ? "in RAM" : NONE);

// Where the page's request is, in a word or two: in the pass, or which of those that wait.
function placeOf(state, run) {
  if (!state) return ["queue", NONE];
  if (!run?.isRunning || !run.id) return ["queue", state.waiting ? `${count(state.waiting)} waiting` : "empty"];
  const { requests, active, waiting } = state;
  if (requests.some((each) => each.id === run.id && each.active)) {
    return ["in the pass", active > 1 ? `with ${count(active - 1)} more` : "alone"];
  }
  const place = requests.filter((each) => !each.active).findIndex((each) => each.id === run.id);
  return ["in the queue", place < 0 ? NONE : `${count(place + 1)} of ${count(waiting)}`];
}
