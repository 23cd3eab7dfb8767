// Reading the embedded data, making elements, writing numbers and names.

const arrayTypes = { u8: Uint8Array, u16: Uint16Array, i32: Int32Array, f32: Float32Array, f64: Float64Array };

// Arrays come as base64 of little-endian numbers, see packing.py; matrices become rows.
function unpack(value) {
  if (Array.isArray(value)) return value.map(unpack);
  if (value === null || typeof value !== "object") return value;
  if (typeof value.packed === "string") {
    const text = atob(value.packed);
    const bytes = new Uint8Array(text.length);
    for (let index = 0; index < text.length; index += 1) bytes[index] = text.charCodeAt(index);
    const numbers = new arrayTypes[value.type](bytes.buffer);
    if (value.width === undefined) return numbers;
    return Array.from({ length: numbers.length / value.width }, (_, row) =>
      numbers.subarray(row * value.width, (row + 1) * value.width));
  }
  return Object.fromEntries(Object.entries(value).map(([key, part]) => [key, unpack(part)]));
}

const report = unpack(JSON.parse(document.getElementById("data").textContent));
// What the experiments found; null for what was not done.
const results = report.evaluation || {};
const classNames = report.class_names || [];
const codebooks = report.codebooks || [];
// The codebook of every coded block, in order.
const blockBooks = (report.block_codebooks || []).map((index) => codebooks[index]);

function make(create, tag, attributes, children) {
  const node = create(tag);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (key === "text") node.textContent = value;
    else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}
const html = (tag, attributes, ...children) =>
  make((name) => document.createElement(name), tag, attributes, children);
const svg = (tag, attributes, ...children) =>
  make((name) => document.createElementNS("http://www.w3.org/2000/svg", name), tag, attributes, children);
const byId = (id) => document.getElementById(id);

const known = (value) => value !== null && value !== undefined && !Number.isNaN(value);
const fixed = (value, digits) => (known(value) ? value.toFixed(digits) : "n/a");
const percent = (share, digits = 1) => (known(share) ? `${(100 * share).toFixed(digits)} %` : "n/a");
const whole = (value) => (known(value) ? Math.round(value).toLocaleString("en") : "n/a");

// Class names are text of any length, script and direction.
const fullName = (index) => classNames[index] || `(class ${index} has no name)`;
const shorten = (text, longest) =>
  [...text].length > longest ? `${[...text].slice(0, longest - 1).join("")}…` : text;
function nameOf(index, longest = 40) {
  const full = fullName(index);
  const short = shorten(full, longest);
  return html("bdi", { dir: "auto", class: "name", text: short, title: short === full ? null : full });
}
// For elements that hold text alone: first-strong isolates keep the direction inside.
const plainName = (index, longest = 40) => `\u2068${shorten(fullName(index), longest)}\u2069`;

function tableOf(caption, headings, rows, attributes) {
  const isNumber = (value) => typeof value === "string" && /^[-+\d.,\s%–]+$|^n\/a$/.test(value);
  const look = headings.map((_, column) => (column && rows.length && isNumber(rows[0][column]) ? "number" : null));
  return html("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": caption },
    html("table", attributes,
      html("caption", { text: caption }),
      html("thead", {}, html("tr", {}, headings.map((text, column) =>
        html("th", { scope: "col", class: look[column] }, text)))),
      html("tbody", {}, rows.map((row) =>
        html("tr", {}, row.map((value, column) =>
          html(column ? "td" : "th", { class: look[column], scope: column ? null : "row" }, value)))))));
}

// The numbers behind a picture; the table is made when it is opened, or printed.
function numbersOf(summary, makeTable) {
  const details = html("details", { class: "numbers" }, html("summary", { text: summary }));
  let filled = false;
  const fill = () => {
    if (!filled) details.append(makeTable());
    filled = true;
  };
  details.addEventListener("toggle", () => details.open && fill());
  details.refresh = () => {
    while (details.childNodes.length > 1) details.lastChild.remove();
    filled = false;
    if (details.open) fill();
  };
  return details;
}

// Draws into a host now and whenever its width changes; hidden hosts wait.
function whenSized(host, draw) {
  let last = 0;
  new ResizeObserver(() => {
    const width = Math.floor(host.clientWidth);
    if (width > 0 && width !== last) {
      last = width;
      draw(width);
    }
  }).observe(host);
}

// What is looked at: a class, and one of its test images or (null) the mean of all.
const state = { chosenClass: 0, sample: null, listeners: [] };
function choose(change) {
  Object.assign(state, change);
  for (const listener of state.listeners) listener(state);
}
function onChoice(listener) {
  state.listeners.push(listener);
  listener(state);
}
