"""Look inside a trained model: what it computes from a text, which parts matter, and how it changed during training.

All functions accept any `tinylm.model.base.Model` in eval mode, return plain tensors with axes documented in the docstrings, and do
not modify the model. `Run.model()` loads such a model.
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
