"""The inner loops of word2vec and GloVe, compiled by numba. They release the interpreter's lock, so threads run them at once.

Legend: V names, D dimensions. A lane is one stretch of text that one thread works through, on a copy of the rows it needs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from tinylm.jit import compiled

BOUND = 8
STEPS = 64
"""The sigmoid is tabulated in steps of 1/64 up to 8 on each side."""
_HALF = np.float32(0.5)
_FAST = {"reassoc", "contract", "arcp", "nsz"}
"""Sums may be reordered into vector instructions; what is not a number must stay so, to be noticed."""
_compiled = compiled(fastmath=_FAST)


class TrainingConstants(NamedTuple):
    """What never changes during a training."""

    keep: np.ndarray
    """Chance that an occurrence is kept, float32 (V,)."""
    accept: np.ndarray
    alias: np.ndarray
    """Walker's alias table of the distribution of negatives, float32 and int32 (V,)."""
    sigmoid: np.ndarray
    log_sigmoid: np.ndarray
    window: int
    negatives: int


class Lane(NamedTuple):
    """The memory of one lane."""

    kept: np.ndarray
    drawn: np.ndarray
    """(positions, negatives): rows of `outputs`, -1 where the word itself was drawn."""
    input_slots: np.ndarray
    output_slots: np.ndarray
    """(V,): where a row's copy is, -1 for not copied."""
    inputs: np.ndarray
    outputs: np.ndarray
    """Copies of rows while the lane works, and the changes to them when it is done."""
    input_rows: np.ndarray
    output_rows: np.ndarray
    input_uses: np.ndarray
    output_uses: np.ndarray
    """How often each copy was updated."""


@_compiled
def _random(state: Any) -> Any:
    """The next number of SplitMix64 (Steele et al. 2014)."""
    state[0] += np.uint64(0x9E3779B97F4A7C15)
    mixed = state[0]
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


@_compiled
def _below(state: Any, size: int) -> Any:
    """A whole number in [0, size)."""
    return np.int64(((_random(state) >> np.uint64(32)) * np.uint64(size)) >> np.uint64(32))


@_compiled
def _share(bits: Any) -> Any:
    """24 bits as a number in [0, 1)."""
    return np.float32(bits & np.uint64(0xFFFFFF)) * np.float32(1 / 16777216)


@_compiled
def _copied(row: Any, slots: Any, rows: Any, uses: Any, copies: Any, table: Any, used: Any) -> Any:
    """Copy a row unless it is copied already; the number of copies then."""
    if slots[row] >= 0:
        return used
    slots[row] = used
    rows[used] = row
    uses[used] = 0
    for d in range(table.shape[1]):
        copies[used, d] = table[row, d]
    return used + 1


@_compiled
def _begin(ids: Any, state: Any, inputs: Any, outputs: Any, law: Any, lane: Any) -> Any:
    """Thin the text out, draw the negatives, copy the rows. (positions kept, input rows, output rows)."""
    kept = 0
    for id in ids:
        if id < 0 or _share(_random(state)) < law.keep[id]:
            lane.kept[kept] = id
            kept += 1
    input_count = output_count = 0
    for position in range(kept):
        id = lane.kept[position]
        if id < 0:
            continue
        input_count = _copied(id, lane.input_slots, lane.input_rows, lane.input_uses, lane.inputs, inputs, input_count)
        output_count = _copied(id, lane.output_slots, lane.output_rows, lane.output_uses, lane.outputs, outputs, output_count)
        for k in range(law.negatives):
            bits = _random(state)
            row = np.int64(((bits >> np.uint64(32)) * np.uint64(len(law.alias))) >> np.uint64(32))
            if _share(bits) >= law.accept[row]:
                row = law.alias[row]
            if row == id:
                lane.drawn[position, k] = -1
            else:
                output_count = _copied(
                    row, lane.output_slots, lane.output_rows, lane.output_uses, lane.outputs, outputs, output_count
                )
                lane.drawn[position, k] = lane.output_slots[row]
    return kept, input_count, output_count


@_compiled
def _finish(lane: Any, inputs: Any, outputs: Any, input_count: int, output_count: int) -> None:
    """Leave the changes where the copies were."""
    for slot in range(input_count):
        row = lane.input_rows[slot]
        lane.input_slots[row] = -1
        for d in range(inputs.shape[1]):
            lane.inputs[slot, d] -= inputs[row, d]
    for slot in range(output_count):
        row = lane.output_rows[slot]
        lane.output_slots[row] = -1
        for d in range(outputs.shape[1]):
            lane.outputs[slot, d] -= outputs[row, d]


@_compiled
def _targets(position: int, lane: Any, targets: Any) -> Any:
    """The rows to tell apart at a position: the word itself first, then its negatives. Their number."""
    targets[0] = lane.output_slots[lane.kept[position]]
    count = 1
    for k in range(lane.drawn.shape[1]):
        if lane.drawn[position, k] >= 0:
            targets[count] = lane.drawn[position, k]
            count += 1
    return count


@_compiled
def _window(position: int, kept: int, lane: Any, width: int) -> Any:
    """[start, end) of the positions around one, within its document."""
    start = position
    while start > 0 and position - start < width and lane.kept[start - 1] >= 0:
        start -= 1
    end = position + 1
    while end < kept and end - position <= width and lane.kept[end] >= 0:
        end += 1
    return start, end


@_compiled
def _place(score: Any) -> Any:
    """Where in the table of the sigmoid a score stands."""
    return np.int64((min(max(score, np.float32(-BOUND)), np.float32(BOUND)) + np.float32(BOUND)) * np.float32(STEPS))


@_compiled
def skip_gram(ids: Any, seed: Any, inputs: Any, outputs: Any, law: Any, lane: Any, rate: Any) -> Any:
    """One lane of skip-gram. (sum of the losses in nats, pairs, input rows, output rows).

    The words around a position share its negatives (Ji et al. 2016, section 3), so that both sides stay in the cache.
    """
    D = inputs.shape[1]
    state = np.array([seed], dtype=np.uint64)
    kept, input_count, output_count = _begin(ids, state, inputs, outputs, law, lane)
    words, own, others = lane.kept, lane.inputs, lane.outputs
    slots, input_uses, output_uses = lane.input_slots, lane.input_uses, lane.output_uses
    sigmoid, log_sigmoid = law.sigmoid, law.log_sigmoid
    targets = np.empty(law.negatives + 1, np.int64)
    steps = np.empty(law.negatives + 1, np.float32)
    changes = np.empty((law.negatives + 1, D), np.float32)
    loss = 0.0
    pairs = 0
    for position in range(kept):
        if words[position] < 0:
            continue
        start, end = _window(position, kept, lane, 1 + _below(state, law.window))
        count = _targets(position, lane, targets)
        changes[:count] = 0
        for other in range(start, end):
            if other == position:
                continue
            slot = slots[words[other]]
            x = own[slot]
            for k in range(count):
                y = others[targets[k]]
                score = np.float32(0)
                for d in range(D):
                    score += x[d] * y[d]
                place = _place(score)
                if k == 0:
                    steps[k] = (np.float32(1) - sigmoid[place]) * rate
                    loss -= log_sigmoid[place]
                else:
                    steps[k] = -sigmoid[place] * rate
                    loss -= log_sigmoid[2 * BOUND * STEPS - place]
            for k in range(count):
                for d in range(D):
                    changes[k, d] += steps[k] * x[d]
            for k in range(count):
                y = others[targets[k]]
                for d in range(D):
                    x[d] += steps[k] * y[d]
            input_uses[slot] += 1
        for k in range(count):
            y = others[targets[k]]
            for d in range(D):
                y[d] += changes[k, d]
            output_uses[targets[k]] += end - start - 1
        pairs += end - start - 1
    _finish(lane, inputs, outputs, input_count, output_count)
    return loss, pairs, input_count, output_count


@_compiled
def cbow(ids: Any, seed: Any, inputs: Any, outputs: Any, law: Any, lane: Any, rate: Any) -> Any:
    """One lane of CBOW; like `skip_gram`, with a loss per position instead of per pair."""
    D = inputs.shape[1]
    state = np.array([seed], dtype=np.uint64)
    kept, input_count, output_count = _begin(ids, state, inputs, outputs, law, lane)
    words, own, others = lane.kept, lane.inputs, lane.outputs
    slots, input_uses, output_uses = lane.input_slots, lane.input_uses, lane.output_uses
    sigmoid, log_sigmoid = law.sigmoid, law.log_sigmoid
    targets = np.empty(law.negatives + 1, np.int64)
    mean = np.empty(D, np.float32)
    change = np.empty(D, np.float32)
    loss = 0.0
    positions = 0
    for position in range(kept):
        if words[position] < 0:
            continue
        start, end = _window(position, kept, lane, 1 + _below(state, law.window))
        if end - start == 1:
            continue
        mean[:] = 0
        change[:] = 0
        for other in range(start, end):
            if other != position:
                x = own[slots[words[other]]]
                for d in range(D):
                    mean[d] += x[d]
        share = np.float32(1) / np.float32(end - start - 1)
        for d in range(D):
            mean[d] *= share
        for k in range(_targets(position, lane, targets)):
            y = others[targets[k]]
            score = np.float32(0)
            for d in range(D):
                score += mean[d] * y[d]
            place = _place(score)
            if k == 0:
                step = (np.float32(1) - sigmoid[place]) * rate
                loss -= log_sigmoid[place]
            else:
                step = -sigmoid[place] * rate
                loss -= log_sigmoid[2 * BOUND * STEPS - place]
            for d in range(D):
                change[d] += step * y[d]
                y[d] += step * mean[d]
            output_uses[targets[k]] += 1
        for other in range(start, end):
            if other != position:
                slot = slots[words[other]]
                x = own[slot]
                for d in range(D):
                    x[d] += change[d]
                input_uses[slot] += 1
        positions += 1
    _finish(lane, inputs, outputs, input_count, output_count)
    return loss, positions, input_count, output_count


@_compiled
def join(
    table: Any, rows: Any, changes: Any, uses: Any, used: Any, rate: Any, lanes_of: Any, uses_of: Any, part: int, parts: int
) -> None:
    """Add the changes of all lanes to every row of one part of the table, in the order of the lanes.

    Lanes that began from the same row do not know of each other: the plain sum of what they did would overshoot for a
    frequent word, and the mean would hold it back. If each update takes a row a share `rate / 2` of the way to where it is
    drawn, n of them take it 1 - exp(-n rate / 2), and the sum is scaled to what all lanes one after another would have done.
    `lanes_of` and `uses_of` are zero before and after.
    """
    for lane in range(len(used)):
        for slot in range(used[lane]):
            row = rows[lane, slot]
            if row % parts == part:
                lanes_of[row] += 1
                uses_of[row] += uses[lane, slot]
    for lane in range(len(used)):
        for slot in range(used[lane]):
            row = rows[lane, slot]
            if row % parts != part:
                continue
            scale = np.float32(1)
            way = _HALF * rate * np.float32(uses_of[row])
            if lanes_of[row] > 1 and way > np.float32(1e-4):
                lanes = np.float32(lanes_of[row])
                scale = (np.float32(1) - np.exp(-way)) / (lanes * (np.float32(1) - np.exp(-way / lanes)))
            for d in range(table.shape[1]):
                table[row, d] += scale * changes[lane, slot, d]
    for lane in range(len(used)):
        for slot in range(used[lane]):
            row = rows[lane, slot]
            if row % parts == part:
                lanes_of[row] = 0
                uses_of[row] = 0


@_compiled
def count_pairs(ids: Any, first: int, window: int, V: int, dense: Any, keys: Any, weights: Any) -> Any:
    """Count the pairs whose second word stands at `first` or behind it, each 1 / distance.

    Pairs of the most frequent words go into `dense`, others as key (smaller * V + larger) and weight. How many of the latter.
    """
    frequent = len(dense)
    found = 0
    for position in range(first, len(ids)):
        id = ids[position]
        if id < 0:
            continue
        for distance in range(1, min(window, position) + 1):
            other = ids[position - distance]
            if other < 0:
                break
            low, high = min(id, other), max(id, other)
            if high < frequent:
                dense[low, high] += 1.0 / distance
            else:
                keys[found] = np.int64(low) * V + high
                weights[found] = np.float32(1.0 / distance)
                found += 1
    return found


@_compiled
def glove(
    rows: Any,
    columns: Any,
    counts: Any,
    words: Any,
    contexts: Any,
    word_squares: Any,
    context_squares: Any,
    rate: Any,
    x_max: Any,
    alpha: Any,
) -> Any:
    """One pass over the cells of one block, with AdaGrad; the last number of each vector is its bias. The sum of the losses."""
    D = words.shape[1] - 1
    loss = 0.0
    for cell in range(len(counts)):
        w, c = words[rows[cell]], contexts[columns[cell]]
        ws, cs = word_squares[rows[cell]], context_squares[columns[cell]]
        score = np.float32(0)
        for d in range(D):
            score += w[d] * c[d]
        error = score + w[D] + c[D] - np.log(counts[cell])
        weight = np.float32(1) if counts[cell] >= x_max else (counts[cell] / x_max) ** alpha
        step = weight * error
        loss += 0.5 * step * error
        step *= rate
        for d in range(D):
            to_word, to_context = step * c[d], step * w[d]
            w[d] -= to_word / np.sqrt(ws[d])
            c[d] -= to_context / np.sqrt(cs[d])
            ws[d] += to_word * to_word
            cs[d] += to_context * to_context
        w[D] -= step / np.sqrt(ws[D])
        c[D] -= step / np.sqrt(cs[D])
        ws[D] += step * step
        cs[D] += step * step
    return loss
