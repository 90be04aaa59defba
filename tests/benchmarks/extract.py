"""Running a frozen body over files and texts: make bench NAME=extract

Ours is what a job says that its features took (`features_s` of its lineage), of 5,000 digits at 96 px and of 3,000
glosses. Held against it: a bare forward loop over the same samples at the best settings known (channels last, bf16 if
this machine is faster so, texts sorted by length, the next batch decoded meanwhile, no gradients), and `encode` of
sentence-transformers as it is. Goals: 0.9 of the loop's speed, 3 times that of `encode`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.benchmarks import head_image, head_text, plain
from tests.benchmarks.harness import in_turn, middle, options, paired, report, same_settings
from tests.benchmarks.peers import DIGITS, GLOSSES, files_of, glosses_of, make_digits, make_glosses

GOAL, GOAL_ENCODE, REPEATS = 0.9, 3, 5


def loop_over(parts: Any, samples: list[Any]) -> tuple[Callable[[int], Any], bool]:
    """A loop over the samples, warmed up, and whether it runs in bf16."""
    forward, prepare, order = parts
    ordered = order(samples)
    bf16 = plain.faster_in_bf16(forward, prepare(ordered[:64]))
    return lambda _: plain.run_body(forward, prepare, order(samples), bf16), bf16


def main() -> None:
    given = options(__doc__, REPEATS).parse_args()
    make_digits()
    few, table = make_glosses(200, 64), make_glosses()
    same_settings()
    from sentence_transformers import SentenceTransformer

    files = [file for split in ("train", "test") for file in files_of(DIGITS / "data" / split)]
    texts = [text for split in ("train", "test") for text, _ in glosses_of(table, split)]
    image_loop, image_bf16 = loop_over(plain.images(head_image.SIZE), files)
    text_loop, text_bf16 = loop_over(plain.texts(), texts)
    encoder = SentenceTransformer(str(GLOSSES / "backbone"), device="cpu")
    encoder.encode(texts[:64])
    with tempfile.TemporaryDirectory() as folder:
        head_image.ours(f"{folder}/warm-up", 1, 0, num_train=64)
        head_text.ours(few, f"{folder}/warm-up-text", 1, 0)
        sides: dict[str, Callable[[int], Any]] = {
            "image, ours": lambda i: head_image.ours(str(Path(folder) / f"image-{i}"), 1, i),
            "image, loop": image_loop,
            "text, ours": lambda i: head_text.ours(table, str(Path(folder) / f"text-{i}"), 1, i),
            "text, loop": text_loop,
            "text, encode": lambda _: encoder.encode(texts),
        }
        seconds, found = in_turn(
            sides, given.repeats, lambda one: f"features {one['features_s']:.2f} s" if isinstance(one, dict) else ""
        )
    ours = {kind: [one["features_s"] for one in found[f"{kind}, ours"]] for kind in ("image", "text")}
    report(
        "extract",
        [
            ("images: our speed over the loop's", paired(seconds["image, loop"], ours["image"]), GOAL, True),
            ("texts: our speed over the loop's", paired(seconds["text, loop"], ours["text"]), GOAL, True),
            ("texts: our speed over encode's", paired(seconds["text, encode"], ours["text"]), GOAL_ENCODE, True),
        ],
        ours_s=ours,
        peer_s={name: took for name, took in seconds.items() if not name.endswith("ours")},
        samples_per_s={
            **{
                f"{kind}, ours": middle([num / middle(ours[kind])])
                for kind, num in (("image", len(files)), ("text", len(texts)))
            },
            **{
                name: middle([(len(files) if name.startswith("image") else len(texts)) / middle(took)])
                for name, took in seconds.items()
                if not name.endswith("ours")
            },
        },
        loop_in_bf16={"image": image_bf16, "text": text_bf16},
    )


if __name__ == "__main__":
    main()
