"use strict";
/* Draws the curves of a page with uPlot: one chart for each figure.chart, from the page's data.
   A chart: {id, unit, x, lines: [{value, label}], bands: [[high, low]], zero, series: [
   {name, values, colour, kind}]}, kind one of "noisy" (drawn thin as it is, and thick as a moving
   mean), "plain", "points" (few values, joined by dashes), "dashed", "edge" (of a band). */
const Charts = (() => {
  const all = [];
  const root = document.documentElement;
  let share = 0.1; // of the steps that a mean is over
  let range = null; // of steps, that all are zoomed to

  const css = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const faded = (colour, by) => colour + Math.round(by * 255).toString(16).padStart(2, "0");

  function shown(value) {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    if (value === 0 || (size >= 1e-3 && size < 1e5))
      return Number.isInteger(value) ? String(value) : String(Number(value.toPrecision(4)));
    return value.toExponential(2);
  }

  const halfWindow = (count) => (share ? Math.max(1, Math.floor((count * share) / 2)) : 0);

  /* The centred moving mean over the values that are there; gaps stay gaps. */
  function smooth(values) {
    const count = values.filter((v) => v !== null).length;
    const half = halfWindow(count);
    const kept = [];
    values.forEach((v, i) => { if (v !== null) kept.push(i); });
    const sums = [0];
    for (const i of kept) sums.push(sums[sums.length - 1] + values[i]);
    const out = new Array(values.length).fill(null);
    kept.forEach((i, k) => {
      const low = Math.max(0, k - half), high = Math.min(kept.length, k + half + 1);
      out[i] = (sums[high] - sums[low]) / (high - low);
    });
    return out;
  }

  /* Spec -> uPlot's columns and series. Of a noisy one there are two. */
  function columns(spec) {
    const data = [spec.x], series = [{}];
    spec.drawn = [];
    spec.series.forEach((one, index) => {
      const colour = css(`--c${one.colour % 8}`);
      const lone = one.values.filter((v) => v !== null).length === 1;
      const base = { label: one.name, stroke: colour, show: !spec.hidden.has(index) };
      const push = (values, more) => {
        data.push(values);
        series.push({ points: { show: false }, spanGaps: false, ...base, ...more });
        spec.drawn.push(index);
      };
      const dot = { show: true, size: 7, fill: colour };
      if (one.kind === "noisy" && !lone && share) {
        push(one.values, { width: 1, stroke: faded(colour, 0.35), raw: true });
        push(smooth(one.values), { width: 2.25, spanGaps: one.sparse });
      } else if (one.kind === "points" || lone) {
        push(one.values, { width: 1.5, dash: [6, 4], spanGaps: true, points: dot });
      } else if (one.kind === "edge") {
        push(one.values, { width: 0, stroke: faded(colour, 0), edge: true });
      } else {
        const dash = one.kind === "dashed" ? { dash: [8, 5] } : {};
        push(one.values, { width: 2, spanGaps: one.sparse, ...dash });
      }
    });
    (spec.lines || []).forEach((line) => {
      data.push(spec.x.map(() => line.value));
      series.push({ label: line.label, stroke: css("--ink"), width: 1, dash: [3, 3],
        points: { show: false }, line: true });
      spec.drawn.push(-1);
    });
    return [data, series];
  }

  /* Where series i of the spec is drawn, thick. */
  const columnOf = (spec, i) => spec.drawn.lastIndexOf(i) + 1;

  function bands(spec) {
    return (spec.bands || []).map(([high, low]) => ({
      series: [columnOf(spec, high), columnOf(spec, low)],
      fill: faded(css(`--c${spec.series[high].colour % 8}`), 0.18),
    }));
  }

  /* Step and values beside the cursor. */
  function tooltip(spec, holder) {
    const tip = document.createElement("div");
    tip.className = "tip";
    tip.hidden = true;
    return {
      hooks: {
        init: (u) => { holder.appendChild(tip); u.over.addEventListener("mouseleave", () => {
          tip.hidden = true; }); },
        setCursor: (u) => {
          const { left, top, idx } = u.cursor;
          tip.hidden = idx === null || left < 0;
          if (tip.hidden) return;
          tip.textContent = "";
          const line = (name, text, strong) => {
            const row = document.createElement("div"), value = document.createElement("b");
            value.textContent = text;
            row.append(name + " ", strong ? "" : value);
            if (strong) row.appendChild(value);
            tip.appendChild(row);
          };
          line("step", String(spec.x[idx]), true);
          spec.series.forEach((one, i) => {
            if (spec.hidden.has(i)) return;
            const raw = one.values[idx], mean = u.data[columnOf(spec, i)][idx];
            if (raw === null && mean === null) return;
            const smoothed = one.kind === "noisy" && raw !== mean && mean !== null;
            line(one.name, shown(raw) + (smoothed ? ` (mean ${shown(mean)})` : ""));
          });
          (spec.lines || []).forEach((one) => line(one.label, shown(one.value)));
          const width = holder.clientWidth, own = tip.offsetWidth;
          const x = u.over.offsetLeft + left;
          tip.style.left = `${Math.max(0, x + 14 + own > width ? x - own - 14 : x + 14)}px`;
          tip.style.top = `${Math.max(0, top - 8)}px`;
        },
      },
    };
  }

  function draw(chart) {
    const { spec, holder } = chart;
    if (chart.plot) chart.plot.destroy();
    chart.ready = false;
    const [data, series] = columns(spec);
    const axis = { stroke: css("--soft"), font: "12px system-ui, sans-serif",
      grid: { stroke: css("--line"), width: 1 }, ticks: { stroke: css("--line"), width: 1 } };
    const first = spec.x[0], last = spec.x[spec.x.length - 1];
    chart.plot = new uPlot({
      width: Math.max(holder.clientWidth, 120), height: holder.clientHeight,
      padding: [8, 18, 0, 0],
      legend: { show: false },
      cursor: { sync: { key: "steps" }, drag: { x: true, y: false }, points: { size: 7 } },
      scales: {
        x: { time: false, range: (u, low, high) =>
          first === last ? [first - 1, first + 1] : [low, high] },
        y: { range: (u, low, high) => {
          if (low === null || high === null) return [0, 1];
          if (spec.zero) low = Math.min(0, low);
          const pad = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
          return [spec.zero && low === 0 ? 0 : low - pad, high + pad];
        } },
      },
      axes: [
        { ...axis, size: 42, space: 60, label: "step", labelSize: 18, labelGap: 0,
          labelFont: "12px system-ui, sans-serif",
          values: (u, ticks) => ticks.map((t) => (Number.isInteger(t) ? String(t) : "")) },
        { ...axis, size: (u, ticks) => 18 + 8 * Math.max(3, ...(ticks || []).map((t) => t.length)),
          space: 34, values: (u, ticks) => ticks.map(shown) },
      ],
      series, bands: bands(spec),
      plugins: [tooltip(spec, holder)],
      hooks: { setScale: [(u, key) => { if (key === "x") follow(chart); }] },
    }, data, holder);
    if (range) chart.plot.setScale("x", range);
    // uPlot sets its first scales in a microtask of its own, and that is nobody's zoom.
    queueMicrotask(() => { chart.ready = true; });
    legend(chart);
  }

  /* One is zoomed, all are, and those that are drawn later. */
  let following = false;
  function follow(from) {
    if (following || !from.ready) return;
    const { min, max } = from.plot.scales.x;
    following = true;
    range = { min, max };
    for (const chart of all) {
      const scale = chart.plot && chart.plot.scales.x;
      if (chart !== from && scale && (scale.min !== min || scale.max !== max))
        chart.plot.setScale("x", { min, max });
    }
    following = false;
    for (const listener of Charts.zoomed) listener(min, max);
  }

  function legend(chart) {
    const { spec, list } = chart;
    list.textContent = "";
    let over = 0;
    spec.series.forEach((one, i) => {
      if (one.kind === "edge") return;
      const item = document.createElement("li"), button = document.createElement("button");
      const key = document.createElement("span"), words = document.createElement("span");
      const sort = one.kind === "points" ? " dot" : one.kind === "dashed" ? " dash" : "";
      key.className = `key k${one.colour % 8}${sort}`;
      const count = one.values.filter((v) => v !== null).length;
      if (one.kind === "noisy" && share && count > 1)
        over = Math.min(count, 2 * halfWindow(count) + 1);
      words.textContent = one.name;
      button.type = "button";
      button.setAttribute("aria-pressed", String(!spec.hidden.has(i)));
      button.append(key, words);
      button.addEventListener("click", () => {
        if (!spec.hidden.delete(i)) spec.hidden.add(i);
        draw(chart);
      });
      item.appendChild(button);
      list.appendChild(item);
    });
    const say = (text) => {
      const item = document.createElement("li");
      item.className = "small soft";
      item.textContent = text;
      list.appendChild(item);
    };
    (spec.lines || []).forEach((one) => say(`dotted: ${one.label} ${shown(one.value)}`));
    if (over) say(`thin: each ${spec.step}; thick: mean over ${over}`);
  }

  function make(spec) {
    const figure = document.querySelector(`[data-chart="${spec.id}"]`);
    if (!figure) return;
    spec.hidden = new Set();
    for (const one of spec.series) one.sparse = one.values.some((v) => v === null) && one.joined;
    const holder = figure.querySelector(".plot");
    const chart = { spec, figure, holder, plot: null, list: figure.querySelector(".legend") };
    holder.textContent = "";
    all.push(chart);
    const folded = figure.closest("details:not([open])");
    if (folded) folded.addEventListener("toggle", () => { if (!chart.plot) draw(chart); });
    else draw(chart);
    new ResizeObserver(() => {
      const width = holder.clientWidth;
      if (chart.plot && width && width !== chart.plot.width)
        chart.plot.setSize({ width, height: holder.clientHeight });
    }).observe(holder);
  }

  const drawn = () => all.filter((chart) => chart.plot);
  return {
    zoomed: [],
    all,
    make,
    redraw: () => drawn().forEach(draw),
    drawRest: () => all.filter((chart) => !chart.plot).forEach(draw),
    smoothOver: (value) => { share = value; drawn().forEach(draw); },
    zoom: (min, max) => {
      range = { min, max };
      drawn().forEach((chart) => chart.plot.setScale("x", range));
      for (const listener of Charts.zoomed) listener(min, max);
    },
  };
})();
