{
const source = document.getElementById("explorer-data");
const data = source ? JSON.parse(source.textContent) : null;
const METRIC = 0, METHOD = 1, VARIANT = 2, LEVEL = 3, TEMPERATURE = 4, ESTIMATE = 5, LOW = 6, HIGH = 7, N = 8;
const VIEWS = {value: "measured value", dense: "relative to the dense model", baseline: "against the baseline"};
const three = (value) => Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : Number(value.toPrecision(3)).toString();
const ends = (values) => [Math.min(...values), Math.max(...values)];

// An axis holds every estimate; intervals that go on much farther are cut at its edge.
function domainOf(rows, log, anchor) {
  const turn = log ? Math.log : (value) => value, back = log ? Math.exp : (value) => value;
  const fits = (value) => value !== null && (!log || value > 0);
  const points = rows.map((row) => row[ESTIMATE]).filter(fits).map(turn);
  if (anchor !== null) points.push(turn(anchor));
  let [low, high] = ends(points);
  const bars = rows.flatMap((row) => [row[LOW], row[HIGH]]).filter(fits).map(turn);
  const least = log ? .04 : .04 * Math.max(Math.abs(low), Math.abs(high)) || .1;
  const reach = Math.max(.75 * (high - low), least);
  low = Math.max(low - reach, Math.min(low, ...bars));
  high = Math.min(high + reach, Math.max(high, ...bars));
  const room = Math.max(.07 * (high - low), least / 2);
  // No axis goes where values cannot be.
  const floor = !log && Math.min(...points, ...bars) >= 0 ? 0 : -Infinity;
  return [back(Math.max(low - room, floor)), back(high + room)];
}

function ticksOf([low, high], log) {
  if (!log || high / low < 3) return undefined;
  const steps = high / low < 100 ? [1, 2, 5] : high / low < 1e4 ? [1, 3] : [1];
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++)
    for (const step of steps) if (step * 10 ** power >= low && step * 10 ** power <= high) ticks.push(Number((step * 10 ** power).toPrecision(3)));
  return ticks;
}

function specOf({rows, log, title, anchor, safe, width, panels, height, against}) {
  const levels = [...new Set(rows.map((row) => row[LEVEL]))].sort((a, b) => a - b);
  if (anchor === 1 && !against) levels.unshift(0);
  const span = levels.at(-1) - levels[0] || 10;
  const shown = [...new Set(rows.map((row) => row[VARIANT]))].sort((a, b) => a - b);
  const shownMethods = [...new Set(rows.map((row) => row[METHOD]))];
  const domain = domainOf(safe ? [...rows, [0, 0, 0, 0, null, safe, null, null, 0]] : rows, log, anchor);
  const values = rows.map((row) => ({
    method: data.methods[row[METHOD]], variant: data.variants[row[VARIANT]].name, estimate: row[ESTIMATE], low: row[LOW], high: row[HIGH],
    x: row[LEVEL] + (shown.indexOf(row[VARIANT]) - (shown.length - 1) / 2) * span * .014,
    level: row[LEVEL] + " %", told: three(row[ESTIMATE]), n: row[N] === null ? "unknown" : String(row[N]),
    interval: row[LOW] === null || row[HIGH] === null ? "none" : three(row[LOW]) + " to " + three(row[HIGH]),
  })).filter((one) => !log || one.estimate > 0);
  if (anchor === 1 && !against) for (const method of shownMethods) for (const variant of shown)
    values.push({method: data.methods[method], variant: data.variants[variant].name, estimate: 1, low: null, high: null, x: 0, level: "0 %", told: "1", n: "", interval: "none", start: true});
  const looks = shown.map((place) => data.variants[place]);
  const names = looks.map((look) => look.name);
  const legend = names.length > 1 ? {title: null} : null;
  const color = {field: "variant", type: "nominal", scale: {domain: names, range: looks.map((look) => look.colour)}, legend};
  const dash = {field: "variant", type: "nominal", scale: {domain: names, range: looks.map((look) => look.dash.length ? look.dash : [1, 0])}, legend};
  const x = {field: "x", type: "quantitative", title: "Heads pruned (%)", scale: {domain: [levels[0] - .06 * span, levels.at(-1) + .06 * span], nice: false, zero: false}, axis: levels.length <= 7 ? {values: levels} : {tickCount: 5}};
  const scale = log ? {type: "log", domain, nice: false} : {type: "linear", domain, nice: false, zero: false};
  // A panel that is too low for these words has them in its heading.
  const y = {field: "estimate", type: "quantitative", title: height < 135 ? null : title, scale, axis: {values: ticksOf(domain, log), tickCount: 5, format: ",.4~r"}};
  const tooltip = [["variant", "variant"], ["method", "method"], ["level", "heads pruned"], ["told", "estimate"], ["interval", "95 % interval"], ["n", "n"]]
    .map(([field, name]) => ({field, title: name, type: "nominal"}));
  const line = (at, strokeDash) => ({mark: {type: "rule", strokeDash, color: "var(--muted)"}, encoding: {y: {datum: at, type: "quantitative", scale}}});
  const layer = [];
  if (anchor !== null) layer.push(line(anchor, [1, 0]));
  if (safe) layer.push(line(safe, [2, 3]));
  layer.push(
    {mark: {type: "line", clip: true, strokeWidth: 2}, encoding: {x, y, color, strokeDash: dash}},
    {transform: [{filter: {field: "low", valid: true}}, {filter: {field: "high", valid: true}}], mark: {type: "rule", clip: true, strokeWidth: 1.5},
      encoding: {x, y: {...y, field: "low"}, y2: {field: "high"}, color}},
    {transform: [{filter: {not: {field: "start", equal: true}}}], mark: {type: "point", filled: true, size: 55, opacity: 1, clip: true}, encoding: {x, y, color, tooltip}},
  );
  const columns = Math.max(1, Math.min(shownMethods.length, panels));
  const spec = {width: Math.max(96, Math.floor((width - 54 - 16 * (columns - 1)) / columns) - 4), height, layer};
  return {
    data: {values}, autosize: {type: "pad"}, background: null, padding: 2,
    ...(shownMethods.length > 1
      ? {facet: {field: "method", type: "nominal", title: null, sort: shownMethods.map((at) => data.methods[at])}, columns, spec, spacing: {row: 14, column: 16}}
      : spec),
    config: {
      font: "inherit", view: {stroke: null},
      axis: {labelColor: "var(--muted)", titleColor: "var(--muted)", gridColor: "var(--rule)", domainColor: "var(--edge)", tickColor: "var(--edge)", labelFontSize: 12, titleFontSize: 12, titleFontWeight: 400, labelFlush: false},
      legend: {orient: "top", labelColor: "var(--ink)", labelFontSize: 13, symbolType: "stroke", symbolStrokeWidth: 3, symbolSize: 260, columnPadding: 22, labelOffset: 8, columns: width < 420 ? 2 : 6, offset: 4},
      header: {labelColor: "var(--ink)", labelFontSize: 13, labelFontWeight: 600, labelAnchor: "start", labelPadding: 4},
    },
  };
}

const turns = new WeakMap();
async function draw(place, options) {
  const style = getComputedStyle(place);
  const width = place.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight);
  if (!(width > 0)) return;
  // One drawing after the other: what was chosen last is drawn last.
  const before = turns.get(place) ?? Promise.resolve();
  const turn = before.then(() => drawNow(place, width, options));
  turns.set(place, turn);
  await turn;
}

async function drawNow(place, width, options) {
  await vegaEmbed(place, specOf({...options, width}), {mode: "vega-lite", renderer: "svg", actions: false, ast: true, tooltip: {theme: "custom"}});
  const svg = place.querySelector("svg");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", place.dataset.label);
}

const drawings = [];
const redraw = () => Promise.all(drawings.map((one) => one()));
let waiting, widthBefore = innerWidth;
addEventListener("resize", () => {
  if (innerWidth === widthBefore) return;
  widthBefore = innerWidth;
  clearTimeout(waiting);
  waiting = setTimeout(redraw, 150);
});

const hero = document.querySelector(".hero .interactive");
if (data && hero) {
  const at = data.metrics.findIndex((metric) => metric.name === "perplexity");
  const rows = data.views.dense.filter((row) => row[METRIC] === at);
  if (rows.length) drawings.push(async () => {
    const methods = new Set(rows.map((row) => row[METHOD])).size;
    const narrow = innerWidth <= 600;
    const panels = narrow ? 1 : methods === 4 ? 2 : Math.min(methods, 3);
    const lines = Math.ceil(methods / panels);
    await draw(hero, {rows, log: true, title: "times the dense model's", anchor: 1, safe: data.tolerance === null ? null : 1 + data.tolerance,
      panels, height: lines === 1 ? (narrow ? 200 : 300) : narrow ? 90 : Math.max(70, Math.floor(330 / lines) - 25)});
    document.querySelector(".hero").classList.add("drawn");
  });
}

const explorer = document.querySelector(".explorer");
if (data && explorer && data.metrics.length) {
  const [view, metric, method, temperature, scale] = ["view", "metric", "method", "temperature", "scale"].map((name) => explorer.querySelector(`select[name=${name}]`));
  const place = explorer.querySelector(".interactive"), told = explorer.querySelector(".told");
  const fill = (select, options) => {
    const before = select.value;
    select.replaceChildren(...options.map(([value, text]) => new Option(text, value)));
    if (options.some(([value]) => value === before)) select.value = before;
  };
  const refresh = () => {
    const has = (name, at) => data.views[name].some((row) => row[METRIC] === at);
    fill(metric, data.metrics.map((one, at) => [String(at), one.label]));
    const at = Number(metric.value);
    fill(view, Object.entries(VIEWS).filter(([name]) => has(name, at)));
    fill(method, [...(data.methods.length > 1 ? [["all", "all methods"]] : []), ...data.methods.map((name, place) => [String(place), name])]);
    const rows = data.views[view.value]?.filter((row) => row[METRIC] === at) ?? [];
    const heats = [...new Set(rows.map((row) => row[TEMPERATURE]))].filter((value) => value !== null).sort((a, b) => Math.abs(a - 1) - Math.abs(b - 1));
    fill(temperature, heats.map((value) => [String(value), String(value)]));
    temperature.parentElement.hidden = heats.length < 2;
    method.parentElement.hidden = data.methods.length < 2;
  };
  const chart = async () => {
    const at = Number(metric.value), one = data.metrics[at];
    const rows = data.views[view.value].filter((row) => row[METRIC] === at && (method.value === "all" || row[METHOD] === Number(method.value))
      && (row[TEMPERATURE] === null || temperature.value === "" || row[TEMPERATURE] === Number(temperature.value)));
    const unit = one.unit[view.value], ratio = view.value === "dense" && one.log;
    const better = {higher: "higher is better", lower: "lower is better", none: ""}[one.better];
    const positive = rows.every((row) => row[ESTIMATE] > 0);
    scale.querySelector("[value=log]").disabled = !positive;
    const log = positive && (scale.value === "log" || scale.value === "auto" && (ratio || one.log && domainOf(rows, false, null)[1] > 8 * Math.min(...rows.map((row) => row[ESTIMATE]))));
    const words = ratio ? "times the dense model's" : view.value === "baseline" ? `difference, ${unit === "1" ? "no unit" : unit}` : unit === "1" ? "" : unit;
    const narrow = innerWidth <= 600;
    const count = new Set(rows.map((row) => row[METHOD])).size;
    if (rows.length) await draw(place, {rows, log, title: [words, better].filter(Boolean).join(", "), anchor: ratio ? 1 : view.value === "baseline" ? 0 : null, safe: null,
      against: view.value === "baseline", panels: narrow ? 1 : count === 4 ? 2 : 3, height: count > 1 ? (narrow ? 140 : 190) : (narrow ? 220 : 300)});
    else place.replaceChildren();
    told.textContent = rows.length ? `${one.label}, ${VIEWS[view.value]}. Point at a dot for estimate, interval and n.` : "There are no figures for this choice.";
  };
  const change = () => { refresh(); return chart(); };
  for (const select of [view, metric, method, temperature, scale]) select.addEventListener("change", change);
  refresh();
  drawings.push(chart);
  explorer.closest("details")?.addEventListener("toggle", (event) => { if (event.target.open) chart(); });
}

document.documentElement.dataset.charts = "drawing";
redraw().then(() => { document.documentElement.dataset.charts = "drawn"; });
}
