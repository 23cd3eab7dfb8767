// Early exit: accuracy against multiply-accumulates, over the margin at which images may leave.

function setUpExits() {
  const { points, network_macs: networkMacs, samples } = results.early_exit;
  const end = points.length - 1;
  const blocks = points[0].exits.length - 1;
  const accuracy = points.map((point) => point.accuracy);
  const shares = points.map((point) => point.macs / networkMacs);
  const measured = report.exit_measured;
  const accuracies = [accuracy, measured ? [measured.early_accuracy] : []];
  const [low, high] = rangeOf(accuracies, [0, 1.002], 0.12);
  const series = [{ name: "one margin for all blocks", look: "inactive", marker: "circle", x: shares, y: accuracy }];
  if (measured)
    series.push({ name: "the margins calibrated for this run", look: "active", marker: "diamond", points: true,
      x: [1 - measured.macs_saved], y: [measured.early_accuracy] });
  const chart = lineChart({
    label: `Accuracy against computation: all images leave at once: ${percent(accuracy[0])} at ${percent(shares[0], 0)} of the multiplications; none leaves early: ${percent(accuracy[end])}`,
    x: { title: "multiply-accumulates, share of the network's", low: 0, high: Math.max(1.02, ...shares), percent: true },
    y: { title: "accuracy", low, high, percent: true },
    series, height: 270,
  });
  const slider = byId("margin");
  slider.max = end;
  const bars = byId("exit-bars");
  const move = () => {
    const at = Number(slider.value);
    const { margin, macs, exits } = points[at];
    const text = known(margin) ? fixed(margin, 3) : "none leaves";
    byId("exit-margin").textContent = text;
    byId("exit-accuracy").textContent = percent(accuracy[at], 2);
    byId("exit-macs").textContent = whole(macs);
    byId("exit-share").textContent = percent(shares[at]);
    slider.setAttribute("aria-valuetext", `margin ${text}: accuracy ${percent(accuracy[at], 2)} at ${percent(shares[at])} of the multiplications`);
    chart.markAt(shares[at], accuracy[at]);
    bars.replaceChildren(...Array.from(exits, (count, block) => {
      const part = count / samples;
      return html("li", {},
        html("span", { text: block < blocks ? `block ${block + 1}` : "classifier" }),
        barOf(part),
        html("span", { class: "number", text: `${whole(count)} (${percent(part, 0)})` }));
    }));
  };
  slider.addEventListener("input", move);
  // To begin with: the least computation among the points that lose nothing against the whole network.
  const lossless = shares.findIndex((_, index) => accuracy[index] >= accuracy[end]);
  slider.value = lossless;
  byId("exit-chart").append(chart.host, legendOf(series), numbersOf("Numbers", () => tableOf(
    `Early exit, ${whole(samples)} test images`, ["margin", "accuracy", "multiply-accumulates", "share"],
    points.map((point, index) => [
      known(point.margin) ? fixed(point.margin, 3) : "none", percent(point.accuracy, 2), whole(point.macs), percent(shares[index])]))));
  move();
}
