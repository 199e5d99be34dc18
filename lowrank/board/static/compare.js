// Several runs in one plot. What still runs is read again now and then.
import { $, get } from "./common.js";
import { Curves, controlsOf } from "./curves.js";

const place = $("#curves");
if (place) {
  const names = JSON.parse(place.dataset.runs);
  const curves = new Curves($("#plot"), $("#plot-words"), controlsOf());
  const load = async (low, high) => {
    const range = low === undefined ? "" : `?low=${low}&high=${high}`;
    const all = await Promise.all(names.map((name) => get(`/api/runs/${encodeURIComponent(name)}/curves${range}`)));
    curves.series.clear();
    all.forEach((found, number) => {
      const jobs = Object.entries(found.jobs);
      for (const [job, drawn] of jobs) curves.set(jobs.length > 1 ? `${names[number]} / ${job}` : names[number], drawn);
    });
    curves.draw();
  };
  curves.onzoom = load;
  $("#unzoom").addEventListener("click", () => curves.unzoom());
  load();
  setInterval(() => { if (!document.hidden && !curves.zoomed && !$("#plot:hover")) load(); }, 10000);
}
