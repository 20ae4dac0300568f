"""The definition and source of every quantity that `tinylm inspect` shows."""

from __future__ import annotations

from dataclasses import dataclass

from tinylm.inspection.heads import CHARACTERISTIC, PERIOD
from tinylm.recipe.base import ModelVariant


@dataclass(frozen=True)
class Formula:
    """A quantity, the formula for it, and the activations or method that it is based on."""

    name: str
    formula: str
    source: str


_FORMULAS = (
    Formula("loss", "-ln p(token | tokens before it), in nats; divide by ln 2 for bits", "logits at the previous position"),
    Formula("attention score", "q · k / √(head width), or -∞ for masked keys", "attn.q, attn.k, attn.scores"),
    Formula("attention weight", "softmax of the scores over all keys", "attn.pattern"),
    Formula("entropy", "-Σ p log₂ p over the keys, averaged over the queries, in bits", "attn.pattern"),
    Formula(
        "previous-token score",
        "mean of pattern[i, i-1]",
        f"random tokens repeated once with period L = {PERIOD}, or half of a shorter context",
    ),
    Formula(
        "duplicate-token score",
        "mean attention to all earlier copies of the same token, averaged over the queries that have such copies",
        "the same repeated tokens",
    ),
    Formula("induction score", "mean of pattern.diagonal(offset=1-L)", "the same repeated tokens; Olsson et al. 2022"),
    Formula(
        "head type",
        f"the largest of the three scores if it is at least {CHARACTERISTIC}; otherwise, not yet characteristic",
        "the three scores",
    ),
    Formula("norm", "√(Σ x²) of a vector", "resid_pre, resid_post, attn_out, mlp_out"),
    Formula("cosine", "a · b / (‖a‖ ‖b‖)", "attn_out and mlp_out for the same layer and token"),
    Formula("neuron activation", "the input of the feed-forward layer's output projection", "mlp.post"),
    Formula(
        "logit lens",
        "softmax(unembedding · norm(residual)); the final norm is recomputed for each layer's residual",
        "resid_pre, resid_post",
    ),
    Formula("rank", "1 + the number of tokens with a higher logit than the true token", "logit lens"),
    Formula(
        "attribution",
        "component × frozen scale of the final norm · unembedding column, or a difference of two columns",
        "embed, attn.z, mlp_out",
    ),
    Formula(
        "ablation",
        "bits per byte with one part replaced with its mean over the text, minus bits per byte without ablation",
        "attn.z of a head, mlp_out of a layer",
    ),
    Formula(
        "patching",
        "(patched - corrupt) / (clean - corrupt), where each term is a metric at the last position",
        "resid_pre at a position, attn.z of a head",
    ),
    Formula(
        "sampling",
        "softmax(logits / temperature), then top-k, top-p and min-p in this order, as in tinylm sample",
        "logits at the last position",
    ),
)


def formulas(model: ModelVariant) -> list[dict[str, str]]:
    """Return the formulas, followed by notes about unusual parts of this model."""
    rows = [{"name": formula.name, "formula": formula.formula, "source": formula.source} for formula in _FORMULAS]
    return [*rows, *({"name": name, "formula": text, "source": "this model"} for name, text in _notes(model))]


def _notes(model: ModelVariant) -> list[tuple[str, str]]:
    """Explain how unusual parts of this model affect the numbers."""
    notes = {
        "qk_norm": ("QK norm", "queries and keys are shown after normalization and rotation, so their dot products are the scores"),
        "shifted_key_heads": ("shifted keys", "the keys of the first heads are those of the previous position"),
        "attention_softcap": ("attention soft-cap", "scores are c · tanh(score / c) before the softmax"),
        "logit_softcap": ("logit soft-cap", "attribution explains the logits before c · tanh(logit / c)"),
        "ngram_embeddings": ("n-gram embeddings", "are a separate component in the attribution"),
        "value_embeddings": ("value embeddings", "are part of the values and are attributed to the heads that read them"),
        "value_residual": ("value residual", "values from the first layer are attributed to the later heads that use them"),
        "embedding_shortcut": ("embedding shortcut", "scales all components before it and is added to the embeddings"),
    }
    chosen = [note for key, note in notes.items() if getattr(model, key, None)]
    if getattr(model, "norm_position", "pre") == "post":
        chosen.append(
            ("post-norm", "every norm is applied to all components with its scale frozen; its bias is a separate component")
        )
    if model.bidirectional:
        note = "loss, logit lens and attribution of a token are computed while it is masked, from the logits at its position"
        chosen.append(("masked tokens", note))
    if model.architecture == "encoder_decoder":
        chosen.append(("alignment", "mean of cross_attention.pattern over the heads of the last decoder layer"))
    if getattr(model, "n_kv_head", None):
        chosen.append(("grouped-query attention", "several query heads share one key/value head"))
    return chosen
