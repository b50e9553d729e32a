"""MetaWorld's arm as a simulation whose goal can be seen: as numbers, in pictures or in point
clouds.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Literal

import numpy as np

from genpolicy.config.errors import ConfigError, RenderError
from genpolicy.tasks._point_cloud import Surface, ball
from genpolicy.tasks._sawyer_pictures import BEHIND, GOAL_RADIUS, WAYS, Moment, moment, studio
from genpolicy.tasks._simulators import library
from genpolicy.tasks._slots import Frame

STATE = "observation.state"
WORLD = "observation.environment_state"
PICTURES = "observation.images.top"
POINTS = "observation.points"
See = Literal["state", "pixels", "points"]
HAND = 4
"""Numbers about the hand, the first of the 39 that MetaWorld shows: its x, y, z and how far the
gripper is open.
"""
PICTURE = 240
"""Height and width of what `render` draws, in pixels."""
CAMERA = {"lookat": (0.0, 0.65, 0.15), "distance": 1.35, "azimuth": 135.0, "elevation": -30.0}
"""A view from behind the arm's shoulder, metres and degrees: doors and shelves show their fronts.
MetaWorld's own cameras at the corners are upside down.
"""
DRAWS = 1000
"""Starts that are drawn, at most, in search of one in which object and goal are apart."""
GRIPPER = frozenset(("hand", "leftpad", "rightpad", "leftclaw", "rightclaw"))
"""Bodies that a cloud shows as the gripper."""
ELSEWHERE = BEHIND | {
    "world",
    "tablelink",
    "RetainingWall",
    "right_l5",
    "right_l6",
    "right_wrist",
    "right_hand",
}
"""Bodies of which a cloud shows nothing: the room, the table, the arm above its hand."""
WORKSPACE = np.array([-0.45, 0.35, -0.05]), np.array([0.45, 1.0, 0.45])
"""Corners of the box that a cloud shows, metres."""
GRIPPER_SHARE = 4
"""One point of so many is the gripper's."""
GOAL_SHARE = 16
"""One point of so many is the goal's; the rest are the objects'."""


def catalogue() -> dict[str, Any]:
    """MetaWorld's environments by name."""
    return library("metaworld.env_dict", "task metaworld").ALL_V3_ENVIRONMENTS


class Lazy(Mapping[str, np.ndarray]):
    """A frame whose values are made when they are first looked at; most moments of a chunk of
    actions never are.
    """

    def __init__(self, makers: Mapping[str, Callable[[], np.ndarray]]) -> None:
        self._makers = dict(makers)
        self._made = dict[str, np.ndarray]()

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._made:
            self._made[name] = self._makers[name]()
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


class Sawyer:
    """A `genpolicy.tasks._slots.Simulation` of one MetaWorld task whose goal can be seen.

    see: what its frames show beside the hand (see `genpolicy.tasks.metaworld`); size: of pictures;
    points: of clouds; spread: of starts. numbers: the 39 of the last frame, fp32, whatever it
    showed.
    """

    def __init__(
        self,
        env: str,
        reward: str,
        see: See = "state",
        size: int = 64,
        points: int = 128,
        spread: float = 1.0,
    ) -> None:
        self._world = catalogue()[env]()
        world = self._world
        world._partially_observable = False
        # The bounds of what is seen were cached when the goal was still hidden; step() would clip
        # the goal to 0.
        world.__dict__.pop("sawyer_observation_space", None)
        # objects and goal are drawn from the seed
        world._freeze_rand_vec = False
        world.seeded_rand_vec = True
        world._set_task_called = True  # nothing else of a task is needed
        world.max_path_length = np.inf  # the limit is kept outside
        if spread < 1:
            self._draw = world._get_state_rand_vec
            world._get_state_rand_vec = self._apart
            space = world._random_reset_space
            middle, half = (space.high + space.low) / 2, (space.high - space.low) / 2
            world._random_reset_space = type(space)(
                middle - spread * half, middle + spread * half, dtype=space.dtype
            )
        self._settle = world._reset_hand
        world._reset_hand = self._settled_once
        world.touching_object = partial(touching, world)
        self._sparse = reward == "sparse"
        self._renderer: Any = None
        self.action_space = world.action_space
        self._env = env
        self._see = see
        self._size = size
        if see == "points":
            self._cloud = Cloud(world.model, points)
        if spread < 1:
            self.reset(seed=0)  # says now what could not be drawn later

    def reset(self, *, seed: int) -> tuple[Frame, dict[str, Any]]:
        self._world.seed(seed)
        self._forgotten = True
        self._draws = 0
        observation, _ = self._world.reset()
        if self._see != "state":
            # tasks move fixtures after the last forward pass; the next step would put them in place
            library("mujoco", "task metaworld").mj_kinematics(self._world.model, self._world.data)
        return self._frame(observation), {}

    def step(self, action: np.ndarray) -> tuple[Frame, float, bool, bool, dict[str, Any]]:
        observation, reward, _, _, info = self._world.step(action)
        success = bool(info["success"])
        reward = float(success if self._sparse else reward)
        return self._frame(observation), reward, success, False, {"success": success}

    def _settled_once(self, *steps: int) -> None:
        """Lets the hand come to rest in the second half of a reset only: those fifty steps are half
        of what a reset costs. MetaWorld's reset() sets everything up twice, the second time from
        nothing: of the first only the model and the random numbers are kept.
        """
        if self._forgotten:
            self._forgotten = False
            self._world.init_tcp = self._world.tcp_center
        else:
            self._settle(*steps)

    def _apart(self) -> np.ndarray:
        """Draws a start. Tasks draw until object and goal are far enough apart, which never happens
        in too small a part of the range: then raises `ConfigError`.
        """
        self._draws += 1
        if self._draws > DRAWS:
            raise ConfigError(
                f"task metaworld: spread is too small for {self._env}, "
                "whose object and goal would be too close; raise it"
            )
        return self._draw()

    def render(self) -> np.ndarray:
        mujoco: Any = library("mujoco", "task metaworld")
        if self._renderer is None:
            try:
                self._renderer = mujoco.Renderer(self._world.model, PICTURE, PICTURE)
            except Exception as error:  # EGL's, GLFW's or OSMesa's
                raise RenderError(
                    f"MuJoCo can't draw here: {' '.join(str(error).split())}; {WAYS}"
                ) from error
            self._camera = mujoco.MjvCamera()
            for setting, value in CAMERA.items():
                setattr(self._camera, setting, value)
        self._renderer.update_scene(self._world.data, self._camera)
        return self._renderer.render()

    def close(self) -> None:
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None
        self._world.close()

    def _frame(self, observation: np.ndarray) -> Frame:
        self.numbers = observation.astype(np.float32)
        hand = self.numbers[:HAND]
        if self._see == "state":
            return {STATE: hand, WORLD: self.numbers[HAND:]}
        now = moment(self._world)
        if self._see == "points":
            return Lazy({STATE: lambda: hand, POINTS: partial(self._cloud, now)})
        # The studio too is made when somebody looks: the expert of a demonstration and a film's
        # camera do not.
        draw = partial(studio, self._env, self._world.model, self._size)
        return Lazy({STATE: lambda: hand, PICTURES: lambda: draw().draw(now)})


def touching(world: Any, geom: int) -> bool:
    """Tells if both pads of the gripper press on a geom: MetaWorld's own `touching_object` without
    an object for every contact, which was a third of a step.
    """
    data = world.data
    pairs = data.contact.geom
    rows = data.contact.efc_address
    for pad in ("leftpad_geom", "rightpad_geom"):
        ours = (pairs == data.geom(pad).id).any(1) & (pairs == geom).any(1)
        if not sum(data.efc_force[rows[ours]]) > 0:
            return False
    return True


class Cloud:
    """A task's point cloud: the gripper's points, the goal's (a ball as pictures show it), then the
    objects', fp32 [P,3].
    """

    def __init__(self, model: Any, points: int) -> None:
        bodies = [model.body(body).name for body in model.geom_bodyid]
        drawn = [
            geom
            for geom in range(model.ngeom)
            if model.geom_group[geom] < 3 and model.geom_rgba[geom, 3] > 0
        ]
        gripper = [geom for geom in drawn if bodies[geom] in GRIPPER]
        objects = [geom for geom in drawn if bodies[geom] not in GRIPPER | ELSEWHERE]
        self._goal = points // GOAL_SHARE
        self._gripper = Surface(model, gripper, points // GRIPPER_SHARE)
        self._objects = Surface(model, objects, points - self._goal - self._gripper.count)

    def __call__(self, now: Moment) -> np.ndarray:
        surfaces = [
            s.points(now.geom_xpos, now.geom_xmat, *WORKSPACE)
            for s in (self._gripper, self._objects)
        ]
        marker = ball(now.goal, GOAL_RADIUS, self._goal)
        return np.concatenate([surfaces[0], marker, surfaces[1]]).astype(np.float32)
