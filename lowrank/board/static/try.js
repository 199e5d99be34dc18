// Talking to the base and to adapters side by side. The history is that of the first model.
import { $, $$, el, post, get, t, toast } from "./common.js";
import { pictures, thumbnail } from "./pictures.js";

const run = $("#chat").dataset.run;
const MOST_BYTES = 23 << 20; // of all that goes with a question
let task = null, models = [], history = [], asking = null, supportsImages = false;
const shown = () => history.flatMap((turn) => (Array.isArray(turn.content) ? turn.content : [])).filter((part) => part.type === "image_url");
const album = pictures(() => shown().length, () => supportsImages);

async function open() {
  $("#open").disabled = true;
  try {
    task = (await post(`/api/runs/${encodeURIComponent(run)}/chat`, { which: $("#which").value })).task;
    await until();
  } catch (error) {
    toast(error.message, true);
    $("#chat-state").textContent = "";
  }
  $("#open").disabled = false;
}

async function until() {
  for (;;) {
    const now = await get(`/api/chat/${task}`);
    if (now.state === "ready") break;
    if (!["waiting", "loading"].includes(now.state)) throw new Error(now.message || t("chat.over"));
    $("#chat-state").textContent = now.state === "waiting" ? t("chat.waiting", { behind: now.behind.join(", ") }) : t("chat.loading");
    await new Promise((resolve) => setTimeout(resolve, 500));
  }
  for (let tries = 0; !models.length; tries += 1) {
    try {
      ({ models, supports_images: supportsImages } = await get(`/api/chat/${task}/models`));
    } catch (error) {
      if (tries > 20) throw error;
      await new Promise((resolve) => setTimeout(resolve, 300));
    }
  }
  $("#chat-state").textContent = "";
  $("#opening").hidden = true;
  $("#talking").hidden = false;
  const first = models.filter((model) => model !== "base").slice(0, 2);
  $("#models").append(...models.map((model) => el("label", {}, el("input", { type: "checkbox", value: model, checked: first.includes(model) || model === "base" || models.length < 3 }), ` ${model}`)));
  $("#add-picture").hidden = $("#picture-keys").hidden = !supportsImages;
  $("#question").focus();
}

const chosen = () => {
  const names = $$("#models input:checked").map((input) => input.value);
  return [...names.filter((name) => name !== "base"), ...names.filter((name) => name === "base")];
};

async function ask(question) {
  const names = chosen();
  if (!names.length || (!question.trim() && !album.any()) || asking) return;
  asking = new AbortController();
  const looked = await album.take();
  if ([...shown().map((part) => part.image_url), ...looked].reduce((sum, { url }) => sum + url.length, 0) > MOST_BYTES) {
    asking = null;
    return toast(t("picture.full"), true);
  }
  $("#question").value = "";
  $("#halt").hidden = false;
  $("#send").disabled = true;
  history.push({ role: "user", content: looked.length ? [...looked.map(({ url }) => ({ type: "image_url", image_url: { url } })), { type: "text", text: question }] : question });
  const answers = names.map((name) => ({ name, text: "", place: el("div", { class: "text" }, "…"), note: el("span", { class: "dim small" }) }));
  $("#turns").append(el("article", { class: "turn" }, looked.length ? el("div", { class: "pictures" }, ...looked.map(thumbnail)) : null, el("p", { class: "asked text" }, question), el("div", { class: "answers-side" }, ...answers.map((one) => el("section", { class: one.name === "base" ? "answer base" : "answer" }, el("h3", {}, one.name, " ", one.note), one.place)))));
  $("#turns").lastChild.scrollIntoView({ block: "end" });
  const system = $("#system").value.trim();
  const messages = [...(system ? [{ role: "system", content: system }] : []), ...history];
  await Promise.all(answers.map((one) => stream(one, messages)));
  if (answers.every((one) => one.failed)) history.pop(); // or nothing asked later would be answered
  else history.push({ role: "assistant", content: answers[0].text });
  asking = null;
  $("#halt").hidden = true;
  $("#send").disabled = false;
}

async function stream(one, messages) {
  const begun = performance.now();
  let pieces = 0;
  try {
    const answer = await fetch(`/api/chat/${task}/say`, {
      method: "POST", headers: { "Content-Type": "application/json" }, signal: asking.signal,
      body: JSON.stringify({ model: one.name, messages, temperature: Number($("#temperature").value), top_p: Number($("#top-p").value), max_tokens: Number($("#max-tokens").value) }),
    });
    if (!answer.ok) throw new Error((await answer.json()).error?.message ?? answer.status);
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let rest = ""; ;) {
      const { value, done } = await reader.read();
      if (done) break;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
        const event = JSON.parse(line.slice(6));
        if (event.error) throw new Error(event.error.message);
        const more = event.choices?.[0]?.delta?.content ?? "";
        if (more) pieces += 1;
        one.text += more;
        one.place.textContent = one.text;
      }
    }
    if (!one.text) one.place.textContent = t("chat.empty");
    one.note.textContent = `${(pieces / Math.max(0.001, (performance.now() - begun) / 1000)).toFixed(0)} tok/s`;
  } catch (error) {
    if (error.name === "AbortError") one.note.textContent = t("chat.halted");
    else {
      one.failed = true;
      one.place.append(el("p", { class: "problem" }, error.message));
    }
  }
}

$("#open").addEventListener("click", open);
$("#ask").addEventListener("submit", (event) => { event.preventDefault(); ask($("#question").value); });
$("#question").addEventListener("keydown", (event) => { if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); $("#ask").requestSubmit(); } });
$("#halt").addEventListener("click", () => asking?.abort());
$("#again").addEventListener("click", () => { history = []; album.clear(); $("#turns").replaceChildren(); $("#question").focus(); });
$("#close").addEventListener("click", async () => {
  await post(`/api/chat/${task}/close`).catch(() => {});
  [task, models, history, supportsImages] = [null, [], [], false];
  album.clear();
  $("#models").querySelectorAll("label").forEach((one) => one.remove());
  $("#turns").replaceChildren();
  $("#talking").hidden = true;
  $("#opening").hidden = false;
});
