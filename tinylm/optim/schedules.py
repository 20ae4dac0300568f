"""Learning-rate schedules. They are pure functions of the training progress, so a resumed run does not need scheduler state."""

from __future__ import annotations

import math

from tinylm.recipe.schema import ConstantSchedule, CosineSchedule, InverseSqrtSchedule, LinearSchedule, NoamSchedule, Schedule


def lr_multiplier(schedule: Schedule, progress: float, step_fraction: float) -> float:
    """Return the learning rate of an update as a fraction of the peak learning rate.

    `progress` is the fraction of training that is complete before this update, in [0, 1]. `step_fraction` is the fraction that one
    update adds: `progress + step_fraction` is 1 for the last update. A warmup of 1 or more is a number of updates. A warmup below 1
    is a fraction of the training length.
    """
    if isinstance(schedule, NoamSchedule):
        step = max(1.0, (progress + step_fraction) / step_fraction)
        return float(schedule.width**-0.5 * min(step**-0.5, step * schedule.warmup**-1.5))
    warmup = schedule.warmup * step_fraction if schedule.warmup >= 1 else schedule.warmup
    if progress < warmup:
        return min(1.0, (progress + step_fraction) / warmup)
    if isinstance(schedule, ConstantSchedule):
        return 1.0
    if isinstance(schedule, InverseSqrtSchedule):
        return math.sqrt(max(warmup, step_fraction) / (progress + step_fraction))
    after_warmup = min(1.0, (progress - warmup) / (1 - warmup)) if warmup < 1 else 1.0
    if isinstance(schedule, CosineSchedule):
        decay = 0.5 * (1 + math.cos(math.pi * after_warmup))
    elif isinstance(schedule, LinearSchedule):
        decay = 1 - after_warmup
    else:  # warmup-stable-decay
        decay = min(1.0, (1 - progress) / schedule.cooldown) if schedule.cooldown else 1.0
    return schedule.floor + (1 - schedule.floor) * max(0.0, decay)
