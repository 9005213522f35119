"""The letters of the moving-words world, drawn once from font files and stored as pictures, so that no machine's fonts or font renderer matter.

`PYTHONPATH=tools python -m pretrain.glyphs NAME=FONT_FILE ... --out FOLDER`, one NAME for each of `instep.bundled.glyphs.FONTS`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from instep.bundled.glyphs import CAP_HEIGHT, FONTS, GLYPH_ABOVE, GLYPH_ROWS, LETTERS
from pretrain.files import write_json

GAP = 1  # empty columns between two letters of a strip


def sized(path: Path) -> ImageFont.FreeTypeFont:
    """The font at the size at which an H is nearest to `CAP_HEIGHT` pixels tall."""
    fonts = (ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC) for size in range(CAP_HEIGHT, 2 * CAP_HEIGHT))
    return min(fonts, key=lambda font: abs(font.getbbox("H", anchor="ls")[1] + CAP_HEIGHT))


def strip(path: Path) -> tuple[Image.Image, dict[str, list[int]]]:
    """All letters side by side (white on black, cut to their ink's columns), and for each one its column, width, left bearing and advance in pixels."""
    font, cells, metrics, column = sized(path), [], {}, 0
    for letter in LETTERS:
        canvas = Image.new("L", (4 * CAP_HEIGHT, GLYPH_ROWS))
        ImageDraw.Draw(canvas).text((CAP_HEIGHT, GLYPH_ABOVE + CAP_HEIGHT), letter, fill=255, font=font, anchor="ls")
        pixels = np.asarray(canvas)
        inked = np.flatnonzero(pixels.max(0))
        first, last = int(inked[0]), int(inked[-1]) + 1
        if pixels[0].any() or pixels[-1].any():
            raise ValueError(f"font: {path.name} has a {letter} taller than {GLYPH_ROWS} rows; raise GLYPH_ROWS or take another font")
        metrics[letter] = [column, last - first, first - CAP_HEIGHT, round(font.getlength(letter))]
        cells.append(np.pad(pixels[:, first:last], ((0, 0), (0, GAP))))
        column += last - first + GAP
    return Image.fromarray(np.concatenate(cells, 1)), metrics


def main() -> None:
    """Draws one strip a font, NAME.png, and `glyphs.json` with their metrics."""
    parser = argparse.ArgumentParser(prog="python -m pretrain.glyphs", description=__doc__)
    parser.add_argument("fonts", nargs="+", metavar="NAME=FONT_FILE")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    files = dict(given.split("=", 1) for given in args.fonts)
    if set(files) != set(FONTS):
        parser.error(f"fonts: {sorted(files)} is not allowed; give one file for each of {', '.join(FONTS)}")
    args.out.mkdir(parents=True, exist_ok=True)
    metrics = {}
    for name in FONTS:
        picture, metrics[name] = strip(Path(files[name]))
        picture.save(args.out / f"{name}.png", optimize=True)
    write_json(args.out / "glyphs.json", metrics)


if __name__ == "__main__":
    main()
