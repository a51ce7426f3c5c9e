"use strict";
// Text of models as DOM nodes: LaTeX drawn by KaTeX, all else as text and never as markup.

const MATH = new RegExp(
  [
    String.raw`\\\[(?<display>[\s\S]+?)\\\]`,
    String.raw`\$\$(?<dollars>[\s\S]+?)\$\$`,
    String.raw`\\\((?<inline>[\s\S]+?)\\\)`,
    // No prices: a dollar that opens has no space behind it, one that closes none before.
    String.raw`(?<![\\$\w])\$(?<dollar>[^\s$](?:[^$\n]{0,400}?[^\s$\\])?)\$(?![\d$])`,
    String.raw`(?<block>\\begin\{(?<of>(?:align|equation|gather)\*?)\}[\s\S]+?\\end\{\k<of>\})`,
    String.raw`(?<boxed>\\boxed\{)`,
  ].join("|"), "g");

/** Splits text into ["text", t] and ["math", tex, isDisplay, source]. */
function parts(text) {
  const out = [];
  let from = 0;
  MATH.lastIndex = 0;
  for (let m; (m = MATH.exec(text)); ) {
    const { dollars, inline, dollar, block, boxed } = m.groups;
    const display = m.groups.display ?? dollars ?? block;
    let tex = display ?? inline ?? dollar;
    if (boxed) {
      const end = closing(text, MATH.lastIndex);
      if (end < 0) continue;
      tex = text.slice(m.index, end);
      MATH.lastIndex = end;
    }
    const source = text.slice(m.index, MATH.lastIndex);
    let before = text.slice(from, m.index);
    from = MATH.lastIndex;
    if (display !== undefined) { // has lines of its own
      before = before.replace(/\s+$/, "");
      while (/\s/.test(text[from] ?? "")) from++;
    }
    out.push(["text", before], ["math", tex, display !== undefined, source]);
  }
  out.push(["text", text.slice(from)]);
  return out;
}

/** Where the brace that was opened before `at` closes; -1 if it does not. */
function closing(text, at) {
  for (let depth = 1; at < text.length; at++) {
    if (text[at] === "\\") at++;
    else if (text[at] === "{") depth++;
    else if (text[at] === "}" && --depth === 0) return at + 1;
  }
  return -1;
}

/** Text with what was searched for marked, as nodes. */
function marked(text, words) {
  const out = document.createDocumentFragment();
  const where = words ? text.toLowerCase() : "";
  let from = 0;
  for (let at; words && (at = where.indexOf(words, from)) >= 0; from = at + words.length) {
    out.append(text.slice(from, at), make("mark", "", text.slice(at, at + words.length)));
  }
  out.append(text.slice(from));
  return out;
}

/** Writes a text into an element. */
function write(element, text, words, hasMath) {
  element.replaceChildren();
  if (!text.trim()) {
    element.append(make("span", "empty", "(empty)"));
    return;
  }
  for (const [kind, part, displayMode, source] of hasMath ? parts(text) : [["text", text]]) {
    if (kind === "math" && window.katex && part.length < 2000) {
      const span = make("span");
      try {
        const options = { displayMode, strict: false, maxExpand: 200, maxSize: 20 };
        katex.render(part, span, { ...options, trust: false });
        if (words && source.toLowerCase().includes(words)) {
          const hit = make("mark");
          hit.append(...span.childNodes);
          span.append(hit);
        }
        element.append(span);
        continue;
      } catch { /* no LaTeX after all: shown as it is */ }
    }
    element.append(marked(kind === "math" ? source : part, words));
  }
}
