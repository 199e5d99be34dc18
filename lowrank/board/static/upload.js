// Files from the person's machine to the board's data folder, by button or by drag.
import { $, el, size, t } from "./common.js";

export function uploads(done) {
  const drop = $("#drop"), input = $("#file"), list = $("#uploading");
  const send = (file) => new Promise((resolve) => {
    const bar = el("progress", { max: 1, value: 0, "aria-label": file.name });
    const words = el("span", {}, `${file.name} `, el("span", { class: "dim" }, size(file.size)));
    const row = el("div", { class: "upload" }, words, bar);
    list.append(row);
    const request = new XMLHttpRequest(); // fetch does not tell how far an upload is
    request.upload.onprogress = (event) => { bar.value = event.loaded / event.total; };
    request.onload = () => {
      const answer = JSON.parse(request.responseText || "{}");
      if (request.status === 200) {
        row.remove();
        done(answer.path);
      } else {
        bar.remove();
        words.append(el("span", { class: "problem" }, ` ${answer.error?.message ?? request.status}`));
      }
      resolve();
    };
    request.onerror = () => { bar.remove(); words.append(el("span", { class: "problem" }, ` ${t("offline")}`)); resolve(); };
    request.open("POST", `/api/upload?name=${encodeURIComponent(file.name)}`);
    request.send(file);
  });
  const all = async (files) => { for (const file of files) await send(file); };
  input.addEventListener("change", () => { all([...input.files]); input.value = ""; });
  drop.addEventListener("dragover", (event) => { event.preventDefault(); drop.classList.add("over"); });
  drop.addEventListener("dragleave", () => drop.classList.remove("over"));
  drop.addEventListener("drop", (event) => { event.preventDefault(); drop.classList.remove("over"); all([...event.dataTransfer.files]); });
}
