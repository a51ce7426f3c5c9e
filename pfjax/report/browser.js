"use strict";
// The browser of completions: what a run said to a prompt at two of its steps, side by side.

const PAGE = 8; // prompts shown at once
const $ = (id) => document.getElementById(id);
let said = { prompts: [], evaluations: [] }; // see samples.py
let shownPrompts = PAGE;
let manySets = false; // of prompts: each says which it is from

/** The samples were packed with gzip, as they are most of the page. */
async function unpack() {
  const bytes = Uint8Array.from(atob($("samples-data").textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

/** Samples by the number of a prompt, [[text, tokens, isWhole, answer, isCorrect]]. */
const evaluation = (run, step) =>
  said.evaluations.find((e) => e.run === run && e.step === step)?.samples ?? {};

const steps = (run) => said.evaluations.filter((e) => e.run === run).map((e) => e.step);

const fraction = (samples) =>
  !samples || samples[0][4] === null ? null
    : samples.filter((s) => s[4]).length / samples.length;

function option(value, text) {
  const element = make("option", "", text);
  element.value = value;
  return element;
}

/** The first sample whose verdict is that of most. */
function typical(samples) {
  const part = fraction(samples);
  if (part === null || part === 0.5) return 0;
  return Math.max(0, samples.findIndex((s) => s[4] === part > 0.5));
}

const KINDS = {
  changed: (a, b) => a !== b,
  better: (a, b) => b > a,
  worse: (a, b) => b < a,
  correct: (a, b) => b > 0.5,
  incorrect: (a, b) => b <= 0.5,
};

/** Prompts that pass all filters; of one kind, those that changed most first. */
function chosen() {
  const run = +$("run").value;
  const [before, after] = [evaluation(run, +$("before").value), evaluation(run, +$("after").value)];
  const words = $("search").value.trim().toLowerCase();
  const kind = KINDS[$("kind").value];
  const only = $("prompt").value;
  const has = (i) => said.prompts[i].text.toLowerCase().includes(words)
    || said.prompts[i].set === words
    || [before[i], after[i]].some((x) => x?.some((s) => s[0].toLowerCase().includes(words)));
  const found = said.prompts.map((_, i) => i).filter((i) => {
    if ((!before[i] && !after[i]) || (only && +only !== i)) return false;
    const parts = [fraction(before[i]), fraction(after[i])];
    if (kind && (parts.includes(null) || !kind(...parts))) return false;
    return !words || has(i);
  });
  if (!kind) return { found, before, after, words };
  const change = (i) => Math.abs(fraction(after[i]) - fraction(before[i]));
  return { found: found.sort((a, b) => change(b) - change(a)), before, after, words };
}

function side(name, samples, words, hasMath) {
  const element = make("div", "side");
  const when = element.appendChild(make("div", "when"));
  const text = make("div", "said");
  const more = make("button", "more", "show all");
  more.type = "button";
  const fold = () => {
    text.classList.add("folded");
    more.hidden = text.scrollHeight <= parseFloat(getComputedStyle(text).maxHeight);
    text.classList.toggle("folded", !more.hidden);
  };
  more.addEventListener("click", () => {
    text.classList.remove("folded");
    more.hidden = true;
  });
  const show = (i) => {
    const [body, tokens, isWhole, answer, isCorrect] = samples[i];
    when.replaceChildren(make("b", "", name));
    if (isCorrect !== null) {
      when.append(make("span", isCorrect ? "good" : "bad", isCorrect ? "✓ correct" : "✗ incorrect"));
    }
    when.append(`${tokens} tokens${isWhole ? "" : ", cut"}${answer === null ? ", no answer" : ""}`);
    const dots = when.appendChild(make("span", "samples"));
    samples.forEach((s, j) => {
      const verdict = s[4] === null ? "" : s[4] ? "yes" : "no";
      const dot = dots.appendChild(make("button", verdict));
      dot.type = "button";
      dot.title = `sample ${j}${verdict ? (s[4] ? ", correct" : ", incorrect") : ""}`;
      dot.setAttribute("aria-label", dot.title);
      dot.setAttribute("aria-pressed", String(j === i));
      dot.addEventListener("click", () => show(j));
    });
    write(text, body, words, hasMath);
    fold();
  };
  element.append(text, more);
  const hit = words ? samples.findIndex((s) => s[0].toLowerCase().includes(words)) : -1;
  return [element, () => show(hit >= 0 ? hit : typical(samples))];
}

function card(i, { before, after, words }) {
  const { text, gold, set } = said.prompts[i];
  const hasMath = !$("plain")?.checked;
  const element = make("article", "prompt");
  const head = element.appendChild(make("header"));
  write(head.appendChild(make("div", "said")), text, words, hasMath);
  const facts = head.appendChild(make("div", "note", set && manySets ? `${set} · ` : ""));
  if (gold !== null) {
    facts.append("correct answer ");
    write(facts.appendChild(make("span")), /\\/.test(gold) ? `\\(${gold}\\)` : gold, "", hasMath);
    const counts = [before[i], after[i]].filter(Boolean).map(
      (samples) => `${samples.filter((s) => s[4]).length} of ${samples.length}`);
    facts.append(` · correct samples ${counts.join(" → ")}`);
  }
  const pair = element.appendChild(make("div", "pair"));
  const fills = [["before", before[i]], ["after", after[i]]].filter((x) => x[1]).map(
    ([id, samples]) => {
      const [half, fill] = side(`step ${$(id).value}`, samples, words, hasMath);
      pair.append(half);
      return fill;
    });
  return [element, () => fills.forEach((fill) => fill())];
}

function showPrompts() {
  const choice = chosen();
  const { found, before, after } = choice;
  const known = said.prompts.map((_, i) => [fraction(before[i]), fraction(after[i])])
    .filter((x) => !x.includes(null));
  const count = (kind) => known.filter((x) => KINDS[kind](...x)).length;
  $("found").textContent = `${found.length} prompt${found.length === 1 ? "" : "s"} found`
    + (known.length ? `. From step ${$("before").value} to ${$("after").value} of this run`
      + ` ${count("better")} are more often correct, ${count("worse")} less often,`
      + ` of ${known.length}.` : ".");
  const cards = found.slice(0, shownPrompts).map((i) => card(i, choice));
  $("prompts").replaceChildren(...cards.map(([element]) => element));
  cards.forEach(([, fill]) => fill()); // what is folded is known once it has a place
  const left = found.length - cards.length;
  $("more").hidden = left <= 0;
  $("more").textContent = `show ${Math.min(PAGE, left)} more of ${left}`;
}

function showSteps() {
  const known = steps(+$("run").value);
  for (const [id, at] of [["before", 0], ["after", known.length - 1]]) {
    $(id).replaceChildren(...known.map((s) => option(s, `step ${s}`)));
    $(id).value = known[at];
  }
}

const FILTERS = ["run", "before", "after", "kind", "prompt", "search"];
const KEPT = `pfjax ${location.pathname}`;

/** A page that is watched comes back as it was left. */
function restore() {
  const kept = JSON.parse(sessionStorage.getItem(KEPT) ?? "{}");
  for (const id of FILTERS) {
    const element = $(id);
    const isThere = !element.options || [...element.options].some((o) => o.value === kept[id]);
    if (kept[id] !== undefined && isThere) element.value = kept[id];
    if (id === "run") showSteps();
  }
}

async function startBrowser() {
  said = await unpack();
  manySets = new Set(said.prompts.map((p) => p.set)).size > 1;
  const numbers = [...new Set(said.evaluations.map((e) => e.run))];
  $("run").replaceChildren(...numbers.map((i) => option(i, data.runs[i])));
  const short = (text) => (text.length > 70 ? `${text.slice(0, 70)}…` : text);
  $("prompt").append(...said.prompts.map((p, i) => option(i, `${i}: ${short(p.text)}`)));
  if (said.prompts.every((p) => p.gold === null)) $("kind").parentElement.hidden = true;
  restore();
  const changed = (id) => {
    if (id === "run") showSteps();
    shownPrompts = PAGE;
    showPrompts();
    const kept = Object.fromEntries(FILTERS.map((f) => [f, $(f).value]));
    if (data.version) sessionStorage.setItem(KEPT, JSON.stringify(kept));
  };
  for (const id of [...FILTERS, "plain"]) {
    const event = $(id)?.tagName === "SELECT" ? "change" : "input";
    $(id)?.addEventListener(event, () => changed(id));
  }
  $("more").addEventListener("click", () => {
    shownPrompts += PAGE;
    showPrompts();
  });
  showPrompts();
}

if ($("samples-data")) startBrowser();
