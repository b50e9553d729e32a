"""Small simulations that the tests can reason about."""

import os
import sys

import numpy as np


class Box:
    def __init__(self, low, high):
        self.low, self.high = np.full(2, low, np.float32), np.full(2, high, np.float32)


class Walk:
    """A point in the plane, its action added to it and a little noise of its own. At x > 3 it is
    done.

    The reward is the clipped action's sum, so that tests see which actions were taken.
    """

    def __init__(self):
        self.action_space = Box(-1, 1)

    def reset(self, *, seed):
        self.noise = np.random.default_rng(seed)
        self.at = self.noise.uniform(-1, 1, 2)
        return self.see(), {}

    def step(self, action):
        self.at = self.at + action + 0.01 * self.noise.standard_normal(2)
        done = bool(self.at[0] > 3)
        return self.see(), float(action.sum()), done, False, {"success": done}

    def see(self):
        return {"observation.state": self.at.astype(np.float32)}

    def render(self):
        raise OSError("no\nscreen")

    def close(self):
        pass


class Leaky(Walk):
    """Forgets to seed its noise again: an episode depends on what ran before it."""

    def reset(self, *, seed):
        kept = getattr(self, "noise", None)
        seen = super().reset(seed=seed)
        self.noise = kept or self.noise
        return seen


class Counter(Walk):
    """Shows how many steps it has taken; success flickers at step 2; it is never done by itself."""

    def reset(self, *, seed):
        self.count = 0
        return self.see(), {}

    def step(self, action):
        self.count += 1
        return self.see(), 1.0, False, False, {"success": self.count == 2}

    def see(self):
        grey = np.full((3, 2, 2), self.count, np.uint8)
        return {
            "observation.state": np.array([self.count, 0], np.float32),
            "observation.images.top": grey,
        }


class Cuts(Counter):
    """Ends its episodes itself at step 3, by its own limit."""

    def step(self, action):
        seen, reward, _, _, info = super().step(action)
        return seen, reward, False, self.count == 3, info


class Odd(Walk):
    """Fails in a way that the sign of the first action chooses, and prints while it works."""

    def step(self, action):
        print("a message on standard output")
        if action[0] > 0.5:
            raise ValueError("the arm has come off")
        if action[0] < -0.5:
            os._exit(3)
        return super().step(action)

    def see(self):
        return {"observation.state": np.array([os.getpid(), "torch" in sys.modules], np.float32)}


class Stuck(Odd):
    """Hangs in its first step."""

    def step(self, action):
        while True:
            pass


class Broken(Walk):
    def __init__(self):
        raise ValueError("there is no such arm")
