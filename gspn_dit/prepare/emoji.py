"""Emoji as captioned and labelled images: the pictures of up to six designs, drawn from SVG, with Unicode's names.

    npm pack @iconify-json/noto @iconify-json/twemoji … emojibase-data
    python -m gspn_dit.prepare.emoji --packages DIR --out data/emoji --size 32

The set is an image folder whose classes are Unicode's groups, with a `metadata.jsonl` of captions in every split:
`train`; `validation`, emoji that no design shows in `train`; and `pairs`, designs that are left out of `train` for
emoji which other designs show there, so that caption and design were both seen, but never together.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import tarfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gspn_dit.errors import ArgumentParser, UserError, run_cli
from gspn_dit.paths import path_argument

STYLES = {
    "noto": "noto",
    "twemoji": "twemoji",
    "openmoji": "openmoji",
    "fluent-emoji-flat": "fluent flat",
    "fluent-emoji": "fluent",
    "emojione": "emojione",
}
"""Packages `@iconify-json/NAME`, and what captions call their designs."""
NAMES = "emojibase-data"
COMPONENTS = 2
"""Unicode's group of skin tones and hair, which are no emoji of their own."""
VALIDATION_PERCENT = 10
"""Share of base emoji in `validation`."""
PAIRS_PERCENT = 20
"""Share of the other emoji of which one design is in `pairs`."""
SPLITS = ("train", "validation", "pairs")
_COMMAND = f"npm pack {' '.join(f'@iconify-json/{name}' for name in STYLES)} {NAMES}"


@dataclass(frozen=True)
class Emoji:
    """One emoji of Unicode, in no design yet."""

    code: str
    """Code points, lower-case hexadecimal with dashes, without variation selectors."""
    label: str
    keywords: tuple[str, ...]
    group: str

    @property
    def base(self) -> str:
        """The code without skin tone and gender: what shares it looks alike and must not fall into different splits."""
        points = [p for p in self.code.split("-") if p not in {"2640", "2642"} and not re.fullmatch("1f3f[b-f]", p)]
        person = {"1f468": "1f9d1", "1f469": "1f9d1"}
        return "-".join(person.get(point, point) for point in points if point != "200d")

    def captions(self, style: str) -> list[str]:
        """Return captions in a design: with the name alone, with the name and keywords, with keywords alone.

        >>> Emoji("1f408", "cat", ("animal", "cat", "cats", "kitten"), "animals-nature").captions("noto")
        ['cat, noto style', 'cat, animal, kitten, noto style', 'animal, kitten, noto style']
        """
        words = [word for word in self.keywords if word.rstrip("s") not in self.label.lower()][:4]
        texts = [self.label, ", ".join([self.label, *words]), ", ".join(words)]
        return [f"{text}, {STYLES[style]} style" for text in dict.fromkeys(filter(None, texts))]


@dataclass(frozen=True)
class Picture:
    """An emoji in a design, as SVG, and the split it belongs to."""

    emoji: Emoji
    style: str
    svg: str
    split: str


class Packages:
    """npm packages in one directory: archives of `npm pack`, or folders as `npm install` leaves them."""

    def __init__(self, directory: Path) -> None:
        if not directory.is_dir():
            raise UserError(f"--packages {directory} is not a directory; make one, and run there: {_COMMAND}")
        self.directory = directory

    def find(self, name: str) -> Path | None:
        """Return the archive or folder of a package, None if it is not there; raises UserError for several versions."""
        folder = self.directory / name
        if folder.is_dir():
            return folder
        prefix = name.removeprefix("@").replace("/", "-")
        found = [
            path for path in self.directory.glob(f"{prefix}-*.tgz") if re.match(r"\d", path.name[len(prefix) + 1 :])
        ]
        if len(found) > 1:
            raise UserError(
                f"{self.directory} has several versions of {name}: {', '.join(p.name for p in sorted(found))}"
            )
        return found[0] if found else None

    def read(self, name: str, file: str) -> Any:
        """Return the content of a JSON file of a package; raises UserError if it is missing or damaged."""
        place = self.find(name)
        if place is None:
            raise UserError(f"{self.directory} has no package {name}; run there: npm pack {name}")
        try:
            if place.is_dir():
                return json.loads((place / file).read_bytes())
            with tarfile.open(place) as archive:
                content = archive.extractfile(f"package/{file}")
                assert content is not None
                return json.load(content)
        except (OSError, KeyError, ValueError, AssertionError, tarfile.TarError) as error:
            raise UserError(f"{place} has no readable {file}: {error}; run npm pack {name} again") from None


def without_variation(code: str) -> str:
    """Return a code in lower case, without variation selectors, which sets spell differently.

    >>> without_variation("1F6A3-200D-2642-FE0F")
    '1f6a3-200d-2642'
    """
    return "-".join(point for point in code.lower().split("-") if point != "fe0f")


def read_emoji(packages: Packages, skin_tones: bool) -> dict[str, Emoji]:
    """Return all emoji by code, with Unicode's English names, keywords and groups."""
    groups = packages.read(NAMES, "meta/groups.json")["groups"]
    found = {}
    for entry in packages.read(NAMES, "en/data.json"):
        if entry.get("group") in (None, COMPONENTS):
            continue
        tones = entry.get("skins", []) if skin_tones else []
        for variant in (entry, *tones):
            code, label = without_variation(variant["hexcode"]), variant["label"]
            found[code] = Emoji(code, label, tuple(entry.get("tags", ())), groups[str(entry["group"])])
    return found


def _slug(label: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")


def read_icons(packages: Packages, style: str, emoji: dict[str, Emoji], names: dict[str, str]) -> dict[str, str]:
    """Return the SVG of a design by code. `names` gives the code of an icon's name where the set lists no codes."""
    package = f"@iconify-json/{style}"
    icons = packages.read(package, "icons.json")
    listed = [(without_variation(code), name) for code, name in packages.read(package, "chars.json").items()]
    found: dict[str, str] = {}
    for code, name in listed or [(code, name) for name, code in names.items()]:
        icon = icons["icons"].get(name)
        if code in emoji and code not in found and icon is not None:
            left, top = icon.get("left", 0), icon.get("top", 0)
            width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
            view = f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}"'
            found[code] = f'<svg xmlns="http://www.w3.org/2000/svg" {view}>{icon["body"]}</svg>'
    return found


def _percent(text: str) -> int:
    """Return a number in 0 … 99 that depends on the text alone."""
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % 100


def assign_splits(emoji: Emoji, styles: list[str]) -> dict[str, str]:
    """Return the split of an emoji in each of the designs that show it."""
    if _percent(f"base {emoji.base}") < VALIDATION_PERCENT:
        return dict.fromkeys(styles, "validation")
    splits = dict.fromkeys(styles, "train")
    if len(styles) > 2 and _percent(f"pair {emoji.code}") < PAIRS_PERCENT:
        splits[sorted(styles)[_percent(f"style {emoji.code}") % len(styles)]] = "pairs"
    return splits


def read_pictures(packages: Packages, styles: list[str], groups: list[str], skin_tones: bool) -> list[Picture]:
    """Return every emoji of the groups in every design that shows it, ordered by code and design."""
    emoji = read_emoji(packages, skin_tones)
    known = sorted({one.group for one in emoji.values()})
    if unknown := sorted(set(groups) - set(known)):
        raise UserError(f"--groups has {unknown[0]}, but can hold {', '.join(known)}")
    names = {_slug(one.label): code for code, one in emoji.items()}
    for style in styles:
        listed = packages.read(f"@iconify-json/{style}", "chars.json")
        names |= {name: without_variation(code) for code, name in listed.items() if without_variation(code) in emoji}
    icons = {style: read_icons(packages, style, emoji, names) for style in styles}
    pictures = []
    for code, one in sorted(emoji.items()):
        shown = [style for style in styles if code in icons[style]]
        if one.group in (groups or known):
            splits = assign_splits(one, shown)
            pictures += [Picture(one, style, icons[style][code], splits[style]) for style in shown]
    return pictures


def draw(svg: str, size: int) -> bytes:
    """Return a PNG of size×size pixels, RGB: the picture centred on white."""
    import resvg_py
    from PIL import Image

    size_given = re.search(r' width="([\d.]+)" height="([\d.]+)"', svg)
    assert size_given is not None  # `read_icons` writes it
    wide = float(size_given[1]) >= float(size_given[2])
    fit: dict[str, Any] = {"width": size} if wide else {"height": size}
    drawn = Image.open(io.BytesIO(resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True, **fit))).convert("RGBA")
    canvas = Image.new("RGBA", (size, size), "white")
    canvas.alpha_composite(drawn, ((size - drawn.width) // 2, (size - drawn.height) // 2))
    buffer = io.BytesIO()
    canvas.convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def _metadata(picture: Picture, file_name: str) -> dict[str, Any]:
    captions = picture.emoji.captions(picture.style)
    return {
        "file_name": file_name,
        "text": captions[0],
        "texts": captions,
        "label": picture.emoji.label,
        "style": STYLES[picture.style],
        "group": picture.emoji.group,
        "code": picture.emoji.code,
    }


def attribution(packages: Packages, styles: list[str], size: int) -> str:
    """Return the text that names every set, its authors and its licence."""
    lines = ["# Where these pictures come from", "", f"Drawn at {size}×{size} pixels on white from the SVG of:", ""]
    for style in styles:
        package = f"@iconify-json/{style}"
        info, version = packages.read(package, "info.json"), packages.read(package, "package.json")["version"]
        author, licence = info["author"], info["license"]
        lines.append(
            f"- {info['name']} ({package} {version}) by {author['name']}, {author.get('url', '')}: "
            f"{licence['spdx']}, {licence.get('url', '')}"
        )
    version = packages.read(NAMES, "package.json")["version"]
    lines += ["", f"Names, keywords and groups: {NAMES} {version}, MIT, from Unicode's data."]
    lines += ["A licence with BY asks for this file beside the pictures; one with SA binds what is made from them.", ""]
    return "\n".join(lines)


def write_set(pictures: list[Picture], out: Path, size: int) -> Counter[str]:
    """Draw the pictures into `out/SPLIT/GROUP/STYLE-CODE.png` and write the captions; return the images per split.

    Of pictures that a design repeats for several emoji (some flags), the first alone is kept.
    """
    from tqdm import tqdm

    rows: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    seen: set[tuple[str, bytes]] = set()
    for picture in tqdm(pictures, unit="image", disable=None):
        content = draw(picture.svg, size)
        if (picture.style, content) in seen:
            continue
        seen.add((picture.style, content))
        name = f"{picture.emoji.group}/{picture.style}-{picture.emoji.code}.png"
        path = out / picture.split / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        rows[picture.split].append(_metadata(picture, name))
    for split in filter(rows.get, SPLITS):
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows[split])
        (out / split / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    return Counter({split: len(rows[split]) for split in SPLITS})


def prepare(packages: Packages, out: Path, size: int, styles: list[str], groups: list[str], skin_tones: bool) -> None:
    """Make the set; `out` is complete or absent. Raises UserError for whatever is missing or does not fit."""
    if out.exists():
        raise UserError(f"--out {out} exists already; give another directory")
    try:
        import resvg_py  # noqa: F401
    except ImportError:
        raise UserError("drawing SVG needs resvg-py: pip install 'gspn-dit[text]'") from None
    styles = styles or [style for style in STYLES if packages.find(f"@iconify-json/{style}")]
    if not styles:
        raise UserError(f"--packages {packages.directory} has no set of emoji; run there: {_COMMAND}")
    pictures = read_pictures(packages, styles, groups, skin_tones)
    text = attribution(packages, styles, size)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        counts = write_set(pictures, partial, size)
        (partial / "ATTRIBUTION.md").write_text(text, encoding="utf-8")
        partial.rename(out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"{out}: {', '.join(f'{counts[split]:,} images for {split}' for split in SPLITS)}; {len(styles)} designs")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def main() -> None:
    """The command line."""
    parser = ArgumentParser(prog="gspn_dit.prepare.emoji", description="Draw captioned emoji from npm's packages.")
    parser.add_argument(
        "--packages", type=path_argument, required=True, metavar="DIR", help=f"where this was run: {_COMMAND}"
    )
    parser.add_argument("--out", type=path_argument, required=True, metavar="DIR", help="where the set goes")
    parser.add_argument("--size", type=int, default=32, help="pixels; emoji are recognisable from 32")
    parser.add_argument("--styles", type=_names, default=[], help="designs, a comma between; none for all")
    parser.add_argument("--groups", type=_names, default=[], help="Unicode's groups, a comma between; none for all")
    parser.add_argument("--skin-tones", action="store_true", help="draw every skin tone, not the yellow one alone")
    options = parser.parse_args()
    if options.size < 8:
        raise UserError(f"--size is {options.size}, but must be at least 8")
    if unknown := [name for name in options.styles if name not in STYLES]:
        raise UserError(f"unknown design {unknown[0]}; allowed are {', '.join(STYLES)}")
    packages = Packages(Path(options.packages))
    prepare(packages, Path(options.out), options.size, options.styles, options.groups, options.skin_tones)


if __name__ == "__main__":
    run_cli(main)
