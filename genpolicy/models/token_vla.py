"""A vision-language-action model of tokens: a PaliGemma of transformers, the backbone of pi0-FAST,
that says each action dim of a chunk as a token of its own vocabulary.

    p(chunk | pictures, words) = prod_d p(token_d | token_<d, pictures, words)

Actions are in bins of the data's range, and the last ids of the vocabulary are their tokens: the
scheme of RT-2 (arXiv 2307.15818) and OpenVLA (arXiv 2406.09246). Nothing of transformers is copied
or subclassed: losses are the cross-entropy that the model itself has for its ``labels``, and a
chunk is said by its forward with its own cache, the prompt being read once for all samples. Chance
and the place inside a bin are those of `genpolicy.models.tokens`; what is drawn are tokens of
actions alone, as in RT-2, whatever probability other words have.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from genpolicy.chain import Linear, Prediction
from genpolicy.chain.schedule import Schedule
from genpolicy.chain.values import Parametrisation
from genpolicy.config.errors import at_least, choice, positive
from genpolicy.config.parse import decode
from genpolicy.config.schema import ChainConfig
from genpolicy.contracts.dataset import Dataset
from genpolicy.contracts.task import Context
from genpolicy.models import _mlp_files
from genpolicy.models import _token_vla_files as files
from genpolicy.models._bins import Bins, one_step, uniform
from genpolicy.models._device import default_device
from genpolicy.models._mlp_scaling import Scaling
from genpolicy.models._reached import reached
from genpolicy.models._token_vla_files import Lora
from genpolicy.models._token_vla_network import Network, action_ids
from genpolicy.models._token_vla_prompt import CAMERA, STATE, Prompt
from genpolicy.models._vla_prefix import Seen

KIND = "token_vla"
"""The name of its own files, which lie beside those of transformers."""
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class _Form:
    """The settings that a saved one brings along."""

    chunk: int
    bins: int
    words: int
    rank: int
    alpha: float
    targets: tuple[str, ...]


@dataclass(eq=False)
class TokenVLA:
    """A PaliGemma as a `genpolicy.contracts.model.TokenModel`.

    pretrained: folder of a PaliGemma as transformers saves one (config.json, safetensors,
        processor), or of a saved token VLA. A PaliGemma that has not acted yet is given shapes and
        statistics by the data set (`initialise`), and this is None until it has been saved.
    train: "lora" trains a LoRA on the language model, "full" everything.
    lora: the LoRA, where that is what learns.
    chunk: T actions per event, all executed; with a saved one its own.
    bins: of each dim, uniform over the data's range; 256 in RT-2 and OpenVLA; with a saved one its
        own.
    words: tokens that the text of a prompt may have, begin and end included; with a saved one its
        own.
    keep: prompts that were read stay in memory, with their pictures, for all that is asked of them
        later (a PaliGemma of 3 billion parameters 6 MB per row, in bf16); false reads them anew
        whenever rows are picked.
    precision: dtype that what is frozen is stored in, and that the network runs in (autocast). What
        learns is fp32.
    device: None takes this process's accelerator if there is one.
    shapes, action_dim: of what it sees and does; not to be set.
    """

    pretrained: str | None = None
    train: Literal["lora", "full"] = "lora"
    lora: Lora = field(default_factory=Lora)
    chunk: int = 4
    bins: int = 256
    words: int = 64
    keep: bool = True
    precision: Literal["fp32", "bf16"] = "fp32"
    device: Any = None
    shapes: dict[str, tuple[int, ...]] = field(init=False, default_factory=dict)
    action_dim: int = field(init=False, default=0)

    acts: ClassVar[bool] = True
    learns_from: ClassVar[float] = 0.0
    draws: ClassVar[int] = 0

    def __post_init__(self) -> None:
        if self.pretrained is None:
            raise ValueError(
                "policy token_vla needs pretrained, the folder of a PaliGemma; it is null"
            )
        choice("policy.train", self.train, ("lora", "full"))
        choice("policy.precision", self.precision, tuple(PRECISIONS))
        if self.train == "full" and self.lora.start is not None:
            raise ValueError(
                f"policy.lora.start is {self.lora.start}, and policy.train is full, which starts"
                " from policy.pretrained alone; set policy.train to lora, or leave start out"
            )
        self.device = default_device() if self.device is None else torch.device(self.device)
        self.evaluations = 0.0
        self.schedule: Schedule = Linear()
        self.parametrisation: Parametrisation = "sample"
        self.clip: tuple[float, bool] | None = None
        self._load(Path(self.pretrained))

    # Shapes, weights and statistics

    def _load(self, folder: Path) -> None:
        # what a saved one brings along
        home = Path(self.lora.start or folder)
        found = None
        if self.lora.start is not None or (home / f"{KIND}.json").is_file():
            found = _mlp_files.read(home, KIND, self.device)
            form = decode(_Form, found.settings, str(found.file))
            self.chunk, self.bins, self.words = form.chunk, form.bins, form.words
            if self.lora.start is not None:
                self.lora = Lora(form.rank, form.alpha, form.targets, self.lora.start)
        at_least("policy token_vla", self, chunk=1, bins=2, words=1)
        at_least("policy token_vla: lora", self.lora, rank=1)
        positive("policy token_vla: lora", self.lora, "alpha")

        # the network and its words
        model = files.load_model(folder)
        self._processor = files.load_processor(home)
        tokenizer, vocabulary = self._processor.tokenizer, model.config.text_config.vocab_size
        actions = action_ids(tokenizer, vocabulary, self.bins).to(self.device)
        if self.train == "lora":
            files.add_lora(model, self.lora)
        frozen = PRECISIONS[self.precision]
        self._network = Network(model.to(self.device), actions, tokenizer.bos_token_id, frozen)

        # what follows from the settings
        self._bins = Bins(self.bins)
        self.history = 1
        self.executed = self.chunk
        self.horizon = range(self.chunk)
        if found is None:
            self.pretrained = None  # `initialise` is still to come
        else:
            self._adopt(found.shapes, found.action_dim, found.scaling(()))

    def initialise(self, dataset: Dataset) -> None:
        """Take the data set's shapes and statistics; the weights stay those of the PaliGemma."""
        cameras = [name for name in dataset.shapes if name.startswith(CAMERA)]
        if STATE not in dataset.shapes or not cameras:
            raise ValueError(
                f"policy token_vla needs {STATE} and a camera; the data set has"
                f" {', '.join(dataset.shapes)}"
            )
        shapes = {name: tuple(dataset.shapes[name]) for name in (STATE, *cameras)}
        self._adopt(shapes, *dataset.shapes["action"], Scaling.fit(dataset, [STATE], self.device))

    def _adopt(self, shapes: dict[str, tuple[int, ...]], action_dim: int, scaling: Scaling) -> None:
        self.shapes = shapes
        self.action_dim = action_dim
        self.event_shape: tuple[int, ...] = (self.chunk, action_dim)
        self._scaling = scaling
        self._prompt = Prompt(self._processor, shapes, scaling, self.words, self.device)
        self._choose_what_learns()

    def _choose_what_learns(self) -> None:
        """Let the learning part's parameters learn that a gradient reaches: heads that nothing
        reads stay as they are. What does not learn is stored in the frozen precision.
        """
        network = self._network
        for name, parameter in network.model.named_parameters():
            parameter.requires_grad_(self.train == "full" or f".{files.ADAPTER}." in name)
        blank = {name: torch.zeros(1, 1, *shape) for name, shape in self.shapes.items()}
        with torch.enable_grad():
            batch = self._prompt(Context([""], blank))
            event = torch.zeros(1, *self.event_shape, device=self.device)
            learning = reached(network.losses(batch, self._bins.tokens(event)))
        for parameter in network.model.parameters():
            learns = parameter in learning
            dtype = torch.float32 if learns else network.precision
            parameter.requires_grad_(learns).data = parameter.data.to(dtype)

    def save(self, directory: Path, sampler: ChainConfig | None = None) -> None:
        """Network (its LoRA alone, where that learns) and processor as transformers and peft save
        them; statistics, shapes and settings beside them.
        """
        files.save(self._network.model, self._processor, directory)
        form = _Form(
            self.chunk,
            self.bins,
            self.words,
            self.lora.rank,
            self.lora.alpha,
            tuple(self.lora.targets),
        )
        sizes = {"shapes": self.shapes, "action_dim": self.action_dim}
        _mlp_files.write(directory, KIND, {**asdict(form), **sizes}, {}, self._scaling)

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that learn, by their names in the network, in its order."""
        return self._network.trainable()

    # The tokens

    def token_losses(self, condition: Seen, event: Tensor) -> Tensor:
        """-log p(token_d | token_<d, prompt) of every dim of event [B,T,D], in nats, [B,T,D]: over
        the whole vocabulary, the loss that such models are trained with. Of the tokens that are
        drawn p is larger: no other words are.
        """
        losses = self._network.losses(condition.batch, self._bins.tokens(event))
        self._count(len(event), losses)
        return losses.view_as(event)

    def denoise(self, x: Tensor, t: Tensor, condition: Seen) -> Prediction:
        """The chunk that noise x [B,T,D] says, without gradient, counted as one evaluation."""
        places = self._network.generate(condition, uniform(x))
        output = self._bins.event(places).view_as(x)
        self._count(len(x), output)
        return Prediction.of(
            self.parametrisation, output, x, self.schedule.alpha(t), self.schedule.sigma(t)
        )

    def _count(self, rows: int, output: Tensor) -> None:
        self.evaluations += rows * (2 if output.requires_grad else 1)

    # What is seen and asked

    def encode(self, context: Context) -> Seen:
        """The prompts' tokens and pictures; the network reads them when it is first needed."""
        return Seen.all(self._prompt(context), self.keep)

    def supervised(self, context: Context, uniform: Tensor) -> tuple[Seen, Tensor]:
        """`encode`, and 0 for every row."""
        return self.encode(context), torch.zeros(len(context), device=self.device)

    def negative(self, condition: Seen) -> Seen:
        """Raises: it has no unconditional branch."""
        raise ValueError("policy token_vla has no unconditional branch; set chain.guidance to 1")

    @torch.no_grad()
    def features(self, condition: Seen) -> Tensor:
        """The mean of the prompt's last hidden states, and the standardised state: [B,F]."""
        return torch.cat([self._network.summary(condition), condition.value(STATE)], -1)

    def observations(self, standard: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of the state's standardisation, where nothing is clamped."""
        return {
            name: self._scaling.observed(name, value) if name == STATE else value
            for name, value in standard.items()
        }

    # The chain's view

    def grid(self, steps: int, start: float | None = None) -> Tensor:
        """[1, 0]; `ValueError` for any other chain."""
        return one_step(self.schedule, steps, start)

    def native_grid(self, steps: int) -> Tensor:
        """The same as `grid`: no other library samples it."""
        return self.grid(steps)

    def event_mask(self, pad: Tensor) -> None:
        """Returns None: every action counts; after an episode's end its last one is held."""

    def times(self, uniform: Tensor) -> Tensor:
        """1, where its only step begins."""
        return torch.ones_like(uniform)

    def scored(self, value: Tensor) -> Tensor:
        """Every dim counts."""
        return value

    def event(self, actions: Tensor) -> Tensor:
        """Actions [B,T,D] scaled so that the data's range is [-1, 1]."""
        return self._scaling.event(actions.to(self.device))

    def decode(self, x0: Tensor) -> Tensor:
        """The inverse of `event`."""
        return self._scaling.actions(x0)
