"""The text of ``model.py`` that makes a picture what the network takes, with Pillow alone."""

from __future__ import annotations

import string

from robust_ssl.data.resizing import FIT, Resizing

_WHOLE = string.Template('''\
def resized(image):
    """Returns a Pillow image as $size x $size pixels, RGB, red first.

    $how
    """
    from PIL import Image, ImageOps

$draft    image = ImageOps.exif_transpose(image)
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA")
    image = image.convert("RGB")
$keep$scale$crop    return image


def picture(file):
    """Returns a picture file as ``load()`` takes it, float32 [1, 3, $size, $size]; needs Pillow."""
    from PIL import Image

    with Image.open(file) as image:
        tiles = [args if isinstance(args, tuple) else (args,) for *_, args in image.tile]
        deep = image.mode[0] in "IF"
        if image.format == "PNG":
            deep |= any(str(args[0]).partition(";")[2].startswith("16") for args in tiles)
        elif image.format == "PPM":
            deep |= any(isinstance(n, int) and n > 255 for args in tiles for n in args[1:2])
        elif image.format == "TIFF":
            deep |= max(image.tag_v2.get(258, (1,))) > 8
        # An MPO is a JPEG with previews of itself behind it.
        moving = image.format != "MPO" and getattr(image, "n_frames", 1) > 1
        if deep or moving:
            what = "more than 8 bits a channel" if deep else "several frames"
            raise ValueError(f"{file} has {what}; convert it to one 8-bit RGB picture")
        pixels = bytearray(resized(image).tobytes())
    pixels = torch.frombuffer(pixels, dtype=torch.uint8).view($size, $size, 3)
    return pixels.permute(2, 0, 1)[None] / 255


''')
_KEEP = string.Template("""\
    if image.size == ($size, $size):
        return image
""")
_SCALE = {
    "fit": """\
    image = ImageOps.fit(image, ($size, $size), method=Image.Resampling.$filter)
""",
    "squash": """\
    image = image.resize(($side, $side), Image.Resampling.$filter)
""",
    "shorter": """\
    shorter = min(image.size)
    sides = [int($side * length / shorter) for length in image.size]
    image = image.resize(sides, Image.Resampling.$filter)
""",
    "longest": """\
    ratio = max(length / $side for length in image.size)
    sides = [max(round(length / ratio), 1) for length in image.size]
    image = image.resize(sides, Image.Resampling.$filter)
    whole = Image.new("RGB", [max(length, $size) for length in sides], $fill)
    whole.paste(image, [max($size - length, 0) // 2 for length in sides])
    image = whole
""",
}
_CROP = """\
    left, top = ($start for length in image.size)
    image = image.crop((left, top, left + $size, top + $size))
"""
_START = {"down": "(length - $size) // 2", "nearest": "round((length - $size) / 2)"}


def text_of(resizing: Resizing | None, image_size: int) -> str:
    """Returns functions ``resized(image)`` and ``picture(file)`` of the file.

    Args:
      resizing: How the model's pictures get their size; None is what `robust_ssl.data` does then.
      image_size: Pixels.

    Example:
      >>> print(text_of(Resizing("squash", interpolation="bilinear"), 8).splitlines()[11].strip())
      image = image.resize((8, 8), Image.Resampling.BILINEAR)
    """
    how = "As the pictures were resized that this model is for."
    if resizing is None:
        resizing, how = FIT, "Nobody has said how: the middle is kept, scaled by Lanczos' filter."
    side = resizing.side or image_size
    values = {"size": image_size, "side": side, "filter": resizing.interpolation.upper()}
    values["fill"] = str(tuple(resizing.fill))
    # Nothing to cut off where both sides have been brought to the square's.
    done = resizing.mode == "fit" or (resizing.mode == "squash" and side == image_size)
    crop = "" if done else _CROP.replace("$start", _START[resizing.offset])
    parts = {"scale": _SCALE[resizing.mode], "crop": crop}
    filled = {name: string.Template(part).substitute(values) for name, part in parts.items()}
    draft = f'    image.draft("RGB", ({2 * side}, {2 * side}))\n' if resizing.draft else ""
    keep = _KEEP.substitute(size=image_size) if resizing.sized == "keep" else ""
    return _WHOLE.substitute(size=image_size, how=how, draft=draft, keep=keep, **filled)
