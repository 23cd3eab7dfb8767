// Line charts: axes, grid, lines with markers and bands, and the numbers as a table.

function wholeTicks(high, about) {
  const step = Math.max(1, Math.ceil(high / about));
  return Array.from({ length: Math.floor(high / step) + 1 }, (_, index) => index * step);
}

function niceTicks(low, high, about) {
  const span = high - low || 1;
  const raw = span / about;
  const power = 10 ** Math.floor(Math.log10(raw));
  const steps = [0.5, 1, 2, 2.5, 5, 10].map((factor) => factor * power);
  const ticksOf = (step) => {
    const ticks = [];
    for (let index = Math.ceil(low / step - 1e-9); index * step <= high + step * 1e-6; index += 1)
      ticks.push(Number((index * step).toPrecision(12)));
    return ticks;
  };
  let chosen = steps.findIndex((step) => step >= raw * 0.999);
  // One number alone is no scale.
  while (chosen > 0 && ticksOf(steps[chosen]).length < 2) chosen -= 1;
  return ticksOf(steps[chosen]);
}

// Ticks as texts, with as many decimals as their step needs, so that no two of them are the same.
function tickTexts(ticks, inPercent) {
  const values = ticks.map((tick) => (inPercent ? 100 * tick : tick));
  const step = Math.abs(values[1] - values[0]) || Math.abs(values[0]) || 1;
  const exact = (digits) => values.every((value) => Math.abs(value - Number(value.toFixed(digits))) < 1e-6 * step);
  const digits = [0, 1, 2, 3, 4, 5, 6].find(exact);
  return values.map((value) => (digits === undefined ? String(value) : value.toFixed(digits)) + (inPercent ? " %" : ""));
}

const markers = {
  circle: (x, y) => svg("circle", { cx: x, cy: y, r: 3.4 }),
  square: (x, y) => svg("rect", { x: x - 3, y: y - 3, width: 6, height: 6 }),
  triangle: (x, y) => svg("path", { d: `M${x} ${y - 4.4}l4.2 7.4h-8.4z` }),
  diamond: (x, y) => svg("path", { d: `M${x} ${y - 5}l5 5l-5 5l-5 -5z` }),
};

// options: label (what the picture shows, for those who cannot see it), x and y ({title, low, high,
// percent, ticks}), series ([{name, look, x, y, band, marker, step}]), lines ([{y|x, name, look}]), height.
// Returns {host, markAt}: markAt(x, y) moves a mark, which says where one is.
function lineChart(options) {
  const host = html("div", { class: "chart" });
  const { x: xAxis, y: yAxis, series } = options;
  let mark = null;
  let scaleX;
  let scaleY;
  let markNode;

  const moveMark = () => {
    if (!markNode) return;
    markNode.replaceChildren();
    if (!mark || !known(mark.x)) return;
    markNode.append(
      svg("line", { class: "guide", x1: scaleX(mark.x), x2: scaleX(mark.x), y1: scaleY(yAxis.low), y2: scaleY(yAxis.high) }));
    if (known(mark.y))
      markNode.append(svg("circle", { class: "mark", cx: scaleX(mark.x), cy: scaleY(mark.y), r: 6 }));
  };

  const draw = (width) => {
    const height = options.height || 230;
    const left = 66;
    const right = width - 14;
    const top = 12;
    const bottom = height - 42;
    scaleX = (value) => left + ((value - xAxis.low) / (xAxis.high - xAxis.low || 1)) * (right - left);
    scaleY = (value) => bottom - ((value - yAxis.low) / (yAxis.high - yAxis.low || 1)) * (bottom - top);
    const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": options.label });
    const ticksY = yAxis.ticks || niceTicks(yAxis.low, yAxis.high, 4);
    const textsY = tickTexts(ticksY, yAxis.percent);
    for (const [index, tick] of ticksY.entries())
      picture.append(
        svg("line", { class: "grid", x1: left, x2: right, y1: scaleY(tick), y2: scaleY(tick) }),
        svg("text", { class: "tick", x: left - 7, y: scaleY(tick) + 4, "text-anchor": "end", text: textsY[index] }));
    const ticksX = xAxis.ticks || niceTicks(xAxis.low, xAxis.high, Math.max(2, width / 90));
    const textsX = tickTexts(ticksX, xAxis.percent);
    for (const [index, tick] of ticksX.entries())
      picture.append(
        svg("line", { class: "axis", x1: scaleX(tick), x2: scaleX(tick), y1: bottom, y2: bottom + 4 }),
        svg("text", { class: "tick", x: scaleX(tick), y: bottom + 17, "text-anchor": "middle", text: textsX[index] }));
    picture.append(
      svg("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom }),
      svg("text", { class: "axis-title", x: (left + right) / 2, y: height - 6, "text-anchor": "middle", text: xAxis.title }),
      svg("text", { class: "axis-title", "text-anchor": "middle", transform: `translate(12 ${(top + bottom) / 2}) rotate(-90)`, text: yAxis.title }));
    for (const line of options.lines || [])
      picture.append(svg("line", {
        class: `rule ${line.look || ""}`,
        x1: known(line.x) ? scaleX(line.x) : left, x2: known(line.x) ? scaleX(line.x) : right,
        y1: known(line.y) ? scaleY(line.y) : top, y2: known(line.y) ? scaleY(line.y) : bottom,
      }));
    for (const one of series) picture.append(...drawSeries(one));
    markNode = svg("g", {});
    picture.append(markNode);
    host.replaceChildren(picture);
    moveMark();
  };

  const drawSeries = (one) => {
    const points = Array.from(one.x, (value, index) => [value, one.y[index]])
      .map(([x, y], index) => ({ x: scaleX(x), y: scaleY(y), ok: known(x) && known(y), index }))
      .filter((point) => point.ok);
    const parts = [];
    if (one.band) {
      const edge = (sign) => points.map(({ x, index }) =>
        `${x} ${scaleY(Math.min(yAxis.high, Math.max(yAxis.low, one.y[index] + sign * one.band[index])))}`);
      parts.push(svg("path", { class: `band ${one.look}`, d: `M${[...edge(1), ...edge(-1).reverse()].join("L")}Z` }));
    }
    const line = points.map(({ x, y }, index) =>
      (index && one.step ? `L${x} ${points[index - 1].y}` : "") + `${index ? "L" : "M"}${x} ${y}`).join("");
    if (!one.points) parts.push(svg("path", { class: `line ${one.look}`, d: line }));
    if (one.marker)
      parts.push(svg("g", { class: `markers ${one.look}` }, points.map(({ x, y }) => markers[one.marker](x, y))));
    return parts;
  };

  whenSized(host, draw);
  return {
    host,
    markAt: (x, y) => {
      mark = { x, y };
      moveMark();
    },
  };
}

// A share as a bar, beside a number that says the same.
function barOf(share) {
  return svg("svg", { class: "bar", viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" },
    svg("rect", { width: 100, height: 10, class: "track" }),
    svg("rect", { width: 100 * share, height: 10, class: "energy inactive" }));
}

// Which line is which: a stroke with its marker beside each name.
function legendOf(entries) {
  return html("ul", { class: "legend" }, entries.map(({ name, look, marker, points }) =>
    html("li", {},
      svg("svg", { width: 30, height: 12, "aria-hidden": "true" },
        points ? null : svg("path", { class: `line ${look}`, d: "M0 6H30" }),
        marker ? svg("g", { class: `markers ${look}` }, markers[marker](15, 6)) : null),
      name)));
}

// The lowest and highest of several lists, with some room; inside the limits.
function rangeOf(lists, [floor, ceiling], room = 0.08) {
  const values = lists.flatMap((list) => Array.from(list)).filter(known);
  const low = Math.min(...values);
  const high = Math.max(...values);
  const extra = room * (high - low || Math.abs(high) * 0.1 || 1);
  return [Math.max(floor, low - extra), Math.min(ceiling, high + extra)];
}
