"""The HTML page that predict.py writes: every photo with its heat map."""
import heapq
import html
import os
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from support.console import printable

STYLE = """body{font:15px/1.4 sans-serif;margin:2em;color:#222}
figure{display:flex;gap:1em;margin:0 0 1.2em;align-items:flex-start}
.p{position:relative;flex:none;width:260px}
.p img{width:100%;height:auto;display:block;background:#eee}
.b{position:absolute;border:2px solid #0cf;box-sizing:border-box}
table{border-collapse:collapse;margin-bottom:1em}
td,th{border:1px solid #ccc;padding:.1em .6em;text-align:left}
hr{border:0;border-top:3px solid #c00;margin:2em 0 .3em}figcaption{overflow-wrap:anywhere}"""


MAX_ROWS = 1000                         # photos, and parts, on the page


class PageRow(NamedTuple):
    """A photo on the page: size is (width, height); pictures: whether its heat map was written."""
    file: Path
    name: str
    score: float
    size: tuple[int, int]
    regions: list[dict]
    pictures: bool = True


class HighestScores:
    """The MAX_ROWS photos of the highest scores, and how many there are in all."""

    def __init__(self):
        self.count = self.defective = 0
        self.heap: list[tuple[float, int, PageRow]] = []

    def add(self, row: PageRow, is_defective: bool) -> None:
        self.count += 1
        self.defective += is_defective
        keep = heapq.heappush if len(self.heap) < MAX_ROWS else heapq.heappushpop
        keep(self.heap, (row.score, -self.count, row))

    def rows(self) -> list[PageRow]:
        return [row for *_, row in sorted(self.heap, reverse=True)]


def web_page(shown: list[tuple], threshold: float | None, out: Path, problems: int,
             count: int | None = None, defective: int | None = None, note: str = "",
             parts: list[dict] = []) -> str:
    """An HTML page of photos, the highest score first: photo, heat map with boxes, name, score.

    shown: a `PageRow` for each photo. problems: the number of photos that could not be read.
    count, defective: the numbers of all photos, where not all are shown. note: a line above all.
    parts: rows of parts.csv. The page refers to the pictures on disk, and the browser loads them on
    scrolling.
    """
    def link(path) -> str:
        return quote(os.fsencode(str(path).replace(os.sep, "/")))

    rows = [PageRow(*row) for row in shown]
    count = len(rows) if count is None else count
    if defective is None:
        defective = sum(threshold is not None and row.score > threshold for row in rows)
    counts = f"{count} photos" + (
        f", {defective} defective, {count - defective} normal" if threshold is not None else
        ", no threshold, so no verdicts") + (f", {problems} could not be read" if problems else "")
    title = f"{note}; {counts}" if note else counts
    lines = [f"<!doctype html><html><head><meta charset='utf-8'><title>{html.escape(title)}</title>"
             f"<style>{STYLE}</style></head><body><h1>{html.escape(title)}</h1>"]
    if count > len(rows):
        lines.append(f"<p>The {len(rows)} photos with the highest scores; scores.csv has all.</p>")
    if parts:
        lines.append(parts_table(parts))
    has_line = threshold is None
    for row in sorted(rows, key=lambda row: -row.score):
        if not has_line and row.score <= threshold:
            lines.append(f"<hr><p>threshold {threshold:.4g}: below it, normal</p>")
            has_line = True
        (W, H), regions = row.size, row.regions
        size = f"loading='lazy' width='{W}' height='{H}'"
        photo = "" if row.file.suffix.lower() in (".tif", ".tiff", ".ppm", ".pgm") else \
            f"<div class='p'><img {size} src='{html.escape(address_of(row.file, out))}'></div>"
        boxes = "".join(f"<div class='b' style='left:{100 * r['x'] / W:.2f}%;top:"
                        f"{100 * r['y'] / H:.2f}%;width:{100 * r['width'] / W:.2f}%;height:"
                        f"{100 * r['height'] / H:.2f}%'></div>" for r in regions)
        heat_map = (f"<div class='p'><img {size} src='{html.escape(link('heatmaps/' + row.name))}"
                    f".png'>{boxes}</div>" if row.pictures else "")
        lines.append(f"<figure>{photo}{heat_map}<figcaption>{html.escape(printable(row.name))}<br>"
                     f"score {row.score:.4g}<br>{len(regions)} region"
                     f"{'s' * (len(regions) != 1)}</figcaption></figure>")
    if not has_line and rows:
        lines.append(f"<hr><p>threshold {threshold:.4g}: no photo shown is below it</p>")
    return "\n".join([*lines, "</body></html>\n"])


def parts_table(parts: list[dict]) -> str:
    """The verdict of every part, as an HTML table; MAX_ROWS parts at most."""
    def cells(values, tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(printable(str(value)))}</{tag}>"
                                for value in values) + "</tr>"

    defective = sum(part["verdict"] == "defective" for part in parts)
    more = f" The first {MAX_ROWS} are shown; parts.csv has all." if len(parts) > MAX_ROWS else ""
    return (f"<p>{len(parts)} parts, {defective} defective.{more}</p><table>"
            + cells(parts[0], "th")
            + "".join(cells(part.values(), "td") for part in parts[:MAX_ROWS]) + "</table>")


def address_of(file: Path, out: Path) -> str:
    """The address of a photo in the page: a relative path, or a URI if it is on another drive."""
    try:
        return quote(os.fsencode(os.path.relpath(file, out).replace(os.sep, "/")))
    except ValueError:                                                # on another drive
        return file.as_uri()
