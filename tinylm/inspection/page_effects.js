// Parts 9 to 11: ablation, patching, checkpoints, formulas.
function effectTable(header, names, values, notes, limit) {
  const body = names.map((label, row) => el("tr", {}, el("th", {}, label), ...values[row].map((value, column) => {
    const td = el("td", { className: "l" + level(Math.abs(value) / limit, [0.08, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95]), title: notes ? notes[row][column] : "" }, value === null ? "" : signed(value));
    return td;
  })));
  return el("div", { className: "scroll", tabIndex: 0 }, el("table", { className: "grid" }, el("thead", {}, el("tr", {}, el("th"), ...header.map(text => el("th", {}, text)))), el("tbody", {}, ...body)));
}
const range = n => Array.from({ length: n }, (_, i) => i);

(() => {
  const part = data.ablation, box = $("ablation");
  box.append(el("h3", {}, "Ablation: a part is set to its mean"));
  if (!part) { box.append(el("div", { id: "no-ablation" })); return unavailable("no-ablation", "ablation", data.missing.ablation ? "" : "Ablations need text to measure on; --ablation-tokens 0 skips them."); }
  const heads = decode(part.heads), headErrors = decode(part.head_errors), layers = decode(part.feed_forward), layerErrors = decode(part.feed_forward_errors);
  const rowsOfHeads = heads.shape[0], columns = heads.shape[1] ?? 0, names = range(Math.max(rowsOfHeads, layers.numbers.length)).map(layer => "layer " + layer);
  const values = names.map((_, layer) => [...range(columns).map(head => heads.at(layer, head)), ...(layer < layers.numbers.length ? [layers.at(layer)] : [])]);
  const notes = names.map((_, layer) => [...range(columns).map(head => "standard error " + number(headErrors.at(layer, head))), "standard error " + (layer < layers.numbers.length ? number(layerErrors.at(layer)) : "")]);
  const all = values.flat().map(Math.abs).sort((a, b) => a - b), typical = Math.max(...values.map(row => row.slice(0, columns)).flat().map(Math.abs), 1e-9);
  box.append(el("p", { className: "note" }, "How much the bits per byte grow (" + part.bits_per_byte.toFixed(3) + " without ablation). Measured on " + part.tokens.toLocaleString("en") + " tokens (" + part.bytes.toLocaleString("en") + " bytes) of " + data.measured_on + ". Differences below two standard errors, at most " + number(2 * Math.max(...headErrors.numbers, ...layerErrors.numbers)) + ", may be chance. Heads are shaded relative to the most important head."));
  box.append(effectTable([...range(columns).map(head => "head " + head), ...(layers.numbers.length ? ["feed-forward"] : [])], names, values, notes, columns ? typical : all[all.length - 1]));
})();

(() => {
  const part = data.patching, box = $("patching");
  box.append(el("h3", {}, "Activation patching: which places carry the difference"));
  if (data.missing.patching) { box.append(el("div", { id: "no-patching" })); return unavailable("no-patching", "patching"); }
  if (!part) return box.append(el("p", { className: "note" }, "Compares two texts with the same number of tokens: tinylm inspect --text \"...\" --corrupt \"...\" --out page.html"));
  const positions = decode(part.positions), heads = decode(part.heads), layers = range(positions.shape[0]);
  const changed = range(T).filter(t => part.texts[t] !== rows[t].text);
  box.append(el("p", { className: "strip" }, "Corrupt text: ", ...part.texts.map((text, t) => el("span", { className: "t" + (changed.includes(t) ? " l4" : "") }, visible(text)))),
    el("p", { className: "note" }, "The model reads the corrupt text with one activation from the original text. 0 means no effect, 1 means that the prediction is restored. Metric: " + visible(part.metric).replaceAll("\u00b7", " ") + "."),
    el("h3", {}, "Residual stream before a layer, at one position"),
    effectTable(range(T).map(t => t + " " + tokenName(t).slice(0, 8)), layers.map(l => "layer " + l), layers.map(l => range(T).map(t => positions.at(l, t))), null, 1),
    el("h3", {}, "One head, at all positions"),
    effectTable(range(heads.shape[1]).map(h => "head " + h), layers.map(l => "layer " + l), layers.map(l => range(heads.shape[1]).map(h => heads.at(l, h))), null, 1));
})();

(() => {
  const part = data.learning, box = $("learning");
  if (!part) return box.append(el("p", { className: "note" }, "Not requested. Save checkpoints to compare with checkpoint.keep_every in the recipe, and add --checkpoints all."));
  const steps = part.steps, K = steps.length, losses = decode(part.losses), patterns = decode(part.patterns), scores = part.scores && Object.fromEntries(Object.entries(part.scores).map(([kind, value]) => [kind, decode(value)]));
  const mean = part.means, hasLoss = mean.every(value => value !== null);
  const slider = el("input", { type: "range", id: "checkpoint-slider", min: 0, max: K - 1, value: K - 1 }), now = el("output"), detail = el("div", { role: "status", id: "checkpoint-detail" });
  const strong = el("div", { className: "strip" });
  function chart(title, lines, lowest, highest) {
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg"), make = (tag, attributes, text) => { const node = document.createElementNS("http://www.w3.org/2000/svg", tag); for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value); if (text) node.textContent = text; svg.append(node); };
    svg.setAttribute("viewBox", "0 0 420 190"); svg.setAttribute("role", "img"); svg.setAttribute("aria-label", title);
    const x = k => 40 + 360 * (K > 1 ? (steps[k] - steps[0]) / (steps[K - 1] - steps[0] || 1) : 0.5), y = value => 150 - 130 * (value - lowest) / (highest - lowest || 1);
    make("line", { x1: 40, y1: 150, x2: 400, y2: 150 }); make("line", { x1: 40, y1: 20, x2: 40, y2: 150 });
    make("text", { x: 2, y: 154 }, number(lowest)); make("text", { x: 2, y: 24 }, number(highest)); make("text", { x: 40, y: 166 }, "step " + steps[0]); make("text", { x: 400, y: 166, "text-anchor": "end" }, String(steps[K - 1]));
    lines.forEach(([label, values, style], index) => { make("path", { class: style, d: values.map((value, k) => (k ? "L" : "M") + x(k) + " " + y(value)).join(" ") }); make("text", { x: 40 + 125 * index, y: 184 }, label); });
    return el("div", {}, el("h3", {}, title), svg);
  }
  const charts = el("div", { className: "columns" }); if (hasLoss) charts.append(chart("Loss on this text, nats per token", [["", mean, ""]], Math.min(...mean), Math.max(...mean)));
  if (scores) { const best = kind => range(K).map(k => Math.max(...range(scores[kind].shape[1]).flatMap(l => range(scores[kind].shape[2]).map(h => scores[kind].at(k, l, h))))); charts.append(chart("Best head score", [["\u2014 previous", best("previous_token"), ""], ["- - duplicate", best("duplicate_token"), "dash"], ["\u00b7 \u00b7 induction", best("induction"), "dots"]], 0, 1)); }
  const canvas = el("canvas", { "aria-hidden": "true" }); canvas.style.width = "min(100%, 16rem)";
  box.append(charts, el("div", { className: "controls" }, el("label", {}, "checkpoint ", slider, now)), el("div", { className: "columns" }, el("div", {}, strong, detail), patterns ? canvas : null));
  strip(strong, rows.map((_, index) => tokenName(index)), () => {}, "token");
  function show() {
    const k = +slider.value;
    now.textContent = "step " + steps[k]; slider.setAttribute("aria-valuetext", "step " + steps[k]);
    paint(strong, index => level(losses.at(k, index) / Math.LN2, bitBounds));
    const lines = hasLoss ? ["Loss " + mean[k].toFixed(3) + " nats per token."] : [];
    if (scores) { const { layer, head } = state; lines.push("Selected head L" + layer + "H" + head + ": " + Object.keys(scores).map(kind => kindNames[kind] + " " + scores[kind].at(k, layer, head).toFixed(2)).join(", ") + "."); for (const kind of Object.keys(scores)) { const first = range(K).find(i => range(scores[kind].shape[1]).some(l => range(scores[kind].shape[2]).some(h => scores[kind].at(i, l, h) >= 0.3))); lines.push("First " + kindNames[kind] + " head: " + (first === undefined ? "not yet." : "by step " + steps[first] + ".")); } }
    if (patterns) { const n = patterns.shape[3]; drawMatrix(canvas, n, n, (i, j) => patterns.at(k, state.layer, state.head, i, j)); lines.push("The picture shows the attention of the selected head among the first " + n + " tokens at this step."); }
    detail.replaceChildren(...lines.map(line => el("p", {}, line)));
  }
  slider.oninput = show;
  onToken(show);
  state.headListeners.push(show);
})();

$("formulas").append(table(["quantity", "formula", "source"], data.formulas.map(row => [row.name, row.formula, row.source])));
selectToken(state.token);
