// Codebooks: who works for whom, and how far the codewords are apart.

const wholeMatrix = 30;
const nearestListed = 10;

function distanceBetween(book, first, second) {
  let distance = 0;
  for (let branch = 0; branch < book.branches; branch += 1)
    distance += book.words[first][branch] !== book.words[second][branch];
  return distance;
}

function setUpCodebooks() {
  const host = byId("codebook-list");
  codebooks.forEach((book, number) => {
    const blocks = blockBooks.flatMap((other, block) => (other === book ? [block + 1] : []));
    const words = html("div", { class: "words" });
    const near = html("div", {});
    host.append(html("article", { class: "card" },
      html("h3", { text: `Codebook ${number + 1}: ${book.active} of ${book.branches} branches` }),
      html("p", { text: `Of coded block${blocks.length > 1 ? "s" : ""} ${blocks.join(", ")}. Two codewords differ in at least ${book.min_distance} branches; each branch works for ${Math.min(...book.column_loads)} to ${Math.max(...book.column_loads)} classes.` }),
      html("div", { class: "pair" }, words, html("div", {}, near, distancesOf(book)))));
    onChoice(({ chosenClass }) => {
      const others = book.words.map((_, index) => index)
        .filter((index) => index !== chosenClass)
        .map((index) => ({ index, distance: distanceBetween(book, chosenClass, index) }))
        .sort((a, b) => a.distance - b.distance || a.index - b.index);
      const rows = book.words.length <= wholeMatrix
        ? book.words.map((_, index) => index)
        : [chosenClass, ...others.slice(0, nearestListed).map(({ index }) => index)];
      words.replaceChildren(wordsOf(book, rows, chosenClass));
      near.replaceChildren(tableOf(`Nearest to ${plainName(chosenClass, 30)}`, ["class", "distance"],
        others.slice(0, nearestListed).map(({ index, distance }) => [nameOf(index, 28), String(distance)])));
    });
  });
}

function wordsOf(book, rows, chosenClass) {
  const cell = Math.max(9, Math.min(20, 300 / book.branches));
  const left = 110;
  const width = left + cell * book.branches + 4;
  const height = 18 + 20 * rows.length;
  const label = book.words.length <= wholeMatrix
    ? "Codewords of all classes" : "Codewords of the chosen class and of the nearest";
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", class: "matrix",
    "aria-label": `${label}. ${plainName(chosenClass)}: branches ${[...book.words[chosenClass]].flatMap((digit, branch) => (digit === "1" ? [branch] : [])).join(", ")}` });
  for (let branch = 0; branch < book.branches; branch += book.branches > 16 ? 4 : 1)
    picture.append(svg("text", { class: "tick", x: left + (branch + 0.5) * cell, y: 12, "text-anchor": "middle", text: branch }));
  rows.forEach((index, row) => {
    const y = 18 + 20 * row;
    const chosen = index === chosenClass;
    picture.append(svg("text", { class: chosen ? "said" : "label", x: left - 8, y: y + 13, "text-anchor": "end", text: plainName(index, 13) }));
    for (let branch = 0; branch < book.branches; branch += 1)
      picture.append(svg("rect", {
        class: book.words[index][branch] === "1" ? (chosen ? "on chosen" : "on") : "off",
        x: left + branch * cell, y, width: cell - 1.5, height: 18, rx: 2,
      }));
  });
  return picture;
}

function distancesOf(book) {
  const entries = Object.entries(book.distances).map(([distance, pairs]) => [Number(distance), pairs]);
  const most = Math.max(...entries.map(([, pairs]) => pairs));
  return html("div", {},
    html("h4", { text: "Pairs of classes at each distance" }),
    html("ul", { class: "bars" }, entries.map(([distance, pairs]) => html("li", {},
      html("span", { text: `distance ${distance}` }),
      svg("svg", { class: "bar", viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" },
        svg("rect", { width: 100, height: 10, class: "track" }),
        svg("rect", { width: (100 * pairs) / most, height: 10, class: "energy inactive" })),
      html("span", { class: "number", text: whole(pairs) })))));
}
