"""The half of the text plugin that needs torch: the model, pooled or with its own head, and the tokenizer."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from orchestrator.errors import BadSampleError, RefusedError, WeightsError
from orchestrator.modality import Plan
from orchestrator.network import (
    Inputs,
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
from orchestrator_text.families import APART, CHANGES, LEAST_TOKENS, PADS_LEFT, READS_ENDS, axial_shape
from orchestrator_text.vocabulary import STAND_INS, keep_trained_tokens, panics_raised, require_within

if TYPE_CHECKING:
    from collections.abc import Callable

_DENSE = "2_Dense"
_POOLED = """\
from sentence_transformers import SentenceTransformer
from transformers import AutoConfig

# Should a pooler be reported as missing: it is no part of this model, which pools the tokens itself.
model, config = SentenceTransformer("."), AutoConfig.from_pretrained(".")
logits = model.encode([{text}], convert_to_tensor=True)
{scores}"""
_NATIVE = """\
from transformers import pipeline

{scores}"""


def build_network(plan: Plan, directory: Path) -> Network:
    """A model for sequence classification, or a pooled body with one layer, as the plan says."""
    _require_trainable(plan)
    tokenizer = make_tokenizer(plan, directory)
    changes = {"pad_token_id": tokenizer.pad_token_id, **CHANGES.get(plan.backbone.model_type, {})}
    if plan.input["head"] == "pooled":
        return _build_pooled(plan, directory, tokenizer, changes)
    chosen = getattr(transformers, plan.row.architecture)
    network = build_transformers(plan, directory, chosen, changes, tokenizer, fresh=lambda config: chosen(config))
    text = '{"text": "a text", "text_pair": "another"}' if _of_pairs(plan) else '"a text"'
    more = ", truncation=True"
    network.usage = _NATIVE.format(
        scores=from_pipeline(plan.job.task, "text-classification", len(plan.classes), text, more)
    )
    network.parts = parts_of(plan)
    return network


def _of_pairs(plan: Plan) -> bool:
    columns = plan.job.data.input_column
    return isinstance(columns, tuple) and len(columns) > 1


def _require_trainable(plan: Plan) -> None:
    """Raise `RefusedError` where the body cannot move with texts as they are."""
    shape = axial_shape(plan.backbone.config) if plan.backbone.model_type == "reformer" else ()
    if shape and plan.recipe.trains_everything and plan.weights != "trained":
        raise RefusedError(
            "unsupported",
            f"{plan.backbone.source} (reformer): while its body is trained it takes texts of {math.prod(shape)} tokens "
            f"alone, all of its table of positions (axial_pos_shape = {list(shape)})",
            mend="train the last layer: method head",
        )


def make_tokenizer(plan: Plan, directory: Path) -> Any:
    """The backbone's own tokenizer, which cuts off where the plan says and pads on its family's side.

    Control tokens in a text are text to it, and additional ones that the network was trained with are tokens. Raises
    `RefusedError` where it gives numbers beyond the embedding.
    """
    # Old versions wrote into tokenizer_config.json where tokenizer.json lay, and some read it from there.
    own = directory / "tokenizer.json"
    files = {"tokenizer_file": str(own) if own.is_file() else None} if "tokenizer_file" in (
        plan.backbone.tokenizer or {}) else {}  # fmt: skip
    with panics_raised():
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False, split_special_tokens=True, **files
        )
    tokenizer.model_max_length = plan.input["max_tokens"]
    tokenizer.padding_side = "left" if plan.backbone.model_type in PADS_LEFT else "right"
    tokenizer.truncation_side = "right"
    rows = getattr(make_config(plan, {}).get_text_config(), "vocab_size", None)
    if isinstance(tokenizer, transformers.PreTrainedTokenizerFast):
        most = rows if isinstance(rows, int) else None
        tokenizer._tokenizer = keep_trained_tokens(tokenizer._tokenizer, plan.backbone, most, directory)
        tokenizer._tokenizer.encode_special_tokens = True
    if isinstance(rows, int):
        _require_within(plan, tokenizer, rows)
    if tokenizer.pad_token is None or (isinstance(rows, int) and tokenizer.pad_token_id >= rows):
        # Language models were trained without padding; what is masked may be any token.
        named = [getattr(tokenizer, name, None) for name in STAND_INS]
        tokenizer.pad_token = next((one for one in named if one is not None and _is_within(tokenizer, one, rows)), None)
    if tokenizer.pad_token is None:
        raise WeightsError(
            f"the tokenizer of {plan.backbone.source} has no token to pad with",
            expected="a padding, end or unknown token",
            mend="choose another backbone, or set one and save the tokenizer again",
        )
    return tokenizer


def _is_within(tokenizer: Any, token: str, rows: int | None) -> bool:
    number = tokenizer.convert_tokens_to_ids(token)
    return isinstance(number, int) and (rows is None or number < rows)


def _require_within(plan: Plan, tokenizer: Any, rows: int) -> None:
    """Raise `RefusedError` where a text can become a number that the embedding has no row for."""
    given = set(tokenizer("a", "a", verbose=False)["input_ids"])  # else it warns where the limit is shorter
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    numbers = tokenizer.get_vocab().items()
    require_within(plan.backbone, rows, ((t, n) for t, n in numbers if n not in special or n in given))


def make_collate(plan: Plan, directory: Path) -> Callable[[Sequence[Text], bool], dict[str, Tensor]]:
    """Texts -> what the tokenizer gives, padded to the longest of the batch; where families need them, `lengths`.

    Those are int64 [texts]: without padding.
    """
    tokenizer = make_tokenizer(plan, directory)
    model_type, num_types = plan.backbone.model_type, plan.backbone.config.get("type_vocab_size")
    apart, least, end = model_type in APART, LEAST_TOKENS.get(model_type, 0), _end_that_is_read(plan)

    def collate(decoded: Sequence[Text], train: bool) -> dict[str, Tensor]:  # noqa: ARG001  # texts are not augmented
        pairs = any(text.second is not None for text in decoded)
        with panics_raised():
            batch = dict(
                tokenizer(
                    [text.first for text in decoded],
                    [text.second or "" for text in decoded] if pairs else None,
                    truncation=True,
                    max_length=plan.input["max_tokens"],
                    padding="longest",
                    return_tensors="pt",
                    return_attention_mask=True if apart else None,
                )
            )
        if num_types is not None and "token_type_ids" in batch and int(batch["token_type_ids"].max()) >= num_types:
            raise BadSampleError(f"is a pair, and the embedding of types has {num_types} rows (type_vocab_size)")
        if end is not None and int((batch["input_ids"] == end).sum(dim=1).min()) == 0:
            raise BadSampleError(
                f"becomes tokens without the end token {end} (eos_token_id), which the head of {model_type} reads"
            )
        if apart:
            batch["lengths"] = batch["attention_mask"].sum(dim=1)
            if int(batch["lengths"].min()) < least:
                raise BadSampleError(f"has fewer than {least} tokens, and {model_type} takes no fewer")
            if "attention_mask" not in tokenizer.model_input_names:
                del batch["attention_mask"]
        return batch

    return collate


def _end_that_is_read(plan: Plan) -> int | None:
    """The end token that the head stands on, None for families whose head needs none."""
    if plan.backbone.model_type not in READS_ENDS or plan.input["head"] == "pooled":
        return None
    end = make_config(plan, {}).eos_token_id
    return end if isinstance(end, int) else None


def parts_of(plan: Plan) -> Callable[[Inputs], list[tuple[Tensor, Inputs]]] | None:
    """Which texts of a batch are computed together: None for all. See families.py."""
    model_type = plan.backbone.model_type
    if model_type not in READS_ENDS and model_type not in APART:
        return None
    end = _end_that_is_read(plan)

    def parts(inputs: Inputs) -> list[tuple[Tensor, Inputs]]:
        """[(int64 indices, inputs), ...]: of one length, unpadded; with one number of end tokens."""
        ids = inputs["input_ids"]
        lengths = inputs.get("lengths", torch.full(ids.shape[:1], ids.shape[1], device=ids.device))
        ends = (ids == end).sum(dim=1) if end is not None else torch.zeros_like(lengths)
        found = []
        for length, num_ends in torch.stack([lengths, ends], dim=1).unique(dim=0).tolist():
            index = ((lengths == length) & (ends == num_ends)).nonzero().flatten()
            given = {key: value[index, :length] for key, value in inputs.items() if key != "lengths"}
            found.append((index, given))
        return found

    return parts


class Pooled(nn.Module):
    """A body, the pooling of its tokens, and one layer, as sentence-transformers computes it."""

    def __init__(self, body: nn.Module, width: int, num_classes: int, pooling: str) -> None:
        super().__init__()
        self.body = body
        self.classifier = new_layer(width, num_classes)
        self._pooling = pooling

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Tensor) -> Tensor:
        """Logits, float [batch, classes]."""
        given = {} if attention_mask is None else {"attention_mask": attention_mask}
        tokens = self.body(input_ids=input_ids, **given, **inputs).last_hidden_state
        if attention_mask is None:  # of families that take none, and whose texts come without padding
            attention_mask = torch.ones_like(input_ids)
        mask = attention_mask.unsqueeze(-1).to(tokens.dtype)
        if self._pooling == "cls":  # the first that is no padding, on whichever side that is
            pooled = tokens[torch.arange(len(tokens), device=tokens.device), attention_mask.argmax(dim=1)]
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
        save=lambda folder, state_dict: _save(module, tokenizer, plan, folder, state_dict), parts=parts_of(plan),
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
