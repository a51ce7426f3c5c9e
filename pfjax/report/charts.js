"use strict";
// Curves over steps (uPlot) with one legend for all, and quality against diversity (SVG).

const data = JSON.parse(document.getElementById("data").textContent);
const hiddenGroups = new Set();
const MOST_BANDS = 6; // of as many groups, or they cannot be told apart
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name);
const make = (tag, className = "", text = "") => {
  const element = document.createElement(tag);
  element.className = className;
  element.textContent = text;
  return element;
};

/** Colour of a group: eight named ones, then hues far from each other. */
function colour(group, alpha = 1) {
  const hue = Math.round((group * 137.5) % 360);
  const plain = group < 8 ? css(`--c${group}`).trim() : `hsl(${hue} 55% 52%)`;
  const percent = Math.round(alpha * 100);
  return alpha < 1 ? `color-mix(in srgb, ${plain} ${percent}%, transparent)` : plain;
}

function number(x) {
  if (x === null || x === undefined) return "—";
  const size = Math.abs(x);
  if (size !== 0 && size < 1e-3) return x.toExponential(1);
  return x.toFixed(size >= 1000 ? 0 : size >= 100 ? 1 : 3);
}

const tip = document.body.appendChild(make("div", "tip"));
tip.hidden = true;

/** Shows lines [group, name, text] beside a point of the window. */
function showTip(x, y, title, lines) {
  tip.replaceChildren(make("strong", "", title));
  for (const [group, name, text] of lines) {
    const row = tip.appendChild(make("div"));
    const dot = row.appendChild(make("i", "dot"));
    dot.style.background = group < 0 ? css("--muted") : colour(group);
    row.append(make("span", "", name), make("b", "", text));
  }
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  const left = x + 16 + width > innerWidth ? x - 16 - width : x + 16;
  tip.style.left = `${Math.max(4, left)}px`;
  tip.style.top = `${Math.max(4, Math.min(y - height / 2, innerHeight - height - 4))}px`;
}

/** The value at or nearest to a place of the axis: groups have steps of their own. */
function nearest(values, at) {
  for (let d = 0; d < values.length; d++) {
    for (const i of [at - d, at + d]) if (values[i] != null) return i;
  }
  return null;
}

function drawChart(chart, holder) {
  const columns = [chart.x];
  const series = [{}];
  const bands = [];
  const hasBands = data.groups.length - hiddenGroups.size <= MOST_BANDS;
  const lines = []; // [place, group, name]
  const add = (values, options) => {
    columns.push(values);
    series.push({ spanGaps: true, points: { show: false }, ...options });
    return columns.length - 1;
  };
  if (chart.before) {
    const grey = { stroke: css("--muted"), dash: [5, 4], width: 1.5 };
    lines.push([add(chart.before, grey), -1, chart.before_name]);
  }
  for (const c of chart.curves) {
    const show = !hiddenGroups.has(c.group);
    if (c.low && hasBands) {
      const edge = { stroke: "transparent", width: 0, show };
      const [high, low] = [add(c.high, edge), add(c.low, edge)];
      bands.push({ series: [high, low], fill: colour(c.group, +css("--band")) });
    }
    if (c.raw) {
      const points = { show: true, size: 3, width: 0, fill: colour(c.group, 0.35) };
      add(c.raw, { paths: () => null, points, stroke: "transparent", show, scale: "y" });
    }
    const few = c.y.filter((v) => v !== null).length <= 30;
    const place = add(c.y, {
      stroke: colour(c.group), width: 2, show, dash: c.group >= 8 ? [6, 3] : undefined,
      points: { show: few, size: 5, fill: colour(c.group), width: 0 },
    });
    lines.push([place, c.group, data.groups[c.group].name]);
  }
  const axis = {
    stroke: css("--muted"), font: "11px system-ui, sans-serif", size: 22, gap: 4,
    grid: { stroke: css("--line"), width: 1 }, ticks: { show: false },
  };
  // Raw points beyond the lines do not decide the scale.
  const decides = chart.curves.flatMap((c) =>
    hiddenGroups.has(c.group) ? []
      : [...c.y, ...((hasBands && c.low) || []), ...((hasBands && c.high) || [])]);
  decides.push(...(chart.before || []));
  if (chart.reference !== null) decides.push(chart.reference, 0);
  const known = decides.filter((v) => v !== null);
  let [low, high] = [Math.min(...known), Math.max(...known)];
  if (!known.length) [low, high] = [0, 1];
  const room = high - low < 1e-9 ? 0.1 : 0.06 * (high - low);
  const range = [low >= 0 && low < room ? 0 : low - room, high + room];
  const plot = new uPlot({
    width: holder.clientWidth, height: 220, series, bands, legend: { show: false },
    focus: { alpha: 0.25 },
    padding: [8, 10, 0, 0],
    scales: { x: chart.doubles ? { time: false, distr: 3, log: 2 } : { time: false },
      y: { range: () => range } },
    axes: [
      { ...axis, incrs: [1, 2, 5, 10, 20, 25, 50, 100, 200, 500, 1e3, 2e3, 5e3, 1e4, 1e5],
        ...(chart.doubles ? { splits: () => chart.x, values: (u, v) => v } : {}) },
      { ...axis, size: 48, values: (u, v) => v.map((x) => +x.toPrecision(6)) },
    ],
    cursor: {
      y: false, drag: { x: true, y: false }, points: { show: false },
      focus: { prox: hasBands ? -1 : 20 }, // the curve under the mouse, of many
      sync: chart.doubles ? undefined : { key: "steps", setSeries: false },
    },
    hooks: {
      draw: [(u) => chart.reference !== null && drawReference(u, chart.reference)],
      setCursor: [(u) => {
        if (!u.over.matches(":hover") || u.cursor.idx == null) return;
        const rows = lines.filter(([place]) => u.series[place].show).map(
          ([place, group, name]) => {
            const i = nearest(columns[place], u.cursor.idx);
            return [group, name, i === null ? null : columns[place][i]];
          });
        rows.sort((a, b) => b[2] - a[2]);
        const box = u.over.getBoundingClientRect();
        showTip(box.left + u.cursor.left, box.top + u.cursor.top,
          `${chart.x_name} ${chart.x[u.cursor.idx]}`,
          rows.map(([group, name, v]) => [group, name, number(v)]));
      }],
    },
  }, columns, holder);
  plot.over.addEventListener("mouseleave", () => { tip.hidden = true; });
  return plot;
}

function drawReference(u, value) {
  const y = u.valToPos(value, "y", true);
  const { left, width } = u.bbox;
  u.ctx.save();
  u.ctx.strokeStyle = css("--muted");
  u.ctx.setLineDash([4 * devicePixelRatio, 4 * devicePixelRatio]);
  u.ctx.lineWidth = devicePixelRatio;
  u.ctx.beginPath();
  u.ctx.moveTo(left, y);
  u.ctx.lineTo(left + width, y);
  u.ctx.stroke();
  u.ctx.restore();
}

/** A path of each group over its evaluations, or over alpha: hollow where it begins, full
 * where it ends. */
function drawPaths(chart, holder) {
  const [width, height, left, bottom] = [holder.clientWidth || 400, 220, 48, 34];
  const shown = chart.curves.filter((c) => !hiddenGroups.has(c.group));
  const scale = (values, from, to) => {
    const [low, high] = [Math.min(...values), Math.max(...values)];
    const room = (high - low) * 0.08 || 0.05;
    const at = (v) => from + ((v - low + room) / (high - low + 2 * room)) * (to - from);
    return { at, ticks: [0, 1, 2, 3].map((i) => low + ((high - low) * i) / 3) };
  };
  const x = scale(chart.curves.flatMap((c) => c.x), left, width - 14);
  const y = scale(chart.curves.flatMap((c) => c.y), height - bottom, 10);
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const add = (tag, values, text) => {
    const element = document.createElementNS(svg.namespaceURI, tag);
    for (const [k, v] of Object.entries(values)) element.setAttribute(k, v);
    if (text !== undefined) element.textContent = text;
    return svg.appendChild(element);
  };
  for (const v of y.ticks) {
    add("line", { x1: left, x2: width - 14, y1: y.at(v), y2: y.at(v), stroke: css("--line") });
    add("text", { x: left - 6, y: y.at(v) + 4, "text-anchor": "end" }, v.toFixed(2));
  }
  for (const v of x.ticks) {
    add("text", { x: x.at(v), y: height - 18, "text-anchor": "middle" }, v.toFixed(2));
  }
  add("text", { x: width - 14, y: height - 3, "text-anchor": "end" }, `${chart.x_name} →`);
  for (const c of shown) {
    const points = c.x.map((v, i) => `${x.at(v)},${y.at(c.y[i])}`).join(" ");
    add("polyline", { points, fill: "none", stroke: colour(c.group, 0.55), "stroke-width": 1.5 });
    c.x.forEach((v, i) => {
      const isEnd = i === c.x.length - 1;
      const dot = add("circle", { cx: x.at(v), cy: y.at(c.y[i]), r: isEnd ? 6 : i ? 2.5 : 4.5,
        fill: i ? colour(c.group) : css("--paper"), stroke: colour(c.group),
        "stroke-width": i ? 0 : 2 });
      dot.addEventListener("mouseenter", (e) => showTip(e.clientX, e.clientY,
        `${data.groups[c.group].name}, ${chart.point} ${c.points[i]}`,
        [[c.group, chart.x_name, number(v)], [c.group, chart.y_name, number(c.y[i])]]));
      dot.addEventListener("mouseleave", () => { tip.hidden = true; });
    });
  }
  holder.replaceChildren(svg);
}

let plots = [];
function drawAll() {
  plots.forEach((p) => p.destroy());
  plots = [];
  for (const chart of data.charts) {
    const holder = document.querySelector(`#${chart.id} .plot`);
    if (chart.is_paths) drawPaths(chart, holder);
    else plots.push(drawChart(chart, holder));
  }
}

/** Buttons that show and hide a group in all charts; a double click leaves it alone. */
function makeLegend() {
  const legend = document.querySelector(".legend");
  if (!legend) return;
  data.groups.forEach((group, i) => {
    const button = legend.appendChild(make("button"));
    button.type = "button";
    button.title = group.name;
    button.append(make("i", "dot"), group.name);
    button.setAttribute("aria-pressed", "true");
    const update = () => {
      [...legend.children].forEach((b, j) =>
        b.setAttribute("aria-pressed", String(!hiddenGroups.has(j))));
      drawAll();
    };
    button.addEventListener("click", () => {
      if (!hiddenGroups.delete(i)) hiddenGroups.add(i);
      update();
    });
    button.addEventListener("dblclick", () => {
      const others = data.groups.map((_, j) => j).filter((j) => j !== i);
      const isAlone = others.every((j) => hiddenGroups.has(j));
      hiddenGroups.clear();
      if (!isAlone) others.forEach((j) => hiddenGroups.add(j));
      update();
    });
  });
  paintLegend();
}

function paintLegend() {
  document.querySelectorAll(".legend .dot").forEach((dot, i) => {
    dot.style.background = colour(i);
  });
}

makeLegend();
drawAll();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  paintLegend();
  drawAll();
});
let lastWidth = innerWidth;
addEventListener("resize", () => {
  if (innerWidth !== lastWidth) drawAll(); // a phone's bars change the height alone
  lastWidth = innerWidth;
});
addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });
