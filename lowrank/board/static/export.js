// Exports: which target and whose adapter goes with each card's form; the list follows.
import { $, $$ } from "./common.js";
import "./measure.js";

for (const form of $$("form[data-target]"))
  form.addEventListener("sending", ({ detail }) => {
    detail.target = form.dataset.target;
    if ($("#adapter")?.value) detail.adapter = $("#adapter").value;
  });
