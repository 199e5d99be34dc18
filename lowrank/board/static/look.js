// What the data doctor says of a file: rows, what is lost and where, and samples with what carries loss colored.
import { count, el, post, sentence, t } from "./common.js";

let asked = 0;

export async function look(place, path, model = "") {
  const number = ++asked;
  place.replaceChildren(el("p", { class: "dim working" }, t("looking", { path })));
  let answer;
  try {
    answer = await post("/api/data/look", { path, model });
  } catch (error) {
    answer = { problem: error.message };
  }
  if (number !== asked || answer.superseded) return;
  place.replaceChildren(...(answer.report ? report(path, answer.report) : [el("div", { class: "box bad" }, el("p", { class: "message" }, answer.problem))]));
}

function report(path, found) {
  const sets = found.datasets ?? [];
  const read = sets.reduce((sum, set) => sum + set.read, 0), used = sets.reduce((sum, set) => sum + set.used, 0);
  const facts = [
    [t("look.format"), [...new Set(sets.map((set) => set.format))].join(", ")],
    [t("look.rows"), t("look.used", { used: count(used), read: count(read) })],
    [t("look.tokens"), count(found.train_tokens)],
    [t("look.learned"), `${(100 * found.learned_share).toFixed(1)} %`],
  ];
  if (found.lengths) facts.push([t("look.lengths"), `${count(found.lengths.shortest)} – ${count(found.lengths.longest)}, ⌀ ${count(found.lengths.mean)}`]);
  const parts = [el("h3", {}, path), el("dl", { class: "facts" }, ...facts.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))))];
  const losses = found.losses ?? [], others = found.notices ?? [];
  if (losses.length) parts.push(el("div", { class: "box bad" }, el("p", {}, el("strong", {}, t("look.problems"))), el("ul", { class: "notes" }, ...losses.map((one) => sentence("li", one)))));
  else parts.push(el("p", { class: "good" }, `✓ ${t("look.fine")}`));
  if (others.length) parts.push(el("ul", { class: "notes dim" }, ...others.slice(0, 20).map((one) => sentence("li", one))));
  if (found.shown?.length) {
    parts.push(el("p", { class: "dim small" }, t("look.shown"), " ", el("mark", {}, t("look.mark"))));
    if (found.pairs_shown) parts.push(el("p", { class: "dim small" }, t("look.pairs")));
    for (const [number, sample] of found.shown.slice(0, 4).entries()) {
      if (found.pairs_shown) parts.push(el("p", { class: "dim small" }, number % 2 ? t("look.rejected") : t("look.chosen")));
      parts.push(el("pre", { class: "sample", tabindex: "0" }, ...sample.map(([text, weight]) => (weight > 0 ? el("mark", {}, text) : text))));
    }
  }
  return parts;
}
