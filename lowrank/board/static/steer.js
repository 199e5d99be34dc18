// Live commands to the adapters of a run that trains: two dialogs, each command with the command line that gives the same.
import { $, $$, get, post, refresh, settled, t } from "./common.js";

const address = `/api/runs/${encodeURIComponent($("#steer").dataset.run)}/commands`;
const waiting = new Map(); // the dialog's number of the command that is answered next: an older answer is not shown
let job = "";

/** What stands in the fields of a command. */
function wanted(command) {
  const body = { kind: command.dataset.kind, job };
  if (body.kind === "add") delete body.job;
  const changes = {};
  for (const field of $$("[data-change]", command)) if (field.value.trim()) changes[field.dataset.change] = field.value.trim();
  if (Object.keys(changes).length) body.changes = changes;
  for (const field of $$("[name]", command)) {
    if (field.type === "checkbox") body[field.name] = field.checked;
    else if (field.type === "number") body[field.name] = Math.round(Number(field.value) || 0);
    else if (field.value.trim()) body[field.name] = field.name === "text" ? field.value : field.value.trim();
  }
  return body;
}

/** The command line and what is wrong with it, without sending the command. */
async function preview(command) {
  const number = (command.number = (command.number ?? 0) + 1);
  let answer;
  try {
    answer = await post(`${address}/preview`, wanted(command));
  } catch (error) {
    answer = { problem: error.message };
  }
  if (number !== command.number) return;
  $(".command", command).hidden = !answer.command_line;
  $("code", command).textContent = answer.command_line ?? "";
  const touched = [...$$("input:not([type=number]), textarea", command)].some((field) => field.value);
  $(".problem", command).hidden = !answer.problem || !touched;
  $(".problem", command).textContent = answer.problem ?? "";
  $("[data-give]", command).disabled = Boolean(answer.problem);
}

for (const command of $$(".live-command")) {
  const later = settled(() => preview(command), 250);
  command.addEventListener("input", later);
  $("[data-give]", command).addEventListener("click", () => give(command));
  $("[data-copy-near]", command).addEventListener("click", (event) => copy(event.target));
  command.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && event.target.matches("input") && !$("[data-give]", command).disabled) { event.preventDefault(); give(command); }
  });
}

async function copy(button) {
  const code = $("code", button.parentElement);
  try {
    await navigator.clipboard.writeText(code.textContent);
  } catch {
    getSelection().selectAllChildren(code); // without https on another host there is no clipboard
  }
}

async function give(command) {
  const dialog = command.closest("dialog"), place = $("[role=status]", dialog), turn = (waiting.get(dialog) ?? 0) + 1;
  waiting.set(dialog, turn);
  const say = (text, kind = "", lang = "") => {
    if (waiting.get(dialog) !== turn) return;
    place.hidden = false;
    place.className = `box ${kind}`;
    place.lang = lang || document.documentElement.lang;
    place.textContent = text;
    place.scrollIntoView({ block: "nearest" });
  };
  try {
    const { number } = await post(address, wanted(command));
    say(t("command.sent"));
    for (let pause = 150; waiting.get(dialog) === turn; pause = Math.min(2000, pause * 1.3)) {
      const answer = await get(`${address}/${number}`);
      if (answer.answered) {
        say(answer.own ? answer.text : t("output.of", { text: answer.text }), answer.done ? "well" : "bad", answer.own ? "" : "en");
        break;
      }
      await new Promise((go) => setTimeout(go, pause));
    }
  } catch (error) {
    say(error.message, "bad");
  }
  await refresh($("#details"));
  if (dialog.open) show();
}

/** The commands that the adapter can be given as it is now. */
function show() {
  const row = $$("[data-job]").find((one) => one.dataset.job === job);
  const state = row?.dataset.state ?? "";
  $('#steer [data-kind="pause"]').hidden = state === "paused" || state === "held";
  $('#steer [data-kind="resume"]').hidden = state !== "paused";
}

function open(dialog) {
  waiting.set(dialog, (waiting.get(dialog) ?? 0) + 1);
  $("[role=status]", dialog).hidden = true;
  for (const command of $$(".live-command", dialog)) preview(command);
  dialog.showModal();
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-steer], [data-add], [data-close]");
  if (!button) return;
  if (button.dataset.close !== undefined) return button.closest("dialog").close();
  if (button.dataset.add !== undefined) return open($("#add"));
  job = button.dataset.steer;
  const row = $$("[data-job]").find((one) => one.dataset.job === job);
  $("#steer-title").textContent = job;
  $$("#steer input:not([type=checkbox]), #steer textarea").forEach((field) => (field.value = ""));
  $$("#steer input[type=checkbox]").forEach((field) => (field.checked = false));
  $("#steer-rate").placeholder = row?.dataset.rate ? Number(row.dataset.rate).toPrecision(3) : "";
  $("#steer-priority").value = row?.dataset.priority || "0";
  show();
  open($("#steer"));
});

// The part with the button was drawn again meanwhile: the focus goes to the one that stands there now.
for (const dialog of $$("dialog"))
  dialog.addEventListener("close", () => $(`[data-key="${CSS.escape(dialog.id === "add" ? "add" : `steer-${job}`)}"]`)?.focus());
