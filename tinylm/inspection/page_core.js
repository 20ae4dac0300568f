// Data, the selected token, and helpers that build elements. Text from the model is only ever inserted as text.
const data = JSON.parse(document.getElementById("data").textContent);
const rows = data.tokens.rows, T = rows.length;
const state = { token: T - 1, layer: 0, head: 0, listeners: [], headListeners: [] };
const $ = id => document.getElementById(id);

function decode(value) {
  if (!value) return null;
  const raw = Uint8Array.from(atob(value.data), c => c.charCodeAt(0)), buffer = raw.buffer;
  let numbers;
  if (value.type === "f4") numbers = new Float32Array(buffer);
  else if (value.type === "i4") numbers = new Int32Array(buffer);
  else if (value.type === "u1") numbers = Float32Array.from(raw, x => x / 255);
  else if (value.type === "u2") numbers = Float32Array.from(new Uint16Array(buffer), x => x / 65535);
  else numbers = Float32Array.from(new Uint16Array(buffer), half);
  return { shape: value.shape, numbers, at: (...index) => numbers[index.reduce((sum, i, axis) => sum * value.shape[axis] + i, 0)] };
}
function half(bits) {
  const sign = bits & 0x8000 ? -1 : 1, exponent = bits >> 10 & 31, fraction = bits & 1023;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  return exponent === 31 ? sign * Infinity : sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}

// Whitespace and control characters become visible marks, so that no text can hide or reorder the page.
const marks = { " ": "\u00b7", "\n": "\u21b5", "\t": "\u21e5", "\r": "\u240d" };
const visible = text => [...text].map(c => marks[c] ?? (/[\p{C}\p{Z}]/u.test(c) ? "\\u{" + c.codePointAt(0).toString(16) + "}" : c)).join("");
const name = id => visible(data.vocabulary[id] ?? "@" + id);
// A classifier predicts one label for the text. Other models predict a token at every position.
const labels = data.labels, outputName = id => labels ? visible(labels[id]) : name(id);
const masked = data.task === "masked_lm", ordinal = layer => layer === 0 ? "embeddings" : "layer " + (layer - 1);
const tokenName = index => visible(rows[index].text);
const percent = p => p >= 0.0005 ? (100 * p).toFixed(1) + " %" : (100 * p).toExponential(0) + " %";
const signed = (x, digits = 3) => (x < 0 ? "-" : "+") + Math.abs(x).toFixed(digits);
const number = x => Math.abs(x) >= 1e4 || (x !== 0 && Math.abs(x) < 1e-3) ? x.toExponential(2) : x.toFixed(3);
const level = (value, bounds) => bounds.filter(bound => value >= bound).length;
const bitBounds = [1, 2, 4, 6, 8, 11, 14], shareBounds = [0.02, 0.05, 0.1, 0.2, 0.35, 0.55, 0.8];

function el(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [key, value] of Object.entries(properties)) key.includes("-") || key === "role" ? element.setAttribute(key, value) : element[key] = value;
  element.append(...children.filter(child => child !== null));
  return element;
}
function table(header, body, className = "") {
  const cell = (tag, content) => { const td = el(tag, { className: typeof content === "string" ? "text" : "" }); td.append(typeof content === "number" ? number(content) : content); return td; };
  const head = el("tr", {}, ...header.map(text => cell("th", text)));
  const element = el("table", { className }, el("thead", {}, head), el("tbody", {}, ...body.map(row => el("tr", {}, ...row.map(value => cell("td", value))))));
  return el("div", { className: "scroll", tabIndex: 0 }, element);
}
function bars(items, isSigned = false) {
  const largest = Math.max(...items.map(item => Math.abs(item[1])), 1e-12), box = el("div", { className: "bars" });
  for (const [label, value, text] of items) {
    const bar = el("i"), share = Math.abs(value) / largest;
    if (isSigned) { bar.style.width = 50 * share + "%"; bar.style[value < 0 ? "right" : "left"] = "50%"; if (value < 0) bar.className = "negative"; } else bar.style.width = 100 * share + "%";
    box.append(el("b", {}, label), el("span", {}, text ?? number(value)), isSigned ? el("div", { className: "signed" }, bar) : el("div", {}, bar));
  }
  return box;
}
// Whether a mouse has moved onto an element. Scrolling by keyboard also moves elements under a resting mouse.
let pointer = [-1, -1];
const hovers = event => event.pointerType !== "touch" && (event.clientX !== pointer[0] || event.clientY !== pointer[1]);
for (const type of ["pointermove", "pointerdown"]) document.addEventListener(type, event => { pointer = [event.clientX, event.clientY]; });
// A row of tokens. Arrow keys move inside it, so that it is a single stop for the Tab key.
function strip(container, texts, choose, label) {
  container.replaceChildren(...texts.map((text, index) => {
    const button = el("button", { type: "button", className: "t", tabIndex: index === 0 ? 0 : -1, "aria-label": label ? label + " " + index + ": " + text : "token " + index + ": " + text }, text || "\u00b7");
    button.dataset.i = index;
    return button;
  }));
  const pick = event => { const button = event.target.closest(".t"); if (button) choose(+button.dataset.i, event.type); };
  container.onclick = pick;
  container.onpointerover = event => { if (hovers(event)) pick(event); };
  container.addEventListener("focusin", pick);
  container.onkeydown = event => arrows(event, container);
}
function arrows(event, container, columns = 1) {
  const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns > 1 ? columns : 1, ArrowUp: columns > 1 ? -columns : -1 };
  const buttons = [...container.querySelectorAll("button")], at = buttons.indexOf(document.activeElement);
  let to = event.key === "Home" ? 0 : event.key === "End" ? buttons.length - 1 : event.key in steps ? at + steps[event.key] : -1;
  if (at < 0 || !(event.key in steps || event.key === "Home" || event.key === "End") || !buttons[to]) return;
  buttons.forEach(button => button.tabIndex = -1);
  buttons[to].tabIndex = 0; buttons[to].focus(); event.preventDefault();
}
function paint(container, shade) {
  for (const button of container.children) { const l = shade(+button.dataset.i); button.className = "t" + (l ? " l" + l : ""); }
}
function selectToken(index) {
  state.token = Math.max(0, Math.min(T - 1, index));
  $("previous").disabled = state.token === 0; $("next").disabled = state.token === T - 1;
  $("current").textContent = "token " + state.token + " of " + T + ": [" + tokenName(state.token) + "]";
  for (const listener of state.listeners) listener();
}
const onToken = listener => state.listeners.push(listener);
function unavailable(id, part, advice = "") {
  const reason = data.missing[part] ?? data.missing.heldout ?? "";
  $(id).replaceChildren(el("p", { className: "note" }, (reason ? "Not available: " + reason + ". " : "") + advice));
}
const ink = () => getComputedStyle(document.documentElement).getPropertyValue("--ink").trim();
// Draw weights (rows, columns) as squares: the more opaque, the larger. `limit` is the weight that is fully opaque.
function drawMatrix(canvas, height, width, weight, mark) {
  canvas.width = width; canvas.height = height;
  const context = canvas.getContext("2d");
  context.fillStyle = ink();
  for (let i = 0; i < height; i++) for (let j = 0; j < width; j++) { const w = weight(i, j); if (w > 0.004) { context.globalAlpha = Math.sqrt(w); context.fillRect(j, i, 1, 1); } }
  if (mark !== undefined) { context.globalAlpha = 0.25; context.fillRect(0, mark, width, 1); }
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => selectToken(state.token));

for (const section of document.querySelectorAll("main > section")) $("parts").append(el("option", { value: section.id }, section.querySelector("h2").textContent));
$("parts").onchange = event => { const section = $(event.target.value); section.scrollIntoView(); section.tabIndex = -1; section.focus({ preventScroll: true }); };
$("previous").onclick = () => selectToken(state.token - 1);
$("next").onclick = () => selectToken(state.token + 1);
$("facts").textContent = [data.run, data.checkpoint, data.architecture, data.parameters.toLocaleString("en") + " parameters", "tinylm " + data.version].join(" \u00b7 ");
