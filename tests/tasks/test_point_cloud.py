"""Points on surfaces: on them, all over them, the same ones every time,
and they move with their bodies.
"""

import numpy as np
import pytest

from genpolicy.tasks._point_cloud import Surface, area, ball, on_surface
from genpolicy.tasks._simulators import library

mujoco = library("mujoco", "the test")

SCENE = """
<mujoco><asset><mesh name="wedge" vertex="0 0 0  1 0 0  0 2 0  0 0 3"/></asset><worldbody>
<geom type="sphere" size=".3"/> <geom type="capsule" size=".2 .5"/>
<geom type="cylinder" size=".2 .5"/> <geom type="box" size=".1 .2 .4"/>
<geom type="mesh" mesh="wedge"/> <geom type="plane" size="1 1 1"/>
<body name="moves" pos="0 0 5"><freejoint/><geom type="box" size=".1 .1 .1"/></body>
</worldbody></mujoco>
"""
SPHERE, CAPSULE, CYLINDER, BOX, MESH, PLANE, MOVES = range(7)
EVERYWHERE = np.full(3, -9.0), np.full(3, 9.0)


@pytest.fixture(scope="module")
def model():
    return mujoco.MjModel.from_xml_string(SCENE)


def distance(model, geom, points):
    """The distance of points in a geom's frame from its surface."""
    a, b, c = model.geom_size[geom]
    radius = np.linalg.norm(points[:, :2], axis=1)
    if geom == SPHERE:
        return abs(np.linalg.norm(points, axis=1) - a)
    if geom == CAPSULE:
        return abs(np.hypot(radius, (abs(points[:, 2]) - b).clip(0)) - a)
    if geom == CYLINDER:
        return np.where(
            abs(abs(points[:, 2]) - b) < 1e-9,
            (radius - a).clip(0),
            abs(radius - a) + (abs(points[:, 2]) > b),
        )
    if geom == BOX:
        return abs((abs(points) / [a, b, c]).max(1) - 1)
    faces = model.mesh_vert[model.mesh_face]
    normals = np.cross(faces[:, 1] - faces[:, 0], faces[:, 2] - faces[:, 0])
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    out = np.einsum("fd,nfd->nf", normals, points[:, None] - faces[:, 0])
    return abs(out.max(1))  # of a convex body: on one plane, inside all others


@pytest.mark.parametrize("geom", [SPHERE, CAPSULE, CYLINDER, BOX, MESH])
def test_points_are_on_the_surface_and_all_over_it(model, geom):
    points = on_surface(model, geom, 20_000, np.random.default_rng(1))
    assert distance(model, geom, points).max() < 1e-6
    assert distance(model, geom, points * 1.1).max() > 1e-3  # the measure does see it
    if geom in (CAPSULE, CYLINDER):
        a, b, _ = model.geom_size[geom]
        side = 4 * np.pi * a * b / area(model, geom)
        caps = points[abs(points[:, 2]) > b - 1e-9]
        assert len(caps) / len(points) == pytest.approx(1 - side, abs=0.02)
        assert np.linalg.norm(caps[:, :2], axis=1).mean() < 0.95 * a  # not on their rims
    if geom == BOX:
        on_x = abs(abs(points[:, 0]) - 0.1) < 1e-9
        assert on_x.mean() == pytest.approx(0.08 / 0.14, abs=0.02)
    if geom == SPHERE:
        assert points.std(0) == pytest.approx(0.3 / np.sqrt(3), rel=0.03)


def test_areas(model):
    assert area(model, SPHERE) == pytest.approx(4 * np.pi * 0.09)
    assert area(model, CYLINDER) == pytest.approx(2 * np.pi * 0.04 + 2 * np.pi * 0.2 * 1.0)
    assert area(model, CAPSULE) == pytest.approx(4 * np.pi * 0.04 + 2 * np.pi * 0.2 * 1.0)
    assert area(model, BOX) == pytest.approx(8 * 0.14)
    assert area(model, MESH) == pytest.approx(1 + 1.5 + 3 + 3.5, rel=1e-5)
    with pytest.raises(ValueError, match="kind 0, on which no points can be drawn"):
        area(model, PLANE)


def cloud(model, surface, low=EVERYWHERE[0], high=EVERYWHERE[1], turn=(1, 0, 0, 0), at=(0, 0, 5)):
    data = mujoco.MjData(model)
    data.qpos[:] = [*at, *turn]
    mujoco.mj_kinematics(model, data)
    return surface.points(data.geom_xpos, data.geom_xmat, low, high)


def test_points_move_with_their_body_and_nothing_else_does(model):
    surface = Surface(model, [MOVES, BOX], 200)
    still, moved = cloud(model, surface), cloud(model, surface, at=(1, 2, 6))
    mine = still[:, 2] > 4
    assert 20 < mine.sum() < 180
    assert np.allclose(moved[mine] - still[mine], [1, 2, 1])
    assert np.array_equal(moved[~mine], still[~mine])
    half = np.sqrt(0.5)
    turned = cloud(model, surface, turn=(half, 0, 0, half))  # a quarter around z
    assert np.allclose(turned[mine][:, :2], np.stack([-still[mine][:, 1], still[mine][:, 0]], 1))


def test_the_same_model_has_the_same_points(model):
    again = mujoco.MjModel.from_xml_string(SCENE)
    first, same = (
        cloud(model, Surface(model, [SPHERE, BOX], 50)),
        cloud(again, Surface(again, [SPHERE, BOX], 50)),
    )
    assert np.array_equal(first, same)
    assert not np.array_equal(first, cloud(model, Surface(model, [SPHERE, CAPSULE], 50)))


def test_a_cloud_is_cropped_and_keeps_its_size(model):
    surface = Surface(model, [SPHERE], 50)
    low, high = np.array([0.0, -9, -9]), np.array([9.0, 9, 9])
    half = cloud(model, surface, low, high)
    assert half.shape == (50, 3)
    assert half[:, 0].min() >= 0
    assert len(np.unique(half, axis=0)) == 50  # there were enough
    sliver = cloud(model, surface, np.array([0.28, -9, -9]), high)
    assert sliver.shape == (50, 3)
    assert 0 < len(np.unique(sliver, axis=0)) < 50
    nowhere = cloud(model, surface, np.full(3, 2.0), np.full(3, 3.0))
    assert np.array_equal(nowhere, np.full((50, 3), 2.0))


def test_a_small_thing_beside_a_large_one_is_seen(model):
    """The small box would have 3 % of the points if they were shared out by area."""
    small = (cloud(model, Surface(model, [MOVES, MESH], 400))[:, 2] > 4).mean()
    assert small == pytest.approx(np.sqrt(0.24) / (np.sqrt(0.24) + 3), abs=0.03)
    assert small > 2 * 0.24 / 9.24


def test_a_marker_is_around_its_place():
    marker = ball(np.array([1.0, 2.0, 3.0]), 0.02, 30)
    assert np.allclose(np.linalg.norm(marker - [1, 2, 3], axis=1), 0.02)
    assert np.allclose(marker - ball(np.zeros(3), 0.02, 30), [1, 2, 3])
    assert len(np.unique(marker, axis=0)) == 30
