// Training curves from the log, one row for every epoch.

function setUpTraining() {
  const columns = report.training_log;
  const names = Object.keys(columns);
  const epochs = columns.epoch || Array.from(columns[names[0]], (_, index) => index + 1);
  const depthLook = (index, count) => `depth-${count > 1 ? Math.round((3 * index) / (count - 1)) : 3}`;
  const numbered = (prefix, text) => {
    const found = names.filter((name) => new RegExp(`^${prefix}_\\d+$`).test(name));
    return found.map((name, index) => ({
      name: `${text} ${name.slice(prefix.length + 1)}`, look: depthLook(index, found.length), column: name }));
  };
  const single = (column, name, look) => (names.includes(column) ? [{ name, look, column }] : []);
  const charts = [
    ["Accuracy on the test images", "share", [...numbered("early_decoding", "decoding block"), ...single("test_accuracy", "the network", "active strong")]],
    ["Loss", "loss", [...single("cross_entropy", "cross-entropy", "inactive dashed"), ...single("total", "total", "active")]],
    ["Coding loss", "loss", numbered("coding", "block")],
    ["Learning rate", "rate", [...single("learning_rate", "learning rate", "ink"), ...single("lr", "learning rate", "ink")]],
  ];
  const host = byId("training-charts");
  const grid = html("div", { class: "multiples wide" });
  for (const [title, unit, lines] of charts) {
    if (!lines.length) continue;
    const series = lines.map(({ name, look, column }) => ({ name, look, x: epochs, y: columns[column] }));
    const [low, high] = rangeOf(series.map((one) => one.y), [unit === "share" ? 0 : -Infinity, unit === "share" ? 1.002 : Infinity]);
    const last = series.map((one) => `${one.name} ${fixed(one.y[one.y.length - 1], 4)}`).join(", ");
    grid.append(html("figure", {},
      html("figcaption", { text: title }),
      lineChart({
        label: `${title} over ${epochs.length} epochs; at the end: ${last}`,
        x: { title: "epoch", low: epochs[0], high: Math.max(epochs[epochs.length - 1], epochs[0] + 1) },
        y: { title: unit, low: Math.max(low, unit === "share" ? 0 : low), high, percent: unit === "share" },
        series, height: 220,
      }).host,
      series.length > 1 ? legendOf(series.length > 6 ? [series[0], series[series.length - 1]] : series) : null));
  }
  host.append(grid, numbersOf("Numbers", () => tableOf("The training log", names,
    Array.from(epochs, (_, row) => names.map((name) => {
      const value = columns[name][row];
      return known(value) ? (Number.isInteger(value) ? String(value) : value.toPrecision(5)) : "n/a";
    })))));
}
