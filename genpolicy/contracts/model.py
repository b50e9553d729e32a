"""The contracts of models: families of networks behind one meaning."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from genpolicy.chain import Condition, Prediction
from genpolicy.chain.schedule import Schedule
from genpolicy.chain.values import Parametrisation
from genpolicy.config.errors import ConfigError
from genpolicy.config.schema import ChainConfig
from genpolicy.contracts.dataset import Dataset
from genpolicy.contracts.task import Context, ControlTask


class Model(Protocol):
    """A family of networks behind one meaning: encode, denoise, decode.

    schedule: alpha(t) and sigma(t).
    parametrisation: the meaning of the network's output, its setting ``prediction_type``, saved
        with the weights.
    event_shape: E of one sample as the chain sees it.
    clip: (bound, recompute_eps) of the predicted x0 (see `ClipX0`), whatever the parametrisation;
        None where the family does not clip.
    acts: True where samples are chunks of actions (`ControlModel`).
    learns_from: noise time below which another, frozen network denoises in the place of the one
        that learns (Wan 2.2's second expert); 0 where there is none.
    draws: uniform numbers that a row of `supervised` takes.
    device, precision: where and in what the network runs.
    evaluations: network evaluations so far, in rows; a row whose evaluation is differentiated
        counts twice, a backward priced as a forward.
    """

    schedule: Schedule
    parametrisation: Parametrisation
    event_shape: tuple[int, ...]
    clip: tuple[float, bool] | None
    acts: ClassVar[bool]
    learns_from: float
    draws: int
    device: torch.device
    precision: Literal["fp32", "bf16", "fp16"]
    evaluations: float

    def grid(self, steps: int, start: float | None = None) -> Tensor:
        """K+1 decreasing noise times (fp64) from ``start`` (None: the noisiest) to 0."""
        ...

    def native_grid(self, steps: int) -> Tensor:
        """The K+1 decreasing noise times (fp64), ending at 0, that the family's own library visits
        in ``steps`` steps; of networks that no other library samples, the same as `grid`.
        """
        ...

    def encode(self, context: Context) -> Condition:
        """Condition of B rows: prompts once per distinct one and cached, observations normalised
        and encoded.
        """
        ...

    def negative(self, condition: Condition) -> Condition:
        """The unconditional (negative-prompt) condition of the same rows."""
        ...

    def denoise(self, x: Tensor, t: Tensor, condition: Condition) -> Prediction:
        """One unguided, unclipped network evaluation, counted. x [B,*E] fp32, t [B] (or [B,T]) ->
        Prediction, fp32.
        """
        ...

    def scored(self, value: Tensor) -> Tensor:
        """The dims of [B,*E] (or of what broadcasts to it) that likelihoods count: all but those
        that no parameter acts through (padding).
        """
        ...

    def features(self, condition: Condition) -> Tensor:
        """The condition as a critic sees it, Float[B,F], detached."""
        ...

    def decode(self, x0: Tensor) -> Tensor:
        """Samples [B,*E] to outputs: images Float[B,3,H,W] in [0,1], videos Float[B,F,3,H,W], or
        the chunk of actions that is executed, Float[B,T,D] in the environment's units.
        """
        ...

    def event(self, outputs: Tensor) -> Tensor:
        """Outputs as the chain's x0 [B,*E], drawing nothing: pictures or videos as `decode` gives
        them, up to the VAE's own loss; of a `ControlModel`, actions Float[B,T,D] in the
        environment's units at the offsets ``horizon``.
        """
        ...

    def event_mask(self, pad: Tensor) -> Tensor | None:
        """The dims of an event that a supervised loss counts, bool, broadcastable to [B,*E] (None:
        all), where ``pad`` bool[B,T] says which actions lie outside their episode: what the
        family's own training does.
        """
        ...

    def times(self, uniform: Tensor) -> Tensor:
        """Noise times to train at, [B] fp64, from uniform numbers in [0,1): the family's own
        training distribution.
        """
        ...

    def supervised(self, context: Context, uniform: Tensor) -> tuple[Condition, Tensor]:
        """The condition of B rows to imitate from, and what the encoder's own losses add to each
        row's loss [B]. uniform [B,``draws``] in [0,1): all its chance (augmentation, a bottleneck's
        samples). A model without any says `encode`, 0.
        """
        ...

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that learn, by name, in a fixed order. fp32."""
        ...

    def save(self, directory: Path, sampler: ChainConfig | None = None) -> None:
        """Write the policy in its ecosystem's own format; with the sampler that it is deployed
        with, where that format can say it.
        """
        ...


@runtime_checkable
class EncodingModel(Model, Protocol):
    """A model whose `event` runs a network of its own that never learns (a VAE), so that an event
    is worth keeping.
    """

    def keep(self, folder: Path) -> None:
        """Keep in ``folder`` the events that are made from now on, by all that they depend on: the
        content of the outputs and of that network. They are looked up there first.
        """
        ...


class ControlModel(Model, Protocol):
    """A model whose samples are chunks of actions.

    pretrained: None for one that is still to be given its shapes and statistics by `initialise`.
    history: observation frames it sees. shapes: of the observations it needs, by LeRobot's names.
    action_dim: D of the environment. executed: how many of a chunk's actions are carried out, T of
    `decode`. horizon: offsets, relative to the current frame, of the actions that one event holds.
    """

    pretrained: str | None
    history: int
    shapes: Mapping[str, tuple[int, ...]]
    action_dim: int
    executed: int
    horizon: range

    def initialise(self, dataset: Dataset) -> None:
        """Draw fresh weights for the dataset's shapes,
        and take its statistics for normalisation.
        """
        ...

    def observations(self, standard: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The observations whose normalised values are ``standard``, name -> [B,history,*shape], as
        far as the network can tell; pictures are taken as they are.
        """
        ...


@runtime_checkable
class PrefixModel(ControlModel, Protocol):
    """A model that reads what it sees and is told once, into a prefix that every evaluation of its
    network takes: a policy of vision, language and action.
    """

    def words(self, instruction: str) -> dict[str, Tensor]:
        """The instruction as the prefix reads it, name -> [1,S], of the same shapes whatever is
        said. Raises `ValueError` with one sentence where it is no function of the instruction
        alone.
        """
        ...

    def told(self, condition: Condition, words: Mapping[str, Tensor]) -> Condition:
        """The same rows, told what `words` says, [B,S] each."""
        ...

    def prefix(self, condition: Condition) -> dict[str, Tensor]:
        """All that the network takes of what was read, and what `features` takes, by name."""
        ...

    def resumed(self, condition: Condition, prefix: Mapping[str, Tensor]) -> Condition:
        """The same rows, whose prefix is known: pictures and words are not read again."""
        ...


@runtime_checkable
class TokenModel(ControlModel, Protocol):
    """A model that says a chunk dim by dim, each given those before, and denoises nothing.

    Its `denoise` runs the whole generation, x_0 = G(x, condition): x at the noisiest time, N(0, I),
    is all the chance of a sample. Its chains are of one step (`grid` refuses others), and between
    noise and sample there are no states that could be noised, taught or scored.
    """

    def token_losses(self, condition: Condition, event: Tensor) -> Tensor:
        """-log p(token of dim d | tokens of the dims before it, condition) of event [B,*E], in
        nats, [B,*E]: the supervised loss of each dim, with gradients if they are on. Counted.
        """
        ...


def require_fit(model: ControlModel, task: ControlTask) -> None:
    """Raise `ConfigError` where the task does not show what the model needs to see, or takes other
    actions.
    """
    for name, shape in model.shapes.items():
        seen = tuple(task.shapes[name]) if name in task.shapes else None
        if seen != tuple(shape):
            has = (
                ", ".join(f"{n} {tuple(s)}" for n, s in task.shapes.items())
                if seen is None
                else f"shape {seen}"
            )
            raise ConfigError(
                f"the policy needs {name} of shape {tuple(shape)}; the task has {has}"
            )
    if model.action_dim != task.action_dim:
        raise ConfigError(
            f"the policy gives actions of {model.action_dim} dims; the task takes {task.action_dim}"
        )
