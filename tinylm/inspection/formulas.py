"""The definition and the source of every quantity that `tinylm inspect` shows."""

from __future__ import annotations

from dataclasses import dataclass

from tinylm.inspection.heads import CHARACTERISTIC, PERIOD
from tinylm.recipe.base import ModelVariant


@dataclass(frozen=True)
class Formula:
    """A quantity, how it is computed, and which activations or method it comes from."""

    name: str
    formula: str
    source: str


_FORMULAS = (
    Formula("loss", "-ln p(token | tokens before it), in nats; divide by ln 2 for bits", "logits of the position before"),
    Formula("attention score", "q · k / √(head width), then -∞ for keys that the mask hides", "attn.q, attn.k, attn.scores"),
    Formula("attention weight", "softmax of the scores over all keys", "attn.pattern"),
    Formula("entropy", "-Σ p log₂ p over the keys, mean over the queries, in bits", "attn.pattern"),
    Formula(
        "previous-token score",
        "mean of pattern[i, i-1]",
        f"random tokens repeated once with period L = {PERIOD} or half of the context",
    ),
    Formula(
        "duplicate-token score",
        "mean attention to all earlier equal tokens, over the queries that have any",
        "the same repeated tokens",
    ),
    Formula("induction score", "mean of pattern.diagonal(offset=1-L)", "the same repeated tokens; Olsson et al. 2022"),
    Formula(
        "kind of a head", f"the largest of the three scores, if at least {CHARACTERISTIC}; otherwise not yet", "the three scores"
    ),
    Formula("norm", "√(Σ x²) of a vector", "resid_pre, resid_post, attn_out, mlp_out"),
    Formula("cosine", "a · b / (‖a‖ ‖b‖)", "attn_out and mlp_out of the same layer and token"),
    Formula("neuron activation", "the input of the feed-forward layer's output projection", "mlp.post"),
    Formula(
        "logit lens",
        "softmax(unembedding · norm(residual)); the final norm is computed again on each layer's residual",
        "resid_pre, resid_post",
    ),
    Formula("rank", "1 + the number of tokens with a higher logit than the true one", "logit lens"),
    Formula(
        "attribution",
        "component × frozen scale of the final norm · unembedding column, or a difference of two columns",
        "embed, attn.z, mlp_out",
    ),
    Formula(
        "ablation",
        "bits per byte with a part set to its mean over the text, minus bits per byte without",
        "attn.z of a head, mlp_out of a layer",
    ),
    Formula(
        "patching",
        "(patched - corrupt) / (clean - corrupt) of a metric at the last position",
        "resid_pre of a position, attn.z of a head",
    ),
    Formula(
        "sampling",
        "softmax(logits / temperature), then top-k, top-p and min-p, in this order, as in tinylm sample",
        "logits of the last position",
    ),
)


def formulas(model: ModelVariant) -> list[dict[str, str]]:
    """The formulas, and what is special about this model."""
    rows = [{"name": formula.name, "formula": formula.formula, "source": formula.source} for formula in _FORMULAS]
    return [*rows, *({"name": name, "formula": text, "source": "this model"} for name, text in _notes(model))]


def _notes(model: ModelVariant) -> list[tuple[str, str]]:
    """How parts of this model that are not in every transformer appear in the numbers."""
    notes = {
        "qk_norm": ("QK norm", "queries and keys are shown after their norm and rotation, so the dot products are the real scores"),
        "attention_softcap": ("attention soft-cap", "scores are c · tanh(score / c) before the softmax"),
        "logit_softcap": ("logit soft-cap", "attribution explains the logits before c · tanh(logit / c)"),
        "ngram_embeddings": ("n-gram embeddings", "are a component of their own in the attribution"),
        "value_embeddings": ("value embeddings", "are part of the values, so they belong to the heads that read them"),
        "value_residual": ("value residual", "the values of the first layer belong to the heads of later layers that mix them in"),
        "embedding_shortcut": ("embedding shortcut", "scales all components before it, and adds to the embeddings"),
    }
    chosen = [note for key, note in notes.items() if getattr(model, key, None)]
    if getattr(model, "norm_position", "pre") == "post":
        chosen.append(
            ("norm after the sum", "every norm is applied to all components with its frozen scale; its bias is a component")
        )
    if getattr(model, "n_kv_head", None):
        chosen.append(("grouped-query attention", "several heads share a key and a value"))
    return chosen
