"""A case as files that need no 3D window: movie of its slices, page of its surfaces, meshes."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.files import atomic_write
from data.labels import BACKGROUND, IMAGE, LABEL, PRED, Labels, index_classes
from data.pictures import add_legend, choose_hu_window, show_patient
from data.results import CaseFiles, list_classes
from data.settings import show_progress

MOVIE_MARGIN_MM = 15  # of a movie, beyond the first and the last slice of foreground
PAGE_COLOUR, PAGE_INK = "#14181d", "#f2f2f2"

# ---------------------------------------------------------------------------------------
# Movies
# ---------------------------------------------------------------------------------------


def draw_frames(case: CaseFiles, size: tuple[int, int]) -> Iterator[np.ndarray]:
    """Axial slices from feet to head, outlined: pictures (height, width, 3) of `size` pixels.

    Those around the foreground, all where there is none.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    scan = case.read_shown()
    maps, names = list_maps(case)
    first, last = find_range(maps.values(), scan.shape[2], MOVIE_MARGIN_MM / scan.spacing_mm[2])
    hu_window = choose_hu_window(scan.data)
    figure = Figure((size[0] / 100, size[1] / 100), dpi=100, layout="constrained")
    canvas, axes = FigureCanvasAgg(figure), figure.subplots()
    if maps:
        add_legend(figure, names, LABEL in maps)
    for index in show_progress(range(first, last), desc="movie", unit="slice"):
        axes.clear()
        part = (slice(None), slice(None), slice(index, index + 1))
        data = {IMAGE: replace(scan, data=scan.data[part])} | {k: m[part] for k, m in maps.items()}
        title = f"{case.name} · axial slice {index + 1} of {scan.shape[2]}"
        show_patient(data, 0, axes=axes, names=names, hu_window=hu_window, title=title)
        canvas.draw()
        yield np.array(canvas.buffer_rgba())[..., :3]


def find_range(masks: Iterable[np.ndarray], depth: int, margin: float) -> tuple[int, int]:
    """(first, last) slice of `depth` that hold foreground, `margin` slices added at both ends."""
    filled = np.zeros(depth, bool)
    for mask in masks:
        filled |= mask.any(axis=(0, 1))
    if not filled.any():
        return 0, depth
    low, high = np.flatnonzero(filled)[[0, -1]]
    return max(0, int(low - margin)), min(depth, int(high + margin) + 1)


def list_maps(case: CaseFiles) -> tuple[dict[str, np.ndarray], list[str]]:
    """Reference and prediction as class indices (X, Y, Z) under MONAI's keys; class names."""
    maps, names = {}, []
    for key, labels in ((LABEL, case.reference if case.truth else None), (PRED, case.labels)):
        if labels is not None:
            classes = list_classes(labels, case.names)
            maps[key] = index_classes(labels.data, as_tuples(classes))
            names = list(classes)  # the prediction's, where there are both
    return maps, names


def as_tuples(classes: Mapping[str, int]) -> Labels:
    """Class → value, as a data set declares its labels: background first, values in tuples."""
    return {BACKGROUND: (0,), **{name: (value,) for name, value in classes.items()}}


def write_frames(frames: Iterable[np.ndarray], path: Path, fps: int) -> None:
    """Pictures (height, width, 3) as an endless GIF or as MP4."""
    with atomic_write(path) as temporary:
        if path.suffix == ".gif":
            rare = Image.Quantize.MAXCOVERAGE  # keeps thin outlines' colours beside many greys
            images = (Image.fromarray(frame).quantize(256, rare) for frame in frames)
            timing: dict[str, Any] = {"duration": round(1000 / fps), "loop": 0}
            next(images).save(temporary, save_all=True, append_images=images, **timing)
        else:
            encode_frames(iter(frames), temporary, fps)


def encode_frames(frames: Iterator[np.ndarray], path: Path, fps: int) -> None:
    """Let ffmpeg make a movie of pictures; OSError with its last words when it cannot."""
    frame = next(frames)
    command = "ffmpeg -loglevel error -y -f rawvideo -pix_fmt rgb24"
    command += f" -s {frame.shape[1]}x{frame.shape[0]} -r {fps} -i -"
    command += " -vf crop=trunc(iw/2)*2:trunc(ih/2)*2 -pix_fmt yuv420p"
    with subprocess.Popen(
        [*command.split(), path], stdin=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdin is not None  # a pipe
        try:
            process.stdin.write(frame.tobytes())
            for frame in frames:
                process.stdin.write(frame.tobytes())
        except BrokenPipeError:
            pass  # ffmpeg has ended; its words say why
        _, words = process.communicate()
    if process.returncode:
        raise OSError(f"ffmpeg: {words.decode(errors='replace').strip()[-200:]}")


# ---------------------------------------------------------------------------------------
# Meshes
# ---------------------------------------------------------------------------------------


def check_mesh(path: Path, points: int, faces: int) -> None:
    """OSError unless a mesh is whole in its file: VTK's writers say nothing when the disk is full.

    Nothing of VTK reads it: its readers crash at some torn files.
    """
    content = path.read_bytes() if path.exists() else b""
    size = len(content)
    if path.suffix == ".stl":  # a header, and 50 bytes a face
        whole = size == 84 + 50 * faces
    elif path.suffix == ".ply":  # its header names what a point has; a face takes 13 bytes
        header, end, _ = content.partition(b"end_header\n")
        floats, small = (header.count(b"property " + kind) for kind in (b"float", b"uchar"))
        whole = size == len(header + end) + points * (4 * floats + small) + faces * 13
    elif path.suffix == ".glb":  # its third number is its length; indices and points in 4 bytes
        whole = int.from_bytes(content[8:12], "little") == size > 12 * (points + faces)
    elif path.suffix == ".obj":
        whole = content.count(b"\nf ") == faces and content.endswith(b"\n")
    else:
        whole = (
            content.rstrip().endswith(b"</VTKFile>") and b'NumberOfPolys="%d"' % faces in content
        )
    if not whole:
        raise OSError(f"the mesh of {points} points and {faces} faces is torn: {size} bytes")


# ---------------------------------------------------------------------------------------
# A page that turns in any browser
# ---------------------------------------------------------------------------------------

Surface = tuple[
    np.ndarray, np.ndarray, str, float
]  # points (N, 3) mm, faces (M, 3), colour, opacity
Views = Mapping[str, tuple[Sequence[float], Sequence[float]]]  # where the viewer stands, what is up


def write_page(
    surfaces: Mapping[str, Surface],
    texts: tuple[str, Sequence[str]],
    views: Views,
    view: str,
    path: Path,
) -> None:
    """Surfaces with legend, letters, axes, views and `texts` (title, lines), all in one file."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for name, (points, faces, colour, opacity) in surfaces.items():
        x, y, z = points.round(2).T
        i, j, k = faces.T
        look = {"color": colour, "opacity": opacity, "name": name, "showlegend": True}
        figure.add_mesh3d(x=x, y=y, z=z, i=i, j=j, k=k, **look)
    x, y, z = place_letters(np.concatenate([points for points, *_ in surfaces.values()])).T
    figure.add_scatter3d(
        x=x, y=y, z=z, text=list("LRPAIS"), mode="text", showlegend=False, hoverinfo="skip",
        textfont={"color": PAGE_INK, "size": 20},
    )  # fmt: skip
    figure.update_layout(**lay_out_page(texts, views, view))
    body = figure.to_html(full_html=False, include_plotlyjs=True, default_height="100vh")
    page = (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>Liver in 3D</title>'
        "<style>html, body {margin: 0; height: 100%; overflow: hidden; "
        f"background: {PAGE_COLOUR}}}</style></head><body>{body}</body></html>"
    )
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def place_letters(points: np.ndarray) -> np.ndarray:
    """Where L R P A I S stand: (6, 3) mm, at the middle of each side of the points' box."""
    low, high = points.min(axis=0), points.max(axis=0)
    middle, half = (low + high) / 2, 0.56 * (high - low)
    return np.array([middle + side * half * axis for axis in np.eye(3) for side in (-1, 1)])


def lay_out_page(texts: tuple[str, Sequence[str]], views: Views, view: str) -> dict[str, Any]:
    """Title, axes, measurements and buttons for the views, as plotly wants them."""
    axes = {
        f"{axis}axis": {"title": f"mm to {end}", "color": PAGE_INK, "backgroundcolor": PAGE_COLOUR}
        for axis, end in zip("xyz", ("Right (R)", "Anterior (A)", "Superior (S)"), strict=True)
    }
    cameras = {
        name: {
            "eye": dict(zip("xyz", (1.9 * np.array(place)).tolist(), strict=True)),
            "up": dict(zip("xyz", up, strict=True)),
        }
        for name, (place, up) in views.items()
    }
    buttons = [
        {"label": name, "method": "relayout", "args": [{"scene.camera": camera}]}
        for name, camera in cameras.items()
    ]
    corner = {"xanchor": "left", "x": 0.01}
    menu = {"type": "buttons", "direction": "right", "buttons": buttons, "showactive": False}
    menu |= {"y": 0.01, "yanchor": "bottom", "bgcolor": PAGE_INK, "font": {"color": PAGE_COLOUR}}
    note = {
        "text": "<br>".join(texts[1]),
        "align": "left",
        "showarrow": False,
        "font": {"size": 14},
    }
    note |= {"y": 0.99, "yanchor": "top", "xref": "paper", "yref": "paper"}
    return {
        "title": {"text": texts[0], "x": 0.01, "y": 0.985, "yanchor": "top"},
        "margin": {"l": 0, "r": 0, "t": 50, "b": 0},
        "template": "plotly_dark",
        "paper_bgcolor": PAGE_COLOUR,
        "font": {"color": PAGE_INK},
        "legend": {"font": {"size": 16}, "x": 0.99, "xanchor": "right", "y": 0.99},
        "scene": {
            "aspectmode": "data",
            "camera": cameras[view],
            "domain": {"x": (0.15, 1)},
            **axes,
        },
        "updatemenus": [menu | corner],
        "annotations": [note | corner],
    }
