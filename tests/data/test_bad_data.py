"""What is broken or unusual in files, texts and labels, each with its decided outcome (docs/data.md)."""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image, ImageDraw

import orchestrator
from orchestrator.errors import BadSampleError, DataError
from orchestrator.job.plans import BackboneCard
from orchestrator.modality import registry
from orchestrator.modality.contract import Profile
from orchestrator.terminal import cli as commands
from tests.tiny import make_bert, make_wav2vec2

Cli = Callable[..., CompletedProcess[str]]


def decode(modality: str, content: bytes) -> Any:
    function = registry.get(modality).decode
    assert function is not None
    return function({modality: content})


def bad(modality: str, content: bytes) -> str:
    with pytest.raises(BadSampleError) as caught:
        decode(modality, content)
    return caught.value.message


def saved(image: Image.Image, form: str, **more: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **more)
    return out.getvalue()


def photograph() -> Image.Image:
    """Red, green, blue and white quarters, 8 x 6."""
    image = Image.new("RGB", (8, 6), "white")
    for colour, box in (("red", (0, 0, 4, 3)), ("green", (4, 0, 8, 3)), ("blue", (0, 3, 4, 6))):
        image.paste(colour, box)
    return image


def as_rgb(content: bytes) -> Image.Image:
    """The image as the network gets it, before it is resized."""
    from orchestrator_image.appearance import convert

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return convert(decode("image", content), "RGB")


def as_the_pipeline(content: bytes) -> Image.Image:
    """The image as transformers.pipeline loads it."""
    from transformers.image_utils import load_image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Path("image").write_bytes(content)
        return load_image("image")  # type: ignore[no-any-return]


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.size == other.size and one.tobytes() == other.tobytes()


# --- images ---


def palette(transparency: int | bytes | None) -> bytes:
    image = photograph().quantize(8)
    return saved(image, "PNG", **({} if transparency is None else {"transparency": transparency}))


def hidden(mode: str) -> bytes:
    """Colours that wholly transparent pixels still have."""
    image = photograph().convert(mode)
    image.putalpha(Image.new("L", image.size, 0))
    return saved(image, "PNG")


def frames(form: str) -> bytes:
    return saved(photograph(), form, save_all=True, append_images=[Image.new("RGB", (8, 6), "black")] * 2)


UNUSUAL: dict[str, Callable[[], bytes]] = {
    "CMYK": lambda: saved(photograph().convert("CMYK"), "JPEG"),
    "CMYK, TIFF": lambda: saved(photograph().convert("CMYK"), "TIFF"),
    "palette": lambda: palette(None),
    "palette, one transparent colour": lambda: palette(0),
    "palette, transparency of each colour": lambda: palette(bytes([0, 128, 255, 0])),
    "GIF": lambda: saved(photograph(), "GIF"),
    "LA": lambda: hidden("L"),
    "RGBA": lambda: hidden("RGB"),
    "RGB, one transparent colour": lambda: saved(photograph(), "PNG", transparency=(255, 0, 0)),
    "1 bit": lambda: saved(photograph().convert("1"), "PNG"),
    "1 bit, TIFF": lambda: saved(photograph().convert("1"), "TIFF"),
    "grey": lambda: saved(photograph().convert("L"), "JPEG"),
    "animated GIF": lambda: frames("GIF"),
    "APNG": lambda: frames("PNG"),
    "animated WebP": lambda: frames("WEBP"),
    "pages of TIFF": lambda: frames("TIFF"),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_images_are_what_the_pipeline_makes_of_them(name: str) -> None:
    content = UNUSUAL[name]()
    assert same(as_rgb(content), as_the_pipeline(content))


def test_what_is_behind_transparency_shows_where_no_background_is_asked_for() -> None:
    assert as_rgb(hidden("RGB")).getpixel((0, 0)) == (255, 0, 0)
    assert decode("image", hidden("RGB")).mode == "RGBA"


@pytest.mark.parametrize(
    "name",
    [
        "LA",
        "RGBA",
        "RGB, one transparent colour",
        "palette, one transparent colour",
        "palette, transparency of each colour",
    ],
)
def test_transparency_of_every_form_is_laid_over_the_background(name: str) -> None:
    from orchestrator_image.appearance import BACKGROUNDS, convert

    image = decode("image", UNUSUAL[name]())
    alpha = np.asarray(image)[..., 3:] / 255
    assert alpha.min() < 1
    for background, level in BACKGROUNDS.items():
        found = np.asarray(convert(image, "RGB", background), np.float64)
        assert np.abs(found - (np.asarray(image)[..., :3] * alpha + level * (1 - alpha))).max() <= 1
        grey = np.asarray(convert(image, "L", background), np.float64)
        assert np.abs(grey[alpha[..., 0] == 0] - level).max(initial=0) <= 1


def folders(root: Path, draw: Callable[[str, int], bytes], suffix: str = "png") -> Path:
    """12 images of each of two classes."""
    for name in ("disc", "cross"):
        (root / name).mkdir(parents=True)
        for i in range(12):
            (root / name / f"{i:02}.{suffix}").write_bytes(draw(name, i))
    return root


def drawn(name: str, i: int, ink: str, paper: str) -> Image.Image:
    image = Image.new("RGB", (64, 64), paper)
    pen, (x, y, r) = ImageDraw.Draw(image), (20 + i, 40 - i, 8 + i % 6)
    if name == "disc":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=ink)
    else:
        pen.line((x - r, y - r, x + r, y + r), fill=ink, width=4)
        pen.line((x - r, y + r, x + r, y - r), fill=ink, width=4)
    return image


def icon(name: str, i: int, ink: str) -> bytes:
    """Drawn in the alpha channel alone: ink everywhere, and transparent but where the drawing is."""
    image = Image.new("RGB", (64, 64), ink)
    image.putalpha(drawn(name, i, "white", "black").convert("L"))
    return saved(image, "PNG")


def planned(backbone: Path, data: Path, **settings: Any) -> orchestrator.Plan:
    return orchestrator.plan(backbone=str(backbone), data=str(data), settings=settings)


def test_an_alpha_channel_that_is_opaque_is_no_transparency(tmp_path: Path, tiny_resnet: Path) -> None:
    data = folders(tmp_path / "data", lambda name, i: saved(drawn(name, i, "red", "white").convert("RGBA"), "PNG"))
    plan = planned(tiny_resnet, data)
    assert [one.what for one in plan.adaptations] == ["channels", "resize"]
    content = (data / "disc" / "00.png").read_bytes()
    assert same(as_rgb(content), drawn("disc", 0, "red", "white"))


def lost(plan: orchestrator.Plan) -> list[str]:
    return [one for one in plan.warnings if "lose most of their variance" in one]


def test_icons_drawn_in_the_alpha_channel_are_seen(tmp_path: Path, tiny_resnet: Path) -> None:
    from orchestrator_image.network import make_collate

    data = folders(tmp_path / "data", lambda name, i: icon(name, i, "black"))
    plan = planned(tiny_resnet, data)
    assert not lost(plan)
    assert "transparency: RGBA -> laid over white" in map(str, plan.adaptations)
    inputs = make_collate(plan, tiny_resnet)([decode("image", icon("disc", 3, "black"))], False)["pixel_values"]
    assert float(inputs.std()) > 0.5


@pytest.mark.parametrize(
    ("ink", "background", "mend"),
    [("black", "black", "white"), ("white", "white", "black"), ("black", "none", "white")],
)
def test_a_background_that_hides_the_drawing_is_a_warning_whose_mend_mends(
    tmp_path: Path, tiny_resnet: Path, ink: str, background: str, mend: str
) -> None:
    data = folders(tmp_path / "data", lambda name, i: icon(name, i, ink))
    (note,) = lost(planned(tiny_resnet, data, background=background))
    assert note.startswith("100% of the images")
    assert "(transparency)" in note
    assert f"--set settings.background={mend}" in note
    assert not lost(planned(tiny_resnet, data, background=mend))


def test_images_that_are_transparent_throughout_are_counted(tmp_path: Path, tiny_resnet: Path) -> None:
    data = folders(
        tmp_path / "data",
        lambda name, i: saved(
            drawn(name, i, "red", "white") if i else Image.new("RGBA", (24, 24), (0, 0, 0, 0)), "PNG"
        ),
    )
    (note,) = (one for one in planned(tiny_resnet, data).warnings if "transparent throughout" in one)
    assert note.startswith("2 of the ")
    assert not [one for one in planned(tiny_resnet, data, background="none").warnings if "throughout" in one]


@pytest.mark.parametrize("mode", ["LA", "P"])
def test_images_are_said_to_be_in_the_mode_of_their_file(mode: str) -> None:
    measure = registry.get("image").measure
    assert measure is not None
    image = Image.new("LA", (8, 8), (255, 0)) if mode == "LA" else Image.new("RGBA", (8, 8), (9, 9, 9, 0)).convert("P")
    content = saved(image, "PNG", **({} if mode == "LA" else {"transparency": 0}))
    facts = measure(decode("image", content), BackboneCard(source="b", kind="directory", name="b"))
    assert facts["mode"] == mode


def test_a_few_images_that_become_one_flat_colour_are_a_warning_too(tmp_path: Path, tiny_resnet: Path) -> None:
    data = folders(
        tmp_path / "data", lambda name, i: saved(drawn(name, i, "red", "white"), "PNG") if i else icon(name, i, "white")
    )
    (note,) = lost(planned(tiny_resnet, data))
    assert note.startswith("8% of the images")


def deep(name: str, i: int, largest: int) -> bytes:
    values = np.asarray(drawn(name, i, "white", "black").convert("L"), np.float64)
    return saved(Image.fromarray((values / 255 * largest).astype(np.uint16)), "PNG")


def test_images_of_12_bits_in_16_are_a_warning_whose_mend_mends(tmp_path: Path, tiny_resnet: Path) -> None:
    from orchestrator_image.appearance import convert

    data = folders(tmp_path / "data", lambda name, i: deep(name, i, 4000))
    (note,) = lost(planned(tiny_resnet, data))
    assert "the largest value of all is 4000: choose settings.white_level" in note
    mended = planned(tiny_resnet, data, white_level=4000)
    assert not mended.warnings or not lost(mended)
    assert "16 bits a channel: I;16 -> 0 to 4000 as 0 to 255" in map(str, mended.adaptations)
    seen = np.asarray(convert(decode("image", deep("disc", 0, 4000)), "RGB", "white", 4000))
    assert (seen.min(), seen.max()) == (0, 255)
    assert not lost(planned(tiny_resnet, folders(tmp_path / "whole", lambda name, i: deep(name, i, 65535))))
    beyond = planned(tiny_resnet, data, white_level=1000)
    assert any("values above 1000, which become white" in one for one in beyond.warnings)


def test_a_transparent_value_of_16_bits_is_dropped_and_said(tmp_path: Path, tiny_resnet: Path) -> None:
    """All of such an image became white."""
    from orchestrator_image.appearance import code_of_reading, convert

    def with_value(name: str, i: int) -> bytes:
        return saved(Image.open(io.BytesIO(deep(name, i, 60000))), "PNG", transparency=0)

    image, plain = decode("image", with_value("disc", 1)), decode("image", deep("disc", 1, 60000))
    assert image.info["transparency"] == 0
    assert same(convert(image, "RGB", "white"), convert(plain, "RGB", "white"))
    plan = planned(tiny_resnet, folders(tmp_path / "data", with_value))
    assert not lost(plan)
    assert "transparency of 16 bits: one value -> dropped" in map(str, plan.adaptations)
    (tmp_path / "one.png").write_bytes(with_value("disc", 1))
    found: dict[str, Any] = {}
    code = code_of_reading(plan).replace('"a file"', repr(str(tmp_path / "one.png")))
    exec("from PIL import Image, ImageOps\n" + code, found)
    assert same(found["image"], convert(plain, "RGB", "white"))


def test_colours_of_one_brightness_on_a_backbone_of_grey_values_are_a_warning(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTImageProcessor

    from tests.conftest import save_backbone

    config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=16,
                       patch_size=4, num_channels=1)  # fmt: skip
    processor = ViTImageProcessor(size={"height": 16, "width": 16}, image_mean=[0.5], image_std=[0.5])
    backbone = save_backbone(tmp_path / "grey", config, processor)
    data = folders(tmp_path / "data", lambda name, i: saved(drawn(name, i, "#ff0000", "#008200"), "PNG"))
    (note,) = lost(planned(backbone, data))
    assert "(channels: RGB -> L)" in note
    plain = folders(tmp_path / "plain", lambda name, i: saved(drawn(name, i, "red", "white"), "PNG"))
    assert not lost(planned(backbone, plain))


def test_lab_images_have_grey_values_too() -> None:
    from orchestrator_image.appearance import convert

    image = decode("image", saved(Image.new("LAB", (8, 6), (200, 128, 128)), "TIFF"))
    assert convert(image, "L").mode == "L"


# --- strips ---


@pytest.mark.parametrize("size", [(60_000, 1), (1, 60_001), (4000, 30), (101, 1)])
def test_strips_are_used_and_take_no_gigabytes(
    size: tuple[int, int], tmp_path: Path, tiny_resnet: Path, tiny_vit: Path
) -> None:
    """By their form they were bad samples: lines of handwriting too, whatever a processor makes of them."""
    from orchestrator_image import network

    data = folders(tmp_path / "data", lambda name, i: saved(drawn(name, i, "red", "white"), "PNG"))
    (data / "disc" / "strip.png").write_bytes(saved(Image.new("RGB", size, "red"), "PNG"))
    for backbone in (tiny_resnet, tiny_vit):
        plan = planned(backbone, data)
        assert plan.data.num_skipped == 0
        strip = decode("image", (data / "disc" / "strip.png").read_bytes())
        assert network.make_collate(plan, backbone)([strip], True)["pixel_values"].shape[0] == 1
    seen = network._seen(strip, 224)
    assert seen.size == strip.size or sorted(seen.size) in ([1, 16], [1, 17])
    assert 224 * 224 * max(seen.size) / min(seen.size) <= 2**24


def test_of_what_is_squeezed_and_not_cropped_all_is_seen() -> None:
    from transformers import ConvNextImageProcessor

    from orchestrator_image import network

    assert network._cropped_from(ConvNextImageProcessor(size={"shortest_edge": 384})) == 0
    assert network._cropped_from(ConvNextImageProcessor(size={"shortest_edge": 224})) == 224


def test_what_would_be_cropped_off_a_strip_is_never_resized() -> None:
    """At 4096 pixels a strip of 20 to 1 would have 335 million; what is left of it is the same to a pixel's edge."""
    from orchestrator_image import network

    image = Image.effect_noise((400, 20), 80).convert("RGB").resize((4000, 200), Image.Resampling.BICUBIC)
    assert network._seen(image, 32) is image
    for turned in (image, image.transpose(Image.Transpose.ROTATE_90)):
        cut = network._seen(turned, 4096)
        assert sorted(cut.size) == [200, 800]
        assert same(middle(turned), middle(cut))


def middle(image: Image.Image) -> Image.Image:
    left, top = (image.width - 200) // 2, (image.height - 200) // 2
    return image.crop((left, top, left + 200, top + 200))


def test_large_images_are_decoded_when_they_are_used_and_give_the_same(
    tiny_resnet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from orchestrator_image import reading
    from orchestrator_image.network import make_collate

    noise = Image.effect_noise((300, 200), 80).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    contents = [saved(noise, "PNG", exif=exif), icon("disc", 0, "black"), saved(noise.convert("P"), "PNG")]
    plan = planned(tiny_resnet, folders(tmp_path / "data", lambda name, i: icon(name, i, "black")), augment="light")
    collate = make_collate(plan, tiny_resnet)
    found = []
    for most in (2**24, 300 * 200 - 1):
        monkeypatch.setattr(reading, "_LARGE", most)
        decoded = [decode("image", content) for content in contents]
        large = [isinstance(one, reading.LargeImage) for one in decoded]
        assert large == [most < 2**24, False, most < 2**24]
        for train in (False, True):
            torch.manual_seed(0)
            found.append(collate(decoded, train)["pixel_values"])
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])
    assert not torch.equal(found[0], found[1])


@pytest.mark.long
@pytest.mark.slow
def test_a_batch_of_large_images_takes_no_gigabytes(tiny_resnet: Path, tmp_path: Path) -> None:
    """8 of 40 million pixels: some kB as files, 120 MB each in memory."""
    plan = planned(tiny_resnet, folders(tmp_path / "data", lambda name, i: icon(name, i, "black")))
    (tmp_path / "plan.json").write_text(plan.model_dump_json())
    Image.new("RGB", (8_000, 5_000), "red").save(tmp_path / "large.png", compress_level=1)
    program = """
import resource, sys
from pathlib import Path
import orchestrator_image
from orchestrator.job import Plan
from orchestrator_image.network import make_collate
plan, content = Plan.model_validate_json(Path("plan.json").read_text()), Path("large.png").read_bytes()
collate = make_collate(plan, Path(sys.argv[1]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
decoded = [orchestrator_image.decode({"image": content}) for _ in range(8)]
assert collate(decoded, False)["pixel_values"].shape == (8, 3, 32, 32)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tiny_resnet)], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 500_000  # kB; all of them are 960 MB


def test_images_whose_greater_half_is_cropped_off_are_a_warning(
    tmp_path: Path, tiny_resnet: Path, tiny_vit: Path
) -> None:
    wide = folders(tmp_path / "wide", lambda name, i: saved(drawn(name, i, "red", "white").resize((150, 64)), "PNG"))
    assert any("crops their centre" in one for one in planned(tiny_resnet, wide).warnings)
    assert not any("crops their centre" in one for one in planned(tiny_vit, wide).warnings)  # it squeezes them


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright_by_their_exif(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = saved(photograph(), "PNG", exif=exif)
    found = as_rgb(content)
    assert found.size == ((8, 6) if orientation < 5 else (6, 8))
    corner = {1: "red", 2: "green", 3: "white", 4: "blue", 5: "red", 6: "blue", 7: "white", 8: "green"}[orientation]
    assert found.getpixel((0, 0)) == Image.new("RGB", (1, 1), corner).getpixel((0, 0))
    assert same(found, as_the_pipeline(content))


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_of_16_bits_the_upper_8_count(form: str) -> None:
    """The pipeline would clip, and show all above 255 as white."""
    values = np.array([[0, 255, 256], [0x8000, 0xFF00, 0xFFFF]], np.uint16)
    found = as_rgb(saved(Image.fromarray(values), form))
    assert np.asarray(found)[..., 0].tolist() == [[0, 0, 1], [128, 255, 255]]


def test_floating_point_images_have_no_white() -> None:
    assert "floating-point" in bad("image", saved(Image.new("F", (4, 4)), "TIFF"))


def png_of(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(bytes(width + 1) * min(height, 64))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in parts
    )


BMP = saved(photograph(), "BMP")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (png_of(30_000, 30_000), "has more than 89,478,485 pixels"),
        (png_of(10_000, 9_000), "has more than 89,478,485 pixels"),
        (png_of(2**31 - 1, 1), "has more than"),
        (png_of(8, 8, (b"zTXt", b"a\0\0" + zlib.compress(bytes(80 * 2**20)))), "cannot be decoded: Decompressed data"),
        (png_of(0, 8), "is no image that Pillow can read"),
        (BMP[:18] + b"\xff\xff\0\0\xff\xff\0\0" + BMP[26:], "has more than"),
    ],
)
def test_bombs_are_not_let_off(content: bytes, problem: str) -> None:
    assert problem in bad("image", content)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM"])
def test_an_image_that_is_cut_off(form: str) -> None:
    """Where a cut leaves every pixel, it is a whole image."""
    content = saved(Image.effect_noise((32, 32), 60).convert("RGB"), form)
    whole, num_bad = as_rgb(content), 0
    for size in range(0, len(content), max(1, len(content) // 40)):
        try:
            found = as_rgb(content[:size])
        except BadSampleError:
            num_bad += 1
        else:
            assert same(found, whole)
    assert num_bad > 30


def test_a_wrong_suffix_is_no_matter_and_another_kind_of_file_is(tiny_resnet: Path) -> None:
    fill(Path("photos"), ".png", lambda i: saved(Image.new("RGB", (8, 8), (i, i, i)), ("JPEG", "GIF", "BMP")[i % 3]))
    plan = orchestrator.plan(backbone=str(tiny_resnet), data="photos", method="head")
    assert plan.data.num_samples["train"] == 16
    Path("photos/a/song.png").write_bytes(wave("WAV"))
    with pytest.raises(DataError, match=r"song\.png: is no image that Pillow can read"):
        orchestrator.plan(backbone=str(tiny_resnet), data="photos")


def fill(root: Path, suffix: str, content: Callable[[int], bytes], num: int = 20) -> Path:
    """Two classes, a and b."""
    for i in range(num):
        file = root / "ab"[i % 2] / f"{i}{suffix}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content(i))
    return root


# --- audio ---


def wave(form: str, seconds: float = 0.25, channels: int = 1, rate_hz: int = 8000, subtype: str = "") -> bytes:
    samples = 0.3 * np.sin(np.arange(round(seconds * rate_hz)) / 4) + np.random.default_rng(0).normal(
        scale=0.05, size=round(seconds * rate_hz)
    )
    out = io.BytesIO()
    several = np.repeat(samples[:, None], channels, axis=1)
    soundfile.write(out, several, rate_hz, format=form, subtype=subtype or None)
    return out.getvalue()


@pytest.mark.parametrize("form", ["WAV", "AIFF", "FLAC", "OGG", "OPUS", "MP3"])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9, 0.97])
def test_a_recording_that_is_cut_off(form: str, share: float) -> None:
    content = wave("OGG", 20, subtype="OPUS") if form == "OPUS" else wave(form, 20)
    assert len(decode("audio", content).samples) >= 20 * 8000
    bad("audio", content[: int(share * len(content))])


def test_an_ogg_file_that_ends_with_a_whole_page_is_a_shorter_recording() -> None:
    """Nothing tells it from the many whole files whose last page is not marked as the last."""
    content = wave("OGG", 20)
    last = content.rfind(b"OggS")
    assert content[last + 5] & 4
    unmarked = without_the_mark(content, last)
    assert len(decode("audio", unmarked).samples) == len(decode("audio", content).samples)
    assert 0 < decode("audio", content[:last]).seconds < 20
    assert bad("audio", content[:-1]) == "is cut off: its last page is not whole"


def test_recordings_that_do_not_say_where_they_end_are_counted_and_said() -> None:
    """What was cut off between two OGG pages, and what was never marked, is used; and the user is told of it."""
    ogg, mp3 = wave("OGG", 20), wave("MP3", 5)
    nameless = mp3.replace(b"Xing", bytes(4)).replace(b"Info", bytes(4))
    cut = ogg[: ogg.rfind(b"OggS")]
    for whole, open_ended in ((ogg, cut), (mp3, nameless)):
        assert decode("audio", whole).end_marked
        assert not decode("audio", open_ended).end_marked
    assert decode("audio", wave("WAV")).end_marked
    audio = registry.get("audio")
    card = BackboneCard(
        source="b", kind="directory", name="b", model_type="wav2vec2", config={"conv_kernel": [10], "conv_stride": [5]},
        preprocessor={"sampling_rate": 8000},
    )  # fmt: skip
    for contents, said in (
        ((ogg, cut, mp3, mp3), "25% of the recordings carry no mark of their end"),
        ((ogg, mp3), ""),
    ):
        assert audio.measure is not None
        assert audio.fit is not None
        profile = Profile.of(audio.measure(decode("audio", content), card) for content in contents)
        fit = audio.fit(card, audio.rules.accepts["wav2vec2"], audio.settings(), profile)
        assert any("no mark of their end" in one for one in fit.warnings) == bool(said)
        assert not said or any(said in one for one in fit.warnings)


def without_the_mark(content: bytes, last: int) -> bytes:
    """The file without the mark on its last page, whose checksum (CRC-32, polynomial 0x04c11db7) is right again."""
    page = bytearray(content[last:])
    page[5] &= ~4
    page[22:26] = bytes(4)
    crc = 0
    for byte in page:
        crc ^= byte << 24
        for _ in range(8):
            crc = ((crc << 1) ^ 0x04C11DB7 if crc & 0x80000000 else crc << 1) & 0xFFFFFFFF
    page[22:26] = struct.pack("<I", crc)
    return content[:last] + bytes(page)


def test_a_header_that_sends_libsndfile_before_the_beginning_leaves_no_trace(capfd: pytest.CaptureFixture[str]) -> None:
    """Found by the fuzz test: an exception in soundfile's callback cannot be caught, and is printed."""
    for at in range(35, 42):
        content = bytearray(wave("AIFF"))
        content[at : at + 4] = b"\xff\xff\xff\xff"
        bad("audio", bytes(content))
    assert "Traceback" not in capfd.readouterr().err


def test_an_mp3_file_that_lacks_its_last_bytes() -> None:
    content = wave("MP3", 5)
    assert f"is cut off: {len(content) - 100} of {len(content)} bytes" in bad("audio", content[:-100])
    tagged = b"ID3\4\0\0\0\0\2\x2c" + bytes(300) + content
    assert len(decode("audio", tagged).samples) == len(decode("audio", content).samples)
    assert "is cut off" in bad("audio", tagged[:-100])
    assert decode("audio", content + b"TAG" + bytes(125)).seconds == pytest.approx(5, abs=0.1)


def test_a_header_that_claims_more_than_there_is_takes_no_memory() -> None:
    import tracemalloc

    claims = bytearray(wave("AU", 1))
    claims[8:12] = b"\x7f\xff\xff\xf0"
    silent = io.BytesIO()
    soundfile.write(silent, np.zeros((10_000_000, 8), np.int16), 48_000, format="FLAC")
    assert len(silent.getvalue()) < 100_000  # 320 MB of float32
    tracemalloc.start()
    try:
        bad("audio", bytes(claims))
        found = decode("audio", silent.getvalue())
        assert tracemalloc.get_traced_memory()[1] < 300 * 2**20
    finally:
        tracemalloc.stop()
    assert found.seconds == pytest.approx(10_000_000 / 48_000)
    assert found.samples.size <= 600 * 48_000 * 2


def test_recordings_that_are_not_finite_or_of_no_length_fail_by_name_or_are_left_out(tmp_path: Path) -> None:
    backbone = make_wav2vec2(tmp_path / "backbone")
    data = fill(tmp_path / "data", ".wav", lambda i: wave("WAV", 0.2, 1 + i % 2))
    spoilt = {"nan": [0.1, np.nan], "inf": [np.inf], "none": []}
    for name, values in spoilt.items():
        soundfile.write(data / "a" / f"x-{name}.wav", np.array(values, np.float32), 8000, subtype="FLOAT")
    with pytest.raises(DataError, match=r"x-inf\.wav: holds samples that are not finite \(and 2 more\)"):
        orchestrator.plan(modality="audio", backbone=str(backbone), data=str(data))
    run = orchestrator.finetune(
        method="head", modality="audio", backbone=str(backbone), data={"path": str(data), "on_bad_sample": "skip"},
        training={"epochs": 1}, scaling={"threads_per_worker": 1}, report=lambda _: None,
    )  # fmt: skip
    lines = [json.loads(line) for line in (run.path / "skipped.jsonl").read_text().splitlines()]
    problems = {Path(line["place"]).name: line["problem"] for line in lines}
    assert problems == {
        "x-nan.wav": "holds samples that are not finite", "x-inf.wav": "holds samples that are not finite",
        "x-none.wav": "holds no sound: 0 samples",
    }  # fmt: skip
    assert run.results["num_skipped"] == 3


# --- text ---


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "the text is empty"),
        (" \t\n\u3000\u00a0".encode(), "the text is empty"),
        (b"\xef\xbb\xbf", "the text is empty"),
        (b"\0\0 \0", "the text is full of NUL characters, as UTF-16 is that is read as UTF-8"),
        ("soup".encode("utf-16-le"), "the text is full of NUL characters, as UTF-16 is that is read as UTF-8"),
        (b"caf\xe9", "the text is not in UTF-8 (byte 3)"),
        ("soup".encode("utf-16"), "the text is not in UTF-8 (byte 0)"),
        (b"\xed\xa0\x80 soup", "the text is not in UTF-8 (byte 0)"),
        (b"\xc0\xaf", "the text is not in UTF-8 (byte 0)"),
    ],
)
def test_texts_that_are_none(content: bytes, problem: str) -> None:
    assert bad("text", content) == problem


def test_texts_of_any_length_and_character_are_learnt_from_and_predicted_for(tmp_path: Path, cli_process: Cli) -> None:
    odd = ["a\0b c", "\u202eniar", "🌧️", "[bold]rain[/bold]", "\x1b[31mred", "a\r\nb\u2028c"]
    rows = [{"text": f"{text}, {i}", "label": "ab"[i % 2]} for i, text in enumerate(odd * 5)]
    rows.append({"text": "rain " * 2000, "label": "a"})
    Path("t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = orchestrator.finetune(
        method="head",
        modality="text", backbone=str(make_bert(tmp_path / "backbone")), data="t.jsonl", training={"epochs": 1},
        name="odd", scaling={"threads_per_worker": 1}, report=lambda _: None,
    )  # fmt: skip
    assert run.plan.adaptations[0].what == "truncate"
    problems = [one.problem for one in orchestrator.predict(run, [*odd, "x" * 10**6, "", "\ud800"])]
    assert problems == [""] * 7 + ["the text is empty", "the text is not in UTF-8 (byte 0)"]
    done = cli_process("predict", "runs/odd", "[bold]a[/bold] :fish:", os.fsdecode(b"\xff rain"), errors="replace")
    assert "[bold]a[/bold] :fish:" in done.stdout
    assert "Traceback" not in done.stderr
    assert flat("not in UTF-8 (byte 0)") in flat(done.stdout + done.stderr)


@pytest.mark.parametrize("escape", [r"\ud800", r"\udc00 rain", r"\uD83C"])
def test_lone_surrogates_in_json_lines(escape: str, tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"rain {i}", "label": "ab"[i % 2]}) for i in range(20)]
    Path("t.jsonl").write_text("\n".join([*lines, '{"text": "' + escape + '", "label": "a"}']))
    with pytest.raises(DataError, match=r"cannot be read|UTF-8"):
        orchestrator.plan(modality="text", backbone=str(make_bert(tmp_path / "backbone")), data="t.jsonl")


# --- labels and names ---

LABELS = (
    "two words",
    "a, b; c",
    "e/f\\g",
    "🐟 魚",
    "<b>x</b> & co",
    "[bold red]y[/]",
    "[/nope]",
    ":fish:",
    "| `code` | *",
    "x\\",
)


def test_labels_and_file_names_are_shown_as_they_are(tiny_resnet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the terminal, in JSON, in the exported config and in the model card."""

    def shown(*arguments: object, code: int = 0) -> str:
        """What the command prints, in this process."""
        assert commands.run([str(one) for one in arguments]) == code
        return flat("".join(capsys.readouterr()))

    rows = []
    for i in range(6 * len(LABELS)):
        name = f"[bold]{i} :fish:.png"
        Path(name).write_bytes(saved(Image.new("RGB", (9, 9), (i, 2 * i, 255 - i)), "PNG"))
        rows.append({"path": name, "label": LABELS[i % len(LABELS)]})
    Path("[t].jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = ("--backbone", tiny_resnet, "--data", "[t].jsonl", "--set", "data.test_fraction=0.2", "--epochs", "1")
    planned = shown("plan", *job)
    assert flat("'a, b; c'") in planned
    for label in LABELS:
        assert flat(label) in planned
    assert flat("runs/[i]run") in shown("finetune", *job, "--name", "[i]run")
    run = orchestrator.open_run("runs/[i]run")
    assert set(run.plan.classes) == set(LABELS)
    config = json.loads((run.model / "config.json").read_text(encoding="utf-8"))
    assert set(config["id2label"].values()) == set(LABELS)
    card = (run.model / "README.md").read_text(encoding="utf-8")
    for written in (r"\<b\>x\</b\> \& co", r"\[bold red\]y\[/\]", r"\| \`code\` \| \*", r"e/f\\g", "🐟 魚", r"x\\"):
        assert written in card
    assert flat("[i]run") in shown("runs")
    assert "accuracy" in shown("evaluate", run.path, "--data", "[t].jsonl")
    predicted = shown("predict", run.path, rows[0]["path"], "[b]gone.png", "--top", len(LABELS), code=1)
    for part in (rows[0]["path"], "[b]gone.png", "No such file"):
        assert flat(part) in predicted
    assert any(flat(label) in predicted for label in LABELS)
    Path("[bold]0 :fish:.png").write_bytes(b"")
    assert flat("[t].jsonl row 1: the file is empty") in shown("plan", *job, code=2)


def flat(text: str) -> str:
    """Without the places where a terminal of 80 columns breaks lines."""
    return "".join(text.split())
