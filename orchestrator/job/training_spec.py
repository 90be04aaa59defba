"""Of a job: how the weights are moved."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from orchestrator.job.part import Part


class Training(Part):
    """How the weights are moved. `None` means: by the method's default, which the plan shows."""

    epochs: int | None = Field(
        None, ge=1, le=100_000, description="passes over the training samples; default: by method, head 40, full 20, "
        "auto 20 and lp-ft 20 (behind the head's), lora 20, scratch 40; a transformer whose body is trained: 6; where "
        "the body is trained and samples are few, what 400 steps take (a transformer: 200, 100 epochs at most)"
    )  # fmt: skip
    batch_size: int | None = Field(
        None, ge=1, description="samples a step, over all workers; default: 32, or 16 where the body is trained on "
        "fewer than 500 samples and a batch has one part or two"
    )  # fmt: skip
    num_microbatches: int | None = Field(
        None,
        ge=1,
        description="parts that a step's batch is computed in, whatever the number of workers; more than "
        "there are workers is gradient accumulation; default: one for each worker, as the run begins",
    )
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="AdamW, or SGD with momentum")
    learning_rate: float | None = Field(
        None, gt=0, description="of the body, and of the head unless given; default: by method, head 0.003, full "
        "0.001, auto 0.0003, lp-ft 0.0003, lora 0.001, scratch 0.001, less for transformers (docs/methods.md); ten "
        "times that for sgd"
    )  # fmt: skip
    head_learning_rate: float | None = Field(None, gt=0, description="of the new head; default: learning_rate")
    layer_decay: float = Field(
        1.0, gt=0, le=1, description="the body's rate is multiplied by it for each block between a parameter and the "
        "head: 0.8 lets early layers move less"
    )  # fmt: skip
    weight_decay: float = Field(0.01, ge=0, description="of all weights but vectors: biases, norms")
    momentum: float = Field(0.9, ge=0, lt=1, description="sgd only")
    schedule: Literal["cosine", "constant"] = Field(
        "cosine", description="of the learning rate after its warm-up: down to 0, or as it is"
    )
    warmup_fraction: float = Field(0.1, ge=0, lt=1, description="of all steps, linear from 0")
    clip_norm: float | None = Field(1.0, gt=0, description="of the gradient over all parameters; null: none")
    class_weights: Literal["none", "auto"] = Field(
        "none", description="auto: rare classes count more, in inverse proportion to their training samples"
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="so much of each target is spread evenly over the classes"
    )
    loss: Literal["auto", "task", "contrastive"] = Field(
        "auto", description="contrastive: methods auto and lp-ft train the body to bring samples of one class "
        "together and fit the head to what it gives; auto: that with fewer than 12 samples a class, but for "
        "groups"
    )  # fmt: skip
    mix: str = Field(
        "none", examples=["none", "mixup", "cutmix", "both"],
        description="training samples are mixed with others of their batch, and so are their labels: images by "
        "mixup, cutmix, or both, each in half of the batches"
    )  # fmt: skip
    patience: int | None = Field(
        None, ge=1, description="epochs without a better validation after which training ends; default: all epochs"
    )
    ema: float | None = Field(
        None, gt=0, lt=1, description="decay of a moving average of the weights, 0.99 or 0.999: validated beside them "
        "in each epoch, and exported where it is better; default: none"
    )  # fmt: skip
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="auto: bf16 where a GPU has it; of a frozen body's features where it is faster and as good"
    )
    batch_norm: Literal["auto", "train", "frozen"] = Field(
        "auto", description="frozen: the pretrained statistics; auto: by the number of samples"
    )
    lora_rank: int = Field(
        16, ge=1, le=4096, description="method lora: the rank of what is added to each of the body's matrices"
    )  # fmt: skip
    lora_alpha: float | None = Field(
        None, gt=0, description="method lora: what is added counts alpha / rank times; default: twice the rank"
    )
    features: Literal["once", "every step"] = Field(
        "once", description="method head: the frozen body runs once for each sample, and what it gives is kept on the "
        "storage; or it runs in every step"
    )  # fmt: skip
    views: int | None = Field(
        None, ge=1, le=1000, description="method head with augmentation: so many random views of each sample are kept; "
        "default: the body runs in every step"
    )  # fmt: skip
    refit: bool = Field(
        False, description="in the end train again, on training and validation samples, for as many epochs as were best"
    )
    budget_min: float | None = Field(
        None, gt=0, description="minutes that the job may take: the epochs in which everything is trained are made to "
        "fit, by its first steps; default: 60 with method auto, unless epochs are given; else none"
    )  # fmt: skip
    seed: int = Field(0, ge=0, description="of new weights, the order of samples, augmentation and dropout")
    deterministic: bool = Field(
        False, description="on a GPU: algorithms that give the same to the bit each time, where there are some; slower"
    )
    checkpoint_every_s: float = Field(60.0, gt=0, description="seconds from one checkpoint to the next")
    checkpoint_every_steps: int | None = Field(None, ge=1, description="steps instead of seconds")
    audit: bool = Field(
        False, description="write down in the run which samples each step took, on which worker: audit/"
    )  # fmt: skip
