// Loss curves of many jobs: as logged, smoothed, held out. Points come thinned from the server and grow with the run.
import { $, t } from "./common.js";

const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const FORGETS_BELOW = 1e-12;
const MANY = 8; // more curves are not told apart by colors: the lowest have one, the others are thin and gray
const LEADING = 3;

/** `{label: place}` of the curves that end lowest. */
function leaders(series) {
  const end = (one) => one.held.findLast(Number.isFinite) ?? one.losses.findLast(Number.isFinite) ?? Infinity;
  const order = [...series].map(([label, one]) => [label, end(one)]).sort((one, other) => one[1] - other[1]);
  return new Map(order.slice(0, LEADING).map(([label], place) => [label, place]));
}

/** Exponential smoothing without the pull of the beginning (TensorBoard's). */
export function smooth(values, weight) {
  let last = 0, seen = 0;
  return values.map((value) => {
    if (value == null) return null;
    last = last * weight + (1 - weight) * value;
    seen += 1;
    return weight ? last / (1 - weight ** seen) : value;
  });
}

export class Curves {
  /** `series`: `{label: {steps, losses, held_out_steps, held_out}}`, in an order that decides the colors. */
  constructor(place, words, controls) {
    Object.assign(this, { place, words, controls, series: new Map(), plot: null, zoomed: null, onzoom: null });
    for (const input of Object.values(controls)) input?.addEventListener("input", () => this.draw());
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
    new ResizeObserver(() => this.plot?.setSize(this.extent())).observe(place);
  }

  extent() {
    const width = Math.max(240, this.place.clientWidth);
    return { width, height: Math.round(Math.min(420, Math.max(240, width * 0.42))) };
  }

  set(label, drawn) {
    this.series.set(label, { steps: [...drawn.steps], losses: [...drawn.losses], heldSteps: [...drawn.held_out_steps], held: [...drawn.held_out] });
  }

  add(label, point) {
    const empty = { steps: [], losses: [], heldSteps: [], held: [] };
    if (!this.series.has(label)) this.series.set(label, empty);
    const one = this.series.get(label);
    const [steps, values] = point.event === "eval" ? [one.heldSteps, one.held] : [one.steps, one.losses];
    steps.push(point.step);
    values.push(point.loss);
  }

  draw() {
    const { smoothing, raw, held, log } = this.controls;
    const tables = [], lines = [{}];
    let number = 0;
    const leading = this.series.size > MANY ? leaders(this.series) : null;
    const add = (steps, values, options) => { tables.push([steps, values]); lines.push(options); };
    const drawn = leading ? [...this.series].sort(([one], [other]) => leading.has(one) - leading.has(other)) : this.series;
    for (const [label, one] of drawn) {
      if (leading && !leading.has(label)) {
        add(one.steps, smooth(one.losses, Number(smoothing.value)).map((value) => (!log.checked || value > FORGETS_BELOW ? value : null)), { label, stroke: style("--dim"), alpha: 0.45, width: 1, points: { show: false } });
        continue;
      }
      const color = style(`--c${leading ? leading.get(label) : number % 8}`);
      const positive = (values) => (log.checked ? values.map((value) => (value > FORGETS_BELOW ? value : null)) : values);
      if (raw.checked) add(one.steps, positive(one.losses), { label: `${label} · ${t("raw")}`, stroke: color, alpha: 0.3, width: 1, points: { show: false } });
      add(one.steps, positive(smooth(one.losses, Number(smoothing.value))), { label, stroke: color, width: 2, points: { show: one.steps.length < 3 } });
      if (held.checked && one.heldSteps.length) add(one.heldSteps, positive(one.held), { label: `${label} · ${t("held_out")}`, stroke: color, dash: [5, 4], width: 1.3, spanGaps: true, points: { show: true, size: 6, fill: color } });
      number += 1;
    }
    this.say(leading);
    this.plot?.destroy();
    this.plot = null;
    if (!tables.some(([steps]) => steps.length)) return;
    const axis = { stroke: style("--dim"), grid: { stroke: style("--rule"), width: 1 }, ticks: { show: false }, font: "12px system-ui, sans-serif" };
    const value = (_, number) => (number == null ? "" : Number(number.toPrecision(5)).toString()); // nothing where the pointer is not
    const options = {
      ...this.extent(),
      series: lines.map((line, place) => ({ ...(place ? line : { label: t("step") }), value })),
      scales: { x: { time: false, ...(this.zoomed ? { min: this.zoomed[0], max: this.zoomed[1] } : {}) }, y: { distr: log.checked ? 3 : 1 } },
      axes: [{ ...axis, grid: { show: false }, incrs: [1, 2, 5, 10, 20, 25, 50, 100, 200, 250, 500, 1e3, 2e3, 2500, 5e3, 1e4, 2e4, 25e3, 5e4, 1e5, 2e5, 5e5, 1e6] }, { ...axis, size: 58, values: (_, ticks) => ticks.map((tick) => (tick == null ? "" : Number(tick.toPrecision(4)).toString())) }],
      cursor: { drag: { x: true, y: false, setScale: false } },
      legend: { live: true, show: !leading },
      hooks: { setSelect: [(plot) => this.zoom(plot)] },
    };
    const joined = uPlot.join(tables.filter(([steps]) => steps.length));
    options.series = options.series.filter((_, place) => !place || tables[place - 1][0].length);
    this.plot = new uPlot(options, joined, this.place);
    if (!performance.getEntriesByName("drawn").length) requestAnimationFrame(() => performance.mark("drawn"));
  }

  zoom(plot) {
    if (plot.select.width < 4) return;
    this.zoomed = [plot.posToVal(plot.select.left, "x"), plot.posToVal(plot.select.left + plot.select.width, "x")];
    $("#unzoom").hidden = false;
    this.onzoom?.(...this.zoomed);
    this.draw();
  }

  unzoom() {
    this.zoomed = null;
    $("#unzoom").hidden = true;
    this.onzoom?.();
    this.draw();
  }

  /** A canvas says nothing to who cannot see it: the last values in words. */
  say(leading) {
    const parts = leading ? [t("curve_summary_many", { number: this.series.size })] : [];
    for (const label of leading ? leading.keys() : this.series.keys()) {
      const one = this.series.get(label);
      const last = one.losses.at(-1), held = one.held.at(-1);
      if (one.steps.length) parts.push(t("curve_summary", { label, step: one.steps.at(-1), loss: last == null ? "–" : last.toFixed(4) }) + (held == null ? "" : t("curve_summary_held", { loss: held.toFixed(4) })));
    }
    if (parts.length) this.words.textContent = parts.join(" · ");
  }
}

export const controlsOf = () => ({ smoothing: $("#smoothing"), raw: $("#raw"), held: $("#held"), log: $("#log") });
