"""LeRobot's flow vision-language-action policies, SmolVLA, pi0 and pi0.5: encode, denoise, decode.

Composition over the loaded policy, nothing of it is copied or subclassed: what is seen and asked
goes through the vision-language model once, and a network evaluation is the action expert's
``denoise_step``. LeRobot's time is ours: 1 is noise, 0 the actions, x_t = (1 - t) x_0 + t eps, and
the network says v = eps - x_0 (a student may say x_0 itself, see ``prediction_type``).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from genpolicy.chain import Linear, Prediction
from genpolicy.chain.schedule import Schedule
from genpolicy.chain.values import Parametrisation, expand
from genpolicy.config.origin import PERSON, Origin
from genpolicy.config.schema import ChainConfig
from genpolicy.contracts.dataset import Dataset
from genpolicy.contracts.task import Context
from genpolicy.models import _head
from genpolicy.models import _lerobot as theirs
from genpolicy.models._device import default_device
from genpolicy.models._lerobot_flow_families import FAMILIES, training_times
from genpolicy.models._lerobot_flow_files import Files
from genpolicy.models._lerobot_flow_networks import Networks
from genpolicy.models._lerobot_processors import Processors
from genpolicy.models._observed import observed
from genpolicy.models._vla_prefix import Prefix, Seen

WORDS = "observation.language."
"""The beginning of the names of what LeRobot's preprocessors make of an instruction."""
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EMPTY = "observation.images.empty_camera"
"""The beginning of the names of cameras that a checkpoint has and no robot needs: LeRobot itself
fills them in.
"""


@dataclass(eq=False)
class LeRobotFlow:
    """A SmolVLA, pi0 or pi0.5 as a `genpolicy.contracts.model.ControlModel`. The event is a chunk
    in the network's own dims.

    pretrained: folder or hub id of a policy as LeRobot saves it; its config.json says which of the
        three it is.
    base: the same, of one that is to learn another robot: its weights, with the data set's shapes
        and statistics (`initialise`). Read only while ``pretrained`` is null.
    revision: the hub's branch, tag or commit.
    tokenizer: folder or hub id in place of the tokenizer that the checkpoint names (pi's is gated);
        of SmolVLA it must also have the VLM's configuration and processor.
    train: "expert" trains the action expert and freezes all that the prefix is computed with (of
        SmolVLA the projection of the state too), so that one prefix serves all steps and updates;
        "full" trains everything, and encodes the prefix anew wherever a gradient is taken.
    prediction_type: meaning of the expert's output. null is "velocity", all that LeRobot's training
        and tools know. A student may say "sample" (its weights stay as they are, and learn to say
        it): its folder can't tell them, so that only this package samples it rightly, by the policy
        section in the genpolicy.json beside it.
    padding: the network has max_action_dim dims, of which the robot uses the first. "zero": the
        others follow their exact flow to 0, x_s = (s/t) x_t, and no parameter acts through them.
        "network": they follow what the network says, which LeRobot does not train, as in its own
        samplers.
    keep: prefixes of a rollout's rows stay in memory for its updates (SmolVLA 2 MB per row, pi0
        15 MB, in bf16); false encodes them anew for every minibatch.
    precision: dtype that what is frozen is stored in, and that the networks run in (autocast). What
        learns is fp32, and so is the kernel algebra.
    device: null takes this process's accelerator if there is one.
    origin: of this section.
    """

    pretrained: str | None = None
    base: str | None = None
    revision: str | None = None
    tokenizer: str | None = None
    train: Literal["expert", "full"] = "expert"
    prediction_type: Parametrisation | None = None
    padding: Literal["zero", "network"] = "zero"
    keep: bool = True
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    device: Any = None
    origin: Origin = field(default=PERSON, repr=False)
    shapes: dict[str, tuple[int, ...]] = field(init=False, default_factory=dict)
    action_dim: int = field(init=False, default=0)

    acts: ClassVar[bool] = True
    learns_from: ClassVar[float] = 0.0
    draws: ClassVar[int] = 0

    def __post_init__(self) -> None:
        source = self.pretrained or self.base
        if source is None:
            raise ValueError(
                "policy lerobot_flow needs pretrained, or base to begin from with a data set; both"
                " are null"
            )
        self.parametrisation: Parametrisation = _head.choose(
            self.prediction_type, "velocity", _head.FLOW, "lerobot_flow"
        )
        self.device = default_device() if self.device is None else torch.device(self.device)
        self._files = Files.find(source, self.revision, self.tokenizer, self.device, self.origin)
        self.policy = self._files.policy()  # in eval mode while it learns too: replay must be exact
        config = self.policy.config
        self._family = FAMILIES[config.type]
        self._networks = Networks(
            self.policy,
            self._family,
            self.device,
            PRECISIONS[self.precision],
            whole=self.train == "full",
        )
        self.schedule: Schedule = Linear()
        self.clip: tuple[float, bool] | None = None
        self.evaluations = 0.0
        self.history = 1
        self.executed: int = config.n_action_steps
        self.horizon = range(config.chunk_size)
        self.event_shape: tuple[int, ...] = (config.chunk_size, config.max_action_dim)
        if self.pretrained is not None:
            self._adopt(self._files.processors(config))

    # Shapes, statistics, and what learns

    def initialise(self, dataset: Dataset) -> None:
        """Take the data set's shapes and statistics; the weights stay those of ``base``."""
        config = self.policy.config
        cameras = [name for name in dataset.shapes if name.startswith(theirs.CAMERA)]
        if theirs.STATE not in dataset.shapes or not cameras:
            raise ValueError(
                f"lerobot_flow needs {theirs.STATE} and a camera; the data set has"
                f" {', '.join(dataset.shapes)}"
            )
        for name, most in ((theirs.STATE, config.max_state_dim), ("action", config.max_action_dim)):
            (dim,) = dataset.shapes[name]
            if dim > most:
                raise ValueError(
                    f"the data set's {name} has {dim} dims; policy.base {self.base} has room for"
                    f" {most}"
                )
        config.input_features = theirs.features(dataset.shapes, [*cameras, theirs.STATE])
        config.output_features = theirs.features(dataset.shapes, ["action"])
        self._adopt(self._files.new_processors(config, dataset))

    def _adopt(self, processors: Processors) -> None:
        config = self.policy.config
        self.processors = processors
        self.shapes = {
            name: tuple(feature.shape)
            for name, feature in config.input_features.items()
            if not name.startswith(EMPTY)
        }
        (self.action_dim,) = config.output_features["action"].shape
        self._networks.choose_what_learns(self._dry)

    def _dry(self) -> Tensor:
        """Evaluates the expert at a blank row."""
        frame = {name: torch.zeros(1, 1, *shape) for name, shape in self.shapes.items()}
        x = torch.zeros(1, *self.event_shape, device=self.device)
        t = torch.ones(1, device=self.device)
        return self._networks.velocity(x, t, self.encode(Context([""], frame)))

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that learn, by their names in the policy's network, in its order."""
        return self._networks.trainable()

    def save(self, directory: Path, sampler: ChainConfig | None = None) -> None:
        """A folder that LeRobot's own tools load."""
        self._files.save(self.policy, self.processors, directory)

    # What is seen and asked

    def encode(self, context: Context) -> Seen:
        """The last frame and the instruction through the policy's own preprocessor; the prefix
        waits until it is needed.
        """
        batch: dict[str, Any] = {"task": list(context.prompts)}
        for name, shape in self.shapes.items():
            batch[name] = observed(context, name, (self.history, *shape))[:, -1]
        with theirs.lerobot():
            made = self.processors.pre(batch)
        seen = {name: value for name, value in made.items() if name.startswith("observation.")}
        return Seen.all(seen, self.keep)

    def words(self, instruction: str) -> dict[str, Tensor]:
        """The instruction as the vision-language model reads it, name -> [1,S]: its tokens, and
        which of them count. S is the most that it reads, whatever is said, so that another
        instruction has the same shapes.

        Raises `ValueError` for pi0.5, whose tokens hold the robot's state, too.
        """
        if self._family.state == "prompt":
            raise ValueError(
                "pi0.5 writes the robot's state into its prompt, as text: its tokens are other ones"
                " at every decision"
            )
        frame = {name: torch.zeros(1, 1, *shape) for name, shape in self.shapes.items()}
        batch = self.encode(Context([instruction], frame)).batch
        most = self.policy.config.tokenizer_max_length
        return {
            name: functional.pad(value, (0, most - value.shape[1]))
            for name, value in batch.items()
            if name.startswith(WORDS)
        }

    def told(self, condition: Seen, words: Mapping[str, Tensor]) -> Seen:
        """The same rows, told what `words` says, [B,S] each."""
        return Seen.all({**condition.batch, **words}, condition.keep)

    def prefix(self, condition: Seen) -> dict[str, Tensor]:
        """The keys and values that the expert attends to, those that count, and the summary."""
        return self._networks.prefix(condition).named()

    def resumed(self, condition: Seen, prefix: Mapping[str, Tensor]) -> Seen:
        """The same rows, whose prefix is known; what they see and are told is not read again."""
        return self._networks.knowing(condition.batch, Prefix.of_names(prefix))

    def negative(self, condition: Seen) -> Seen:
        """Raises: it has no unconditional branch."""
        raise ValueError("policy lerobot_flow has no unconditional branch; set chain.guidance to 1")

    def supervised(self, context: Context, uniform: Tensor) -> tuple[Seen, Tensor]:
        """`encode`: LeRobot's encoders have no losses of their own, and its image augmentation is
        its data loader's.
        """
        return self.encode(context), torch.zeros(len(context), device=self.device)

    @torch.no_grad()
    def features(self, condition: Seen) -> Tensor:
        """The mean over the prefix's valid tokens of its last hidden states, and the normalised
        state: [B,F].
        """
        state = condition.value(theirs.STATE).float()
        return torch.cat([self._networks.prefix(condition).summary, state], -1)

    # The chain's view

    def grid(self, steps: int, start: float | None = None) -> Tensor:
        """K uniform steps from ``start`` (None: 1) to 0."""
        return self.schedule.grid(steps, start)

    def native_grid(self, steps: int) -> Tensor:
        """The same as `grid`: LeRobot's samplers take uniform Euler steps from 1 to 0."""
        return self.grid(steps)

    def times(self, uniform: Tensor) -> Tensor:
        """scale * Beta(a, b) + offset: .999 u^(2/3) + .001 unless configured otherwise."""
        return training_times(self.policy.config, uniform)

    def denoise(self, x: Tensor, t: Tensor, condition: Seen) -> Prediction:
        """One evaluation of the expert on x [B,T,max_action_dim] at t [B], counted."""
        output = self._networks.velocity(x, t, condition)
        self.evaluations += len(x) * (2 if output.requires_grad else 1)
        prediction = Prediction.of(
            self.parametrisation, output, x, self.schedule.alpha(t), self.schedule.sigma(t)
        )
        if self.padding == "network" or self.action_dim == x.shape[-1]:
            return prediction
        padded = x[..., self.action_dim :]  # x_0 is 0 there, and all of x is noise
        noise = padded / expand(self.schedule.sigma(t), padded)
        return Prediction(
            torch.cat([self.scored(prediction.x0), torch.zeros_like(padded)], -1),
            torch.cat([self.scored(prediction.eps), noise], -1),
        )

    def scored(self, value: Tensor) -> Tensor:
        """The robot's own dims, [B,T,action_dim]."""
        return value[..., : self.action_dim]

    # Actions

    def event(self, actions: Tensor) -> Tensor:
        """Actions [B,T,action_dim] normalised as LeRobot does, and zeros in the padded dims."""
        padded = self.event_shape[-1] - self.action_dim
        return functional.pad(self.processors.event(actions.to(self.device)), (0, padded))

    def event_mask(self, pad: Tensor) -> Tensor:
        """bool [B,T,max_action_dim]: padded dims never count. As in LeRobot's own losses, SmolVLA
        leaves actions outside the episode out as well, pi0 and pi0.5 learn them.
        """
        counts = torch.ones_like(pad) if self._family.learns_pad else ~pad
        robot = torch.arange(self.event_shape[-1]) < self.action_dim
        return counts.to(self.device)[..., None] & robot.to(self.device)

    def observations(self, standard: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of LeRobot's normalisation."""
        return self.processors.observations(standard, self.shapes)

    def decode(self, x0: Tensor) -> Tensor:
        """The executed actions, [B,executed,action_dim] in the environment's units."""
        return self.processors.actions(self.scored(x0)[:, : self.executed])
