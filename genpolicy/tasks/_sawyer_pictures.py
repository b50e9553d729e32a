"""Pictures of MetaWorld's table for a policy to see: small, without shadows, of a moment that may
be long past.

One renderer serves every simulation of a task in this process: a moment is the poses that a picture
follows from, copied in microseconds, and drawn only if somebody looks (2 ms of a CPU core for 64 x
64 pixels by Mesa's llvmpipe; with MuJoCo's shadows and sixteen-fold samples it would be 40).
"""

import atexit
from typing import Any, NamedTuple

import numpy as np

from genpolicy.config.errors import RenderError
from genpolicy.tasks._simulators import library

VIEW = {"lookat": (0.0, 0.68, 0.05), "distance": 0.8, "azimuth": -90.0, "elevation": -65.0}
"""A view steeply from above the table's far side, metres and degrees: the arm comes from the
picture's top and hides little.
"""
UNSEEN = 5
"""A geom group that is not drawn."""
_ARM = "right_arm_base_link right_l0 right_l1 right_l2 right_l3 right_l4 right_arm_itb"
BEHIND = frozenset(f"base controller_box pedestal_feet torso pedestal head screen {_ARM}".split())
"""The arm's parts that are not in the picture, or at its edge: two thirds of all triangles."""
GOAL_RADIUS = 0.02
GOAL_COLOUR = (0.0, 1.0, 0.0, 1.0)
WAYS = "set MUJOCO_GL to egl, glfw or osmesa"
FLAT = ("mjRND_SHADOW", "mjRND_REFLECTION", "mjRND_SKYBOX", "mjRND_FOG", "mjRND_HAZE")


class Moment(NamedTuple):
    """The poses of everything, in metres: of G geoms and L lights, and the goal."""

    geom_xpos: np.ndarray  # [G,3]
    geom_xmat: np.ndarray  # [G,9]
    light_xpos: np.ndarray  # [L,3]
    light_xdir: np.ndarray  # [L,3]
    goal: np.ndarray  # [3]


def moment(world: Any) -> Moment:
    """The present moment of a MetaWorld environment."""
    poses = {name: getattr(world.data, name).copy() for name in Moment._fields[:-1]}
    return Moment(goal=world._target_pos.copy(), **poses)


class Studio:
    """Draws moments of one MuJoCo model, of which it keeps a copy, as pictures of ``size`` x
    ``size`` pixels.
    """

    def __init__(self, model: Any, size: int) -> None:
        self._mujoco: Any = library("mujoco", "task metaworld")
        model = model.__copy__()
        model.vis.quality.offsamples = 0
        model.vis.global_.offwidth = model.vis.global_.offheight = size
        for geom, body in enumerate(model.geom_bodyid):
            if model.body(body).name in BEHIND:
                model.geom_group[geom] = UNSEEN
        self._data = self._mujoco.MjData(model)
        try:
            self._renderer = self._mujoco.Renderer(model, size, size)
        except Exception as error:  # EGL's, GLFW's or OSMesa's
            raise RenderError(
                f"MuJoCo can't draw here: {' '.join(str(error).split())}; {WAYS}"
            ) from error
        atexit.register(self._renderer.close)
        for flag in FLAT:
            self._renderer.scene.flags[getattr(self._mujoco.mjtRndFlag, flag)] = 0
        self._camera = self._mujoco.MjvCamera()
        self._options = self._mujoco.MjvOption()
        for setting, value in VIEW.items():
            setattr(self._camera, setting, value)
        self._options.sitegroup[:] = 0  # some are drawn at the goal, others at nothing

    def draw(self, seen: Moment) -> np.ndarray:
        """The picture of a moment, uint8 [3,size,size], with a green ball where the goal is."""
        for name in Moment._fields[:-1]:
            getattr(self._data, name)[:] = getattr(seen, name)
        self._renderer.update_scene(self._data, self._camera, self._options)
        scene = self._renderer.scene
        ball = scene.geoms[scene.ngeom]
        sphere = self._mujoco.mjtGeom.mjGEOM_SPHERE
        radii = np.full(3, GOAL_RADIUS)
        colour = np.array(GOAL_COLOUR, np.float32)
        self._mujoco.mjv_initGeom(ball, sphere, radii, seen.goal, np.eye(3).ravel(), colour)
        scene.ngeom += 1
        return self._renderer.render().transpose(2, 0, 1).copy()


_studios: dict[tuple[str, int], Studio] = {}


def studio(env: str, model: Any, size: int) -> Studio:
    """The studio of this task in this process: its meshes take a third of a second to load."""
    if (env, size) not in _studios:
        _studios[env, size] = Studio(model, size)
    return _studios[env, size]
