"""Plot a scaling experiment: the losses of the runs, the fitted law, and the prediction, against training compute."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tinylm.paths import atomic_file
from tinylm.scaling.experiment import Result

_POINTS = 100


def draw(result: Result, path: Path) -> None:
    """Plot `result` and save the image at `path`. Crosses are runs that the law was fitted without."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    prediction, law = result.prediction, result.fit.best
    sizes = {row.cell.parameters: f"{row.cell.n_layer} x {row.cell.n_embd}" for row in result.rows}
    if prediction.parameters not in sizes:
        sizes[prediction.parameters] = f"{prediction.n_layer} x {prediction.n_embd}"
    shortest = min(row.cell.tokens for row in result.rows)
    for index, (parameters, label) in enumerate(sorted(sizes.items())):
        color = pyplot.colormaps["viridis"](index / len(sizes))
        tokens = np.geomspace(shortest, prediction.flops / (6 * parameters), _POINTS)
        losses = np.exp(law.log_losses(np.full(_POINTS, parameters), tokens)[0])
        axes.plot(6 * parameters * tokens, losses, color=color, linewidth=1)
        for used, marker in ((True, "o"), (False, "x")):
            rows = [row for row in result.rows if row.cell.parameters == parameters and (row.left_out is None) == used]
            measured = [(row.cell.flops, row.val_loss) for row in rows if row.val_loss is not None]
            name = label if used else None
            axes.plot([x for x, _ in measured], [y for _, y in measured], marker, color=color, label=name)
    low, high = prediction.loss.ci95
    error = [[max(0.0, prediction.loss.value - low)], [max(0.0, high - prediction.loss.value)]]
    axes.errorbar([prediction.flops], [prediction.loss.value], yerr=error, fmt="D", color="C3", capsize=4, label="prediction")
    axes.set_xscale("log")
    axes.set_xlabel("training FLOPs")
    axes.set_ylabel("held-out loss (nats per token)")
    axes.legend(title="layers x width")
    axes.grid(alpha=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=144, format=path.suffix[1:])
    pyplot.close(figure)
