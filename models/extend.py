"""A model made ready for longer contexts: another base of its rotary frequencies (arXiv 2309.16039), another limit."""

from typing import Any

from seqzoo.models.causal_lm import SeqZooForCausalLM


def extended(
    model: SeqZooForCausalLM, *, rope_theta: float | None = None, max_position_embeddings: int | None = None
) -> SeqZooForCausalLM:
    """The model with this base in every mixer that turns by positions, and this limit; its weights are shared.

    Args:
        rope_theta: None leaves the bases.
        max_position_embeddings: [tokens] None leaves the limit.

    Raises:
        ValueError: a base for a model in which no mixer turns anything, or numbers that are none.
    """
    named = model.config.to_dict()
    fields = {name: value for name, value in named.items() if name not in ("model_type", "_name_or_path")}
    if max_position_embeddings is not None:
        fields["max_position_embeddings"] = max_position_embeddings
    if rope_theta is not None:
        if not isinstance(rope_theta, int | float) or isinstance(rope_theta, bool) or not 0 < rope_theta < float("inf"):
            raise ValueError(f"rope_theta: expected a number above 0, got {rope_theta!r}")
        changed: list[str] = []
        fields["mixers"] = {name: _with(spec, float(rope_theta), changed) for name, spec in fields["mixers"].items()}
        if not changed:
            raise ValueError(f"rope_theta: expected a model that turns by positions, got {sorted(fields['mixers'])}")
    new = SeqZooForCausalLM(type(model.config)(**fields))
    new.load_state_dict(model.state_dict(), assign=True)
    new.tie_weights()
    new.generation_config = model.generation_config
    return new.train(model.training)


def _with(spec: Any, theta: float, changed: list[str]) -> Any:
    """A spec and the specs in it."""
    if not isinstance(spec, dict):
        return spec
    spec = {name: _with(value, theta, changed) for name, value in spec.items()}
    if "rope_theta" in spec and spec.get("rotary_width") != 0:
        changed.append(spec["kind"])
        spec["rope_theta"] = theta
    return spec
