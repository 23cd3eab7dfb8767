// The network as a picture: every block splits into branches and merges again. A class lights the
// branches that its codewords give it; the bars are the energies that were measured.

// Energy on the scale of a codeword, where 1 is what a branch of the class should have.
const energyRoom = 1.7;

function energiesShown(block) {
  const { chosenClass, sample } = state;
  if (sample !== null) return results.samples.blocks[block].energies[sample];
  const row = results.paths && results.paths.energies[block][chosenClass];
  return row && known(row[0]) ? row : null;
}

function shareOnPath(block) {
  const energies = energiesShown(block);
  if (!energies) return null;
  const word = blockBooks[block].words[state.chosenClass];
  let on = 0;
  let all = 0;
  energies.forEach((energy, branch) => {
    all += energy;
    if (word[branch] === "1") on += energy;
  });
  return all > 0 ? on / all : null;
}

function setUpNetwork() {
  const host = byId("network-picture");
  const { blocks } = report;
  let parts = null;

  // One drawing for both orientations: u runs along the depth, v across the branches.
  const draw = (width) => {
    const upright = width < 700;
    const most = Math.max(...blocks.filter((block) => block.active).map((block) => block.branches), 1);
    const plainLength = upright ? 38 : 46;
    const end = upright ? 64 : 78;
    const pitch = upright ? Math.min((width - 16) / most, 34) : Math.max(9, Math.min(26, 340 / most));
    const across = pitch * most;
    const head = upright ? 30 : 0;
    const plain = blocks.filter((block) => !block.active).length;
    const coded = blocks.length - plain;
    const free = width - 2 * end - plain * plainLength;
    const codedLength = upright ? head + 112 : Math.max(62, coded ? Math.min(free / coded, 260) : 0);
    const depth = 2 * end + plain * plainLength + coded * codedLength;
    const footer = upright ? 0 : 62;
    const start = upright ? (width - across) / 2 : 8;
    const middle = start + across / 2;
    const pointAt = (u, v) => (upright ? [v, u] : [u, v]);
    const at = (u, v) => pointAt(u, v).join(" ");
    const box = (u, v, length, breadth) => {
      const [x, y] = pointAt(u, v);
      return upright ? { x, y, width: breadth, height: length } : { x, y, width: length, height: breadth };
    };
    const size = upright ? [width, depth] : [Math.max(width, depth), across + footer + 12];
    const picture = svg("svg", { viewBox: `0 0 ${size.join(" ")}`, width: size[0], height: size[1], role: "img", "aria-labelledby": "network-text" });
    const links = svg("g", { class: "links" });
    const front = svg("g", {});
    picture.append(links, front);
    parts = { blocks: [], upright };

    // Where the image enters; the chosen test image is drawn here.
    const side = upright ? 48 : 66;
    const [imageX, imageY] = pointAt(end / 2 - side / 2 - (upright ? 4 : 6), middle - side / 2);
    parts.frame = svg("rect", { class: "image-frame", x: imageX, y: imageY, width: side, height: side, rx: 5 });
    parts.image = svg("image", { x: imageX, y: imageY, width: side, height: side, class: "pixels" });
    const imageNote = svg("text", { class: "label", x: imageX + side / 2, y: imageY + side / 2 + 4, "text-anchor": "middle", text: "image" });
    front.append(parts.frame, imageNote, parts.image);

    let u = end;
    links.append(svg("path", { class: "trunk", d: `M${at(end / 2 + side / 2 - 6, middle)}L${at(u, middle)}` }));
    let index = 0;
    for (const block of blocks) {
      if (block.active) {
        parts.blocks.push(drawCoded(u, block, index));
        index += 1;
        u += codedLength;
      } else {
        drawPlain(u);
        u += plainLength;
      }
    }
    const [outX, outY] = pointAt(u + end / 2, middle);
    links.append(svg("path", { class: "trunk", d: `M${at(u, middle)}L${at(u + 18, middle)}` }));
    parts.output = svg("text", { class: "said", x: outX, y: outY + 5, "text-anchor": "middle" });
    front.append(
      parts.output,
      svg("text", { class: "label", x: outX, y: outY + 22, "text-anchor": "middle", text: "classifier" }));
    host.replaceChildren(picture);
    update();

    function drawPlain(from) {
      links.append(svg("path", { class: "trunk", d: `M${at(from, middle)}L${at(from + plainLength, middle)}` }));
      const length = plainLength - 20;
      front.append(svg("rect", { class: "plain-block", ...box(from + 10, middle - 26, length, 52), rx: 4 }));
      const [x, y] = pointAt(from + plainLength / 2, middle);
      front.append(svg("text", { class: "label", x, y: y + 4, "text-anchor": "middle", transform: upright ? null : `rotate(-90 ${x} ${y})`, text: "plain" }));
    }

    function drawCoded(from, block, number) {
      const split = from + head;
      const fan = Math.min(46, (codedLength - head) * 0.27);
      const barStart = split + fan;
      const length = codedLength - head - 2 * fan;
      const merge = from + codedLength;
      const breadth = Math.max(3, Math.min(pitch - 2.5, 20));
      if (head) links.append(svg("path", { class: "trunk", d: `M${at(from, middle)}L${at(split, middle)}` }));
      const first = middle - (block.branches * pitch) / 2;
      const branches = Array.from({ length: block.branches }, (_, branch) => {
        const v = first + (branch + 0.5) * pitch;
        const bend = fan * 0.55;
        const link = svg("path", {
          d: `M${at(split, middle)}C${at(split + bend, middle)} ${at(barStart - bend, v)} ${at(barStart, v)}`
            + `M${at(barStart + length, v)}C${at(barStart + length + bend, v)} ${at(merge - bend, middle)} ${at(merge, middle)}`,
        });
        links.append(link);
        const fill = svg("rect", { ...box(barStart, v - breadth / 2, 0, breadth), rx: 2 });
        const outline = svg("rect", { class: "track", ...box(barStart, v - breadth / 2, length, breadth), rx: 2 });
        const tick = barStart + length / energyRoom;
        const asked = svg("path", { class: "asked", d: `M${at(tick, v - breadth / 2)}L${at(tick, v + breadth / 2)}` });
        const title = svg("title", {});
        const group = svg("g", {}, title, outline, fill, asked);
        let value = null;
        if (!upright && breadth >= 13 && length >= 84) {
          value = svg("text", { class: "value", x: barStart + length - 4, y: v + 3.5, "text-anchor": "end" });
          group.append(value, svg("text", { class: "branch", x: barStart - 5, y: v + 3.5, "text-anchor": "end", text: branch }));
        }
        front.append(group);
        return { link, fill, outline, asked, title, value, length };
      });
      front.append(svg("circle", { class: "node", cx: pointAt(split, middle)[0], cy: pointAt(split, middle)[1], r: 4 }));
      const centre = split + (codedLength - head) / 2;
      const room = Math.max(6, Math.floor(codedLength / 8));
      const lines = upright
        ? [[0, from + 18, "start"], [width, from + 18, "end"], [width, from + 33, "end"]]
        : [[centre, across + 30, "middle"], [centre, across + 47, "middle"], [centre, across + 64, "middle"]];
      const [name, said, share] = lines.map(([x, y, anchor], row) =>
        svg("text", { class: ["label", "said", "label"][row], x, y, "text-anchor": anchor }));
      name.textContent = codedLength > 90 || upright ? `block ${number + 1}: ${block.active} of ${block.branches}` : number + 1;
      front.append(name, said, share);
      return { branches, said, share, room, number };
    }
  };

  const update = () => {
    if (!parts) return;
    const { chosenClass, sample } = state;
    const samples = results.samples;
    for (const { branches, said, share, room, number } of parts.blocks) {
      const energies = energiesShown(number);
      const word = blockBooks[number].words[chosenClass];
      branches.forEach((branch, index) => {
        const active = word[index] === "1";
        const energy = energies ? energies[index] : 0;
        const length = Math.min(energy / energyRoom, 1) * branch.length;
        branch.fill.setAttribute(parts.upright ? "height" : "width", length);
        branch.fill.setAttribute("class", `energy ${active ? "active" : "inactive"}`);
        branch.outline.setAttribute("class", `track ${active ? "lit" : ""}`);
        branch.asked.setAttribute("class", `asked ${active ? "" : "unlit"}`);
        branch.link.setAttribute("class", `link ${active ? "active" : energy > 0.25 ? "inactive" : ""}`);
        branch.link.setAttribute("stroke-width", (0.8 + 2.6 * Math.min(energy, 1.4)).toFixed(2));
        branch.title.textContent = `branch ${index}${active ? ", works for the class" : ""}: energy ${energies ? energy.toFixed(3) : "n/a"}`;
        if (branch.value) branch.value.textContent = energies ? energy.toFixed(2) : "";
      });
      const onPath = percent(shareOnPath(number), 0);
      if (sample === null) {
        said.textContent = onPath === "n/a" ? (room > 9 ? "no image" : "–") : onPath;
        share.textContent = room > 9 && onPath !== "n/a" ? "of energy on path" : "";
        said.setAttribute("class", "said");
      } else {
        const decoded = samples.blocks[number].decoded[sample];
        const right = decoded === samples.targets[sample];
        said.textContent = `${right ? "✓" : "✗"} ${plainName(decoded, Math.max(2, room - 4))}`;
        said.setAttribute("class", `said ${right ? "right" : "wrong"}`);
        share.textContent = room > 9 ? `${onPath} on path` : onPath;
      }
    }
    const picture = sample !== null && report.pictures ? report.pictures[sample] : null;
    if (picture) parts.image.setAttribute("href", picture);
    parts.image.setAttribute("visibility", picture ? "visible" : "hidden");
    const final = sample === null ? chosenClass : samples.predictions[sample];
    parts.output.textContent = plainName(final, 7);
  };

  const describe = () => {
    const { chosenClass, sample } = state;
    const count = results.paths ? results.paths.samples_per_class[chosenClass] : 0;
    if (sample === null && !count) {
      byId("network-text").textContent = `Class ${plainName(chosenClass)}: its path; no test image of it was measured.`;
      return;
    }
    const what = sample === null
      ? `Class ${plainName(chosenClass)}, mean of ${whole(count)} test images.`
      : `Test image ${results.samples.positions[sample]} of class ${plainName(chosenClass)}.`;
    const shares = blockBooks.map((_, block) => {
      const text = `block ${block + 1}: ${percent(shareOnPath(block), 0)}`;
      return sample === null ? text : `${text}, decoder says ${plainName(results.samples.blocks[block].decoded[sample])}`;
    });
    byId("network-text").textContent = `${what} Energy on the designed path: ${shares.join("; ")}.`;
  };

  const table = numbersOf("All energies as a table", () => {
    const most = Math.max(...blockBooks.map((book) => book.branches));
    const rows = blockBooks.map((book, block) => {
      const energies = energiesShown(block);
      const word = book.words[state.chosenClass];
      return [`block ${block + 1}`, ...Array.from({ length: most }, (_, branch) => {
        if (branch >= book.branches) return "";
        const text = energies ? energies[branch].toFixed(3) : "n/a";
        return word[branch] === "1" ? html("strong", { class: "number", text: `${text} *` }) : text;
      })];
    });
    return tableOf("Energy of every branch; * works for the class", ["", ...Array.from({ length: most }, (_, n) => String(n))], rows);
  });
  table.id = "energy-table";
  byId("network-numbers").append(table);
  whenSized(host, draw);
  onChoice(() => {
    update();
    describe();
    table.refresh();
  });
}
