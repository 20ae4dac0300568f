"""The inner loops of word2vec and GloVe, compiled with numba. They release the GIL, so several threads can run them in parallel.

Papers: Mikolov et al. 2013, "Distributed Representations of Words and Phrases and their Compositionality" (negative sampling);
Pennington et al. 2014, "GloVe: Global Vectors for Word Representation".

Legend: `V` vocabulary size, `D` dimensions, `P` positions in a segment, `K` negatives. `ids` are int32 indices into the
vocabulary; a negative id marks the end of a document. A workspace is the scratch memory for one segment of the text.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from tinylm.jit import cached_njit

SIGMOID_RANGE = 8
SIGMOID_STEPS = 64
"""The sigmoid is tabulated from -8 to 8 in steps of 1/64. Scores outside this range are clamped."""
CBOW_SHARING = 4
"""In CBOW, this many consecutive positions use the same negatives."""
_HALF = np.float32(0.5)
_FAST = {"reassoc", "contract", "arcp", "nsz"}
"""Allow sums to be reordered so that they can be vectorized. NaN and infinity are kept so that divergence can be detected."""
_compiled = cached_njit(fastmath=_FAST)


class TrainingConstants(NamedTuple):
    """Values that stay constant during training."""

    keep: np.ndarray
    """float32 (V,): probability that subsampling keeps an occurrence (Mikolov et al. 2013, section 2.3)."""
    accept: np.ndarray
    alias: np.ndarray
    """float32 and int32 (V,): Walker's alias table for sampling negatives."""
    sigmoid: np.ndarray
    log_sigmoid: np.ndarray
    """float32 (2 * SIGMOID_RANGE * SIGMOID_STEPS + 1,): lookup tables for the two functions."""
    window: int
    negatives: int


class Workspace(NamedTuple):
    """Scratch memory for one segment. A slot is a row of `inputs` or `outputs` that contains a copy of a table row."""

    kept: np.ndarray
    """int32 (P,): the ids in the segment that subsampling kept."""
    negatives: np.ndarray
    """int32 (P, K): the output slots of each position's negatives; -1 where the word itself was drawn."""
    input_slots: np.ndarray
    output_slots: np.ndarray
    """int32 (V,): the slot that contains the copy of each table row, or -1."""
    inputs: np.ndarray
    outputs: np.ndarray
    """float32 (slots, D): copies of table rows during training; after `_finish`, the changes to these rows."""
    input_rows: np.ndarray
    output_rows: np.ndarray
    """int32 (slots,): the table row of each slot."""
    input_uses: np.ndarray
    output_uses: np.ndarray
    """int32 (slots,): how many times each copy was updated."""


@_compiled
def _random(state: Any) -> Any:
    """Return the next 64-bit random number of SplitMix64 (Steele et al. 2014)."""
    state[0] += np.uint64(0x9E3779B97F4A7C15)
    mixed = state[0]
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


@_compiled
def _random_below(state: Any, size: int) -> Any:
    """Return a random integer in [0, size)."""
    return np.int64(((_random(state) >> np.uint64(32)) * np.uint64(size)) >> np.uint64(32))


@_compiled
def _to_unit_interval(bits: Any) -> Any:
    """Convert the lowest 24 bits to a number in [0, 1)."""
    return np.float32(bits & np.uint64(0xFFFFFF)) * np.float32(1 / 16777216)


@_compiled
def _copy_row(row: Any, slots: Any, rows: Any, uses: Any, copies: Any, table: Any, used: Any) -> Any:
    """Copy a row of `table` into the next free slot, unless it already has a slot. Returns the number of slots in use."""
    if slots[row] >= 0:
        return used
    slots[row] = used
    rows[used] = row
    uses[used] = 0
    for d in range(table.shape[1]):
        copies[used, d] = table[row, d]
    return used + 1


@_compiled
def _prepare(ids: Any, state: Any, inputs: Any, outputs: Any, constants: Any, work: Any, sharing: int) -> Any:
    """Subsample the segment, draw the negatives and copy the table rows that will be used.

    `sharing` consecutive positions use the same negatives. Returns the number of positions kept, followed by the numbers of input
    and output slots in use.
    """
    drawn = np.empty(constants.negatives, np.int64)
    uses_left = 0
    kept = 0
    for id in ids:
        if id < 0 or _to_unit_interval(_random(state)) < constants.keep[id]:
            work.kept[kept] = id
            kept += 1
    input_count = output_count = 0
    for position in range(kept):
        id = work.kept[position]
        if id < 0:
            continue
        input_count = _copy_row(id, work.input_slots, work.input_rows, work.input_uses, work.inputs, inputs, input_count)
        output_count = _copy_row(id, work.output_slots, work.output_rows, work.output_uses, work.outputs, outputs, output_count)
        if uses_left == 0:
            uses_left = sharing
            for k in range(constants.negatives):
                bits = _random(state)
                row = np.int64(((bits >> np.uint64(32)) * np.uint64(len(constants.alias))) >> np.uint64(32))
                if _to_unit_interval(bits) >= constants.accept[row]:
                    row = constants.alias[row]
                drawn[k] = row
        uses_left -= 1
        for k in range(constants.negatives):
            row = drawn[k]
            if row == id:
                work.negatives[position, k] = -1
            else:
                output_count = _copy_row(
                    row, work.output_slots, work.output_rows, work.output_uses, work.outputs, outputs, output_count
                )
                work.negatives[position, k] = work.output_slots[row]
    return kept, input_count, output_count


@_compiled
def _finish(work: Any, inputs: Any, outputs: Any, input_count: int, output_count: int) -> None:
    """Replace each copy with its difference from the table row, and clear the slots."""
    for slot in range(input_count):
        row = work.input_rows[slot]
        work.input_slots[row] = -1
        for d in range(inputs.shape[1]):
            work.inputs[slot, d] -= inputs[row, d]
    for slot in range(output_count):
        row = work.output_rows[slot]
        work.output_slots[row] = -1
        for d in range(outputs.shape[1]):
            work.outputs[slot, d] -= outputs[row, d]


@_compiled
def _targets(position: int, work: Any, targets: Any) -> Any:
    """Write the output slots for a position to `targets`: the word itself, then its negatives. Returns the number of slots."""
    targets[0] = work.output_slots[work.kept[position]]
    count = 1
    for k in range(work.negatives.shape[1]):
        if work.negatives[position, k] >= 0:
            targets[count] = work.negatives[position, k]
            count += 1
    return count


@_compiled
def _window(position: int, kept: int, work: Any, width: int) -> Any:
    """Return the bounds [start, end) of the window around `position`. It does not cross document boundaries."""
    start = position
    while start > 0 and position - start < width and work.kept[start - 1] >= 0:
        start -= 1
    end = position + 1
    while end < kept and end - position <= width and work.kept[end] >= 0:
        end += 1
    return start, end


@_compiled
def _sigmoid_index(score: Any) -> Any:
    """Return the index in the sigmoid table for a score."""
    clamped = min(max(score, np.float32(-SIGMOID_RANGE)), np.float32(SIGMOID_RANGE))
    return np.int64((clamped + np.float32(SIGMOID_RANGE)) * np.float32(SIGMOID_STEPS))


@_compiled
def skip_gram(ids: Any, seed: Any, inputs: Any, outputs: Any, constants: Any, work: Any, lr: Any) -> Any:
    """Train skip-gram with negative sampling on one segment (Mikolov et al. 2013, equation 4).

    All context words at a position use the same negatives (Ji et al. 2016, section 3), which keeps the rows in the CPU cache.
    Returns the summed loss in nats, the number of pairs, and the numbers of input and output slots in use.
    """
    D = inputs.shape[1]
    state = np.array([seed], dtype=np.uint64)
    kept, input_count, output_count = _prepare(ids, state, inputs, outputs, constants, work, 1)
    words, inputs_copy, outputs_copy = work.kept, work.inputs, work.outputs
    slots, input_uses, output_uses = work.input_slots, work.input_uses, work.output_uses
    sigmoid, log_sigmoid = constants.sigmoid, constants.log_sigmoid
    targets = np.empty(constants.negatives + 1, np.int64)
    steps = np.empty(constants.negatives + 1, np.float32)
    changes = np.empty((constants.negatives + 1, D), np.float32)
    loss = 0.0
    pairs = 0
    for position in range(kept):
        if words[position] < 0:
            continue
        start, end = _window(position, kept, work, 1 + _random_below(state, constants.window))
        count = _targets(position, work, targets)
        changes[:count] = 0
        for other in range(start, end):
            if other == position:
                continue
            slot = slots[words[other]]
            x = inputs_copy[slot]  # (D,)
            for k in range(count):
                y = outputs_copy[targets[k]]  # (D,)
                score = np.float32(0)
                for d in range(D):
                    score += x[d] * y[d]
                index = _sigmoid_index(score)
                if k == 0:
                    steps[k] = (np.float32(1) - sigmoid[index]) * lr
                    loss -= log_sigmoid[index]
                else:
                    steps[k] = -sigmoid[index] * lr
                    loss -= log_sigmoid[2 * SIGMOID_RANGE * SIGMOID_STEPS - index]
            for k in range(count):
                for d in range(D):
                    changes[k, d] += steps[k] * x[d]
            for k in range(count):
                y = outputs_copy[targets[k]]
                for d in range(D):
                    x[d] += steps[k] * y[d]
            input_uses[slot] += 1
        for k in range(count):
            y = outputs_copy[targets[k]]
            for d in range(D):
                y[d] += changes[k, d]
            output_uses[targets[k]] += end - start - 1
        pairs += end - start - 1
    _finish(work, inputs, outputs, input_count, output_count)
    return loss, pairs, input_count, output_count


@_compiled
def cbow(ids: Any, seed: Any, inputs: Any, outputs: Any, constants: Any, work: Any, lr: Any) -> Any:
    """Train CBOW with negative sampling on one segment (Mikolov et al. 2013).

    Consecutive positions share negatives (see `CBOW_SHARING`), so that fewer rows have to be copied.
    Returns the same values as `skip_gram`, but counts positions instead of pairs.
    """
    D = inputs.shape[1]
    state = np.array([seed], dtype=np.uint64)
    kept, input_count, output_count = _prepare(ids, state, inputs, outputs, constants, work, CBOW_SHARING)
    words, inputs_copy, outputs_copy = work.kept, work.inputs, work.outputs
    slots, input_uses, output_uses = work.input_slots, work.input_uses, work.output_uses
    sigmoid, log_sigmoid = constants.sigmoid, constants.log_sigmoid
    targets = np.empty(constants.negatives + 1, np.int64)
    mean = np.empty(D, np.float32)
    change = np.empty(D, np.float32)
    loss = 0.0
    positions = 0
    for position in range(kept):
        if words[position] < 0:
            continue
        start, end = _window(position, kept, work, 1 + _random_below(state, constants.window))
        if end - start == 1:
            continue
        mean[:] = 0
        change[:] = 0
        for other in range(start, end):
            if other != position:
                x = inputs_copy[slots[words[other]]]
                for d in range(D):
                    mean[d] += x[d]
        scale = np.float32(1) / np.float32(end - start - 1)
        for d in range(D):
            mean[d] *= scale
        for k in range(_targets(position, work, targets)):
            y = outputs_copy[targets[k]]
            score = np.float32(0)
            for d in range(D):
                score += mean[d] * y[d]
            index = _sigmoid_index(score)
            if k == 0:
                step = (np.float32(1) - sigmoid[index]) * lr
                loss -= log_sigmoid[index]
            else:
                step = -sigmoid[index] * lr
                loss -= log_sigmoid[2 * SIGMOID_RANGE * SIGMOID_STEPS - index]
            for d in range(D):
                change[d] += step * y[d]
                y[d] += step * mean[d]
            output_uses[targets[k]] += 1
        for other in range(start, end):
            if other != position:
                slot = slots[words[other]]
                x = inputs_copy[slot]
                for d in range(D):
                    x[d] += change[d]
                input_uses[slot] += 1
        positions += 1
    _finish(work, inputs, outputs, input_count, output_count)
    return loss, positions, input_count, output_count


@_compiled
def _of_segment(work: Any, segment: int) -> Any:
    """Return a segment's workspace. The arrays of `work` have one row per segment."""
    return Workspace(
        work.kept[segment],
        work.negatives[segment],
        work.input_slots[segment],
        work.output_slots[segment],
        work.inputs[segment],
        work.outputs[segment],
        work.input_rows[segment],
        work.output_rows[segment],
        work.input_uses[segment],
        work.output_uses[segment],
    )


@_compiled
def train_segments(
    ids: Any,
    seeds: Any,
    inputs: Any,
    outputs: Any,
    constants: Any,
    work: Any,
    lr: Any,
    losses: Any,
    counts: Any,
    is_skip_gram: bool,
    part: int,
    parts: int,
) -> None:
    """Call `skip_gram` or `cbow` for the segments `part`, `part + parts`, ... of a step, and store its results.

    `ids` contains the ids of all segments, and `seeds` one number per segment. `losses` is (segments,). `counts`, (3, segments),
    contains the numbers of pairs or positions, input slots and output slots.
    """
    P = work.kept.shape[1]
    for segment in range(part, len(seeds), parts):
        own_ids, own_work = ids[segment * P : (segment + 1) * P], _of_segment(work, segment)
        if is_skip_gram:
            result = skip_gram(own_ids, seeds[segment], inputs, outputs, constants, own_work, lr)
        else:
            result = cbow(own_ids, seeds[segment], inputs, outputs, constants, own_work, lr)
        losses[segment], counts[0, segment], counts[1, segment], counts[2, segment] = result


@_compiled
def merge_changes(
    table: Any,
    rows: Any,
    changes: Any,
    uses: Any,
    used: Any,
    lr: Any,
    segments_per_row: Any,
    uses_per_row: Any,
    part: int,
    parts: int,
) -> None:
    """Add the changes of all segments to rows `part`, `part + parts`, ... of `table`, in segment order.

    `rows` and `uses` are (segments, slots), `changes` is (segments, slots, D), and `used`, (segments,), counts the slots in use.
    `segments_per_row` and `uses_per_row` are scratch arrays (V,) that are zero before and after the call.

    Segments that update the same row start from the same value. For a frequent word, adding their changes would overshoot, and
    averaging them would learn too slowly. If each update moves a row by the fraction `lr / 2` toward its optimum, n updates move it
    by 1 - exp(-n lr / 2). The sum of the changes is scaled to match what sequential updates would have done.
    """
    own = np.empty((used.sum(), 2), np.int32)
    count = 0
    for segment in range(len(used)):
        for slot in range(used[segment]):
            row = rows[segment, slot]
            if row % parts == part:
                own[count] = segment, slot
                count += 1
                segments_per_row[row] += 1
                uses_per_row[row] += uses[segment, slot]
    for segment, slot in own[:count]:
        row = rows[segment, slot]
        scale = np.float32(1)
        decay = _HALF * lr * np.float32(uses_per_row[row])
        if segments_per_row[row] > 1 and decay > np.float32(1e-4):
            segments = np.float32(segments_per_row[row])
            scale = (np.float32(1) - np.exp(-decay)) / (segments * (np.float32(1) - np.exp(-decay / segments)))
        for d in range(table.shape[1]):
            table[row, d] += scale * changes[segment, slot, d]
    for segment, slot in own[:count]:
        row = rows[segment, slot]
        segments_per_row[row] = 0
        uses_per_row[row] = 0


@_compiled
def count_pairs(ids: Any, first: int, window: int, V: int, dense: Any, keys: Any, weights: Any) -> Any:
    """Count pairs whose second word is at position `first` or later. A pair has weight 1 / distance (Pennington et al. 2014).

    If both words are among the `len(dense)` most frequent, the weight is added to `dense`. Otherwise, `smaller id * V + larger id`
    is appended to `keys` and the weight to `weights`. Returns the number of pairs appended.
    """
    frequent = len(dense)
    count = 0
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
                keys[count] = np.int64(low) * V + high
                weights[count] = np.float32(1.0 / distance)
                count += 1
    return count


@_compiled
def glove(
    rows: Any,
    columns: Any,
    counts: Any,
    words: Any,
    contexts: Any,
    word_squares: Any,
    context_squares: Any,
    lr: Any,
    x_max: Any,
    alpha: Any,
) -> Any:
    """Fit the cells of one block with AdaGrad (Pennington et al. 2014, equation 8). Returns the summed loss.

    `rows`, `columns` and `counts` are (cells,). The tables are (V, D + 1). The last column of `words` and `contexts` is the bias.
    `word_squares` and `context_squares` contain AdaGrad's sums of squared gradients.
    """
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
        step *= lr
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
