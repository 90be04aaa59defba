"""The half of the text plugin that needs torch: the model, pooled or with its own head, and the tokenizer."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from orchestrator.errors import WeightsError
from orchestrator.modality import Plan
from orchestrator.network import (
    Network,
    StateDict,
    build_transformers,
    from_logits,
    from_pipeline,
    load_body,
    make_config,
    new_layer,
    part_of,
    quiet,
)
from orchestrator_text import Text

if TYPE_CHECKING:
    from collections.abc import Callable

_DENSE = "2_Dense"
_POOLED = """\
from sentence_transformers import SentenceTransformer
from transformers import AutoConfig

model, config = SentenceTransformer("."), AutoConfig.from_pretrained(".")
logits = model.encode([{text}], convert_to_tensor=True)
{scores}"""
_NATIVE = """\
from transformers import pipeline

{scores}"""


def build_network(plan: Plan, directory: Path) -> Network:
    """A model for sequence classification, or a pooled body with one layer, as the plan says."""
    tokenizer = make_tokenizer(plan, directory)
    changes = {"pad_token_id": tokenizer.pad_token_id}
    if plan.input["head"] == "pooled":
        return _build_pooled(plan, directory, tokenizer, changes)
    chosen = getattr(transformers, plan.row.architecture)
    network = build_transformers(plan, directory, chosen, changes, tokenizer, fresh=lambda config: chosen(config))
    text = '{"text": "a text", "text_pair": "another"}' if _of_pairs(plan) else '"a text"'
    more = ", truncation=True"
    network.usage = _NATIVE.format(
        scores=from_pipeline(plan.job.task, "text-classification", len(plan.classes), text, more)
    )
    return network


def _of_pairs(plan: Plan) -> bool:
    columns = plan.job.data.input_column
    return isinstance(columns, tuple) and len(columns) > 1


def make_tokenizer(plan: Plan, directory: Path) -> Any:
    """The backbone's own tokenizer, which pads on the right and cuts off where the plan says."""
    # Old versions wrote into tokenizer_config.json where tokenizer.json lay, and some read it from there.
    own = directory / "tokenizer.json"
    files = {"tokenizer_file": str(own) if own.is_file() else None} if "tokenizer_file" in (
        plan.backbone.tokenizer or {}) else {}  # fmt: skip
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        directory, local_files_only=True, trust_remote_code=False, **files
    )
    tokenizer.model_max_length = plan.input["max_tokens"]
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    if tokenizer.pad_token is None:  # language models were trained without padding; what is masked may be any token
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise WeightsError(
            f"the tokenizer of {plan.backbone.source} has no token to pad with",
            expected="a padding, end or unknown token",
            mend="choose another backbone, or set one and save the tokenizer again",
        )
    return tokenizer


def make_collate(plan: Plan, directory: Path) -> Callable[[Sequence[Text], bool], dict[str, Tensor]]:
    """Texts -> what the tokenizer gives, padded to the longest of the batch."""
    tokenizer = make_tokenizer(plan, directory)

    def collate(decoded: Sequence[Text], train: bool) -> dict[str, Tensor]:  # noqa: ARG001  # texts are not augmented
        pairs = any(text.second is not None for text in decoded)
        return dict(
            tokenizer(
                [text.first for text in decoded],
                [text.second or "" for text in decoded] if pairs else None,
                truncation=True,
                max_length=plan.input["max_tokens"],
                padding="longest",
                return_tensors="pt",
            )
        )

    return collate


class Pooled(nn.Module):
    """A body, the pooling of its tokens, and one layer, as sentence-transformers computes it."""

    def __init__(self, body: nn.Module, width: int, num_classes: int, pooling: str) -> None:
        super().__init__()
        self.body = body
        self.classifier = new_layer(width, num_classes)
        self._pooling = pooling

    def forward(self, attention_mask: Tensor, **inputs: Tensor) -> Tensor:
        """Logits, float [batch, classes]."""
        tokens = self.body(attention_mask=attention_mask, **inputs).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(tokens.dtype)
        if self._pooling == "cls":
            pooled = tokens[:, 0]
        elif self._pooling == "max":
            pooled = tokens.masked_fill(mask == 0, -1e9).max(dim=1).values
        else:
            pooled = (tokens * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1e-9)
        return self.classifier(pooled)  # type: ignore[no-any-return]


def _build_pooled(plan: Plan, directory: Path, tokenizer: Any, changes: dict[str, Any]) -> Network:
    config = make_config(plan, changes)
    chosen = transformers.MODEL_MAPPING[type(config)]
    # A pooler that nobody reads would be random where the checkpoint has none.
    bare = {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(chosen.__init__).parameters else {}
    torch.manual_seed(plan.job.training.seed)
    if plan.weights == "random":
        body, unused = chosen(config, **bare), ()
    else:
        body, unused = load_body(plan, directory, chosen, config, bare)
    width = getattr(config, "hidden_size", None) or config.d_model
    module = Pooled(body, width, len(plan.classes), plan.input["pooling"])
    if plan.weights == "trained":
        dense = load_file(directory / _DENSE / "model.safetensors")
        module.classifier.load_state_dict({name.removeprefix("linear."): value for name, value in dense.items()})
    new = {"trained": (), "pretrained": ("classifier.weight", "classifier.bias"), "random": tuple(module.state_dict())}
    return Network(
        module, ("classifier",), new[plan.weights], unused,
        save=lambda folder, state_dict: _save(module, tokenizer, plan, folder, state_dict),
        usage=_POOLED.format(
            text='("a text", "another")' if _of_pairs(plan) else '"a text"',
            scores=from_logits(plan.job.task, "logits[0]", "config"),
        ),
        library="sentence-transformers",
    )  # fmt: skip


def _save(module: Pooled, tokenizer: Any, plan: Plan, directory: Path, state_dict: StateDict) -> None:
    """A directory in the layout of sentence-transformers: Transformer, Pooling, Dense."""
    with quiet():
        module.body.save_pretrained(directory, state_dict=part_of(state_dict, "body"))  # type: ignore[operator]
        tokenizer.save_pretrained(directory)
    parts = (("", "Transformer"), ("1_Pooling", "Pooling"), (_DENSE, "Dense"))
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(parts)
    ]
    width, num_classes = module.classifier.in_features, module.classifier.out_features
    pooling = plan.input["pooling"]
    files: dict[str, Any] = {
        "modules.json": modules,
        "sentence_bert_config.json": {"max_seq_length": plan.input["max_tokens"], "do_lower_case": False},
        "1_Pooling/config.json": {
            "word_embedding_dimension": width,
            "pooling_mode_cls_token": pooling == "cls",
            "pooling_mode_mean_tokens": pooling == "mean",
            "pooling_mode_max_tokens": pooling == "max",
        },
        f"{_DENSE}/config.json": {
            "in_features": width,
            "out_features": num_classes,
            "bias": True,
            "activation_function": "torch.nn.modules.linear.Identity",
        },
    }
    for name, content in files.items():
        file = directory / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(content, indent=1), encoding="utf-8")
    layer = {f"linear.{name}": value.contiguous().cpu() for name, value in part_of(state_dict, "classifier").items()}
    save_file(layer, directory / _DENSE / "model.safetensors", metadata={"format": "pt"})
