"""Every text type that is accepted: a text alone, beside longer ones, and through the exported pipeline."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import orchestrator
from orchestrator.modality import registry
from orchestrator_text.families import APART, PADS_LEFT, READS_ENDS
from tests.gate.test_survey import NUM_LABELS, SOME, classes, tiny

LENGTHS = (60, 31, 9, 2, 9)
OTHERS = {
    "reformer": (13, 9, 4, 2, 4),  # 16 places in its table of positions
    "canine": (60, 31, 9, 4, 9),  # fewer than four tokens make no place
}
LONG = {"big_bird": (760, 40, 300), "bigbird_pegasus": (760, 40, 300)}  # where they begin to attend to blocks
TOLERANCE = 1e-4


def words(num: int, at: int = 0) -> str:
    """So many words of the tokenizer."""
    return " ".join(f"w{3 + (7 * i + 13 * at) % 97}" for i in range(num))


def save_tokenizer(directory: Path) -> None:
    """w3 to w99, a padding token and an end token behind each text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {"[UNK]": 0, "[PAD]": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 100)}}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 2)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="[PAD]",
        unk_token="[UNK]",
        eos_token="</s>",
    ).save_pretrained(directory)


def data(folder: Path) -> Path:
    lines = [json.dumps({"text": words(3 + i % 5, i), "label": f"class {i % NUM_LABELS}"}) for i in range(50)]
    file = folder / "data.jsonl"
    file.write_text("\n".join(lines))
    return file


def differences(cls: Any, folder: Path, lengths: tuple[int, ...]) -> dict[str, float]:
    """The largest difference from the logits of each text alone: in a batch, and of the exported pipeline."""
    directory, exported = folder / "backbone", folder / "exported"
    config = tiny(cls)
    model = cls(config).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # large enough that what padding changes shows
        if parameter.ndim > 1 or not parameter.isfinite().all():
            parameter.data.normal_(0, 0.15, generator=generator)
    model.save_pretrained(directory)
    save_tokenizer(directory)
    settings = {"max_tokens": max(lengths) + 1}
    plan = orchestrator.plan(
        modality="text", backbone=str(directory), data=str(data(folder)), settings=settings, method="head"
    )
    plan = plan.model_copy(update={"weights": "trained"})
    text = registry.get("text")
    assert text.build is not None
    assert text.batch is not None
    assert text.decode is not None
    network, collate = text.build(plan, directory), text.batch(plan, directory)
    network.module.eval()
    texts = [words(length, at) for at, length in enumerate(lengths)]
    decoded = [text.decode({"text": one.encode()}) for one in texts]
    with torch.no_grad():
        alone = torch.cat([network.logits(collate([one], False)) for one in decoded])
        together = network.logits(collate(decoded, False))
    exported.mkdir()
    network.save(exported, network.module.state_dict())
    pipe = transformers.pipeline("text-classification", model=str(exported), function_to_apply="none", top_k=None)
    said = [{one["label"]: one["score"] for one in pipe([text], truncation=True)[0]} for text in texts]
    served = torch.tensor([[one[name] for name in plan.classes] for one in said])
    assert float(alone.std()) > 1e-2
    return {"batch": float((together - alone).abs().max()), "pipeline": float((served - alone).abs().max())}


@pytest.mark.slow
@pytest.mark.parametrize("only", [SOME, pytest.param(None, marks=pytest.mark.long, id="all")])
def test_a_text_is_the_same_alone_in_a_batch_and_in_the_pipeline(tmp_path: Path, only: tuple[str, ...] | None) -> None:
    """One test, since importing all types takes most of the time."""
    transformers.logging.set_verbosity_error()
    rows = registry.get("text").rules.accepts
    by_architecture: dict[str, str] = {}
    for name, row in rows.items():
        by_architecture.setdefault(row.architecture, name)
    wrong, seen = {}, set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for cls in classes(only):
            name = cls.config_class.model_type
            if by_architecture.get(cls.__name__) is None or name not in rows:
                continue
            seen.add(cls.__name__)
            for lengths in filter(None, (OTHERS.get(name, LENGTHS), LONG.get(name))):
                folder = tmp_path / f"{name}-{lengths[0]}"
                folder.mkdir()
                try:
                    found = differences(cls, folder, lengths)
                except Exception as error:
                    wrong[name, lengths] = f"{type(error).__name__}: {str(error)[:300]}"
                    continue
                if max(found.values()) > TOLERANCE:
                    wrong[name, lengths] = found
    assert seen == set(by_architecture) if only is None else len(seen) > 6
    assert not wrong, "\n".join(f"{name}: {problem}" for name, problem in wrong.items())


def test_families_that_are_padded_otherwise_are_types_that_are_accepted() -> None:
    accepted = set(registry.get("text").rules.accepts)
    assert {*PADS_LEFT, *APART, *READS_ENDS} <= accepted
    assert not PADS_LEFT & set(APART)
