// The data page: upload, and look at a file.
import { $, $$, el, t } from "./common.js";
import { look } from "./look.js";
import { uploads } from "./upload.js";

const show = (path) => {
  $("#looked").scrollIntoView({ block: "start" });
  look($("#look"), path, $("#count-model").value.trim());
};
uploads((path) => {
  $("#list").prepend(el("li", {}, el("div", { class: "grow" }, el("strong", {}, path)), el("button", { "data-look": path }, t("look"))));
  show(path);
});
document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-look]");
  if (button) show(button.dataset.look);
});
if ($("#looked-section").dataset.lookNow) show($("#looked-section").dataset.lookNow);
