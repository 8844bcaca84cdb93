"""The numbers and choices of a run: what `configs/trainer/*.yaml` may say."""

from dataclasses import dataclass

import torch

PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The `trainer=` choices, all of them given in its YAML.

    Attributes:
        steps: optimizer steps of the run.
        batch_size, sequence_length: rows of a micro-batch, tokens of a row.
        accumulate: micro-batches of a step.
        shuffle_buffer: documents that are shuffled at a time.
        clip: the largest norm of the gradient; None does not clip.
        precision: "fp32", or "bf16" for autocast.
        float8: the blocks' linear layers multiply numbers of eight bits, as `models/float8.py` has it.
        compile: torch.compile.
        gradient_checkpointing: activations are computed again instead of kept: True all of a block's, "selective" all
            but its products', False none.
        device: "cpu", "cuda", ...; None is a GPU where there is one.
        max_skips: steps in a row whose loss or gradient is not finite that end the run.
        skip_spikes: steps whose gradient's norm is above so many times its running mean are skipped, as those that are
            not finite are; None skips none.
        max_minutes: of training; None leaves the end to `steps`. A run that ends by the clock is not reproducible.
        log_every, validate_every, checkpoint_every: steps from one to the next; the end always counts.
        profile_every: steps from one that is profiled to the next, a share of its time spent in exchanges written down
            and a trace of each process laid into the run folder; None profiles none. Such a step takes longer.
        validation_tokens: of a validation on the way, spread evenly over all.
        final_validation_bytes: of the validation set, which is all used at the end.
        keep: checkpoints to keep.
        milestone_every: steps from one checkpoint that is kept for good to the next; None keeps the newest alone.
        resume: None starts, "auto" goes on from the run folder's newest checkpoint, a path from that one.
        tensorboard, wandb: whether to write there too.
        prompt, sample_tokens, temperature: of the text made at the end; 0 tokens make none.
    """

    steps: int
    batch_size: int
    sequence_length: int
    accumulate: int
    shuffle_buffer: int
    clip: float | None
    precision: str
    float8: bool
    compile: bool
    gradient_checkpointing: bool | str
    device: str | None
    max_skips: int
    skip_spikes: float | None
    max_minutes: float | None
    log_every: int
    validate_every: int
    profile_every: int | None
    validation_tokens: int
    final_validation_bytes: int
    checkpoint_every: int
    keep: int
    milestone_every: int | None
    resume: str | None
    tensorboard: bool
    wandb: bool
    prompt: str
    sample_tokens: int
    temperature: float

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "sequence_length", "accumulate", "max_skips", "log_every", "validate_every")
        for name in (*counts, "validation_tokens", "final_validation_bytes", "checkpoint_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"trainer.{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("milestone_every", "profile_every"):
            every = getattr(self, name)
            if every is not None and every < 1:
                raise ValueError(f"trainer.{name}: expected at least 1 or null, got {every}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"trainer.precision: expected one of {PRECISIONS}, got {self.precision!r}")
        if self.gradient_checkpointing not in (True, False, "selective"):
            got = self.gradient_checkpointing
            raise ValueError(f"trainer.gradient_checkpointing: expected true, false or selective, got {got!r}")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"trainer.clip: expected a norm above 0 or null, got {self.clip}")
        if self.skip_spikes is not None and not self.skip_spikes > 1:
            raise ValueError(f"trainer.skip_spikes: expected a factor above 1 or null, got {self.skip_spikes}")
        if self.max_minutes is not None and not self.max_minutes > 0:
            raise ValueError(f"trainer.max_minutes: expected minutes above 0 or null, got {self.max_minutes}")
        if not isinstance(self.prompt, str):
            raise ValueError(f"trainer.prompt: expected text, got {self.prompt!r}")
        for name in ("sample_tokens", "temperature"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"trainer.{name}: expected at least 0, got {getattr(self, name)}")

    def torch_device(self) -> torch.device:
        return torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))
