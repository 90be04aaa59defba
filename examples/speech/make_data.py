"""Spoken syllables and the vowel in each, as a table of recordings: python examples/speech/make_data.py

Writes examples/speech/data/vowels.csv with the columns path, label and speaker, and the recordings beside it: 1,004
letters and syllables with one vowel each (a, e, i, o, u), read aloud in 13 languages for KLettres, which teaches
children to read. They are those of Debian's package klettres-data (GPL-2+). Where it is not installed, it is fetched
with `apt-get download`, which needs no root. Elsewhere: python examples/speech/make_data.py --klettres DIRECTORY

The label is what the program shows its pupil: the written syllable in each language's sounds.xml (nobody listened to
them). Kept are syllables with one vowel letter whose sound is one of the five in that language's spelling. Left out are
languages where a letter's name or a syllable does not tell: English (the letter a is called "ay"), Danish and Norwegian
(o is often u, u is fronted), Arabic and Hebrew (vowels are not written), Dutch (26 syllables, most of them diphthongs).

The speaker is the language, for each was read by its own people (KLettres' handbook names 9 of the 13; Spanish, Low
Saxon and Brazilian Portuguese have two each, who stay together). Russian and Ukrainian count as one: their lists of
syllables are the same, and the handbook names neither reader.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import subprocess
import sys
import tempfile
import unicodedata
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
INSTALLED = Path("/usr/share/klettres")
_PLAIN = dict(zip("aeiou", "aeiou", strict=True))
_ACUTE = {**_PLAIN, **dict(zip("áéíóú", "aeiou", strict=True))}
# Language -> (vowel letter -> what is heard; vowel letters that make a syllable unfit).
LANGUAGES: dict[str, tuple[dict[str, str], str]] = {
    "cs": (_ACUTE, "ěýůy"),
    "de": (_PLAIN, "äöüy"),
    "es": (_PLAIN, ""),
    "fr": ({"a": "a", "i": "i", "o": "o"}, "euy"),  # e alone is a schwa, u is y
    "hu": (_ACUTE, "öőüű"),
    "it": (_PLAIN, ""),
    "lt": ({**_PLAIN, **dict(zip("ąęėįyųū", "aeeiiuu", strict=True))}, ""),
    "nds": (_PLAIN, "äöüy"),
    "pt_BR": (_PLAIN, ""),
    "ru": (dict(zip("аэеиоёуюя", "aeeioouua", strict=True)), "ы"),
    "tn": (_PLAIN, ""),
    "uk": (dict(zip("аеєіїоуюя", "aeeiiouua", strict=True)), "и"),
}
SPEAKERS = {"ru": "ru+uk", "uk": "ru+uk"}
# Malayalam writes a consonant with a sign for its vowel, and without one where that is a.
_SIGNS = dict(zip("ാിീുൂെേൊോ", "aiiuueeoo", strict=True))
_INDEPENDENT = dict(zip("അആഇഈഉഊഎഏഒഓ", "aaiiuueeoo", strict=True))


def vowel(language: str, written: str) -> str | None:
    """The one vowel of a written syllable, None where there is another number of them, or another vowel."""
    text = unicodedata.normalize("NFC", written.strip().lower())
    if language == "ml":
        consonant = "ക" <= text[:1] <= "ഹ"
        if len(text) == 1:
            return "a" if consonant else _INDEPENDENT.get(text)
        return _SIGNS.get(text[1]) if consonant and len(text) == 2 else None
    if language not in LANGUAGES:
        return None
    heard, unfit = LANGUAGES[language]
    found = [letter for letter in text if letter in heard or letter in unfit or letter in "aeiou"]
    if language == "nds" and len(found) == 2 and found[0] * 2 in text:
        found.pop()  # a long vowel: aal, boom, huus
    return heard.get(found[0]) if len(found) == 1 else None


def fetched(folder: Path) -> Path:
    """The package's directory, unpacked into the folder. Raises `SystemExit` where it cannot be fetched."""
    try:
        subprocess.run(["apt-get", "download", "-qq", "klettres-data"], cwd=folder, check=True, capture_output=True)
        package = next(folder.glob("*.deb"))
        subprocess.run(["dpkg-deb", "-x", package, folder], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError, StopIteration):
        sys.exit("KLettres is not here: apt-get install klettres-data, or name its directory with --klettres")
    return folder / "usr/share/klettres"


def make_data(directory: Path = INSTALLED, out: Path = HERE / "data") -> Path:
    """The table's path."""
    with tempfile.TemporaryDirectory() as folder:
        source = directory if (directory / "es" / "sounds.xml").is_file() else fetched(Path(folder))
        heard: dict[str, set[str | None]] = defaultdict(set)
        for language in (*LANGUAGES, "ml"):
            for sound in ElementTree.parse(source / language / "sounds.xml").iter("sound"):
                heard[sound.attrib["file"]].add(vowel(language, sound.attrib["name"]))
        rows = []
        for path, vowels in sorted(heard.items()):
            # One file stands for two syllables, and six are not there.
            if len(vowels) == 1 and None not in vowels and (source / path).is_file():
                language = path.split("/")[0]
                (out / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / path, out / path)
                rows.append((path, vowels.pop(), SPEAKERS.get(language, language)))
    file = out / "vowels.csv"
    with file.open("w", newline="", encoding="utf-8") as table:
        writer = csv.writer(table)
        writer.writerow(("path", "label", "speaker"))
        writer.writerows(rows)
    return file


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--klettres", type=Path, default=INSTALLED)
    print(make_data(parser.parse_args().klettres))
