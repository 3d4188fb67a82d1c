"""The readable output of a run: pictures, the loss curve and one self-contained page."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from .. import files
from ..evaluation import Score
from ..synthetic import SyntheticSet

SIDE = 64  # pixels an image is at least shown with
GAP = 4
TITLE = 18  # pixels of a class name's line, in a picture as wide as it is shown
SHOWN = 832  # pixels of that width, on the page
ROW = 10  # images side by side
PIXELS = 1 << 23  # of all images that are drawn, about
FONT = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"  # with more letters than Pillow's own
RESULT = "result.json"
FILES = (RESULT, "report.html", "images.png")


def picture(synthetic: SyntheticSet) -> Image.Image:
    """Draw the images in true colours, those of a class side by side under its name.

    Of very many images only the first of each class are drawn, or those of the first classes alone, and a
    line below says so. Images of one channel are grey, of three colour; of any other number the first is
    shown.
    """
    zoom = max(1, -(-SIDE // synthetic.images.shape[-1]))
    side = synthetic.images.shape[-1] * zoom
    most = max(1, PIXELS // side**2)
    names, all_of_class = synthetic.class_names[:most], len(synthetic) // len(synthetic.class_names)
    ipc = min(all_of_class, max(1, most // len(names)))
    strips = synthetic.pixels.unflatten(0, (-1, all_of_class))[: len(names), :ipc]
    channels = strips if strips.shape[2] == 3 else strips[:, :, :1].expand(-1, -1, 3, -1, -1)
    pixels = (channels * 255).round().byte().permute(0, 1, 3, 4, 2).cpu()
    columns = min(ipc, ROW)
    lines = -(-ipc // ROW)  # of images in a class
    across = max(1, min(ROW // columns, len(names)))
    width = columns * (side + GAP) + GAP
    title = TITLE * max(1, round(across * width / SHOWN))
    height = lines * (side + GAP) + title + GAP
    rows = -(-len(names) // across)
    whole = len(names) * ipc == len(synthetic)
    canvas = Image.new("RGB", (across * width + GAP, rows * height + (GAP if whole else title)), "white")
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.truetype(FONT, title * 2 // 3)
    for c, name in enumerate(names):
        left, top = c % across * width + GAP, c // across * height + GAP
        draw.text((left, top), _fitting(name, font, width - GAP), "black", font)
        for k in range(ipc):
            tile = Image.fromarray(pixels[c, k].numpy()).resize((side, side), Image.Resampling.NEAREST)
            x, y = left + k % ROW * (side + GAP), top + title + k // ROW * (side + GAP)
            canvas.paste(tile, (x, y))
    if not whole:
        note = f"{len(names) * ipc} of {len(synthetic)} images"
        draw.text((GAP, rows * height), _fitting(note, font, canvas.width - GAP), "black", font)
    return canvas


def _fitting(text: str, font: Any, width: int) -> str:
    while font.getlength(text) > width and len(text) > 1:
        text = text.removesuffix("…")[:-1] + "…"
    return text


def loss_curve(history: Sequence[Mapping[str, float]]) -> str:
    """Draw the terms of the loss over the iterations as SVG."""
    figure = Figure(figsize=(7, 2.6), layout="constrained")
    names = [name for name in history[0] if name != "iteration"]
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        alone = "." if len(history) == 1 else None  # or it would be a line without length
        axes.plot([look["iteration"] for look in history], [look[name] for look in history], marker=alone)
        axes.set(title=f"{name} term", xlabel="iteration")
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    svg = io.StringIO()
    figure.savefig(svg, format="svg", metadata={"Date": None})
    return svg.getvalue()[svg.getvalue().index("<svg") :]


def rows(result: Mapping[str, Any]) -> list[tuple[str, str, int]]:
    """Return the closing table: what was trained on, its accuracy in percent, and on how many networks."""
    names = {
        "random": "random real images",
        "kmeans": "real images nearest to k-means centres",
        "base": f"{result['method']} without mutual information",
        "full": "all real images",
    }
    scores = [(names[name], score) for name, score in result["baselines"].items()]
    if result["accuracy_mean"] is not None:
        method = result["method"]
        scores.append((f"{method} with mutual information" if result["mim_weight"] else method, result))
    return _printed(scores)


def architectures(result: Mapping[str, Any]) -> list[tuple[str, str, int]]:
    """Return the table of other networks: which one, its accuracy in percent, and of how many."""
    return _printed(result["cross_architecture"].items())


def _printed(scores: Iterable[tuple[str, Mapping[str, Any]]]) -> list[tuple[str, str, int]]:
    return [(name, str(Score(tuple(s["accuracies"]))), s["num_networks"]) for name, s in scores]


def information(result: Mapping[str, Any]) -> str:
    """Return the estimates of the mutual information as text, empty if there are none."""
    nats = result["mutual_information"]
    if nats["after"] is None:
        return ""
    before, after, cap = (round(nats[name], 2) + 0.0 for name in ("before", "after", "cap"))  # no -0.00
    return f"{before:.2f} nats before, {after:.2f} after, of at most {cap:.2f}"


def remove(folder: Path) -> None:
    """Remove what `write` has written there before."""
    for name in FILES:
        (folder / name).unlink(missing_ok=True)


def write(folder: Path, synthetic: SyntheticSet, result: Mapping[str, Any]) -> None:
    """Write `FILES` into `folder`, each whole or not at all; the result last, as a sign that all is there."""
    image = io.BytesIO()
    picture(synthetic).save(image, "png")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mim4dd.commands", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("report.html").render(
        result=result,
        rows=rows(result),
        information=information(result),
        architectures=architectures(result),
        picture=base64.b64encode(image.getvalue()).decode(),
        curve=loss_curve(result["history"]) if result["history"] else "",
        class_names=synthetic.class_names,
        settings=json.dumps(result["config"], indent=2, ensure_ascii=False),
    )
    contents: dict[str, str | bytes] = {
        "images.png": image.getvalue(),
        "report.html": page,
        RESULT: json.dumps(result, indent=2),
    }
    for name, content in contents.items():
        files.write(folder / name, content)
