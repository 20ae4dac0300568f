// Parts 6 to 8: logit lens, attribution, sampling.
(() => {
  const part = data.lens, box = $("lens"), after = masked ? ", at token " : ", after token ";
  if (!part) return unavailable("lens", "lens");
  const ids = decode(part.ids), shares = decode(part.shares), ranks = decode(part.ranks), [layers, , count] = ids.shape;
  if (labels) return labelLens(box, ids, shares);
  const label = ordinal, detail = el("div", { id: "lens-detail", role: "status" }), cells = [];
  let at = [layers - 1, T - 1];
  const body = el("tbody");
  for (let layer = layers - 1; layer >= 0; layer--) {
    const row = el("tr", {}, el("th", {}, label(layer)));
    for (let position = 0; position < T; position++) {
      const button = el("button", { type: "button", tabIndex: -1, "aria-label": label(layer) + after + position + ": " + name(ids.at(layer, position, 0)) + " " + percent(shares.at(layer, position, 0)) }, name(ids.at(layer, position, 0)).slice(0, 10) + "\n" + Math.round(100 * shares.at(layer, position, 0)) + "% #" + (ranks.at(layer, position) || "-"));
      const choose = () => { at = [layer, position]; show(); };
      button.onclick = choose; button.onfocus = choose; button.onpointerover = event => { if (hovers(event)) choose(); };
      const td = el("td", { className: "l" + level(shares.at(layer, position, 0), shareBounds) }, button);
      cells.push([layer, position, td, button]);
      row.append(td);
    }
    body.append(row);
  }
  const grid = el("table", { className: "grid" }, el("thead", {}, el("tr", {}, el("th"), ...rows.map((_, index) => el("th", {}, tokenName(index).slice(0, 10))))), body);
  cells.find(([layer, position]) => layer === layers - 1 && position === T - 1)[3].tabIndex = 0;
  body.onkeydown = event => arrows(event, body, T);
  const scroller = el("div", { className: "scroll" }, grid);
  box.append(scroller, el("p", { className: "note" }, "Each cell: best token, its probability, and # the rank of the true token, which is " + (masked ? "the token at this position. Each token is masked while it is predicted." : "the next one.")), detail);
  function show() {
    const [layer, position] = at, rank = ranks.at(layer, position);
    for (const [l, p, td] of cells) td.classList.toggle("selected", l === layer && p === position);
    const items = Array.from({ length: count }, (_, r) => ["[" + name(ids.at(layer, position, r)) + "]", shares.at(layer, position, r), percent(shares.at(layer, position, r))]);
    detail.replaceChildren(el("h3", {}, label(layer) + after + position + " [" + tokenName(position) + "]" + (rank ? ": [" + (masked || position + 1 < T ? tokenName(position + (masked ? 0 : 1)) : "end") + "] is the true token, rank " + rank : "")), bars(items));
  }
  onToken(() => { at = [at[0], state.token]; show(); });
})();

// A classifier has one prediction per layer: the probabilities of all labels.
function labelLens(box, ids, shares) {
  const [layers, , count] = ids.shape, body = [];
  for (let layer = layers - 1; layer >= 0; layer--) {
    const byLabel = new Map(Array.from({ length: count }, (_, r) => [ids.at(layer, 0, r), shares.at(layer, 0, r)]));
    body.push(el("tr", {}, el("th", {}, ordinal(layer)), ...labels.map((_, id) => el("td", { className: "l" + level(byLabel.get(id), shareBounds) }, percent(byLabel.get(id))))));
  }
  box.append(el("div", { className: "scroll", tabIndex: 0 }, el("table", { className: "grid", id: "label-lens" }, el("thead", {}, el("tr", {}, el("th"), ...labels.map((_, id) => el("th", {}, outputName(id))))), el("tbody", {}, ...body))),
    el("p", { className: "note" }, "The probability of each label if the text's vector were pooled from this layer."));
}

(() => {
  const part = data.attribution, box = $("attribution");
  if (!part) return unavailable("attribution", "attribution");
  const target = decode(part.target), competitor = decode(part.competitor), logits = decode(part.logits), result = el("div", { id: "contributions" });
  const mode = el("select", { id: "attribution-mode" }), order = el("select", { id: "attribution-order" }, el("option", { value: "size" }, "largest first"), el("option", { value: "path" }, "in the order of the model"));
  mode.append(el("option", { value: "difference" }), el("option", { value: "logit" }));
  box.append(el("div", { className: "controls" }, el("label", {}, "explain ", mode), el("label", {}, "sort ", order)), result);
  function show() {
    const t = labels ? 0 : state.token, isDifference = mode.value !== "logit", wanted = outputName(part.targets[t]), other = outputName(part.competitors[t]);
    mode.options[0].textContent = "logit of [" + wanted + "] minus logit of [" + other + "]"; mode.options[1].textContent = "logit of [" + wanted + "]";
    let items = part.components.map((component, n) => [component, target.at(n, t) - (isDifference ? competitor.at(n, t) : 0)]);
    const sum = items.reduce((total, [, value]) => total + value, 0), logit = logits.at(0, t) - (isDifference ? logits.at(1, t) : 0);
    if (order.value === "size") items = items.sort((a, b) => Math.abs(b[1]) - Math.abs(a[1]));
    const truth = labels ? null : masked ? rows[t] : rows[t + 1], real = truth && truth.loss !== null && truth.id === part.targets[t];
    const where = labels ? "For this text" : (masked ? "At" : "After") + " token " + t + " [" + tokenName(t) + "]", kind = labels ? "label" : "token";
    result.replaceChildren(el("p", {}, where + "; [" + wanted + "] is " + (real ? "the true token" : "the most likely or requested " + kind) + ", [" + other + "] is its strongest competitor."),
      bars(items.map(([component, value]) => [component, value, signed(value)]), true),
      el("p", { id: "attribution-sum" }, "Sum of " + items.length + " contributions " + signed(sum, 4) + "; the model computed " + signed(logit, 4) + "; remainder " + (logit - sum).toExponential(1) + ". The scale of the final norm " + (labels ? "and of the pooling layer " : "") + "is frozen." + (part.softcap ? " These are the logits before the soft-cap of " + part.softcap + "." : "")));
  }
  mode.onchange = show; order.onchange = show;
  onToken(show);
  if (!labels) state.token = part.position;
})();

(() => {
  const part = data.sampling, box = $("sampling"), logits = decode(part.logits).numbers, V = logits.length, result = el("div", { id: "distribution", role: "status" });
  if (labels) {
    $("sampling-text").textContent = "The softmax turns the logits of the labels into probabilities. A classifier does not sample, so there are no sampling options.";
    const largest = logits[0], weights = Array.from(logits, x => Math.exp(x - largest)), total = weights.reduce((a, b) => a + b, 0);
    return box.append(bars(weights.map((w, r) => ["[" + outputName(part.ids[r]) + "]", w / total, percent(w / total) + ", logit " + number(logits[r])])));
  }
  const sliders = { temperature: [0, 2, 0.05, 1], "top-k": [0, Math.min(200, V), 1, 0], "top-p": [0.05, 1, 0.05, 1], "min-p": [0, 0.5, 0.01, 0] }, inputs = {}, controls = el("div", { className: "controls" });
  for (const [label, [min, max, step, value]] of Object.entries(sliders)) {
    const output = el("output"), input = el("input", { type: "range", id: "slider-" + label, min, max, step, value });
    input.oninput = () => { output.textContent = label === "top-k" && input.value === "0" ? "off" : input.value; show(); };
    inputs[label] = input; output.textContent = label === "top-k" ? "off" : value;
    controls.append(el("label", {}, label, input, output));
  }
  box.append(el("p", {}, data.task === "causal_lm" ? "After the last token:" : data.source ? "The first token of the translation:" : "At token " + part.position + " [" + tokenName(part.position) + "]:"), controls, result, el("p", { className: "note" }, "The loss of a token is -ln of its probability in nats, or -log\u2082 in bits: a token with probability 50 % costs 1 bit."));
  // Temperature, then top-k, then top-p, then min-p. The logits are sorted, largest first.
  function distribution() {
    const temperature = Math.max(+inputs.temperature.value, 1e-5), k = +inputs["top-k"].value || V, p = +inputs["top-p"].value, least = +inputs["min-p"].value;
    let weights = Array.from(logits.subarray(0, k), x => Math.exp((x - logits[0]) / temperature)), total = weights.reduce((a, b) => a + b, 0), before = 0;
    weights = weights.map(w => w / total);
    const kept = weights.map(w => { const keep = (p >= 1 || before < p) && w >= least * weights[0]; before += w; return keep ? w : 0; });
    total = kept.reduce((a, b) => a + b, 0);
    return kept.map(w => w / total).filter(w => w > 0);
  }
  function show() {
    const chances = distribution(), entropy = chances.reduce((sum, p) => sum - p * Math.log2(p), 0);
    const items = chances.slice(0, 15).map((p, r) => ["[" + name(part.ids[r]) + "]", p, percent(p) + ", " + (p === 1 ? 0 : -Math.log2(p)).toFixed(1) + " bits"]);
    result.replaceChildren(el("p", {}, chances.length.toLocaleString("en") + " of " + V.toLocaleString("en") + " tokens can be chosen; entropy " + entropy.toFixed(2) + " bits."), bars(items));
  }
  show();
})();
