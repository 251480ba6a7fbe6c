// What the model wrote so far: text, its tokens, and the pieces in which they are shown.
//
// A piece is the text of one token, or of several if only together they are whole characters:
// {text, tokens: [{name, logprob, top: [[name, logprob], ...]}]}. A piece without tokens has no probability yet.

const SPECIAL = /^<\/?[^<>\s]+>$/;

export class Continuation {
  constructor({ text = "", tokens = [] } = {}) {
    // The server counts in code points, JavaScript in halves of some of them.
    this.characters = Array.from(text);
    this.tokens = tokens;
  }

  get text() {
    return this.characters.join("");
  }

  get length() {
    return this.characters.length;
  }

  // Adds one choice of a completion's chunk.
  grow({ text, logprobs }) {
    this.characters.push(...text);
    if (!logprobs) return;
    logprobs.tokens.forEach((name, index) =>
      this.tokens.push({
        name,
        offset: logprobs.text_offset[index],
        logprob: logprobs.token_logprobs[index],
        top: Object.entries(logprobs.top_logprobs[index] ?? {}).sort((one, other) => other[1] - one[1]),
      }),
    );
  }

  pieces() {
    const found = [];
    let open = [];
    this.tokens.forEach((token, index) => {
      open.push(token);
      const begin = open[0].offset;
      const end = Math.min(this.length, this.#end(token, this.tokens[index + 1]));
      if (end <= begin && !SPECIAL.test(token.name)) return;
      found.push({ text: this.characters.slice(begin, end).join(""), tokens: open });
      open = [];
    });
    const last = this.tokens.at(-1);
    const shown = open.length ? open[0].offset : last ? Math.min(this.length, this.#end(last)) : 0;
    const rest = this.characters.slice(shown).join("");
    if (rest) found.push({ text: rest, tokens: open });
    return found;
  }

  toJSON() {
    return { text: this.text, tokens: this.tokens };
  }

  // The character after those of a token.
  #end(token, next) {
    if (next) return next.offset;
    if (token.name.startsWith("bytes:")) return this.length;
    return SPECIAL.test(token.name) ? token.offset : token.offset + Array.from(token.name).length;
  }
}

export const logprobOf = (piece) => piece.tokens.reduce((sum, token) => sum + token.logprob, 0);

// Least probability of each level of colour; what is less likely has the last one.
const LEVELS = [0.9, 0.5, 0.2, 0.05, 0.01];

export function levelOf(logprob) {
  const probability = Math.exp(logprob);
  const level = LEVELS.findIndex((least) => probability >= least);
  return level < 0 ? LEVELS.length : level;
}
