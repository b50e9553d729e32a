"""Point clouds from a simulator's geometry: points fixed on the surfaces of bodies, which move with
them. No renderer.

A depth camera sees the sides that face it; these points lie all around. The same model gives the
same points: they are drawn once, uniformly over each surface, from a generator of a fixed seed.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

SEED = 0
SPHERE, CAPSULE, CYLINDER, BOX, MESH = 2, 3, 5, 6, 7
"""MuJoCo's kinds of geom that points can be drawn on."""
SPARE = 4
"""Points drawn per point asked for: some will be outside the workspace."""


class Surface:
    """``count`` points on the surfaces of some geoms of a MuJoCo model, each geom with a share by
    the root of its area.

    By area, the largest geom would have nearly all: a case has fifty times the area of its handle.
    """

    def __init__(self, model: Any, geoms: Sequence[int], count: int) -> None:
        draw = np.random.default_rng(SEED)
        self.count = count
        areas = np.array([area(model, geom) for geom in geoms])
        share = np.sqrt(areas) / np.sqrt(areas).sum()
        which = draw.choice(len(geoms), size=SPARE * count, p=share)
        self._geom = np.array(geoms)[which]
        self._local = np.empty((len(which), 3))
        for place, geom in enumerate(geoms):
            mine = which == place
            self._local[mine] = on_surface(model, geom, int(mine.sum()), draw)

    def points(
        self, geom_xpos: np.ndarray, geom_xmat: np.ndarray, low: np.ndarray, high: np.ndarray
    ) -> np.ndarray:
        """The places of the points, [count,3]: the first ones of the drawn that lie in the box,
        again from the start if too few do.

        If none does, all are at the box's nearest points. geom_xpos [G,3] and geom_xmat [G,9] of
        the whole model.
        """
        turned = np.einsum("nij,nj->ni", geom_xmat[self._geom].reshape(-1, 3, 3), self._local)
        points = geom_xpos[self._geom] + turned
        inside = points[((points >= low) & (points <= high)).all(1)]
        if not len(inside):
            inside = points.clip(low, high)
        return np.resize(inside, (self.count, 3))


def ball(centre: np.ndarray, radius: float, count: int) -> np.ndarray:
    """``count`` points all around a sphere, [count,3], always at the same places: a marker."""
    direction = np.random.default_rng(SEED).standard_normal((count, 3))
    return centre + radius * direction / np.linalg.norm(direction, axis=1, keepdims=True)


def area(model: Any, geom: int) -> float:
    """The area of a geom's surface, square metres. Raises `ValueError` for one that has no end or
    is unknown.
    """
    a, b, c = model.geom_size[geom]
    kind = model.geom_type[geom]
    if kind == MESH:
        return float(_triangle_areas(_triangles(model, geom)).sum())
    areas = {
        SPHERE: 4 * np.pi * a**2,
        CAPSULE: 4 * np.pi * a * (a + b),
        CYLINDER: 2 * np.pi * a * (a + 2 * b),
        BOX: 8 * (a * b + b * c + c * a),
    }
    if kind not in areas:
        raise ValueError(f"geom {geom} is of MuJoCo's kind {kind}, on which no points can be drawn")
    return float(areas[kind])


def on_surface(model: Any, geom: int, count: int, draw: np.random.Generator) -> np.ndarray:
    """Draws points uniformly on a geom's surface, in its own frame: [count,3], metres."""
    a, b, c = model.geom_size[geom]
    kind = model.geom_type[geom]
    if kind == MESH:
        corners = _triangles(model, geom)
        areas = _triangle_areas(corners)
        chosen = corners[draw.choice(len(corners), size=count, p=areas / areas.sum())]
        u = np.sort(draw.random((count, 2)), axis=1)
        weights = np.stack([u[:, 0], u[:, 1] - u[:, 0], 1 - u[:, 1]], 1)
        return np.einsum("nv,nvd->nd", weights, chosen)
    if kind == BOX:
        at = draw.uniform(-1, 1, (count, 3)) * (a, b, c)
        faces = np.array([b * c, c * a, a * b])
        axis = draw.choice(3, size=count, p=faces / faces.sum())
        side = draw.choice((-1, 1), size=count)
        at[np.arange(count), axis] = side * np.array([a, b, c])[axis]
        return at
    direction = draw.standard_normal((count, 3))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    if kind == SPHERE:
        return a * direction
    round_ = direction.copy()
    end = draw.choice((-1, 1), size=count)
    round_[:, 2] = 0
    round_ /= np.linalg.norm(round_, axis=1, keepdims=True)
    side = a * round_ + draw.uniform(-b, b, count)[:, None] * [0, 0, 1]
    if kind == CAPSULE:  # its half spheres point outwards
        tip = a * direction + np.sign(direction[:, 2:]) * [0, 0, b]
        return np.where(draw.random((count, 1)) < b / (a + b), side, tip)
    cap = a * np.sqrt(draw.random((count, 1))) * round_ + (end * b)[:, None] * [0, 0, 1]
    return np.where(draw.random((count, 1)) < 2 * b / (a + 2 * b), side, cap)


def _triangles(model: Any, geom: int) -> np.ndarray:
    """The corners of a mesh's triangles, [faces,3,3]."""
    mesh = model.geom_dataid[geom]
    faces = slice(model.mesh_faceadr[mesh], model.mesh_faceadr[mesh] + model.mesh_facenum[mesh])
    return model.mesh_vert[model.mesh_vertadr[mesh] + model.mesh_face[faces]].astype(np.float64)


def _triangle_areas(corners: np.ndarray) -> np.ndarray:
    first, second = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    return np.linalg.norm(np.cross(first, second), axis=1) / 2
