// Early decoding by depth, and what removing branches costs.

function setUpEarlyDecoding() {
  const early = results.early_decoding;
  const accuracy = early.blocks.map((block) => block.accuracy);
  const agreement = early.blocks.map((block) => block.agreement);
  const depth = accuracy.map((_, index) => index + 1);
  const [low, high] = rangeOf([accuracy, agreement, [early.accuracy, 1]], [0, 1.002], 0.15);
  const series = [
    { name: "agrees with the network", look: "inactive dashed", marker: "square", x: depth, y: agreement },
    { name: "accuracy", look: "active", marker: "circle", x: depth, y: accuracy },
  ];
  const chart = lineChart({
    label: `Accuracy of decoding each coded block: ${accuracy.map((share, index) => `block ${index + 1} ${percent(share)}`).join(", ")}; the network ${percent(early.accuracy)}`,
    x: { title: "coded block, by depth", low: 0.7, high: depth.length + 0.3, ticks: depth },
    y: { title: "share of test images", low, high, percent: true },
    lines: [{ y: early.accuracy, look: "ink dotted" }],
    series, height: 250,
  });
  byId("early-decoding-chart").append(
    chart.host,
    legendOf([...series].reverse().concat({ name: `the whole network, ${percent(early.accuracy)}`, look: "ink dotted" })),
    numbersOf("Numbers", () => tableOf(`Early decoding of ${whole(early.samples)} test images`,
      ["coded block", "accuracy", "agrees with the network"],
      depth.map((block, index) => [`block ${block}`, percent(accuracy[index], 2), percent(agreement[index], 2)]))));
}

function setUpRemoval() {
  const { removal } = results;
  const kinds = [["active", "active", "circle"], ["inactive", "inactive dashed", "square"]];
  const all = removal.blocks.flatMap((block) => [block.active, block.inactive]);
  const [low, high] = rangeOf([[removal.accuracy], ...all.map((curve) => curve.accuracy)], [0, 1.002], 0.06);
  const most = Math.max(...all.flatMap((curve) => Array.from(curve.removed)));
  const grid = html("div", { class: "multiples" });
  removal.blocks.forEach((block, index) => {
    const series = kinds.map(([kind, look, marker]) => ({
      name: kind, look, marker, band: [0, ...block[kind].deviation],
      x: [0, ...block[kind].removed], y: [removal.accuracy, ...block[kind].accuracy] }));
    const [active, inactive] = kinds.map(([kind]) => {
      const { accuracy } = block[kind];
      const last = accuracy[accuracy.length - 1];
      return percent(last);
    });
    grid.append(html("figure", {},
      html("figcaption", { text: `coded block ${index + 1}` }),
      lineChart({
        label: `Coded block ${index + 1}: accuracy without all active branches ${active}, without all inactive branches ${inactive}, of the whole network ${percent(removal.accuracy)}`,
        x: { title: "branches removed", low: 0, high: most, ticks: wholeTicks(most, 8) },
        y: { title: "accuracy", low, high, percent: true },
        lines: [{ y: removal.accuracy, look: "ink dotted" }],
        series, height: 200,
      }).host));
  });
  byId("removal-charts").append(
    grid,
    legendOf([
      { name: "branches that work for the image's class removed", look: "active", marker: "circle" },
      { name: "other branches removed", look: "inactive dashed", marker: "square" },
      { name: "nothing removed", look: "ink dotted" },
    ]),
    numbersOf("Numbers", () => tableOf(`Accuracy and energy without branches, ${whole(removal.samples)} test images`,
      ["coded block", "kind", "removed", "accuracy", "deviation", "energy left"],
      removal.blocks.flatMap((block, index) => kinds.flatMap(([kind]) =>
        Array.from(block[kind].removed, (removed, point) => [
          `block ${index + 1}`, kind, String(removed), percent(block[kind].accuracy[point], 2),
          percent(block[kind].deviation[point], 2), percent(block[kind].energy[point])]))))));
}
