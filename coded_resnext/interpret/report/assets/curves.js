// Early decoding by depth, and what removing branches costs.

function setUpEarlyDecoding() {
  const early = report.early_decoding;
  const depth = Array.from(early.block_accuracy, (_, index) => index + 1);
  const [low, high] = rangeOf([early.block_accuracy, early.block_agreement, [early.accuracy, 1]], [0, 1.002], 0.15);
  const series = [
    { name: "agrees with the network", look: "inactive dashed", marker: "square", x: depth, y: early.block_agreement },
    { name: "accuracy", look: "active", marker: "circle", x: depth, y: early.block_accuracy },
  ];
  const chart = lineChart({
    label: `Accuracy of decoding each coded block: ${Array.from(early.block_accuracy, (share, index) => `block ${index + 1} ${percent(share)}`).join(", ")}; the network ${percent(early.accuracy)}`,
    x: { title: "coded block, by depth", low: 0.7, high: depth.length + 0.3, ticks: depth },
    y: { title: "share of test images", low, high, format: (value) => percent(value, high - low < 0.04 ? 1 : 0) },
    lines: [{ y: early.accuracy, look: "ink dotted" }],
    series, height: 250,
  });
  byId("early-decoding-chart").append(
    chart.host,
    legendOf([...series].reverse().concat({ name: `the whole network, ${percent(early.accuracy)}`, look: "ink dotted" })),
    numbersOf("Numbers", () => tableOf(`Early decoding of ${whole(early.samples)} test images`,
      ["coded block", "accuracy", "agrees with the network"],
      depth.map((block, index) => [`block ${block}`, percent(early.block_accuracy[index], 2), percent(early.block_agreement[index], 2)]))));
}

function setUpRemoval() {
  const removal = report.removal;
  const kinds = [["active", "active", "circle"], ["inactive", "inactive dashed", "square"]];
  const computed = removal.blocks.filter((block) => block);
  const all = computed.flatMap((block) => kinds.map(([kind]) => block[kind])).filter((curve) => curve);
  const [low, high] = rangeOf([[removal.accuracy], ...all.map((curve) => curve.accuracy)], [0, 1.002], 0.06);
  const most = Math.max(...all.map((curve) => Math.max(...curve.removed)));
  const grid = html("div", { class: "multiples" });
  removal.blocks.forEach((block, index) => {
    const series = block ? kinds.filter(([kind]) => block[kind]).map(([kind, look, marker]) => ({
      name: `${kind} branches removed`, look, marker,
      x: [0, ...block[kind].removed], y: [removal.accuracy, ...block[kind].accuracy], band: [0, ...block[kind].deviation],
    })) : [];
    const last = (kind) => {
      const curve = block && block[kind];
      return curve ? percent(curve.accuracy[curve.accuracy.length - 1]) : "not computed";
    };
    const label = `Coded block ${index + 1}: without all active branches ${last("active")}, without all inactive branches ${last("inactive")}; whole ${percent(removal.accuracy)}`;
    grid.append(html("figure", {},
      html("figcaption", { text: `coded block ${index + 1}` }),
      series.length ? lineChart({
        label, series, height: 200,
        x: { title: "branches removed", low: 0, high: most, ticks: wholeTicks(most, 8) },
        y: { title: "accuracy", low, high, format: (value) => percent(value, high - low < 0.04 ? 1 : 0) },
        lines: [{ y: removal.accuracy, look: "ink dotted" }],
      }).host : html("p", { class: "absent", text: "not computed" })));
  });
  byId("removal-charts").append(
    grid,
    legendOf([
      { name: "branches that work for the image's class removed", look: "active", marker: "circle" },
      { name: "other branches removed", look: "inactive dashed", marker: "square" },
      { name: "nothing removed", look: "ink dotted" },
    ]),
    numbersOf("Numbers", () => tableOf(`Accuracy without branches, ${whole(removal.samples)} test images`,
      ["coded block", "kind", "removed", "accuracy", "deviation"],
      removal.blocks.flatMap((block, index) => !block ? [] : kinds.filter(([kind]) => block[kind]).flatMap(([kind]) =>
        Array.from(block[kind].removed, (removed, place) => [
          `block ${index + 1}`, kind, String(removed), percent(block[kind].accuracy[place], 2), percent(block[kind].deviation[place], 2)]))))));
}
