// Pictures for the next question: by button, by paste, by drag. They stay in the page and go with the question; no file
// of theirs is kept anywhere.
import { $, el, size, t, toast } from "./common.js";

const TYPES = ["image/png", "image/jpeg", "image/webp", "image/gif"];
const MOST = 16, MOST_BYTES = 64 << 20;
const LARGE_BYTES = 2 << 20, LARGE_PIXELS = 4 << 20, LONGEST_SIDE = 2048; // models look at less; a conversation sends them again

/** Pictures beside the question field. `held()`: how many the conversation has already; `open()`: whether the model looks. */
export function pictures(held, open) {
  const list = $("#pictures"), input = $("#picture-file"), button = $("#add-picture"), form = $("#ask");
  let chosen = [], adding = Promise.resolve();

  function draw() {
    list.hidden = !chosen.length;
    list.replaceChildren(...chosen.map((one) => el("li", {}, thumbnail(one),
      el("button", { type: "button", class: "quiet", "aria-label": t("picture.remove", { name: one.name }), onclick: () => { chosen = chosen.filter((other) => other !== one); draw(); (list.querySelector("button") ?? button).focus(); } }, "×"))));
  }

  async function add(file) {
    if (!open()) return toast(t("picture.blind"), true);
    if (held() + chosen.length >= MOST) return toast(t("picture.many", { most: MOST }), true);
    if (!TYPES.includes(file.type)) return toast(t("picture.none", { name: file.name }), true);
    if (file.size > MOST_BYTES) return toast(t("picture.large", { name: file.name, most: size(MOST_BYTES) }), true);
    try {
      chosen.push(await read(file));
      draw();
    } catch {
      toast(t("picture.none", { name: file.name }), true); // its bytes are not what its name says
    }
  }

  const all = (files) => { for (const file of files) adding = adding.then(() => add(file)); };
  const has = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
  button.addEventListener("click", () => input.click());
  input.addEventListener("change", () => { all([...input.files]); input.value = ""; $("#question").focus(); });
  form.addEventListener("paste", (event) => { if (event.clipboardData.files.length) { event.preventDefault(); all([...event.clipboardData.files]); } });
  form.addEventListener("dragover", (event) => { if (has(event)) { event.preventDefault(); form.classList.add("over"); } });
  form.addEventListener("dragleave", () => form.classList.remove("over"));
  form.addEventListener("drop", (event) => { if (has(event)) { event.preventDefault(); form.classList.remove("over"); all([...event.dataTransfer.files]); } });

  return {
    /** What was chosen, when all of it is read; the field is empty then. */
    async take() {
      await adding;
      const taken = chosen;
      chosen = [];
      draw();
      return taken;
    },
    any: () => chosen.length > 0,
    clear() { chosen = []; draw(); },
  };
}

export const thumbnail = (one) => el("img", { src: one.url, alt: t("picture.of", { name: one.name }), title: one.note, loading: "lazy" });

/** `{name, note, url}`, the url with the picture in it. Throws for bytes that are no picture. */
async function read(file) {
  const image = await createImageBitmap(file);
  const { width, height } = image;
  const large = file.size > LARGE_BYTES || width * height > LARGE_PIXELS;
  if (!large) return { name: file.name, note: `${file.name} · ${width} × ${height}`, url: await dataUrl(file) };
  const scale = Math.min(1, LONGEST_SIDE / Math.max(width, height));
  const canvas = el("canvas", { width: Math.max(1, Math.round(width * scale)), height: Math.max(1, Math.round(height * scale)) });
  const pen = canvas.getContext("2d");
  pen.fillStyle = "white"; // JPEG knows no transparency; models are shown it on white as well
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.drawImage(image, 0, 0, canvas.width, canvas.height);
  return { name: file.name, note: t("picture.shrunk", { name: file.name, width: canvas.width, height: canvas.height }), url: canvas.toDataURL("image/jpeg", 0.92) };
}

const dataUrl = (file) => new Promise((resolve, reject) => {
  const reader = new FileReader();
  reader.onload = () => resolve(reader.result);
  reader.onerror = reject;
  reader.readAsDataURL(file);
});
