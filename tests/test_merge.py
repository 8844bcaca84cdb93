"""Models merged neuron by neuron."""

import pytest
import torch
from test_bdh import small
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from seqzoo.models.convert.bdh import from_bdh_state_dict
from seqzoo.models.merge import merge_neurons
from seqzoo.models.quantise import quantise


@pytest.mark.parametrize("times", [2, 3])
def test_merged_with_itself_it_is_itself(times, tmp_path):
    """Up to the layer norms' eps; also after a trip to disk, and cut into prefill and steps."""
    ours, ids = small(hidden_size=24, neurons=192), torch.randint(19, (2, 60))
    merged = merge_neurons([ours] * times)
    spec = merged.config.blocks["bdh"]
    assert (spec["neurons"], spec["ladders"]) == (times * 192, times)
    assert_close(merged(ids).logits, ours(ids).logits, atol=2e-4, rtol=2e-4)
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(ids).logits, merged(ids).logits)
    with torch.no_grad():
        past = again(ids[:, :50], use_cache=True).past_key_values
        pieces = []
        for t in range(50, 60):
            out = again(ids[:, t : t + 1], past_key_values=past, use_cache=True)
            past = out.past_key_values
            pieces.append(out.logits)
    assert_close(torch.cat(pieces, 1), merged(ids).logits[:, 50:], atol=1e-4, rtol=1e-4)


def test_of_different_models_nothing_is_lost():
    """Neurons side by side in each head, each with its own ladder of frequencies; the rest is the mean."""
    one, other, third = (small(neurons=n, ladders=k) for n, k in ((48, 1), (48, 1), (96, 2)))
    merged = merge_neurons([one, other, third])
    block, parts = merged.stack.blocks[0], [m.stack.blocks[0] for m in (one, other, third)]
    assert merged.config.blocks["bdh"]["ladders"] == 4
    assert torch.equal(block.decoder[1], torch.cat([p.decoder[1] for p in parts]))
    assert_close(merged.lm_head.weight, (one.lm_head.weight + other.lm_head.weight + third.lm_head.weight) / 3)
    assert len({p.data_ptr() for m in (one, other, third, merged) for p in m.parameters()}) == 4 * 5


def test_merged_as_the_paper_merges_it():
    """Their tensors concatenated on the neurons' axis, frequencies too, and read: the same model."""
    one, other = (small(), small())
    theirs = []
    for model in (one, other):
        block = model.stack.blocks[0]
        theirs.append((block.encoder.mT, block.encoder_v.mT, block.decoder))
    encoder, encoder_v, decoder = (
        torch.cat(x, dim=dim) for x, dim in zip(zip(*theirs, strict=True), (2, 2, 1), strict=True)
    )
    freqs = 65536.0 ** -(torch.arange(24) // 2 * 2 / 24) / (2 * torch.pi)
    read = from_bdh_state_dict(
        {
            "encoder": encoder, "encoder_v": encoder_v, "decoder": decoder.flatten(0, 1),
            "embed.weight": (one.embed_tokens.weight + other.embed_tokens.weight) / 2,
            "lm_head": ((one.lm_head.weight + other.lm_head.weight) / 2).T,
            "attn.freqs": freqs.repeat(2).view(1, 1, 1, -1),
        },
        num_layers=3,
    ).eval()  # fmt: skip
    ids = torch.randint(19, (2, 40))
    assert_close(read(ids).logits, merge_neurons([one, other])(ids).logits)


def test_a_text_ends_where_the_first_ends():
    """Training writes the marks of its tokenizer into the generation config, not into the config."""
    one, other = small(), small()
    one.generation_config.eos_token_id = 7
    assert merge_neurons([one, other]).generation_config.eos_token_id == 7


def test_says_what_cannot_be_merged():
    ours = small()
    with pytest.raises(ValueError, match="expected two models or more, got 1"):
        merge_neurons([ours])
    with pytest.raises(ValueError, match="configs alike but for neurons, got other .'hidden_size'"):
        merge_neurons([ours, small(hidden_size=24)])
    with pytest.raises(ValueError, match="bdh: expected blocks alike but for their neurons, got other .'dropout'"):
        merge_neurons([ours, small(dropout=0.1)])
    with pytest.raises(ValueError, match="bdh: expected ladders of one length"):
        merge_neurons([ours, small(neurons=96)])
    whole = quantise(small(hidden_size=16, neurons=64), group=16, head=True, skip=["encoder", "decoder"])
    with pytest.raises(ValueError, match="lm_head.weight: expected a floating dtype, got torch.int8"):
        merge_neurons([whole, whole])
