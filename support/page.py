"""The HTML page that predict.py writes: every photo with its heat map."""
import html
import os
from pathlib import Path
from urllib.parse import quote

from support.console import printable

STYLE = """body{font:15px/1.4 sans-serif;margin:2em;color:#222}
figure{display:flex;gap:1em;margin:0 0 1.2em;align-items:flex-start}
.p{position:relative;flex:none;width:260px}
.p img{width:100%;height:auto;display:block;background:#eee}
.b{position:absolute;border:2px solid #0cf;box-sizing:border-box}
hr{border:0;border-top:3px solid #c00;margin:2em 0 .3em}figcaption{overflow-wrap:anywhere}"""


def web_page(shown: list[tuple], threshold: float | None, out: Path, unread: int) -> str:
    """An HTML page of all photos, the highest score first: photo, heat map with boxes, name, score.

    shown: (file, name, score, (width, height), regions) of each photo; unread: number of unreadable
    files. The page refers to the pictures on disk, and the browser loads them on scrolling.
    """
    def link(path) -> str:
        return html.escape(quote(os.fsencode(str(path).replace(os.sep, "/"))))

    defective = sum(threshold is not None and row[2] > threshold for row in shown)
    counts = f"{len(shown)} photos" + (
        f", {defective} defective, {len(shown) - defective} normal" if threshold is not None else
        ", no threshold, so no verdicts") + (f", {unread} could not be read" if unread else "")
    parts = [f"<!doctype html><html><head><meta charset='utf-8'><title>{counts}</title><style>"
             f"{STYLE}</style></head><body><h1>{counts}</h1>"]
    has_line = threshold is None
    for file, name, score, (W, H), regions in sorted(shown, key=lambda row: -row[2]):
        if not has_line and score <= threshold:
            parts.append(f"<hr><p>threshold {threshold:.4g}: below it, normal</p>")
            has_line = True
        size = f"loading='lazy' width='{W}' height='{H}'"
        count = f"{len(regions)} region{'s' * (len(regions) != 1)}"
        photo = "" if file.suffix.lower() in (".tif", ".tiff", ".ppm", ".pgm") else \
            f"<div class='p'><img {size} src='{link(address_of(file, out))}'></div>"
        boxes = "".join(f"<div class='b' style='left:{100 * r['x'] / W:.2f}%;top:"
                        f"{100 * r['y'] / H:.2f}%;width:{100 * r['width'] / W:.2f}%;height:"
                        f"{100 * r['height'] / H:.2f}%'></div>" for r in regions)
        parts.append(f"<figure>{photo}<div class='p'><img {size} src='heatmaps/{link(name)}.png'>"
                     f"{boxes}</div><figcaption>{html.escape(printable(name))}<br>score "
                     f"{score:.4g}<br>{count}</figcaption></figure>")
    if not has_line:
        parts.append(f"<hr><p>threshold {threshold:.4g}: no photo below it</p>")
    return "\n".join([*parts, "</body></html>\n"])


def address_of(file: Path, out: Path) -> str:
    """The address of a photo in the page: a relative path, or a URI if it is on another drive."""
    try:
        return os.path.relpath(file, out)
    except ValueError:                                                # on another drive
        return file.as_uri()
