// A new run. What differs from the defaults is kept in `values`; the server makes a settings file of it, has it
// checked, and says what is wrong where.
import { $, $$, count, duration, el, get, post, sentence, settled, size, t, toast } from "./common.js";
import { look } from "./look.js";
import { uploads } from "./upload.js";

const begin = JSON.parse($("#begin").textContent);
const main = new Set(begin.main.flat());
let asked = 0; // an estimate of settings that have changed since is not shown
let fields = new Map();
// From the first moment: what a person does while the fields are still on their way must not be lost.
let { values, jobs, extra, sweep } = begin.draft ?? { values: { ...begin.presets.good }, jobs: [], extra: {}, sweep: [] };
let looked = "";

const draft = () => ({ name: $("#name").value, values, jobs, extra, sweep });
const asText = (value) => (value == null ? "" : typeof value === "object" ? (Array.isArray(value) && value.every((one) => typeof one !== "object") ? value.join(", ") : JSON.stringify(value)) : String(value));

// ---- values and the controls that show them

function set(path, value) {
  if (value === "" || value == null) delete values[path];
  else values[path] = value;
  changed();
}

function showControls() {
  for (const control of $$("[data-path]"))
    if (control !== document.activeElement) control.value = asText(values[control.dataset.path] ?? (control.tagName === "SELECT" ? control.dataset.default : ""));
}

function showAll() {
  showControls();
  $("#others").replaceChildren();
  for (const path of Object.keys(values)) if (!main.has(path) && fields.has(path)) showOther(path);
  drawData();
  drawJobs();
  drawSweep();
  changed();
}

document.addEventListener("input", (event) => {
  const path = event.target.dataset?.path;
  if (path) {
    set(path, event.target.value.trim());
    $$("[data-preset]").forEach((one) => one.setAttribute("aria-pressed", "false"));
  }
});
$("#name").addEventListener("input", () => changed());
for (const pick of $$("[data-model]")) pick.addEventListener("click", () => { $("#model").value = pick.dataset.model; set("model.path", pick.dataset.model); });

for (const card of $$("[data-preset]"))
  card.addEventListener("click", () => {
    const kept = Object.fromEntries(["model.path", "data.train", "data.eval"].filter((path) => path in values).map((path) => [path, values[path]]));
    values = { ...kept, ...begin.presets[card.dataset.preset] };
    $$("[data-preset]").forEach((one) => one.setAttribute("aria-pressed", String(one === card)));
    showAll();
  });

// ---- what the base is

let described = "";
const describe = settled(async () => {
  const path = values["model.path"] ?? "", place = $("#model-about");
  if (path === described) return;
  described = path;
  place.hidden = true;
  if (!path) return;
  let about;
  try {
    about = await get(`/api/models/about?path=${encodeURIComponent(path)}`);
  } catch {
    return; // outside of the folders: the check says so at this field
  }
  if (path !== described) return;
  place.hidden = false;
  place.className = about.problem ? "dim small" : "good small";
  place.textContent = about.problem ? t(`base.${about.problem}`) : `${about.kind} · ${size(about.bytes)} · ${t(about.chat ? "base.chat" : "base.plain")} · ${t(`base.${about.where}`)}`;
}, 500);

// ---- data

function addData(path) {
  if (!path) return;
  values["data.train"] = [...new Set([...(values["data.train"] ?? []), path])];
  $("#pick-data").value = "";
  drawData();
  changed();
  lookAt(path);
}

function lookAt(path) {
  looked = path;
  look($("#look"), path, values["model.path"] ?? "");
}

function drawData() {
  const train = values["data.train"] ?? [];
  $("#chosen-data").replaceChildren(...train.map((source, place) => {
    const path = typeof source === "string" ? source : source.path;
    return el("li", {}, el("div", { class: "grow" }, el("strong", {}, path), typeof source === "string" ? null : el("span", { class: "dim" }, ` ${JSON.stringify(source)}`)),
      el("button", { type: "button", class: "quiet", "aria-label": `${t("look")} ${path}`, onclick: () => lookAt(path) }, t("look")),
      el("button", { type: "button", class: "quiet", "aria-label": `${t("remove")} ${path}`, onclick: () => { const left = train.filter((_, other) => other !== place); if (left.length) values["data.train"] = left; else delete values["data.train"]; if (looked === path) $("#look").replaceChildren(); drawData(); changed(); } }, t("remove")));
  }));
}
uploads(addData);
$("#add-data").addEventListener("click", () => addData($("#pick-data").value.trim()));
$("#pick-data").addEventListener("keydown", (event) => { if (event.key === "Enter") { event.preventDefault(); addData($("#pick-data").value.trim()); } });
$("#pick-data").addEventListener("change", () => { if ($$("#datas option").some((option) => option.value === $("#pick-data").value)) addData($("#pick-data").value); });

// ---- jobs

const columns = ["name", "adapter.type", "adapter.rank", "optimizer.learning_rate", "seed"];

function drawJobs() {
  $("#jobs").hidden = !jobs.length;
  $("#jobs tbody").replaceChildren(...jobs.map((job, place) => el("tr", {},
    ...columns.map((column) => el("td", {}, cell(job, column, place))),
    el("td", {}, el("button", { type: "button", class: "quiet", "aria-label": `${t("remove")} ${job.name}`, onclick: () => { jobs.splice(place, 1); drawJobs(); changed(); } }, "×")))));
}

function cell(job, column, place) {
  const label = `${column} ${place + 1}`;
  const keep = (event) => { if (event.target.value.trim()) job[column] = event.target.value.trim(); else delete job[column]; changed(); };
  if (column === "adapter.type") {
    const types = fields.get(column)?.choices ?? [];
    const select = el("select", { "aria-label": label, onchange: keep }, el("option", { value: "" }, "–"), ...types.map((type) => el("option", { value: type }, type)));
    select.value = job[column] ?? "";
    return select;
  }
  const input = el("input", { "aria-label": label, size: column === "name" ? 10 : 6, placeholder: asText(values[column] ?? $(`[data-path="${CSS.escape(column)}"]`)?.placeholder ?? ""), oninput: keep });
  input.value = asText(job[column]);
  return input;
}

$("#add-job").addEventListener("click", () => { jobs.push({ name: `job${jobs.length + 1}` }); drawJobs(); changed(); $("#jobs tbody tr:last-child input")?.focus(); });
$("#vary-rank").addEventListener("click", () => { jobs = [8, 16, 64].map((rank) => ({ name: `r${rank}`, "adapter.rank": rank })); drawJobs(); changed(); });
$("#vary-rate").addEventListener("click", () => { jobs = ["1e-4", "2e-4", "5e-4"].map((rate) => ({ name: `lr${rate}`, "optimizer.learning_rate": rate })); drawJobs(); changed(); });

// ---- a search

function drawSweep() {
  $("#sweep").hidden = $("#sweep-more").hidden = !sweep.length;
  $("#sweep tbody").replaceChildren(...sweep.map((row, place) => {
    const named = (path) => el("option", { value: path }, fieldName(path));
    const setting = el("select", { "aria-label": `${t("sweep.setting")} ${place + 1}`, onchange: (event) => { row.path = event.target.value; changed(); } },
      el("optgroup", { label: t("sweep.first") }, ...begin.swept.first.map(named)),
      el("optgroup", { label: t("sweep.all") }, ...begin.swept.all.slice(begin.swept.first.length).map(named)));
    setting.value = row.path;
    const how = el("select", { "aria-label": `${t("sweep.how")} ${place + 1}`, onchange: (event) => { row.how = event.target.value; text.placeholder = t(`sweep.way.${row.how}.hint`); changed(); } },
      ...begin.ways.map((way) => el("option", { value: way }, t(`sweep.way.${way}`))));
    how.value = row.how;
    const text = el("input", { "aria-label": `${t("sweep.values")} ${place + 1}`, value: row.text, autocomplete: "off", placeholder: t(`sweep.way.${row.how}.hint`), oninput: (event) => { row.text = event.target.value; changed(); } });
    const remove = el("button", { type: "button", class: "quiet", "aria-label": `${t("remove")} ${row.path}`, onclick: () => { sweep.splice(place, 1); drawSweep(); changed(); } }, "×");
    return el("tr", {}, ...[setting, how, text, remove].map((one) => el("td", {}, one)));
  }));
}

const fieldName = (path) => $(`.field[data-field="${CSS.escape(path)}"] label`)?.textContent ?? path;

$("#add-sweep").addEventListener("click", () => {
  const free = begin.swept.first.find((path) => !sweep.some((row) => row.path === path)) ?? begin.swept.first[0];
  sweep.push({ path: free, how: "values", text: "" });
  drawSweep();
  changed();
  $("#sweep tbody tr:last-child select")?.focus();
});
$("#sweep-usual").addEventListener("click", () => {
  sweep = [{ path: "adapter.rank", how: "values", text: "8, 16, 64" }, { path: "optimizer.learning_rate", how: "values", text: "1e-4, 3e-4, 1e-3" }];
  drawSweep();
  changed();
});

// ---- all other settings

const applies = (field) => !field.when || field.when[1].includes(String(values[field.when[0]] ?? fields.get(field.when[0])?.default ?? ""));

$("#search").addEventListener("input", () => {
  const words = $("#search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const hits = words.length ? [...fields.values()].filter((field) => words.every((word) => `${field.path} ${field.help}`.toLowerCase().includes(word))) : [];
  hits.sort((one, other) => Number(applies(other)) - Number(applies(one)));
  $("#found").textContent = words.length ? t("found", { number: hits.length }) : "";
  $("#results").replaceChildren(...hits.slice(0, 30).map((field) => el("li", {}, el("div", { class: "grow" }, el("code", {}, field.path), el("p", { class: "dim small" }, field.help), applies(field) ? null : el("p", { class: "dim small" }, t("only_with", { setting: field.when[0], types: field.when[1].join(", ") }))), el("button", { type: "button", "aria-label": `${t("set")} ${field.path}`, onclick: () => { const control = $(`[data-path="${CSS.escape(field.path)}"]`) ?? showOther(field.path); control.scrollIntoView({ block: "center" }); control.focus(); } }, t("set")))));
});

function showOther(path) {
  const known = $(`#others [data-path="${CSS.escape(path)}"]`);
  if (known) return known;
  const field = fields.get(path), id = `o-${path.replaceAll(".", "-")}`;
  const common = { id, "data-path": path, "data-default": asText(field.default), "aria-describedby": `${id}-help` };
  let control;
  if (field.kind === "choice" || field.kind === "switch") {
    const choices = field.kind === "switch" ? ["true", "false"] : field.choices;
    control = el("select", common, ...(field.default == null ? [el("option", { value: "" }, "–")] : []), ...choices.map((choice) => el("option", { value: choice }, choice)));
  } else control = el("input", { ...common, placeholder: field.default == null || field.default === "" ? t("automatic") : asText(field.default), autocomplete: "off" });
  control.value = asText(values[path] ?? (control.tagName === "SELECT" ? field.default : ""));
  $("#others").append(el("div", { class: "field", "data-field": path }, el("label", { for: id }, el("code", {}, path)), control, el("p", { class: "help", id: `${id}-help` }, field.help), el("p", { class: "problem", "data-problem": path, hidden: true })));
  return control;
}

// ---- check, estimate, start

let checked = 0;
const check = settled(async () => {
  const number = ++checked;
  let answer;
  try {
    answer = await post("/api/draft/check", draft());
  } catch (error) {
    answer = { problems: [{ path: "", text: error.message, own: true }], yaml: "", command: "", name: "" };
  }
  if (number !== checked || answer.superseded) return;
  if (document.activeElement !== $("#yaml")) $("#yaml").value = answer.yaml;
  $("#command").textContent = answer.command;
  $("#sweep-count").textContent = answer.candidates ? t("sweep.count", { number: count(answer.candidates) }) : "";
  $("#name-note").textContent = answer.taken ? t("taken") : answer.name && answer.name !== $("#name").value ? answer.name : "";
  showProblems(answer.problems);
}, 350);

function changed() {
  asked += 1;
  $("#plan").replaceChildren();
  check();
  describe();
}

function showProblems(problems) {
  $$("[data-problem]").forEach((one) => { one.hidden = true; one.textContent = ""; });
  $$("[aria-invalid]").forEach((one) => one.removeAttribute("aria-invalid"));
  const elsewhere = [];
  const started = values["model.path"] || values["data.train"];
  for (const problem of problems) {
    const { path } = problem;
    const place = $$("[data-problem]").find((one) => path === one.dataset.problem || path.startsWith(`${one.dataset.problem}.`));
    if (place && (started || !problem.missing)) {
      place.hidden = false;
      place.replaceChildren(sentence("span", problem));
      $(`[data-path="${CSS.escape(place.dataset.problem)}"]`)?.setAttribute("aria-invalid", "true");
    }
    elsewhere.push(sentence("li", problem, path ? `${path}${t("colon")}` : ""));
  }
  $("#problems").replaceChildren(...(problems.length
    ? [el("div", { class: started ? "box bad" : "box" }, el("strong", {}, started ? t("problems", { number: problems.length }) : t("incomplete")), started ? el("ul", { class: "notes" }, ...elsewhere.slice(0, 12)) : null)]
    : [el("p", { class: "good" }, `✓ ${t("valid")}`)]));
  $("#go").disabled = Boolean(problems.length);
}

$("#estimate").addEventListener("click", async () => {
  const button = $("#estimate"), begun = performance.now(), now = asked;
  const words = el("p", { class: "dim working" }, t("estimating"));
  const timer = setInterval(() => { words.textContent = `${t("estimating")} ${duration((performance.now() - begun) / 1000)}`; }, 1000);
  $("#plan").replaceChildren(words);
  button.disabled = true;
  try {
    for (const address of ["/api/draft/plan?brief=true", "/api/draft/plan"]) { // the answer first, then how fast and what else
      const answer = await post(address, draft());
      if (answer.superseded || asked !== now) return;
      if (!answer.plan) {
        $("#plan").replaceChildren(el("div", { class: "box bad" }, ...answer.problems.map((one) => sentence("p", one, one.path ? `${one.path}${t("colon")}` : ""))));
        return;
      }
      $("#plan").replaceChildren(...plan(answer.plan), ...(address.endsWith("true") ? [words] : []));
    }
  } catch (error) {
    $("#plan").replaceChildren(el("div", { class: "box bad" }, el("p", { class: "message" }, error.message)));
  } finally {
    clearInterval(timer);
    button.disabled = false;
  }
});

function plan({ plan: found, speed, changes_that_fit: changes, largest_micro_batch_tokens: largest, longest_document_tokens: longest }) {
  const share = Math.min(1, found.peak / found.available);
  const facts = [[t("plan.memory"), t("plan.of", { peak: size(found.peak), free: size(found.available) })]];
  if (speed) facts.push([t("plan.time"), duration(speed.seconds_to_train)], [t("plan.speed"), `${count(speed.tokens_per_second)} tok/s`]);
  const faster = speed?.times_faster_than_one_after_another;
  if (faster != null) facts.push([t("plan.together"), faster < 1.05 ? t("plan.together.same") : t("plan.together.faster", { faster })]);
  facts.push([t("plan.device"), found.device]);
  if (longest) facts.push([t("plan.longest"), t("plan.tokens", { tokens: count(longest) })], [t("plan.largest"), t("plan.tokens", { tokens: count(largest) })]);
  const parts = Object.entries(found.step).filter(([, bytes]) => bytes > 0);
  return [
    el("div", { class: found.fits ? "box" : "box bad" }, el("p", {}, el("strong", {}, found.fits ? t("plan.fits") : t("plan.no"))),
      el("meter", { min: 0, max: 1, high: 0.92, value: share, "aria-label": t("plan.memory") }),
      el("dl", { class: "facts tight" }, ...facts.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value)))),
      changes?.length ? el("div", {}, el("p", {}, t("plan.changes")), el("ul", { class: "notes" }, ...changes.map((one) => sentence("li", one)))) : null,
      el("details", {}, el("summary", {}, t("plan.parts")), el("dl", { class: "facts tight" }, ...[...parts, ["process", found.process]].map(([name, bytes]) => el("div", {}, el("dt", {}, t(`plan.part.${name}`)), el("dd", {}, size(bytes)))))))
  ];
}

$("#form").addEventListener("submit", async (event) => {
  event.preventDefault();
  $("#go").disabled = true;
  try {
    const answer = await post("/api/draft/start", draft());
    location.href = `/runs/${encodeURIComponent(answer.name)}`;
  } catch (error) {
    showProblems([{ path: "", text: error.message, own: true }]);
    $("#go").disabled = false;
  }
});

// ---- files in and out

async function read(text) {
  $("#read-notes").textContent = t("reading");
  try {
    const answer = await post("/api/draft/read", { text });
    if (answer.problems) {
      $("#read-notes").textContent = answer.problems.map((one) => `${one.path ? `${one.path}${t("colon")}` : ""}${one.own ? one.text : t("output.of", { text: one.text })}`).join("\n");
      return;
    }
    if (answer.superseded) return;
    ({ values, jobs, extra, sweep } = answer.draft);
    $("#read-notes").textContent = answer.notes || t("read");
    showAll();
  } catch (error) {
    $("#read-notes").textContent = error.message;
  }
}

function save(name, text) {
  const link = el("a", { href: URL.createObjectURL(new Blob([text], { type: "application/yaml" })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

$("#read-yaml").addEventListener("click", () => read($("#yaml").value));
$("#yaml-file").addEventListener("change", async (event) => { if (event.target.files[0]) await read(await event.target.files[0].text()); event.target.value = ""; });
$("#save-yaml").addEventListener("click", async () => { const answer = await post("/api/draft/check", draft()); save(`${answer.name || "run"}.yaml`, answer.yaml); });
$("#save-llamafactory").addEventListener("click", async () => { try { save("llamafactory.yaml", (await post("/api/draft/llamafactory", draft())).text); } catch (error) { toast(error.message, true); } });

showControls(); // they came with the page; only what is drawn from the fields waits for them
$("#form").inert = false; // before, nothing would handle a click
fields = new Map((await get("/api/fields")).map((field) => [field.path, field]));
if (!begin.draft && $$('[data-preset][aria-pressed="true"]').length === 0) $(`[data-preset="good"]`).setAttribute("aria-pressed", "true");
showAll();
post("/api/worker/warm").catch(() => {});
