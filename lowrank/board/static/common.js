// What every page needs: texts, requests, parts that the server draws anew, and a stream that says when.

const texts = JSON.parse(document.getElementById("texts").textContent);

export const t = (key, values = {}) =>
  (texts[key] ?? key).replace(/\{(\w+)\}/g, (whole, name) => (name in values ? values[name] : whole));

export const $ = (selector, within = document) => within.querySelector(selector);
export const $$ = (selector, within = document) => [...within.querySelectorAll(selector)];

/** An element; children that are texts stay texts, whatever stands in them. */
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child != null && child !== false));
  return node;
}

/** What a command said, `{text, own}`: where it is not in the page's language, it is announced as output. */
export const sentence = (tag, { text, own }, ...before) =>
  own ? el(tag, {}, ...before, text) : el(tag, {}, ...before, t("output.of", { text: "" }), el("span", { lang: "en" }, text));

/** POST JSON and read JSON; an error carries the words of the command or of the board. */
export async function post(url, body = {}, options = {}) {
  let answer;
  try {
    answer = await fetch(url, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error(t("offline"));
  }
  const content = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(content.error?.message ?? `${answer.status}`);
  return content;
}

export async function get(url) {
  const answer = await fetch(url, { headers: { Accept: "application/json" } });
  if (!answer.ok) throw new Error(`${answer.status}`);
  return answer.json();
}

export function toast(text, bad = false) {
  const note = el("div", { class: bad ? "toast bad" : "toast" }, text);
  $("#toasts").append(note);
  setTimeout(() => note.remove(), bad ? 12000 : 4000);
}

/** Have the server draw a part again. Focus, opened details and typed texts of it stay. */
export async function refresh(part) {
  let text;
  try {
    const answer = await fetch(part.dataset.part);
    if (!answer.ok) return;
    text = await answer.text();
  } catch {
    return; // the board is being started again; the stream will say so
  }
  if (part.drawn === text || part.contains(document.activeElement) && document.activeElement.matches("input, textarea, select")) return;
  part.drawn = text;
  const opened = $$("details", part).map((one) => one.open);
  const key = part.contains(document.activeElement) ? document.activeElement.dataset.key : null;
  const scrolled = $$(".log, .scroll", part).map((one) => [one.scrollLeft, one.scrollTop, one.scrollTop + one.clientHeight >= one.scrollHeight - 4]);
  part.innerHTML = text; // drawn by our server, which escapes what it is given
  $$("details", part).forEach((one, place) => { if (place < opened.length) one.open = opened[place]; });
  $$(".log, .scroll", part).forEach((one, place) => {
    const [left, top, atEnd] = scrolled[place] ?? [0, 0, true];
    one.scrollLeft = left;
    one.scrollTop = one.matches(".log") && atEnd ? one.scrollHeight : top;
  });
  if (key) $(`[data-key="${CSS.escape(key)}"]`, part)?.focus();
}

/** Messages of a stream. It rests while the page is hidden, since a browser has few connections, and goes on after. */
export function listen(address, handlers) {
  let stream = null;
  const open = () => {
    stream = new EventSource(address());
    for (const [name, handler] of Object.entries(handlers)) stream.addEventListener(name, (message) => handler(JSON.parse(message.data), message.lastEventId));
    stream.onerror = () => {
      document.body.classList.add("away");
      if (stream.readyState === EventSource.CLOSED) setTimeout(() => { close(); if (!document.hidden) open(); }, 3000);
    };
    stream.onopen = () => document.body.classList.remove("away");
  };
  const close = () => { stream?.close(); stream = null; };
  document.addEventListener("visibilitychange", () => (document.hidden ? close() : stream ?? open()));
  window.addEventListener("pagehide", close);
  if (!document.hidden) open();
}

/** At most one call per so many milliseconds; the last one is never lost. */
export function calmly(work, pause) {
  let timer = null, again = false;
  const run = async () => {
    timer = setTimeout(() => { timer = null; if (again) { again = false; run(); } }, pause);
    await work();
  };
  return () => { if (timer) again = true; else run(); };
}

/** After the last of many calls. */
export function settled(work, pause) {
  let timer;
  return (...given) => { clearTimeout(timer); timer = setTimeout(() => work(...given), pause); };
}

export function size(bytes) {
  if (bytes == null) return "–";
  for (const [unit, large] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]])
    if (bytes >= large) return `${(bytes / large).toFixed(unit === "GB" ? 1 : 0)} ${unit}`;
  return `${bytes} B`;
}

export function duration(seconds) {
  if (seconds == null || !Number.isFinite(seconds)) return "–";
  const whole = Math.max(0, Math.round(seconds));
  if (whole < 60) return `${whole} s`;
  const two = (number) => String(number).padStart(2, "0");
  const [hours, minutes] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60];
  if (!hours) return `${minutes}:${two(whole % 60)}`;
  return hours < 24 ? `${hours}:${two(minutes)}:${two(whole % 60)}` : `${Math.floor(hours / 24)} d ${two(hours % 24)}:${two(minutes)}`;
}

export const count = (number) => (number == null ? "–" : Math.round(number).toLocaleString("en-US"));

document.addEventListener("click", async (happened) => {
  const button = happened.target.closest("[data-post], [data-copy], [data-copy-from]");
  if (!button) return;
  happened.preventDefault();
  if (!button.dataset.post) {
    const text = button.dataset.copy ?? document.getElementById(button.dataset.copyFrom).textContent;
    try {
      await navigator.clipboard.writeText(text);
      toast(t("copied"));
    } catch {
      const code = button.previousElementSibling; // without https on another host there is no clipboard
      getSelection().selectAllChildren(code);
    }
    return;
  }
  if (button.dataset.sure && !confirm(button.dataset.sure)) return;
  button.disabled = true;
  try {
    await post(button.dataset.post, JSON.parse(button.dataset.body ?? "{}"));
  } catch (error) {
    toast(error.message, true);
    button.disabled = false;
  }
  $$("[data-part]").forEach(refresh);
});

document.addEventListener("submit", async (happened) => {
  const form = happened.target;
  if (!form.dataset.send) return;
  happened.preventDefault();
  const body = {};
  for (const field of form.elements) {
    if (!field.name || field.value === "") continue;
    body[field.name] = field.dataset.number !== undefined ? Number(field.value) : field.type === "checkbox" ? field.checked : field.value;
  }
  form.dispatchEvent(new CustomEvent("sending", { detail: body }));
  try {
    await post(form.dataset.send, body);
    toast(t("queued"));
  } catch (error) {
    toast(error.message, true);
  }
  document.activeElement?.blur();
  $$("[data-part]").forEach(refresh);
});
