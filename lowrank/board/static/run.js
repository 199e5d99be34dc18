// A run's page: its curves grow as points are logged, its parts follow.
import { $, $$, calmly, get, listen, refresh } from "./common.js";
import { Curves, controlsOf } from "./curves.js";

const name = $("#curves").dataset.run;
const address = `/api/runs/${encodeURIComponent(name)}`;
const curves = new Curves($("#plot"), $("#plot-words"), controlsOf());
let position = ""; // `file-offset`: up to where the page has its points
let loading = null;
const fileOf = (where) => where.split("-")[0], offsetOf = (where) => Number(where.split("-")[1]);

async function load(low, high) {
  const range = low === undefined ? "" : `?low=${low}&high=${high}`;
  const found = await get(`${address}/curves${range}`);
  if (low === undefined) position = found.position;
  take(found);
}

function take(found) {
  curves.series.clear();
  for (const [job, drawn] of Object.entries(found.jobs)) curves.set(job, drawn);
  curves.draw();
}

const draw = calmly(() => curves.draw(), 500);
const parts = calmly(() => Promise.all($$("[data-part]").map(refresh)), 900);
curves.onzoom = (low, high) => { loading = load(low, high); };
$("#unzoom").addEventListener("click", () => curves.unzoom());

const begun = JSON.parse($("#points").textContent); // what was there came with the page
position = begun.position;
take(begun);
listen(() => `${address}/live?position=${encodeURIComponent(position)}`, {
  points: async (points, id) => {
    await loading; // what it brings may hold these points already
    if (!id || fileOf(id) !== fileOf(position) || offsetOf(id) <= offsetOf(position)) return; // said again after a break
    const had = offsetOf(position);
    position = id;
    if (!curves.zoomed) for (const point of points) if (point.end > had) curves.add(point.job, point);
    draw();
  },
  anew: (_, id) => { position = id; curves.zoomed = null; loading = load(); },
  changed: parts,
});
setInterval(() => { if (!document.hidden && $("#head .state.running, #head .state.waiting")) parts(); }, 2000);

// A notification for somebody who looks elsewhere when it is over.
let was = $("#head .bar")?.dataset.state;
new MutationObserver(() => {
  const now = $("#head .bar")?.dataset.state;
  if (was === "running" && now && now !== "running") document.title = `✓ ${document.title.replace(/^✓ /, "")}`;
  was = now;
}).observe($("#head"), { childList: true, subtree: true });
