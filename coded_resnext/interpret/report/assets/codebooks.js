// Codebooks: who works for whom, and how far the codewords are apart.

const wholeMatrix = 30;
const nearestListed = 12;
const rowHeight = 20;

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
    const loads = [Math.min(...book.column_loads), Math.max(...book.column_loads)];
    const load = loads[0] === loads[1] ? loads[0] : loads.join(" to ");
    const small = book.words.length <= wholeMatrix;
    const words = html("figure", {});
    const matrix = small ? html("figure", {}) : null;
    // Nearest first, the class itself at the head.
    const byDistance = () => book.words
      .map((_, index) => ({ index, distance: distanceBetween(book, state.chosenClass, index) }))
      .sort((a, b) => a.distance - b.distance || a.index - b.index);
    const table = numbersOf("Distances from the chosen class as a table", () =>
      tableOf(`Distance to ${plainName(state.chosenClass, 60)}`, ["class", "distance"],
        byDistance().slice(1).map(({ index, distance }) => [nameOf(index, 60), String(distance)])));
    host.append(html("article", { class: "card", "data-codebook": number },
      html("h3", { text: `Codebook ${number + 1}: ${book.active} of ${book.branches} branches` }),
      html("p", { text: `Of coded block${blocks.length > 1 ? "s" : ""} ${blocks.join(", ")}. Two codewords differ in at least ${book.min_distance} branches; each branch works for ${load} classes.` }),
      html("div", { class: "pair" }, words, html("div", {}, matrix, distancesOf(book))), table));
    onChoice(({ chosenClass }) => {
      const rows = small ? book.words.map((_, index) => index)
        : byDistance().slice(0, nearestListed + 1).map(({ index }) => index);
      words.replaceChildren(
        html("figcaption", { text: small ? "Codewords, and their distance from the chosen class" : "The chosen class and the nearest codewords, with their distance" }),
        wordsOf(book, rows, chosenClass));
      if (matrix) matrix.replaceChildren(html("figcaption", { text: "Distances between all classes" }), matrixOf(book, chosenClass));
      table.refresh();
    });
  });
}

// Names are cut at 13 letters, of about 8 pixels each.
function roomForNames(indices) {
  return 14 + 8 * Math.min(13, Math.max(...indices.map((index) => [...classNames[index]].length)));
}

function rowName(index, row, chosenClass, left) {
  return svg("text", {
    class: index === chosenClass ? "said" : "label", x: left - 8, y: 18 + rowHeight * row + 13,
    "text-anchor": "end", text: plainName(index, 13) });
}

function wordsOf(book, rows, chosenClass) {
  const cell = Math.max(9, Math.min(20, 310 / book.branches));
  const left = roomForNames(rows);
  const width = left + cell * book.branches + 34;
  const height = 18 + rowHeight * rows.length;
  const mine = [...book.words[chosenClass]].flatMap((digit, branch) => (digit === "1" ? [branch] : []));
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, role: "img", class: "matrix",
    "aria-label": `Codewords of ${rows.length} classes; branches of ${plainName(chosenClass, 60)}: ${mine.join(", ")}` });
  for (let branch = 0; branch < book.branches; branch += book.branches > 16 ? 4 : 1)
    picture.append(svg("text", { class: "tick", x: left + (branch + 0.5) * cell, y: 12, "text-anchor": "middle", text: branch }));
  rows.forEach((index, row) => {
    const chosen = index === chosenClass;
    picture.append(
      rowName(index, row, chosenClass, left),
      svg("text", { class: "tick", x: width - 4, y: 18 + rowHeight * row + 13, "text-anchor": "end", text: distanceBetween(book, index, chosenClass) }));
    for (let branch = 0; branch < book.branches; branch += 1)
      picture.append(svg("rect", {
        class: book.words[index][branch] === "1" ? (chosen ? "on chosen" : "on") : "off",
        x: left + branch * cell, y: 18 + rowHeight * row, width: cell - 1.5, height: rowHeight - 2, rx: 2,
      }));
  });
  return picture;
}

function matrixOf(book, chosenClass) {
  const count = book.words.length;
  const cell = Math.max(12, Math.min(26, 320 / count));
  const left = roomForNames(classNames.map((_, index) => index));
  const width = left + cell * count + 2;
  const height = 18 + rowHeight * count;
  const most = Math.max(...Object.keys(book.distances).map(Number));
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, role: "img", class: "matrix",
    "aria-label": `Distances between the codewords of ${count} classes, from ${book.min_distance} to ${most}` });
  book.words.forEach((_, row) => {
    picture.append(rowName(row, row, chosenClass, left));
    book.words.forEach((__, column) => {
      if (row === column) return;
      const distance = distanceBetween(book, row, column);
      const x = left + column * cell;
      const y = 18 + rowHeight * row;
      const strength = 0.12 + 0.5 * ((distance - book.min_distance) / Math.max(most - book.min_distance, 1));
      picture.append(
        svg("rect", { class: "distance", "fill-opacity": strength.toFixed(2), x, y, width: cell - 1.5, height: rowHeight - 2, rx: 2 }),
        cell >= 15 ? svg("text", { class: "tick strong", x: x + cell / 2 - 1, y: y + 13, "text-anchor": "middle", text: distance }) : "");
    });
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
      barOf(pairs / most),
      html("span", { class: "number", text: whole(pairs) })))));
}
