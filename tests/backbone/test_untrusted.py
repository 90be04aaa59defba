"""Hostile repositories: nothing that their JSON files name is opened, asked for or run. Published ones load."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import orchestrator
from orchestrator.backbone.timm_settings import allowed_args
from orchestrator.errors import RefusedError
from tests.hub_server import Hub, Repository
from tests.tiny import make_bert, make_wav2vec2

Change = Callable[[dict[str, Any]], object]
SECRET = "secret.safetensors"  # a file of the machine, beside the repositories

_watched: list[str] | None = None


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if _watched is not None and event == "open" and SECRET in str(arguments[0]):
        _watched.append(str(arguments[0]))


@pytest.fixture(scope="module")
def _hook() -> None:
    sys.addaudithook(_note)  # for good: a hook cannot be removed, but it looks at nothing when nobody asks


@pytest.fixture
def opened(_hook: None) -> Iterator[list[str]]:
    """The times that the secret file was opened while the test ran."""
    global _watched
    _watched = []
    yield _watched
    _watched = None


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, tiny_resnet: Path) -> dict[str, Path]:
    """A repository of each kind, and the secret beside them."""
    import timm
    import torch

    root = tmp_path_factory.mktemp("repositories")
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=5)
    timm.models.save_for_hf(model, root / "timm", model_args={"stem_width": 32}, safe_serialization=True)
    shutil.copytree(tiny_resnet, root / "image")
    make_bert(root / "text")
    make_wav2vec2(root / "audio")
    shutil.copy(tiny_resnet / "model.safetensors", root / SECRET)
    return {name: root / name for name in ("timm", "image", "text", "audio")}


def changed(good: dict[str, Path], kind: str, into: Path, **files: dict[str, Any]) -> Path:
    """A copy in which these keys of these files are set; `{SECRET}` in a value is the secret's place."""
    directory = into / kind
    shutil.copytree(good[kind], directory)
    for name, keys in files.items():
        file = directory / f"{name}.json"
        whole = json.loads(file.read_text()) if file.is_file() else {}
        text = json.dumps(keys).replace("{SECRET}", str(good[kind].parent / SECRET))
        file.write_text(json.dumps({**whole, **json.loads(text)}))
    return directory


CHECKPOINT = {"model_args": {"checkpoint_path": "{SECRET}"}}
# (kind, file, what is set, reason, words)
HOSTILE: list[tuple[str, str, dict[str, Any], str, str]] = [
    ("timm", "config", CHECKPOINT, "bad_config", "checkpoint_path: it names weights that lie elsewhere"),
    ("timm", "config", {"model_args": {"pretrained": True}}, "bad_config", "pretrained: it names weights"),
    ("timm", "config", {"model_args": {"cache_dir": "/tmp"}}, "bad_config", "cache_dir: it names weights"),
    ("timm", "config", {"model_args": {"pretrained_cfg": {"file": "{SECRET}"}}}, "bad_config", "pretrained_cfg: it"),
    ("timm", "config", {"model_args": {"pretrained_cfg_overlay": {"url": "http://x"}}}, "bad_config", "overlay: it"),
    ("timm", "config", {"model_args": {"scriptable": True}}, "bad_config", "scriptable: it sets"),
    ("timm", "config", {"model_args": {"exportable": True}}, "bad_config", "exportable: it sets"),
    ("timm", "config", {"model_args": {"device": "cuda"}}, "bad_config", "device: it says where"),
    ("timm", "config", {"model_args": {"features_only": True}}, "bad_config", "without a classifier"),
    ("timm", "config", {"model_args": {"stem_widht": 32}}, "bad_config", "stem_widht: no architecture of timm takes"),
    ("timm", "config", {"model_args": ["x"]}, "bad_config", "an object of settings"),
    ("timm", "config", {"architecture": "resnet10t.hf-hub:org/other"}, "bad_config", "no name of timm's"),
    ("image", "config", {"vision_config": CHECKPOINT}, "bad_config", "vision_config.model_args = "),
    ("image", "config", {"_attn_implementation": "org/kernel"}, "bad_config", "downloaded from the Hub and run"),
    ("image", "config", {"attn_implementation": {"": "org/kernel:run"}}, "bad_config", "downloaded from the Hub"),
    ("image", "config", {"backbone": "org/other"}, "bad_config", "another repository"),
    ("image", "config", {"backbone_kwargs": CHECKPOINT["model_args"]}, "bad_config", "another network's constructor"),
    ("image", "config", {"configuration_files": ["config.5.0.json"]}, "unsupported", "which nobody looked at"),
    ("image", "config", {"transformers_weights": "../" + SECRET}, "unsupported", "model.safetensors"),
    ("image", "config", {"num_hidden_layers": 10**30}, "bad_config", "no number of layers"),
    ("image", "config", {"depths": [2, 10**6]}, "bad_config", "no number of layers"),
    ("image", "config", {"torch_dtype": "_C"}, "bad_config", "no number format"),
    ("image", "config", {"text_config": {"quantization_config": {"bits": 4}}}, "quantised", "quantised from"),
    ("image", "config", {"image_processor_type": "RagRetriever"}, "bad_config", "none of the kind"),
    ("image", "preprocessor_config", {"image_processor_type": "OneFormerImageProcessorFast"}, "bad_config", "it names"),
    ("image", "preprocessor_config", {"image_processor_type": "LayoutLMv3ImageProcessor"}, "bad_config", "tesseract"),
    ("image", "processor_config", {"image_processor": {"image_processor_type": "pipeline"}}, "bad_config", "the kind"),
    ("audio", "preprocessor_config", {"feature_extractor_type": "AutoModel"}, "bad_config", "none of the kind"),
    ("audio", "preprocessor_config", {"feature_extractor_type": "AutoFeatureExtractor"}, "bad_config", "whatever"),
    ("text", "tokenizer_config", {"vocab_file": "{SECRET}"}, "bad_config", "would be opened"),
    ("text", "tokenizer_config", {"spm_file": "../" + SECRET}, "bad_config", "would be opened"),
    ("text", "tokenizer_config", {"vocab": "{SECRET}"}, "bad_config", "would be opened"),
    ("text", "tokenizer_config", {"sp_model_kwargs": {"model_file": "{SECRET}"}}, "bad_config", "model_file reaches"),
    ("text", "tokenizer_config", {"mecab_kwargs": {"mecab_option": "-r x"}}, "bad_config", "mecab_option reaches"),
    ("text", "tokenizer_config", {"sudachi_kwargs": {"sudachi_config_path": "x"}}, "bad_config", "sudachi_config_path"),
    ("text", "tokenizer_config", {"init_inputs": ["{SECRET}"]}, "bad_config", "in the place of its files"),
    ("text", "tokenizer_config", {"fast_tokenizer_files": ["tokenizer.1.json"]}, "unsupported", "nobody looked at"),
    ("text", "tokenizer_config", {"gguf_file": "{SECRET}"}, "bad_config", "would be opened"),
    ("text", "tokenizer_config", {"tokenizer_class": "RagTokenizer"}, "bad_config", "nobody looked at"),
    ("text", "tokenizer_config", {"tokenizer_class": "AutoModel"}, "bad_config", "none of the kind"),
    ("text", "config", {"tokenizer_class": "pipeline"}, "bad_config", "none of the kind"),
    ("text", "special_tokens_map", {"tokenizer_file": "{SECRET}"}, "bad_config", "would be opened"),
    ("text", "special_tokens_map", {"vocab_file": "{SECRET}"}, "bad_config", "would be opened"),
    ("image", "adapter_config", {"base_model_name_or_path": "org/other"}, "unsupported", "merge_and_unload"),
]  # fmt: skip


def modality_of(kind: str) -> str:
    return "image" if kind == "timm" else kind


@pytest.mark.parametrize(("kind", "file", "keys", "reason", "words"), HOSTILE)
def test_what_a_repository_may_not_set(
    good: dict[str, Path], hub: Hub, opened: list[str], tmp_path: Path,
    kind: str, file: str, keys: dict[str, Any], reason: str, words: str,
) -> None:  # fmt: skip
    directory = changed(good, kind, tmp_path, **{file: keys})
    hub.repositories["org/evil"] = Repository({one.name: one.read_bytes() for one in directory.iterdir()})
    for backbone in (str(directory), "org/evil"):
        with pytest.raises(RefusedError) as caught:
            orchestrator.check(backbone, modality_of(kind))
        assert caught.value.reason == reason
        assert words in str(caught.value)
        assert caught.value.mend
    assert not opened
    asked = [path for _, path, _ in hub.requests]
    assert asked
    assert all("org/evil" in path for path in asked)
    assert not hub.asked_for(".safetensors")


@pytest.mark.parametrize(
    ("kind", "file", "keys"),
    [
        ("timm", "config", CHECKPOINT),
        ("text", "tokenizer_config", {"sp_model_kwargs": {"model_file": "{SECRET}"}}),
    ],
)
def test_a_job_refuses_before_anything_is_loaded(
    good: dict[str, Path], opened: list[str], tmp_path: Path, flat_digits: Path, kind: str, file: str, keys: Any
) -> None:
    directory = changed(good, kind, tmp_path, **{file: keys})
    with pytest.raises(RefusedError, match="sets"):
        orchestrator.finetune(method="head", modality=modality_of(kind), backbone=str(directory), data=str(flat_digits))
    assert not opened


# What published repositories hold, and no constructor gets.
LEFTOVERS: dict[str, dict[str, dict[str, Any]]] = {
    "timm": {"config": {
        "pretrained_cfg": {
            "file": "{SECRET}", "url": "http://127.0.0.1:9/x.pth", "hf_hub_id": "org/other", "source": "hf-hub",
            "input_size": [3, 32, 32], "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "num_classes": 5,
            "classifier": "fc",
        },
        "model_args": {"stem_width": 32, "checkpoint_path": None, "num_classes": 5},
    }},
    "image": {"config": {
        "_name_or_path": "{SECRET}", "auto_map": {"AutoModelForImageClassification": "evil.Evil"},
        "torch_dtype": "bfloat16", "_attn_implementation": "flash_attention_2", "_attn_implementation_autoset": True,
        "trust_remote_code": True, "quantization_config": None, "use_timm_backbone": False, "backbone": "resnet50",
        "label2id": {"backbone_kwargs": 0, "gguf_file": 1}, "custom_pipelines": {"x": {"impl": "evil.Evil"}},
    }},
    "text": {"tokenizer_config": {
        "tokenizer_file": "{SECRET}", "special_tokens_map_file": "{SECRET}", "name_or_path": "{SECRET}",
        "vocab_file": None, "mecab_kwargs": {"mecab_dic": "unidic_lite"}, "sp_model_kwargs": {},
        "chat_template": "{{ messages }}",
    }, "config": {"_name_or_path": "org/other"}},
    "audio": {"preprocessor_config": {"processor_class": "Wav2Vec2Processor"}},
}  # fmt: skip


@pytest.mark.parametrize("kind", ["timm", "image"])
def test_what_published_repositories_hold_reaches_no_constructor(
    good: dict[str, Path], hub: Hub, opened: list[str], tmp_path: Path, flat_digits: Path, kind: str
) -> None:
    """The job ends as it does without all that, and what it exports has none of it."""
    (tmp_path / "evil.py").write_text("raise SystemExit('it ran')")
    directory = changed(good, kind, tmp_path, **LEFTOVERS[kind])
    for method in ("head", "scratch"):
        run = orchestrator.finetune(
            backbone=str(directory), data=str(flat_digits), method=method, settings={"size": 32}, name=method,
            training={"epochs": 1}, scaling={"threads_per_worker": 1}, report=lambda _: None,
        )  # fmt: skip
        exported = (run.model / "config.json").read_text()
        config = json.loads(exported)
        assert SECRET not in exported
        assert "other" not in exported
        assert "evil" not in exported
        assert config.get("dtype", "float32") == "float32"
    assert not opened
    assert not hub.requests


def test_leftovers_of_tokenizers_are_not_opened(
    good: dict[str, Path], hub: Hub, opened: list[str], tmp_path: Path
) -> None:
    directory = changed(good, "text", tmp_path, **LEFTOVERS["text"])
    rows = [(f"rain and snow {i}" if i % 2 else f"bread and soup {i}", "ab"[i % 2]) for i in range(40)]
    (tmp_path / "texts.csv").write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    run = orchestrator.finetune(
        method="head",
        modality="text", backbone=str(directory), data=str(tmp_path / "texts.csv"), training={"epochs": 1},
        scaling={"threads_per_worker": 1}, report=lambda _: None,
    )  # fmt: skip
    assert orchestrator.predict(run, ["rain"])[0].label in ("a", "b")
    assert not opened
    assert not hub.requests


def test_an_audio_repository_as_published_passes(good: dict[str, Path], tmp_path: Path) -> None:
    assert orchestrator.check(str(changed(good, "audio", tmp_path, **LEFTOVERS["audio"])), "audio").model_type


def test_a_run_that_somebody_changed_is_refused(good: dict[str, Path], opened: list[str], flat_digits: Path) -> None:
    run = orchestrator.finetune(
        method="head", backbone=str(good["timm"]), data=str(flat_digits), settings={"size": 32}, training={"epochs": 1},
        scaling={"threads_per_worker": 1}, report=lambda _: None,
    )  # fmt: skip
    file = run.model / "config.json"
    config = json.loads(file.read_text())
    secret = str(good["timm"].parent / SECRET)
    file.write_text(json.dumps({**config, "model_args": {"checkpoint_path": secret}}))
    with pytest.raises(RefusedError, match="checkpoint_path"):
        orchestrator.predict(run.path, [next(flat_digits.rglob("*.png"))])
    assert not opened


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of old names of timm's own modules
def test_the_settings_of_timm_are_those_of_the_installed_one() -> None:
    from scripts.generate_rows import NOT_TIMM_ARGS, timm_args

    allowed, others = allowed_args()
    assert allowed == set(timm_args())
    assert set(others) <= set(" ".join(NOT_TIMM_ARGS.values()).split())
    assert not allowed & set(others)
    assert {"checkpoint_path", "pretrained", "cache_dir", "scriptable"} <= set(others)


def test_what_timm_itself_saves_passes(tmp_path: Path, flat_digits: Path) -> None:
    import timm

    made = {"drop_path_rate": 0.1, "num_heads": 2, "embed_dim": 32, "depth": 1, "img_size": 32, "act_layer": "relu"}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, **made)
    timm.models.save_for_hf(model, tmp_path / "vit", safe_serialization=True)
    plan = orchestrator.plan(backbone=str(tmp_path / "vit"), data=str(flat_digits))
    assert plan.backbone.config["model_args"]["embed_dim"] == 32
