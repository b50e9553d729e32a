"""LeRobot's DiffusionPolicy: its own encoder, U-Net, table and processors, sampled and scored by
our chain.

Nothing is forked or subclassed. What LeRobot samples is a special case: the ODE (its DDIM) or
DDIM(eta 1) (its DDPM) on the grid that `native_grid` gives. That grid never visits the noisiest
levels when steps are few (one step starts, and ends, at level 0), so that ours begins at the top
instead.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from genpolicy.chain import Prediction, VariancePreserving
from genpolicy.chain.schedule import Schedule
from genpolicy.chain.values import Parametrisation
from genpolicy.config.origin import PERSON, Origin
from genpolicy.config.schema import ChainConfig
from genpolicy.contracts.dataset import Dataset
from genpolicy.contracts.task import Context
from genpolicy.models import _head
from genpolicy.models import _lerobot as theirs
from genpolicy.models._device import default_device
from genpolicy.models._lerobot_diffusion_fresh import configure, draw
from genpolicy.models._lerobot_processors import Processors, load_processors, make_processors

HEADS: tuple[Parametrisation, ...] = ("epsilon", "sample")
"""The heads that LeRobot's DiffusionConfig knows."""


@dataclass(frozen=True)
class Seen:
    """The normalised observations of B rows, kept where the encoder still learns: name ->
    [B,history,*shape].
    """

    observation: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.observation[theirs.STATE])

    def __getitem__(self, rows: Tensor | slice) -> "Seen":
        return Seen({name: value[rows] for name, value in self.observation.items()})

    @classmethod
    def cat(cls, parts: Sequence["Seen"]) -> "Seen":
        """The rows of several, one after the other."""
        names = parts[0].observation
        return cls({name: torch.cat([part.observation[name] for part in parts]) for name in names})


@dataclass(eq=False)
class LeRobotDiffusion:
    """A LeRobot DiffusionPolicy as a `genpolicy.contracts.model.ControlModel`. The event is its
    whole horizon [T,D].

    pretrained: folder or hub id of a saved one; None: fresh weights in `initialise`.
    revision: the hub's branch, tag or commit.
    config: keys of LeRobot's DiffusionConfig for fresh ones (n_obs_steps, horizon, n_action_steps,
        down_dims, ...).
    prediction_type: meaning of the U-Net's output, "epsilon" or "sample", which the folder's
        config.json carries, so that LeRobot's own tools sample it rightly; None: what the saved
        one, or ``config``, says. With another head than the saved one's the weights stay as they
        are, and learn to say it. x0 is clipped as the config says, whatever the head, as LeRobot's
        schedulers do.
    train: "full" trains the U-Net and the cameras' encoder, which then runs in every evaluation;
        "denoiser" trains the U-Net alone, and cameras are encoded once per decision.
    spacing: the grid that `grid` gives, "trailing" from the noisiest level or "lerobot" as its own
        sampler visits it (`native_grid`, which does not depend on it).
    device: None takes this process's accelerator if there is one.
    origin: of this section.
    """

    pretrained: str | None = None
    revision: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    prediction_type: Parametrisation | None = None
    train: Literal["full", "denoiser"] = "full"
    spacing: Literal["trailing", "lerobot"] = "trailing"
    device: Any = None
    origin: Origin = field(default=PERSON, repr=False)

    acts: ClassVar[bool] = True
    learns_from: ClassVar[float] = 0.0
    draws: ClassVar[int] = 0

    def __post_init__(self) -> None:
        self.device = default_device() if self.device is None else torch.device(self.device)
        self.precision: Literal["fp32", "bf16", "fp16"] = "fp32"
        self.evaluations = 0.0
        own = self.config.get("prediction_type", HEADS[0])
        head = _head.choose(self.prediction_type, own, HEADS, "LeRobot's DiffusionPolicy")
        if self.pretrained is not None:
            folder = theirs.find(self.pretrained, self.revision, ("diffusion",))
            # its weights are all in the folder: those of the backbone alone need not be downloaded
            # first
            policy = theirs.load(folder, self.device, pretrained_backbone_weights=None)
            if self.prediction_type is not None:
                _head.tell(head, policy.config.prediction_type)
                policy.config.prediction_type = head
                policy.diffusion.noise_scheduler.register_to_config(prediction_type=head)
            self._adopt(policy, load_processors(policy.config, folder, self.device, self.origin))
            return
        self._config = configure(self.config, head, self.device)
        self._describe(self._config)

    def initialise(self, dataset: Dataset) -> None:
        """Fresh weights, from torch's global generator, for what of the data set a DiffusionPolicy
        can see.
        """
        policy = draw(self._config, dataset, self.device)
        self._adopt(policy, make_processors(self._config, dataset))

    def _describe(self, config: Any) -> None:
        """Takes over everything that follows from its config alone."""
        with theirs.lerobot():
            from lerobot.policies.diffusion.modeling_diffusion import _make_noise_scheduler

            names = (
                "num_train_timesteps",
                "beta_start",
                "beta_end",
                "beta_schedule",
                "clip_sample",
                "clip_sample_range",
            )
            settings = {name: getattr(config, name) for name in (*names, "prediction_type")}
            self._scheduler = _make_noise_scheduler(config.noise_scheduler_type, **settings)
        self.history = config.n_obs_steps
        self.executed = config.n_action_steps
        self.horizon = range(1 - self.history, 1 - self.history + config.horizon)
        self.parametrisation: Parametrisation = config.prediction_type
        final = float(getattr(self._scheduler, "final_alpha_cumprod", 1.0))  # DDPM's is always 1
        self.schedule: Schedule = VariancePreserving(self._scheduler.alphas_cumprod.double(), final)
        self._levels: int = config.num_train_timesteps
        # diffusers' DDPM takes eps of the clipped x0 again, its DDIM does not
        clip = (config.clip_sample_range, config.noise_scheduler_type == "DDPM")
        self.clip: tuple[float, bool] | None = clip if config.clip_sample else None

    def _adopt(self, policy: Any, processors: Processors) -> None:
        """Takes over a whole policy: its shapes, and what of it learns."""
        config = policy.config
        self._describe(config)
        self.policy = policy
        self.processors = processors
        used = [theirs.STATE, *config.image_features] + [theirs.WORLD] * (
            config.env_state_feature is not None
        )
        self.shapes = {name: tuple(config.input_features[name].shape) for name in used}
        self.action_dim: int = config.action_feature.shape[0]
        self.event_shape: tuple[int, ...] = (config.horizon, self.action_dim)
        # eval while it learns too: random crops would make a replay inexact
        policy.eval().requires_grad_(False)
        (policy.diffusion if self.train == "full" else policy.diffusion.unet).requires_grad_(True)
        encoder = getattr(policy.diffusion, "rgb_encoder", None)
        self._encoder_learns = self.train == "full" and encoder is not None

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that learn, by their names in the LeRobot policy."""
        return {name: p for name, p in self.policy.named_parameters() if p.requires_grad}

    def save(self, directory: Path, sampler: ChainConfig | None = None) -> None:
        """A folder that LeRobot's own tools load."""
        own = self.policy.config.device
        self.policy.config.device = self.device.type
        self.policy.save_pretrained(directory)
        self.policy.config.device = own
        self.processors.save(directory)

    # The chain's view

    def grid(self, steps: int, start: float | None = None) -> Tensor:
        """K+1 noise times as ``spacing`` says: from the noisiest level, or as LeRobot visits them.
        From ``start``, where LeRobot has no grid of its own, they are spaced alike.
        """
        if self.spacing == "lerobot" and start is None:
            return self.native_grid(steps)
        return self.schedule.grid(steps, start)

    def native_grid(self, steps: int) -> Tensor:
        """The K+1 noise times that LeRobot itself visits with num_inference_steps = ``steps``."""
        self._scheduler.set_timesteps(steps)
        times = (self._scheduler.timesteps.double() + 1) / self._levels
        return torch.cat([times, times.new_zeros(1)])

    def times(self, uniform: Tensor) -> Tensor:
        """One of the levels, all alike, as LeRobot draws them."""
        return ((uniform * self._levels).floor() + 1) / self._levels

    def encode(self, context: Context) -> Tensor | Seen:
        """The condition of the U-Net, [B,G]; where the encoder learns, what that is to see."""
        batch = self.processors.observe(context, self.history, self.shapes)
        seen = Seen({name: batch[name].to(self.device) for name in self.shapes})
        return seen if self._encoder_learns else self._encoded(seen)

    def _encoded(self, condition: Tensor | Seen) -> Tensor:
        if isinstance(condition, Tensor):
            return condition
        batch = dict(condition.observation)
        cameras = self.policy.config.image_features
        if cameras:
            batch["observation.images"] = torch.stack([batch[name] for name in cameras], dim=-4)
        return self.policy.diffusion._prepare_global_conditioning(batch)

    def negative(self, condition: Tensor | Seen) -> Tensor:
        """Raises: it has no unconditional branch."""
        raise ValueError(
            "policy lerobot_diffusion has no unconditional branch; set chain.guidance to 1"
        )

    def denoise(self, x: Tensor, t: Tensor, condition: Tensor | Seen) -> Prediction:
        """One evaluation of the U-Net on x [B,T,D] at t [B], counted."""
        level = (t * self._levels).round().long().to(x.device) - 1
        output = self.policy.diffusion.unet(x, level, global_cond=self._encoded(condition))
        self.evaluations += len(x) * (2 if output.requires_grad else 1)
        return Prediction.of(
            self.parametrisation, output, x, self.schedule.alpha(t), self.schedule.sigma(t)
        )

    def scored(self, value: Tensor) -> Tensor:
        """Every dim counts: actions that are not executed feed back into those that are."""
        return value

    def supervised(self, context: Context, uniform: Tensor) -> tuple[Tensor | Seen, Tensor]:
        """`encode`: LeRobot's encoders have no losses of their own, and its image augmentation is
        its data loader's.
        """
        return self.encode(context), torch.zeros(len(context), device=self.device)

    @torch.no_grad()
    def features(self, condition: Tensor | Seen) -> Tensor:
        """The condition of the U-Net, [B,G], without a gradient."""
        return self._encoded(condition).detach()

    def event(self, actions: Tensor) -> Tensor:
        """Actions [B,T,D] at the offsets ``horizon``, normalised as LeRobot does."""
        return self.processors.event(actions.to(self.device))

    def event_mask(self, pad: Tensor) -> Tensor | None:
        """The actions inside the episode, if its config masks the others
        (do_mask_loss_for_padding).
        """
        return (
            ~pad[..., None].to(self.device) if self.policy.config.do_mask_loss_for_padding else None
        )

    def observations(self, standard: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of LeRobot's normalisation."""
        return self.processors.observations(standard, self.shapes)

    def decode(self, x0: Tensor) -> Tensor:
        """The executed actions, from the current frame's on, [B,executed,D] in the environment's
        units.
        """
        first = self.history - 1
        return self.processors.actions(x0[:, first : first + self.executed])
