"""Look inside a trained model: what it computes from a text, which parts matter, and how it came to be.

All functions accept any `tinylm.model.base.Model` in eval mode, return plain tensors whose axes the docstrings name, and do not
change the model. `Run.model()` loads one.
"""

from tinylm.inspection.attribution import Attribution, attribution
from tinylm.inspection.heads import HeadScores, head_scores, repeated_tokens
from tinylm.inspection.interventions import Ablation, ablate, logit_difference, patch
from tinylm.inspection.lens import logit_lens
from tinylm.inspection.neurons import TopActivations, top_activations

__all__ = [
    "Ablation",
    "Attribution",
    "HeadScores",
    "TopActivations",
    "ablate",
    "attribution",
    "head_scores",
    "logit_difference",
    "logit_lens",
    "patch",
    "repeated_tokens",
    "top_activations",
]
