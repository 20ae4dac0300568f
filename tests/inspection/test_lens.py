"""The logit lens after a layer equals the prediction of a model that ends at that layer."""

from __future__ import annotations

import pytest
import torch
from tiny import PRESETS, VOCAB_SIZE, ids, model, section

from tinylm.errors import InputError
from tinylm.inspection import logit_lens
from tinylm.inspection.lens import lens_guesses
from tinylm.model.transformer import Transformer


@pytest.mark.parametrize("preset", PRESETS)
def test_the_lens_after_a_layer_is_the_prediction_of_a_model_without_the_later_layers(preset: str) -> None:
    network, tokens = model(preset, n_layer=3), ids(2, 10)
    lens = logit_lens(network, tokens)
    assert lens.shape == (4, 2, 10, VOCAB_SIZE)
    for layer in (1, 2, 3):
        shorter = Transformer(section(preset, n_layer=layer), VOCAB_SIZE).eval()
        remaining = shorter.state_dict()
        shorter.load_state_dict({name: weight for name, weight in network.state_dict().items() if name in remaining})
        with torch.no_grad():
            torch.testing.assert_close(lens[layer], shorter(tokens), atol=1e-5, rtol=1e-5)


def test_guesses_are_the_most_likely_tokens_and_ranks_start_at_1() -> None:
    network, tokens = model("gpt2"), ids(1, 10)
    probabilities = logit_lens(network, tokens)[:, 0].softmax(-1)
    truth = torch.cat((tokens[0, 1:], torch.tensor([-1])))
    guesses = lens_guesses(network, tokens, truth, 4)
    torch.testing.assert_close(guesses.probabilities, probabilities.sort(descending=True).values[..., :4])
    torch.testing.assert_close(probabilities.gather(-1, guesses.ids), guesses.probabilities)
    for layer in range(3):
        for position in range(9):
            following = int(tokens[0, position + 1])
            ordered = probabilities[layer, position].argsort(descending=True).tolist()
            assert guesses.ranks[layer, position] == 1 + ordered.index(following)
    assert guesses.ranks[:, -1].tolist() == [0, 0, 0]


def test_a_model_without_a_residual_stream_is_rejected() -> None:
    from bigram import Bigram, BigramSection

    network = Bigram(BigramSection(context_length=8), 20)
    with pytest.raises(InputError, match="bigram architecture has no residual stream"):
        logit_lens(network, ids(1, 4, vocab_size=20))
