"""The typed run: every setting, its unit and its meaning. Values stand in `conf/`, not here.

An unknown or ill-typed key fails when the configuration is composed, with the key's name. A default
here is what versions without that setting did, so that their checkpoints still open.
"""

from dataclasses import dataclass, field
from typing import Any

from longctx.config.data import ContextsConfig, DataConfig
from longctx.config.distill import KlConfig, TeacherConfig
from longctx.config.encoder import CepeConfig, EncoderConfig
from longctx.config.in_loop import InLoopConfig
from longctx.config.rope import RopeConfig
from longctx.config.typed import choice, positive
from longctx.errors import UserError


@dataclass(frozen=True)
class ModelConfig:
    """A pretrained model, or an architecture to start from random weights.

    Args:
        name: short name, for run directories and reports.
        path: a directory, a `.gguf` file, or a hub name. None: random weights.
        architecture: transformers config fields, with `model_type`. Needed when `path` is None;
            beside a path it lets plans be made without the weights.
        tokenizer: where the tokenizer is. None: the model's path.
        family: of models that share the numbers a recipe is run with; `path`: unknown.
        made_by: arguments of the run that exports to `path`. None: no run of longctx.
    """

    name: str
    path: str | None
    architecture: dict[str, Any]
    tokenizer: str | None
    family: str = "path"
    made_by: str | None = None

    @property
    def tokenizer_path(self) -> str | None:
        """A directory, a `.gguf` file or a hub name with the tokenizer. None: there is none."""
        return self.tokenizer or self.path


@dataclass(frozen=True)
class AdapterConfig:
    """Full fine-tuning, or low-rank adapters through peft.

    Args:
        name: `none | lora`.
        rank: rank r of the update.
        alpha: the update is scaled by alpha / rank.
        targets: names of the linear layers that get an adapter.
        also_train: name parts of parameters trained in full beside the adapters.
    """

    name: str
    rank: int
    alpha: float
    targets: list[str]
    also_train: list[str]


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its learning-rate schedule.

    Args:
        lr: peak learning rate.
        betas: Adam's two decay rates.
        eps: Adam's epsilon.
        weight_decay: decoupled decay, applied to matrices only.
        clip: maximum global gradient norm; 0 switches clipping off.
        schedule: `constant | linear | cosine`, after the warm-up.
        warmup_steps: steps of linear warm-up.
        warmup_from: learning rate of the first warm-up step as a fraction of `lr`.
        final_fraction: learning rate at the last step as a fraction of `lr` (linear, cosine).
    """

    lr: float
    betas: list[float]
    eps: float
    weight_decay: float
    clip: float
    schedule: str
    warmup_steps: int
    warmup_from: float
    final_fraction: float

    def __post_init__(self) -> None:
        positive(self.lr, "optim.lr")
        choice(self.schedule, ("constant", "linear", "cosine"), "optim.schedule")


@dataclass(frozen=True)
class ParallelConfig:
    """How a step is spread over processes.

    Args:
        zero_stage: DeepSpeed ZeRO 0-3: what is sharded (1 optimizer, 2 + gradients, 3 + weights).
        activation_checkpointing: recompute each layer in the backward pass.
        offload_optimizer: keep fp32 weights and Adam moments in CPU memory and update there; ZeRO
            1, 2 and 3.
        offload_parameters: keep the shards of the weights in CPU memory between uses; ZeRO 3.
        offload_checkpoints: keep the layer inputs that activation checkpointing saves in CPU
            memory.
        mlp_tile: tokens that go through an FFN at a time, in both directions; 0: all at once.
        sp: ranks that share a row, each with an equal part of its tokens (Ulysses).
        lost_after: seconds without a sign of life after which a rank is lost and all end; 0: never.
    """

    zero_stage: int
    activation_checkpointing: bool
    offload_optimizer: bool = False
    offload_parameters: bool = False
    offload_checkpoints: bool = False
    mlp_tile: int = 0
    sp: int = 1
    lost_after: float = 30.0

    def __post_init__(self) -> None:
        positive(self.sp, "parallel.sp")
        if self.zero_stage not in (0, 1, 2, 3):
            raise UserError(f"parallel.zero_stage={self.zero_stage} is not one of 0, 1, 2, 3")
        if self.offload_optimizer and not self.zero_stage:
            raise UserError("parallel.offload_optimizer=true needs parallel.zero_stage 1, 2 or 3")
        if self.offload_parameters and self.zero_stage != 3:
            raise UserError("parallel.offload_parameters=true needs parallel.zero_stage=3")
        if self.offload_checkpoints and not self.activation_checkpointing:
            raise UserError(
                "parallel.offload_checkpoints=true needs parallel.activation_checkpointing=true"
            )
        if self.lost_after < 0:
            raise UserError(f"parallel.lost_after={self.lost_after} must be at least 0, seconds")
        if self.mlp_tile < 0:
            raise UserError(f"parallel.mlp_tile={self.mlp_tile} must be at least 0, tokens")


@dataclass(frozen=True)
class TrainConfig:
    """The loop.

    Args:
        max_steps: optimizer steps.
        batch_rows: rows per optimizer step, over all ranks.
        micro_batch_rows: rows per rank in one forward pass.
        dtype: `fp32 | bf16`, of the weights in the forward and backward pass.
        export_dtype: `fp32 | bf16`, of the exported weights.
        eval_every: steps between held-out evaluations; 0: only at the end.
        eval_rows: held-out rows per evaluation.
        save_every: steps between checkpoints; 0: only at the end.
        keep_last: checkpoints kept; 0 keeps all.
        save_async: write checkpoints beside the steps, not between them; needs host memory.
        max_skipped: bad steps in a row (loss or gradient norm not finite) that end the run.
        skip_above: a step is bad too if its gradient norm is above this many times the usual one,
            the median of the last 100 accepted; 0: never.
    """

    max_steps: int
    batch_rows: int
    micro_batch_rows: int
    dtype: str
    export_dtype: str
    eval_every: int
    eval_rows: int
    save_every: int
    keep_last: int
    save_async: bool = False
    max_skipped: int = 5
    skip_above: float = 0.0

    def __post_init__(self) -> None:
        for key in ("max_steps", "batch_rows", "micro_batch_rows", "max_skipped"):
            positive(getattr(self, key), f"train.{key}")
        choice(self.dtype, ("fp32", "bf16"), "train.dtype")
        choice(self.export_dtype, ("fp32", "bf16"), "train.export_dtype")
        if self.skip_above and not self.skip_above > 1:
            raise UserError(f"train.skip_above={self.skip_above} must be above 1, or 0 for never")

    def accumulation(self, dp_size: int) -> int:
        """Micro-batches per rank and step.

        Raises:
            UserError: if the rows of a step cannot be dealt out evenly.
        """
        per_pass = self.micro_batch_rows * dp_size
        if self.batch_rows % per_pass:
            raise UserError(
                f"train.batch_rows={self.batch_rows} is not a multiple of "
                f"train.micro_batch_rows={self.micro_batch_rows} x {dp_size} ranks = {per_pass}"
            )
        return self.batch_rows // per_pass

    def check_rows(self, dp_size: int) -> None:
        """Raises UserError unless training and evaluation rows can be dealt out evenly."""
        self.accumulation(dp_size)
        if self.eval_rows % (self.micro_batch_rows * dp_size):
            raise UserError(
                f"train.eval_rows={self.eval_rows} is not a multiple of "
                f"train.micro_batch_rows={self.micro_batch_rows} x {dp_size} ranks"
            )


@dataclass(frozen=True)
class WandbConfig:
    """Where wandb files a run.

    Args:
        project: project name.
        entity: user or team; None: wandb's default.
        mode: `auto` (online with a key, else offline) `| online | offline`.
    """

    project: str
    entity: str | None
    mode: str

    def __post_init__(self) -> None:
        choice(self.mode, ("auto", "online", "offline"), "wandb.mode")


@dataclass(frozen=True)
class RunConfig:
    """One training run.

    Args:
        name: the recipe's name.
        builder: module that holds the RECIPE; `recipes.NAME` is one of longctx's own.
        model, rope, adapter, data, optim, parallel, train, wandb: see their classes.
        encoder, contexts, cepe: see their classes; for recipes that train an encoder.
        kl, teacher: see their classes; for recipes that distil.
        in_loop: see its class; what is measured between steps.
        settings: what the recipe alone reads; its module says what there is.
        attention: `name` of a method in `longctx/attention/` and that method's own numbers.
        logger: `wandb | none`; metrics.jsonl is written in any case.
        resume: `auto` (newest valid checkpoint of run_dir, else start) `| none |` a checkpoint.
        dry_run: print the resolved run, its batch arithmetic and memory plan, and stop.
        seed: of initialisation, data order and dropout.
        run_dir: where everything of this run is written.
        force: start also where the memory plan says that the run cannot fit.
    """

    name: str
    builder: str
    model: ModelConfig
    attention: dict[str, Any]
    rope: RopeConfig
    adapter: AdapterConfig
    data: DataConfig
    optim: OptimConfig
    parallel: ParallelConfig
    train: TrainConfig
    wandb: WandbConfig
    logger: str
    resume: str
    dry_run: bool
    seed: int
    run_dir: str
    encoder: EncoderConfig = field(default_factory=lambda: EncoderConfig("none", None, {}))
    contexts: ContextsConfig = field(default_factory=ContextsConfig)
    cepe: CepeConfig = field(default_factory=CepeConfig)
    kl: KlConfig = field(default_factory=KlConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    in_loop: InLoopConfig = field(default_factory=InLoopConfig)
    settings: dict[str, Any] = field(default_factory=dict)
    force: bool = False

    def made_before(self) -> dict[str, tuple[str, str]]:
        """What other runs make for this one: setting -> (its path, the arguments of that run)."""
        parts = {"model.path": (self.model.path, self.model.made_by)}
        if self.cepe.start is None:
            parts["encoder.path"] = (self.encoder.path, self.encoder.made_by)
        else:  # the encoder comes with it
            parts["cepe.start"] = (self.cepe.start, self.cepe.made_by)
        return {key: (path, made) for key, (path, made) in parts.items() if path and made}

    @property
    def row_tokens(self) -> int:
        """Tokens of text in a row: its own and, unless they are the same, its contexts'."""
        return self.data.seq_len + (0 if self.contexts.repeat else self.contexts.tokens)

    def __post_init__(self) -> None:
        choice(self.logger, ("wandb", "none"), "logger")
        if self.seed < 0:
            raise UserError(f"seed={self.seed} must be at least 0")
        if self.contexts.repeat and self.contexts.tokens != self.data.seq_len:
            raise UserError(
                f"contexts.repeat=true needs contexts.count x contexts.size = "
                f"{self.contexts.tokens} equal to data.seq_len={self.data.seq_len}"
            )
        if self.data.seq_len % self.parallel.sp:
            raise UserError(
                f"data.seq_len={self.data.seq_len} is not a multiple of parallel.sp="
                f"{self.parallel.sp}: each rank holds an equal part of a row"
            )
        if self.train.dtype == "bf16" and self.parallel.zero_stage == 0:
            raise UserError(
                "train.dtype=bf16 needs parallel.zero_stage >= 1: DeepSpeed's stage 0 takes a "
                "wrong first Adam step in bf16"
            )
