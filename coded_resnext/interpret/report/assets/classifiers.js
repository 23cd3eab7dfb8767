// The one-class classifiers: a table that sorts, and one of them with a threshold to move.

const rowsShown = 20;

function setUpClassifiers() {
  const { classifiers } = results.one_class;
  const missing = (one) => (one.computed ? "n/a" : "not computed");
  const columns = [
    { title: "class", value: (index) => classNames[index], text: true },
    { title: "accuracy", value: (index) => results.classification.class_accuracy[index], digits: 3, always: true },
    { title: "images", value: (index) => (classifiers[index].computed ? classifiers[index].positives : null), digits: 0 },
    { title: "avg. prec.", value: (index) => classifiers[index].average_precision, digits: 3 },
    { title: "precision", value: (index) => classifiers[index].precision, digits: 3 },
    { title: "recall", value: (index) => classifiers[index].recall, digits: 3 },
    { title: "F1", value: (index) => classifiers[index].f1, digits: 3 },
  ];
  let order = { column: columns.find(({ title }) => title === "avg. prec."), direction: 1 };
  let shown = rowsShown;

  const body = html("tbody", {});
  const headings = columns.map((column) => html("th", { scope: "col", class: column.text ? null : "number" },
    html("button", { type: "button", class: "sort", onclick: () => {
      order = { column, direction: order.column === column ? -order.direction : column.text ? 1 : -1 };
      fill();
    } }, column.title, html("span", { class: "arrow", "aria-hidden": "true" }))));
  const more = html("button", { type: "button", class: "more", onclick: () => {
    shown = classifiers.length;
    fill();
  } });
  const table = html("table", { id: "classifier-table" },
    html("caption", { text: "Classifiers of single classes, on the test images; choose a class to look at it" }),
    html("thead", {}, html("tr", {}, headings)), body);

  const fill = () => {
    const { column, direction } = order;
    const compare = (a, b) => {
      const [first, second] = [column.value(a), column.value(b)];
      // What is not available stays at the end, whichever way one sorts.
      if (!known(first) || !known(second)) return known(second) - known(first) || a - b;
      const difference = column.text ? first.localeCompare(second, "en", { numeric: true }) : first - second;
      return direction * difference || a - b;
    };
    const indices = classifiers.map((_, index) => index).sort(compare);
    headings.forEach((heading, position) => {
      const active = columns[position] === column;
      if (active) heading.setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
      else heading.removeAttribute("aria-sort");
      heading.querySelector(".arrow").textContent = active ? (direction > 0 ? " ▲" : " ▼") : "";
    });
    body.replaceChildren(...indices.slice(0, shown).map((index) => html("tr", { "data-class": index },
      columns.map((column) => {
        const value = column.value(index);
        if (column.text)
          return html("th", { scope: "row" },
            html("button", { type: "button", class: "pick", onclick: () => choose({ chosenClass: index, sample: null }) }, nameOf(index, 28)));
        return html("td", { class: "number", text: known(value) ? value.toFixed(column.digits) : column.always ? "n/a" : missing(classifiers[index]) });
      }))));
    more.hidden = indices.length <= shown;
    more.textContent = `Show all ${whole(indices.length)} classes`;
    mark(state);
  };
  const mark = ({ chosenClass }) => {
    for (const row of body.children) {
      const chosen = Number(row.dataset.class) === chosenClass;
      row.classList.toggle("chosen", chosen);
      row.querySelector(".pick").setAttribute("aria-pressed", chosen);
    }
  };
  byId("classifier-list").append(
    html("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Table of classifiers" }, table), more);
  fill();
  onChoice(mark);
  setUpPoints(classifiers);
  onChoice(({ chosenClass }) => showClassifier(classifiers[chosenClass], chosenClass));
}

// The paper's figure: all classifiers as points of one plot; the chosen one is marked.
function setUpPoints(classifiers) {
  const outside = classifiers.map((one) => one.outside || {});
  const axis = (title) => ({ title, low: -0.02, high: 1.02, ticks: [0, 0.25, 0.5, 0.75, 1] });
  const series = [
    { name: "against images of other classes", look: "inactive", marker: "circle", of: classifiers },
    { name: "against images of none of the classes", look: "active hollow", marker: "triangle", of: outside },
  ].filter(({ of }) => of.some((one) => known(one.precision)))
    .map((one) => ({ ...one, points: true, x: one.of.map(({ recall }) => recall), y: one.of.map(({ precision }) => precision) }));
  const chart = lineChart({
    label: `Precision against recall of all classifiers at their thresholds, ${series.map(({ name }) => name).join(", and ")}`,
    x: axis("recall"), y: axis("precision"), series, height: 330,
  });
  byId("classifier-points").append(
    html("h3", { text: "All classifiers at their thresholds" }), chart.host, legendOf(series),
    numbersOf("Numbers", () => tableOf("Classifiers at their thresholds, against images of other classes and of none of the classes",
      ["class", "recall", "precision", "balanced accuracy", "precision, outside", "F1, outside", "balanced accuracy, outside"],
      classifiers.map((one, index) => {
        const { precision, f1, balanced_accuracy: balanced } = outside[index];
        const values = [one.recall, one.precision, one.balanced_accuracy, precision, f1, balanced];
        return [nameOf(index, 28), ...values.map((value) => fixed(value, 3))];
      }))));
  onChoice(({ chosenClass }) => chart.markAt(classifiers[chosenClass].recall, classifiers[chosenClass].precision));
}

// Every stop of the slider is a point of the curve that was measured, and the chosen threshold.
function stopsOf(one) {
  const { thresholds, precision, recall } = one.curve;
  const stops = Array.from(thresholds, (threshold, index) => ({ threshold, precision: precision[index], recall: recall[index] }))
    .filter((stop) => known(stop.threshold));
  if (known(one.threshold) && known(one.precision)
      && !stops.some((stop) => stop.threshold === one.threshold && stop.recall === one.recall))
    stops.push({ threshold: one.threshold, precision: one.precision, recall: one.recall });
  return stops.sort((a, b) => a.threshold - b.threshold);
}

let classifierShown = null;
function showClassifier(one, index) {
  if (classifierShown === index) return;
  classifierShown = index;
  const panel = byId("classifier");
  const heading = html("h3", {}, "Class ", nameOf(index));
  if (!one.curve) {
    const why = !one.computed ? "was not computed" : "has no precision and recall: it needs test images of the class and of others";
    panel.replaceChildren(heading, html("p", { class: "absent", text: `This classifier ${why}.` }));
    return;
  }
  const stops = stopsOf(one);
  const edges = one.histogram.edges;
  const scores = histogramOf(one);
  const curve = lineChart({
    label: `Precision against recall; average precision ${fixed(one.average_precision, 3)}`,
    x: { title: "recall", low: 0, high: 1, ticks: [0, 0.25, 0.5, 0.75, 1] },
    y: { title: "precision", low: 0, high: 1.02, ticks: [0, 0.25, 0.5, 0.75, 1] },
    series: [{ name: "", look: "inactive", x: one.curve.recall, y: one.curve.precision, step: true }],
    height: 200,
  });
  const slider = html("input", { type: "range", id: "threshold", min: 0, max: stops.length - 1, step: 1 });
  const value = (id) => html("output", { id, for: "threshold" });
  const outputs = { threshold: value("at-threshold"), precision: value("at-precision"), recall: value("at-recall"), f1: value("at-f1") };
  const move = () => {
    const stop = stops[Number(slider.value)];
    const f1 = stop.precision + stop.recall > 0 ? (2 * stop.precision * stop.recall) / (stop.precision + stop.recall) : 0;
    outputs.threshold.textContent = fixed(stop.threshold, 3);
    outputs.precision.textContent = fixed(stop.precision, 3);
    outputs.recall.textContent = fixed(stop.recall, 3);
    outputs.f1.textContent = fixed(f1, 3);
    slider.setAttribute("aria-valuetext", `threshold ${fixed(stop.threshold, 3)}: precision ${fixed(stop.precision, 3)}, recall ${fixed(stop.recall, 3)}`);
    curve.markAt(stop.recall, stop.precision);
    scores.markAt(Math.min(Math.max(stop.threshold, edges[0]), edges[edges.length - 1]));
  };
  slider.addEventListener("input", move);
  const chosen = stops.findIndex((stop) => stop.threshold === one.threshold && stop.recall === one.recall);
  slider.value = Math.max(chosen, 0);
  panel.replaceChildren(
    heading,
    html("p", {}, `Average precision ${fixed(one.average_precision, 3)}; ${whole(one.positives)} test images of the class, ${whole(one.negatives)} of others.`
      + (one.outside && known(one.outside.accepted) ? ` Of ${whole(one.outside.samples)} images of no class it accepts ${percent(one.outside.accepted)}.` : "")
      + (one.dead > 0 ? ` For ${percent(one.dead)} of the images a block had no energy left.` : "")),
    html("div", { class: "slider" },
      html("label", { for: "threshold", text: "Say yes from this score on" }), slider,
      html("dl", { class: "outputs" }, Object.entries({ threshold: "threshold", precision: "precision", recall: "recall", f1: "F1" })
        .flatMap(([key, text]) => html("div", {}, html("dt", { text }), html("dd", {}, outputs[key]))))),
    html("div", { class: "pair" }, scores.host, curve.host),
    legendOf([{ name: "images of the class", look: "active" }, { name: "images of other classes", look: "inactive" }]));
  move();
}

// Scores of the class's images and of the others', each as shares of its own number.
function histogramOf(one) {
  const { edges, positives, negatives } = one.histogram;
  const share = (counts, total) => Array.from(counts, (count) => count / Math.max(total, 1));
  const shares = [share(negatives, one.negatives), share(positives, one.positives)];
  const highest = Math.max(...shares.flat()) * 1.05 || 1;
  const stairs = (values) => ({
    x: Array.from(edges).flatMap((edge) => [edge, edge]),
    y: [0, ...values.flatMap((height) => [height, height]), 0],
  });
  return lineChart({
    label: "Scores of the images of the class, and of all others",
    x: { title: "score", low: edges[0], high: edges[edges.length - 1] },
    y: { title: "share of images", low: 0, high: highest, percent: true },
    series: [
      { name: "others", look: "inactive filled", ...stairs(shares[0]) },
      { name: "class", look: "active filled", ...stairs(shares[1]) },
    ],
    height: 200,
  });
}
