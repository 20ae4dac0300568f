// Parts 1 to 5: tokens, embeddings, attention, residual stream, feed-forward.
(() => {
  $("key").append(el("b", {}, "bits"), ...["0-1", "1-2", "2-4", "4-6", "6-8", "8-11", "11-14", "14+"].map((text, l) => el("span", { className: l ? "l" + l : "" }, text)));
  const box = $("tokens");
  strip(box, rows.map((_, index) => tokenName(index)), (index, type) => { if (type !== "pointerover") selectToken(index); });
  paint(box, index => rows[index].loss === null ? 0 : level(rows[index].loss / Math.LN2, bitBounds));
  onToken(() => {
    for (const button of box.children) { const here = +button.dataset.i === state.token; button.setAttribute("aria-pressed", here); if (here || button.tabIndex === 0) button.tabIndex = here ? 0 : -1; }
    const row = rows[state.token];
    $("token-facts").textContent = "[" + visible(row.text) + "] has id " + row.id + (row.loss === null ? ". It is not predicted from other tokens, so it has no loss." : ". Loss " + row.loss.toFixed(3) + " nats = " + (row.loss / Math.LN2).toFixed(3) + " bits: the model gave it a probability of " + percent(Math.exp(-row.loss)) + ".");
  });
  const words = $("words");
  if (data.tokens.reason) words.append(el("p", { className: "note" }, "Not available: " + data.tokens.reason));
  for (const word of data.tokens.words) {
    const list = el("ul");
    for (const step of word.steps) { const item = el("li", {}, step.step + ": "); for (const part of step.parts) item.append(el("span", { className: "t l2" }, visible(part)), " "); list.append(item); }
    words.append(el("div", { className: "word" }, el("code", {}, visible(word.text)), " ids " + word.ids.join(" "), list));
  }
})();

(() => {
  const part = data.embeddings, box = $("embeddings");
  if (!part) return unavailable("embeddings", "embeddings");
  const vectors = part.parts.map(each => ({ name: each.name, values: decode(each.values), norms: decode(each.norms) }));
  onToken(() => {
    box.replaceChildren();
    for (const { name: label, values, norms } of vectors) {
      const width = values.shape[1], start = state.token * width, cells = el("div", { className: "cells", role: "img", "aria-label": label + ", " + width + " numbers" });
      const vector = values.numbers.subarray(start, start + width), size = Math.sqrt(vector.reduce((sum, x) => sum + x * x, 0) / width) || 1;
      for (const x of vector) cells.append(el("span", { className: "l" + level(Math.abs(x) / size, [0, 0.3, 0.6, 1, 1.4, 1.8, 2.4]) + (x < 0 ? " negative" : ""), title: number(x) }));
      const first = [...vector.subarray(0, 8)].map(number).join(", ");
      box.append(el("h3", {}, label + ": length " + norms.at(state.token).toFixed(3)), cells, el("p", { className: "note" }, width + " numbers, the first: " + first + (width > 8 ? ", ..." : "")));
    }
    const near = part.nearest[rows[state.token].id];
    const note = { rope: "The position is not added to the vector: rotary positions turn queries and keys by an angle that grows with the position (base " + part.theta + ").", learned: "The position has a vector of its own, which is learned and added.", sinusoidal: "The position has a vector of sines and cosines, which is added.", none: "No position is added to the vector." }[part.position] ?? "";
    box.append(el("p", { className: "note" }, note), el("h3", {}, "Tokens with the most similar vectors (cosine)"), bars(near.map(([id, value]) => ["[" + name(id) + "]", value])));
  });
})();

const attention = data.attention && (() => {
  const part = data.attention, patterns = decode(part.patterns), { layers, heads, causal } = part, per = causal ? T * (T + 1) / 2 : T * T;
  const weight = (layer, head, query, key) => causal ? (key > query ? 0 : patterns.numbers[(layer * heads + head) * per + query * (query + 1) / 2 + key]) : patterns.numbers[(layer * heads + head) * per + query * T + key];
  return { part, layers, heads, weight, q: decode(part.vectors.q), k: decode(part.vectors.k), v: decode(part.vectors.v), entropy: decode(part.entropy), scores: Object.fromEntries(Object.entries(part.scores).map(([kind, value]) => [kind, decode(value)])) };
})();
const kindNames = { previous_token: "previous token", duplicate_token: "duplicate token", induction: "induction" };

(() => {
  const box = $("attention");
  if (!attention) return unavailable("attention", "attention", "A model without attention keeps what it has read in its state.");
  const { part, layers, heads, weight } = attention;
  [state.layer, state.head] = part.strongest;
  const grid = el("div", { className: "heads", role: "group", "aria-label": "Attention heads" });
  grid.style.gridTemplateColumns = "repeat(" + heads + ", minmax(0, 1fr))";
  const thumbnails = [];
  for (let layer = 0; layer < layers; layer++) for (let head = 0; head < heads; head++) {
    const canvas = el("canvas", { "aria-hidden": "true" }), kind = part.kinds[layer][head];
    const button = el("button", { type: "button", tabIndex: layer + head ? -1 : 0, "aria-label": "layer " + layer + " head " + head + (kind ? ", " + kindNames[kind] + " head" : ", not yet characteristic") }, canvas, el("span", {}, "L" + layer + "H" + head), el("span", {}, kind ? kindNames[kind] : "not yet"));
    button.onclick = () => { state.layer = layer; state.head = head; state.key = null; showHead(); };
    button.onfocus = button.onclick;
    thumbnails.push([canvas, layer, head, button]);
    grid.append(button);
  }
  grid.onkeydown = event => arrows(event, grid, heads);
  const title = el("h3"), matrix = el("canvas", { id: "matrix", role: "img", "aria-label": "attention of the selected head, rows look at columns" }), tokensBox = el("div", { className: "strip", id: "looks", role: "group", "aria-label": "Where a token looks" });
  const text = el("p", { role: "status", id: "looks-text" }), statistics = el("p", { className: "note" }), sum = el("div", { id: "by-hand" });
  box.append(grid, title, statistics, el("div", { className: "columns" }, matrix, el("div", {}, tokensBox, text)), sum);
  let query = state.token;
  strip(tokensBox, rows.map((_, index) => tokenName(index)), index => { query = index; look(); }, "query");
  matrix.onpointermove = event => { if (!hovers(event)) return; const rect = matrix.getBoundingClientRect(); query = Math.max(0, Math.min(T - 1, Math.floor((event.clientY - rect.top) / rect.height * T))); look(); };
  function look() {
    const { layer, head } = state, weights = rows.map((_, key) => weight(layer, head, query, key));
    paint(tokensBox, index => level(weights[index], shareBounds));
    [...tokensBox.children].forEach((button, index) => button.setAttribute("aria-pressed", index === query));
    const order = weights.map((w, key) => [w, key]).sort((a, b) => b[0] - a[0]).slice(0, 5);
    text.textContent = "Token " + query + " [" + tokenName(query) + "] looks at: " + order.map(([w, key]) => key + " [" + tokenName(key) + "] " + percent(w)).join(", ");
    drawMatrix(matrix, T, (i, j) => weight(layer, head, i, j), query);
    byHand(sum, query, state.key ?? order[0][1]);
  }
  function showHead() {
    const { layer, head } = state, kind = part.kinds[layer][head];
    thumbnails.forEach(([, l, h, button]) => button.classList.toggle("selected", l === layer && h === head));
    title.textContent = "Layer " + layer + ", head " + head + ": " + (kind ? kindNames[kind] + " head" : "not yet characteristic");
    statistics.textContent = Object.entries(attention.scores).map(([each, value]) => kindNames[each] + " score " + value.at(layer, head).toFixed(3)).join(", ") + " (on repeated random tokens). Entropy on this text " + attention.entropy.at(layer, head).toFixed(2) + " bits.";
    look();
  }
  onToken(() => {
    query = state.token;
    for (const [canvas, layer, head] of thumbnails) drawMatrix(canvas, T, (i, j) => weight(layer, head, i, j));
    showHead();
  });
})();

// One attention weight, written out so that it can be computed again by hand.
function byHand(box, query, key) {
  const { part, q, k, v, weight } = attention, { layer, head } = state, row = part.vectors.heads.findIndex(([l, h]) => l === layer && h === head);
  if (row < 0) return box.replaceChildren(el("p", { className: "note" }, "Queries and keys are stored for " + part.vectors.heads.length + " of " + part.layers * part.heads + " heads, so that the page stays small: " + part.vectors.heads.map(([l, h]) => "L" + l + "H" + h).join(", ") + "."));
  const open = box.querySelector("details")?.open ?? false, D = part.width, scores = [], products = [];
  for (let d = 0; d < D; d++) products.push([d, q.at(row, query, d), k.at(row, key, d), q.at(row, query, d) * k.at(row, key, d)]);
  const masked = j => part.causal && j > query;
  for (let j = 0; j < T; j++) { let s = 0; for (let d = 0; d < D; d++) s += q.at(row, query, d) * k.at(row, j, d); s /= Math.sqrt(D); scores.push(part.softcap ? part.softcap * Math.tanh(s / part.softcap) : s); }
  const window = part.windows[layer], hidden = j => masked(j) || (window !== null && j <= query - window);
  const dot = products.reduce((sum, row) => sum + row[3], 0), exps = scores.map((s, j) => hidden(j) ? 0 : Math.exp(s)), total = exps.reduce((a, b) => a + b, 0);
  const chooser = el("select", { id: "key-token" });
  for (let j = 0; j < T; j++) if (!masked(j)) chooser.append(el("option", { value: j, selected: j === key }, j + " [" + tokenName(j) + "]"));
  chooser.onchange = () => { state.key = +chooser.value; byHand(box, query, state.key); $("key-token").focus(); };
  const steps = [
    "dot product q \u00b7 k = " + number(dot),
    "scale: " + number(dot) + " / \u221a" + D + " = " + number(dot / Math.sqrt(D)) + (part.softcap ? ", capped to " + number(scores[key]) : ""),
    "mask: " + (hidden(key) ? "hidden, so the score is -\u221e" : "this key may be read, so the score stays"),
    "softmax: e^" + number(scores[key]) + " / (sum over keys of e^score) = " + number(exps[key]) + " / " + number(total) + " = " + (exps[key] / total).toFixed(4),
    "the model computed " + weight(layer, head, query, key).toFixed(4) + "; the numbers shown here are rounded to 11 bits",
  ];
  const details = el("details", { open }, el("summary", {}, "Compute one weight by hand"), el("div", { className: "controls" }, el("label", {}, "query " + query + " [" + tokenName(query) + "] looks at key ", chooser)), el("ol", {}, ...steps.map(step => el("li", {}, step))),
    el("div", { className: "columns" }, el("div", {}, el("h3", {}, "q \u00b7 k, number by number"), table(["", "q", "k", "q \u00d7 k"], products.map(r => [String(r[0]), r[1], r[2], r[3]]))),
      el("div", {}, el("h3", {}, "softmax over the keys"), table(["key", "score", "e^score", "weight"], scores.map((s, j) => [j + " [" + tokenName(j) + "]", hidden(j) ? "-\u221e" : s, exps[j], exps[j] / total]).filter((_, j) => !masked(j))),
        el("h3", {}, "value v of this key"), el("p", { className: "mono" }, Array.from({ length: D }, (_, d) => number(v.at(row, key, d))).join("  ")))));
  box.replaceChildren(details);
}

(() => {
  const part = data.residual, box = $("residual");
  if (!part) return unavailable("residual", "residual");
  const stream = decode(part.stream), spread = decode(part.spread), attended = decode(part.attention), fed = decode(part.feed_forward), cosine = decode(part.cosine), final = decode(part.final);
  onToken(() => {
    const body = [];
    for (let layer = 0; layer < stream.shape[0] - 1; layer++) body.push(["layer " + layer, stream.at(layer, state.token), spread.at(layer, state.token), attended ? attended.at(layer, state.token) : "", fed ? fed.at(layer, state.token) : "", cosine ? cosine.at(layer, state.token) : "", stream.at(layer + 1, state.token)]);
    box.replaceChildren(table(["", "norm before", part.norm, "attention adds", "feed-forward adds", "cosine of both", "norm after"], body),
      el("p", { className: "note" }, "A norm divides each vector by its " + part.norm + " before a layer reads it, so that layers see vectors of equal size." + (final ? " The final norm turns a length of " + number(stream.at(stream.shape[0] - 1, state.token)) + " into " + number(final.at(state.token)) + "." : "")));
  });
})();

(() => {
  const part = data.neurons, box = $("neurons");
  if (!part) return unavailable("neurons", "feed_forward");
  const ids = decode(part.ids), values = decode(part.values), places = el("div", { id: "snippets", role: "status" }), list = el("div", { id: "neuron-list" });
  box.append(list, places);
  function show(layer, neuron) {
    const found = part.snippets?.places[layer + "." + neuron] ?? [];
    places.replaceChildren(el("h3", {}, "Layer " + layer + ", neuron " + neuron + (part.snippets ? " in " + part.snippets.tokens.toLocaleString("en") + " tokens of " + data.measured_on : "")));
    if (!part.snippets) places.append(el("p", { className: "note" }, data.missing.heldout ?? ""));
    for (const [window, position, value] of found) {
      const snippet = el("p", { className: "snippet strip" }, number(value) + "  ");
      part.snippets.windows[window].slice(Math.max(0, position - 12), position + 6).forEach((id, offset) => snippet.append(el("span", { className: offset + Math.max(0, position - 12) === position ? "t l4" : "t" }, name(id))));
      places.append(snippet);
    }
  }
  onToken(() => {
    const body = [];
    for (let layer = 0; layer < ids.shape[0]; layer++) body.push(["layer " + layer, ...Array.from({ length: ids.shape[2] }, (_, r) => { const neuron = ids.at(layer, state.token, r), button = el("button", { type: "button" }, neuron + ": " + number(values.at(layer, state.token, r))); button.onclick = () => show(layer, neuron); return button; })]);
    list.replaceChildren(table(["", ...Array.from({ length: ids.shape[2] }, (_, r) => r ? String(r + 1) : "most active")], body));
    show(ids.shape[0] - 1, ids.at(ids.shape[0] - 1, state.token, 0));
  });
})();
