// Choosing a test image, and what every early decoder says about it.

function setUpSamples() {
  const { samples } = results;
  const { pictures } = report;
  const count = samples.targets.length;
  const blocks = samples.blocks.length;
  const misread = (index) => samples.predictions[index] !== samples.targets[index];
  const said = (index) => misread(index) ? `read as ${plainName(samples.predictions[index])}` : "classified correctly";

  const strip = byId("sample-strip");
  let stripClass = null;
  const fillStrip = (chosenClass) => {
    const indices = Array.from({ length: count }, (_, index) => index)
      .filter((index) => samples.targets[index] === chosenClass);
    const entry = (value, title, ...content) => html("label", { class: "thumb", title },
      html("input", { type: "radio", name: "shown", value, onchange: () => choose({ sample: value === "mean" ? null : Number(value) }) }),
      ...content);
    strip.replaceChildren(
      entry("mean", "the mean of all test images of the class", html("span", { class: "thumb-text", text: "mean" })),
      ...indices.map((index) => entry(String(index), `test image ${samples.positions[index]}, ${said(index)}`,
        pictures
          ? html("img", { src: pictures[index], alt: `test image ${samples.positions[index]}, ${said(index)}`, width: 44, height: 44, loading: "lazy" })
          : html("span", { class: "thumb-text", text: `#${samples.positions[index]}` }),
        misread(index) ? html("span", { class: "flaw", "aria-hidden": "true", text: "✗" })
          : samples.settled[index] > 0 ? html("span", { class: "flaw late", "aria-hidden": "true", text: "…" }) : null)));
    byId("sample-count").textContent = `Images of this class in this report: ${indices.length}`;
    stripClass = chosenClass;
  };

  const odd = Array.from({ length: count }, (_, index) => index)
    .filter((index) => misread(index) || samples.settled[index] > 0)
    .sort((a, b) => misread(b) - misread(a) || a - b);
  const jump = byId("sample-jump");
  jump.append(
    html("option", { value: "", text: odd.length ? `${odd.length} images to look at…` : "none: all blocks are right about every image" }),
    ...odd.map((index) => html("option", {
      value: index, dir: "auto",
      text: misread(index)
        ? `${plainName(samples.targets[index], 24)} read as ${plainName(samples.predictions[index], 24)} (${samples.positions[index]})`
        : `${plainName(samples.targets[index], 24)}, settles at ${stageName(samples.settled[index])} (${samples.positions[index]})`,
    })));
  jump.disabled = !odd.length;
  jump.addEventListener("change", () => {
    if (jump.value !== "") choose({ chosenClass: samples.targets[jump.value], sample: Number(jump.value) });
  });

  function stageName(block) {
    return block < blocks ? `block ${block + 1}` : "the classifier";
  }

  onChoice(({ chosenClass, sample }) => {
    if (stripClass !== chosenClass) fillStrip(chosenClass);
    const radio = strip.querySelector(`input[value="${sample === null ? "mean" : sample}"]`);
    if (radio) radio.checked = true;
    if (jump.value !== "" && Number(jump.value) !== sample) jump.value = "";
    showReading(sample);
  });

  function showReading(sample) {
    const panel = byId("reading");
    panel.hidden = sample === null;
    if (sample === null) return;
    const right = samples.predictions[sample] === samples.targets[sample];
    const facts = [
      ["true class", nameOf(samples.targets[sample])],
      ["the network says", html("span", { class: right ? "right" : "wrong" },
        `${right ? "✓" : "✗"} `, nameOf(samples.predictions[sample]), `, ${percent(samples.probabilities[sample])}`)],
      ["settles at", html("span", { id: "settles" }, stageName(samples.settled[sample]))],
    ];
    if (report.sample_exits)
      facts.push(["early exit leaves at", html("span", { id: "leaves" }, stageName(report.sample_exits[sample]))]);
    const rows = samples.blocks.map((block, index) => {
      const nearest = Array.from(block.nearest[sample]);
      const ok = block.decoded[sample] === samples.targets[sample];
      return [
        `block ${index + 1}`,
        html("span", { class: ok ? "right" : "wrong" }, `${ok ? "✓" : "✗"} `, nameOf(block.decoded[sample])),
        percent(block.shares[sample][0]),
        fixed(block.margins[sample], 3),
        html("span", {}, nearest.slice(1).flatMap((other, rank) =>
          [rank ? ", " : "", nameOf(other, 24), ` ${percent(block.shares[sample][rank + 1], 0)}`])),
      ];
    });
    panel.replaceChildren(
      html("div", { class: "reading-facts" },
        pictures ? html("img", { class: "pixels", src: pictures[sample], alt: `test image ${samples.positions[sample]}`, width: 132, height: 132 }) : null,
        html("dl", {}, facts.flatMap(([term, value]) => [html("dt", { text: term }), html("dd", {}, value)]))),
      tableOf("What each early decoder says", ["coded block", "says", "energy on its branches", "margin", "next nearest"], rows, { id: "decoders" }));
  }
}
