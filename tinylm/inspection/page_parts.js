// Parts 1 to 5: tokens, embeddings, attention, residual stream, feed-forward.
(() => {
  $("key").append(el("b", {}, "bits"), ...["0-1", "1-2", "2-4", "4-6", "6-8", "8-11", "11-14", "14+"].map((text, l) => el("span", { className: l ? "l" + l : "" }, text)));
  const box = $("tokens");
  if (labels) { $("key").remove(); $("surprise").remove(); }
  if (data.source) {
    $("source-tokens").append(el("h3", {}, "Source"), el("p", { className: "strip" }, ...data.source.rows.map(row => el("span", { className: "t" }, visible(row.text)))), el("h3", {}, data.source.generated ? "Translation by this model" : "Given translation"));
  }
  strip(box, rows.map((_, index) => tokenName(index)), (index, type) => { if (type !== "pointerover") selectToken(index); });
  paint(box, index => rows[index].loss === null ? 0 : level(rows[index].loss / Math.LN2, bitBounds));
  onToken(() => {
    for (const button of box.children) { const here = +button.dataset.i === state.token; button.setAttribute("aria-pressed", here); if (here || button.tabIndex === 0) button.tabIndex = here ? 0 : -1; }
    const row = rows[state.token];
    $("token-facts").textContent = row.id < 0 ? "This is the position before the translation. The prediction here is the first token." : "[" + visible(row.text) + "] has id " + row.id + (row.loss === null ? (labels ? "." : ". It is not predicted from other tokens, so it has no loss.") : (masked ? ". While it is masked: loss " : ". Loss ") + row.loss.toFixed(3) + " nats = " + (row.loss / Math.LN2).toFixed(3) + " bits: the model gave it a probability of " + percent(Math.exp(-row.loss)) + ".");
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
    const near = part.nearest[rows[state.token].id] ?? [];
    const note = { rope: "The position is not added to the vector: rotary positions turn queries and keys by an angle that grows with the position (base " + part.theta + ").", learned: "The position has a vector of its own, which is learned and added.", sinusoidal: "The position has a vector of sines and cosines, which is added.", none: "No position is added to the vector." }[part.position] ?? "";
    box.append(el("p", { className: "note" }, note));
    if (near.length) box.append(el("h3", {}, "Tokens with the most similar vectors (cosine)"), bars(near.map(([id, value]) => ["[" + name(id) + "]", value])));
  });
})();

const kindNames = { previous_token: "previous token", duplicate_token: "duplicate token", induction: "induction" };

// The heads of one kind of attention: thumbnails, one enlarged head, and one weight by hand. `id` starts the ids of the elements.
// `changed` is called with the selected layer and head.
function attentionView(box, part, { id = "", queries, keys, heading = null, changed = () => {} }) {
  const patterns = decode(part.patterns), { layers, heads, causal } = part, Q = queries.length, K = keys.length, per = causal ? Q * (Q + 1) / 2 : Q * K;
  const weight = (layer, head, query, key) => causal ? (key > query ? 0 : patterns.numbers[(layer * heads + head) * per + query * (query + 1) / 2 + key]) : patterns.numbers[(layer * heads + head) * per + query * K + key];
  const view = { part, weight, queries, keys, id, q: decode(part.vectors.q), k: decode(part.vectors.k), v: decode(part.vectors.v), key: null };
  const entropy = decode(part.entropy), scores = part.scores && Object.fromEntries(Object.entries(part.scores).map(([kind, value]) => [kind, decode(value)]));
  const kindOf = (layer, head) => part.kinds ? part.kinds[layer][head] : undefined, kindText = kind => kind ? kindNames[kind] + " head" : "not yet characteristic";
  [view.layer, view.head] = part.strongest;
  const grid = el("div", { className: "heads", role: "group", "aria-label": (heading ?? "Attention") + ": heads" });
  grid.style.gridTemplateColumns = "repeat(" + heads + ", minmax(0, 1fr))";
  const thumbnails = [];
  for (let layer = 0; layer < layers; layer++) for (let head = 0; head < heads; head++) {
    const canvas = el("canvas", { "aria-hidden": "true" }), kind = kindOf(layer, head);
    const button = el("button", { type: "button", tabIndex: layer + head ? -1 : 0, "aria-label": "layer " + layer + " head " + head + (part.kinds ? ", " + kindText(kind) : "") }, canvas, el("span", {}, "L" + layer + "H" + head), part.kinds ? el("span", {}, kind ? kindNames[kind] : "not yet") : null);
    button.onclick = () => { view.layer = layer; view.head = head; view.key = null; showHead(); changed(layer, head); };
    button.onfocus = button.onclick;
    thumbnails.push([canvas, layer, head, button]);
    grid.append(button);
  }
  grid.onkeydown = event => arrows(event, grid, heads);
  const title = el("h3"), matrix = el("canvas", { id: id + "matrix", className: "matrix", role: "img", "aria-label": "attention of the selected head, rows look at columns" }), tokensBox = el("div", { className: "strip", id: id + "looks", role: "group", "aria-label": "Where a token looks" });
  const text = el("p", { role: "status", id: id + "looks-text" }), statistics = el("p", { className: "note" }), sum = el("div", { id: id + "by-hand" });
  if (heading) box.append(el("h3", { className: "kind" }, heading));
  box.append(grid, title, statistics);
  const square = queries === keys, keysBox = square ? tokensBox : el("div", { className: "strip" });
  box.append(el("div", { className: "columns" }, matrix, el("div", {}, tokensBox, square ? null : el("p", { className: "note" }, "looks at the source:"), square ? null : keysBox, text)), sum);
  let query = Math.min(state.token, Q - 1);
  strip(tokensBox, queries, index => { query = index; view.key = null; look(); }, "query");
  if (!square) keysBox.replaceChildren(...keys.map((each, index) => { const span = el("span", { className: "t" }, each); span.dataset.i = index; return span; }));
  matrix.onpointermove = event => { if (!hovers(event)) return; const rect = matrix.getBoundingClientRect(); query = Math.max(0, Math.min(Q - 1, Math.floor((event.clientY - rect.top) / rect.height * Q))); look(); };
  function look() {
    const { layer, head } = view, weights = keys.map((_, key) => weight(layer, head, query, key));
    paint(keysBox, index => level(weights[index], shareBounds));
    [...tokensBox.children].forEach((button, index) => button.setAttribute("aria-pressed", index === query));
    const order = weights.map((w, key) => [w, key]).sort((a, b) => b[0] - a[0]).slice(0, 5);
    text.textContent = "Token " + query + " [" + queries[query] + "] looks at: " + order.map(([w, key]) => key + " [" + keys[key] + "] " + percent(w)).join(", ");
    drawMatrix(matrix, Q, K, (i, j) => weight(layer, head, i, j), query);
    byHand(view, sum, query, view.key ?? order[0][1]);
  }
  function showHead() {
    const { layer, head } = view;
    thumbnails.forEach(([, l, h, button]) => button.classList.toggle("selected", l === layer && h === head));
    title.textContent = "Layer " + layer + ", head " + head + (part.kinds ? ": " + kindText(kindOf(layer, head)) : "");
    const measured = scores ? Object.entries(scores).map(([each, value]) => kindNames[each] + " score " + value.at(layer, head).toFixed(3)).join(", ") + " (on repeated random tokens). " : "";
    statistics.textContent = measured + "Entropy on this text " + entropy.at(layer, head).toFixed(2) + " bits.";
    look();
  }
  // Follow the selected token, if the queries are the tokens of the page.
  return follow => {
    if (follow) query = state.token;
    for (const [canvas, layer, head] of thumbnails) drawMatrix(canvas, Q, K, (i, j) => weight(layer, head, i, j));
    showHead();
  };
}

(() => {
  const box = $("attention"), names = rows.map((_, index) => tokenName(index));
  if (!data.attention) return unavailable("attention", "attention", "A model without attention keeps what it has read in its state.");
  [state.layer, state.head] = data.attention.strongest;
  const show = attentionView(box, data.attention, { queries: names, keys: names, heading: data.source ? "Decoder: the translation looks at itself" : null, changed: (layer, head) => { state.layer = layer; state.head = head; state.headListeners.forEach(listener => listener()); } });
  onToken(() => show(true));
})();

// The attention of a translator's decoder to the source text, and of its encoder.
(() => {
  const source = data.source;
  if (!source) return;
  const names = rows.map((_, index) => tokenName(index)), sources = source.rows.map(row => visible(row.text)), alignment = decode(source.alignment), box = $("cross-attention");
  const predicted = names.map((_, index) => index + 1 < T ? names[index + 1] : "end");
  const body = predicted.map((label, t) => el("tr", {}, el("th", { className: "text" }, label), ...sources.map((_, s) => el("td", { className: "l" + level(alignment.at(t, s), shareBounds), title: label + " \u2190 " + sources[s] + " " + percent(alignment.at(t, s)) }, String(Math.round(100 * alignment.at(t, s)))))));
  box.append(el("h3", { className: "kind" }, "Alignment: what each predicted token reads in the source"), el("p", { className: "note" }, "Rows are predicted tokens, columns are source tokens. The numbers are the cross-attention of the last decoder layer in percent, averaged over heads."),
    el("div", { className: "scroll", tabIndex: 0 }, el("table", { className: "grid", id: "alignment" }, el("thead", {}, el("tr", {}, el("th"), ...sources.map(each => el("th", {}, each)))), el("tbody", {}, ...body))));
  const showCross = attentionView(box, source.cross, { id: "cross-", queries: names, keys: sources, heading: "Cross-attention: the translation looks at the source" });
  const showEncoder = attentionView($("encoder-attention"), source.attention, { id: "encoder-", queries: sources, keys: sources, heading: "Encoder: the source looks at itself" });
  onToken(() => { showCross(true); showEncoder(false); });
})();

// One attention weight, written out so that it can be computed again by hand.
function byHand(view, box, query, key) {
  const { part, q, k, v, weight, queries, keys, layer, head } = view, row = part.vectors.heads.findIndex(([l, h]) => l === layer && h === head), K = keys.length;
  if (row < 0) return box.replaceChildren(el("p", { className: "note" }, "Queries and keys are stored for " + part.vectors.heads.length + " of " + part.layers * part.heads + " heads, so that the page stays small: " + part.vectors.heads.map(([l, h]) => "L" + l + "H" + h).join(", ") + "."));
  const open = box.querySelector("details")?.open ?? false, D = part.width, scores = [], products = [];
  const details = el("details", { open }, el("summary", {}, "Compute one weight by hand"));
  box.replaceChildren(details);
  details.ontoggle = () => { if (details.open && details.children.length === 1) fill(); };
  if (open) fill();
  function fill() {
    for (let d = 0; d < D; d++) products.push([d, q.at(row, query, d), k.at(row, key, d), q.at(row, query, d) * k.at(row, key, d)]);
    const masked = j => part.causal && j > query;
    for (let j = 0; j < K; j++) { let s = 0; for (let d = 0; d < D; d++) s += q.at(row, query, d) * k.at(row, j, d); s /= Math.sqrt(D); scores.push(part.softcap ? part.softcap * Math.tanh(s / part.softcap) : s); }
    const window = part.windows[layer], hidden = j => masked(j) || (window !== null && (j <= query - window || j >= query + window));
    const dot = products.reduce((sum, row) => sum + row[3], 0), exps = scores.map((s, j) => hidden(j) ? 0 : Math.exp(s)), total = exps.reduce((a, b) => a + b, 0);
    const chooser = el("select", { id: view.id + "key-token" });
    for (let j = 0; j < K; j++) if (!masked(j)) chooser.append(el("option", { value: j, selected: j === key }, j + " [" + keys[j] + "]"));
    chooser.onchange = () => { view.key = +chooser.value; byHand(view, box, query, view.key); $(view.id + "key-token").focus(); };
    const steps = [
      "dot product q \u00b7 k = " + number(dot),
      "scale: " + number(dot) + " / \u221a" + D + " = " + number(dot / Math.sqrt(D)) + (part.softcap ? ", capped to " + number(scores[key]) : ""),
      "mask: " + (hidden(key) ? "hidden, so the score is -\u221e" : "this key may be read, so the score stays"),
      "softmax: e^" + number(scores[key]) + " / (sum over keys of e^score) = " + number(exps[key]) + " / " + number(total) + " = " + (exps[key] / total).toFixed(4),
      "the model computed " + weight(layer, head, query, key).toFixed(4) + "; the numbers shown here are rounded to 11 bits",
    ];
    details.append(el("div", { className: "controls" }, el("label", {}, "query " + query + " [" + queries[query] + "] looks at key ", chooser)), el("ol", {}, ...steps.map(step => el("li", {}, step))),
      el("div", { className: "columns" }, el("div", {}, el("h3", {}, "q \u00b7 k, number by number"), table(["", "q", "k", "q \u00d7 k"], products.map(r => [String(r[0]), r[1], r[2], r[3]]))),
        el("div", {}, el("h3", {}, "softmax over the keys"), table(["key", "score", "e^score", "weight"], scores.map((s, j) => [j + " [" + keys[j] + "]", hidden(j) ? "-\u221e" : s, exps[j], exps[j] / total]).filter((_, j) => !masked(j))),
          el("h3", {}, "value v of this key"), el("p", { className: "mono" }, Array.from({ length: D }, (_, d) => number(v.at(row, key, d))).join("  ")))));
  }
}

(() => {
  const part = data.residual, box = $("residual");
  if (!part) return unavailable("residual", "residual");
  const stream = decode(part.stream), spread = decode(part.spread), attended = decode(part.attention), fed = decode(part.feed_forward), crossed = decode(part.cross_attention), cosine = decode(part.cosine), final = decode(part.final);
  onToken(() => {
    const body = [];
    for (let layer = 0; layer < stream.shape[0] - 1; layer++) body.push(["layer " + layer, stream.at(layer, state.token), spread.at(layer, state.token), attended ? attended.at(layer, state.token) : "", ...(crossed ? [crossed.at(layer, state.token)] : []), fed ? fed.at(layer, state.token) : "", cosine ? cosine.at(layer, state.token) : "", stream.at(layer + 1, state.token)]);
    box.replaceChildren(table(["", "norm before", part.norm, "attention adds", ...(crossed ? ["cross-attention adds"] : []), "feed-forward adds", "cosine of " + (crossed ? "self-attention and feed-forward" : "both"), "norm after"], body),
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
