// The text on the page: a span for each piece, its colour, and the alternatives of the one that is pointed at.

import { levelOf, logprobOf } from "./continuation.js";
import { byId, element } from "./dom.js";
import { percent } from "./units.js";

// Characters of the prompt that are shown before the text.
const GIVEN = 700;
const SHOWN = { " ": "·", "\n": "↵", "\t": "→", "\r": "↵" };

export class TextView {
  #output = byId("output");
  #empty = byId("output").firstElementChild;
  #given = element("span", { class: "given" });
  #caret = element("span", { class: "caret", "aria-hidden": "true" });
  #alternatives = new Alternatives();
  #pieces = [];
  #spans = [];
  #current = 0;

  constructor() {
    const span = (event) => event.target.closest?.(".token");
    this.#output.addEventListener("pointerover", (event) => this.#point(span(event)));
    this.#output.addEventListener("pointerleave", () => this.#point(null));
    this.#output.addEventListener("focusin", (event) => this.#focused(span(event)));
    this.#output.addEventListener("focusout", () => this.#alternatives.hide());
    this.#output.addEventListener("keydown", (event) => this.#key(event));
    addEventListener("scroll", () => this.#alternatives.place(), { passive: true });
    addEventListener("resize", () => this.#alternatives.place());
  }

  // Shows a prompt and the pieces that follow it, and touches only what has changed.
  show(given, pieces, isGrowing) {
    if (!given && !pieces.length) {
      this.#output.replaceChildren(this.#empty);
      this.#pieces = this.#spans = [];
      return;
    }
    const shown = given.length > GIVEN ? `… ${given.slice(-GIVEN)}` : given;
    if (this.#given.textContent !== shown) this.#given.textContent = shown;
    if (!this.#given.isConnected) {
      this.#output.replaceChildren(this.#given, this.#caret);
      this.#pieces = this.#spans = [];
    }
    let same = 0;
    while (same < pieces.length && isSame(this.#pieces[same], pieces[same])) same += 1;
    this.#spans.slice(same).forEach((span) => span.remove());
    const added = pieces.slice(same).map(spanOf);
    this.#caret.before(...added);
    this.#spans = [...this.#spans.slice(0, same), ...added];
    this.#pieces = pieces;
    this.#caret.hidden = !isGrowing;
    this.#rove(Math.min(this.#current, this.#spans.length - 1));
  }

  #rove(place) {
    const tokens = this.#spans;
    if (!tokens.length) return;
    this.#current = Math.max(0, place);
    tokens.forEach((span, index) => {
      span.tabIndex = index === this.#current ? 0 : -1;
    });
  }

  #point(span) {
    if (span) this.#alternatives.show(span, this.#pieces[this.#spans.indexOf(span)]);
    else if (this.#output.contains(document.activeElement)) this.#focused(document.activeElement);
    else this.#alternatives.hide();
  }

  #focused(span) {
    const place = this.#spans.indexOf(span);
    if (place < 0) return;
    this.#rove(place);
    this.#alternatives.show(span, this.#pieces[place]);
  }

  #key(event) {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const place = this.#next(event.key);
    if (event.key === "Escape" && this.#alternatives.isShown) {
      this.#alternatives.hide();
      event.stopPropagation();
    }
    if (place === null) return;
    event.preventDefault();
    this.#spans[place]?.focus();
  }

  #next(key) {
    const last = this.#spans.length - 1;
    const moves = { ArrowLeft: this.#current - 1, ArrowRight: this.#current + 1, Home: 0, End: last };
    if (key in moves) return Math.min(last, Math.max(0, moves[key]));
    if (key === "ArrowUp") return this.#beside(-1);
    return key === "ArrowDown" ? this.#beside(1) : null;
  }

  // The piece in the line above (-1) or below (1) that is nearest to the current one.
  #beside(direction) {
    const from = this.#spans[this.#current].getBoundingClientRect();
    let best = this.#current;
    let least = Infinity;
    this.#spans.forEach((span, index) => {
      const box = span.getBoundingClientRect();
      const lines = (direction * (box.top - from.top)) / from.height;
      const distance = Math.abs(box.left - from.left) + 10_000 * Math.round(lines);
      if (lines > 0.5 && distance < least) [best, least] = [index, distance];
    });
    return best;
  }
}

// The likeliest tokens at a place in the text, beside it.
class Alternatives {
  #box = byId("alternatives");
  #span = null;

  get isShown() {
    return !this.#box.hidden;
  }

  show(span, piece) {
    if (!piece?.tokens.length) return this.hide();
    this.#span?.removeAttribute("aria-describedby");
    this.#span = span;
    span.setAttribute("aria-describedby", this.#box.id);
    this.#box.replaceChildren(...piece.tokens.map(tableOf));
    this.#box.hidden = false;
    this.place();
  }

  hide() {
    this.#box.hidden = true;
    this.#span?.removeAttribute("aria-describedby");
    this.#span = null;
  }

  place() {
    if (!this.#span?.isConnected) return this.hide();
    const [around] = this.#span.getClientRects();
    if (!around) return this.hide();
    const { offsetWidth: width, offsetHeight: height } = this.#box;
    const edge = 8;
    const below = around.bottom + edge + height < innerHeight || around.top < height + edge;
    const left = Math.min(innerWidth - width - edge, Math.max(edge, around.left - 12));
    this.#box.style.left = `${left}px`;
    this.#box.style.top = `${below ? around.bottom + edge : around.top - height - edge}px`;
  }
}

function isSame(one, other) {
  return (
    one !== undefined &&
    one.text === other.text &&
    one.tokens.length === other.tokens.length &&
    one.tokens.every((token, index) => token.logprob === other.tokens[index].logprob)
  );
}

function spanOf(piece) {
  const span = element("span", { class: "token", tabIndex: -1 }, piece.text);
  if (piece.tokens.length) span.dataset.level = levelOf(logprobOf(piece));
  if (!piece.text) span.dataset.special = piece.tokens.map((token) => token.name).join("");
  else if (/^\s*\n\s*$/.test(piece.text)) span.dataset.newline = "";
  return span;
}

function tableOf(token) {
  const rows = token.top.map(([name, logprob]) => {
    const probability = Math.exp(logprob);
    const bar = element("span", { class: "bar", "aria-hidden": "true" });
    bar.style.setProperty("--share", Math.min(1, probability));
    return element(
      "li",
      name === token.name ? { class: "chosen", "aria-current": "true" } : {},
      element("span", { class: "name" }, ...visible(name)),
      bar,
      element("span", { class: "share" }, percent(probability)),
    );
  });
  return element("ol", {}, ...rows);
}

// A token's name, whose white space can be seen.
function visible(name) {
  return Array.from(name, (character) =>
    character in SHOWN ? element("span", { class: "blank" }, SHOWN[character]) : character,
  );
}
