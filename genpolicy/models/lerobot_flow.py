"""LeRobot's flow vision-language-action policies, SmolVLA, pi0 and pi0.5: encode, denoise, decode.

Composition over the loaded policy, nothing of it is copied or subclassed: the vision-language model encodes what is seen
and asked once, and one network evaluation is the action expert's ``denoise_step``. LeRobot's time is ours: 1 is noise, 0
the actions, x_t = (1 - t) x_0 + t eps, and the network says v = eps - x_0.
"""




PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
STATE, ACTION, IMAGES = "observation.state", "action", "observation.images."
EMPTY = IMAGES + "empty_camera"
"""Cameras that a checkpoint has and no robot needs: LeRobot feeds them black."""


@dataclass(eq=False)
class Seen:
    """What B rows see and are asked, as the policy's preprocessor made it, and its prefix once it was needed.

    Rows that are picked take their part of the prefix along. It is large (SmolVLA 2 MB a row, pi0 15 MB, in bf16):
    keep the context instead where conditions are kept for long.
    """

    batch: dict[str, Tensor]
    prefix: Prefix | None = None

    def __len__(self) -> int:
        return len(next(iter(self.batch.values())))

    def __getitem__(self, rows: Tensor | slice) -> "Seen":
        batch = {name: value[rows] for name, value in self.batch.items()}
        return Seen(batch, None if self.prefix is None else self.prefix[rows])


@dataclass(eq=False)
class LeRobotFlow:
    """A SmolVLA, pi0 or pi0.5 checkpoint as a `genpolicy.policy.ControlModel`.

    pretrained: hub id or folder of a policy as LeRobot saves it; its config.json says which of the three it is.
    base: the same, of a policy that is to learn another robot: weights are kept, shapes and statistics are the data
        set's (`initialise`). Read only while ``pretrained`` is None.
    revision: the hub's branch, tag or commit.
    tokenizer: hub id or folder in place of the one the checkpoint names (pi's is gated); of SmolVLA it must also have
        the VLM's configuration and processor. A folder named vlm inside the checkpoint is found without it.
    train: "expert" trains the action expert and freezes all that the prefix is computed with (SmolVLA's projection of
        the state is part of that), so that one prefix serves every step and every update; "full" trains both, and
        encodes the prefix anew wherever gradients are taken.
    padding: networks act in max_action_dim dims, of which the robot has fewer. "zero": the others follow their exact
        flow to 0, x_s = (s/t) x_t, which no parameter acts through. "network": they follow the network, which was never
        told what to say there, as LeRobot's own samplers do.
    precision: dtype that what is frozen is stored in, and that the networks run in (autocast). What learns is fp32, and
        so is the kernel algebra.
    device: None takes this process's accelerator if there is one.
    """

    pretrained: str | None = None
    base: str | None = None
    revision: str | None = None
    tokenizer: str | None = None
    train: Literal["expert", "full"] = "expert"
    padding: Literal["zero", "network"] = "zero"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    device: Any = None
    shapes: dict[str, tuple[int, ...]] = field(init=False, default_factory=dict)
    action_dim: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        for name, valid in (
            ("train", ("expert", "full")),
            ("padding", ("zero", "network")),
            ("precision", tuple(PRECISIONS)),
        ):
            if getattr(self, name) not in valid:
                raise ValueError(f"policy.{name} is {getattr(self, name)!r}; valid are {', '.join(valid)}")
        source = self.pretrained or self.base
        if source is None:
            raise ValueError("policy lerobot_flow needs pretrained, or base to clone a data set with: both are null")
        self.device = default_device() if self.device is None else torch.device(self.device)
        self._loaded = load(source, self.revision, self.tokenizer, self.device)
        self.vla = self._loaded.policy.eval()  # while it learns too: replay must be exact
        config = self.vla.config
        self._family = FAMILIES[config.type]
        self.schedule: Schedule = Linear()
        self.parametrisation: Parametrisation = "velocity"
        self.clip: tuple[float, bool] | None = None
        self.evaluations = 0.0
        self.history = 1
        self.executed = config.n_action_steps
        self.horizon = range(config.chunk_size)
        self.event_shape: tuple[int, ...] = (config.chunk_size, config.max_action_dim)
        if self.pretrained is not None:
            check_statistics(self._loaded, source)
            self._settle()

    # Shapes, statistics, and what learns

    def initialise(self, dataset: Dataset) -> None:
        """Take the data set's shapes, and its statistics for normalisation; the weights stay those of ``base``."""
        names = [n for n in dataset.shapes if n.startswith(IMAGES)]
        if STATE not in dataset.shapes or not names:
            raise ValueError(f"lerobot_flow needs {STATE} and an image in the data set; it has {', '.join(dataset.shapes)}")
        config = self.vla.config
        for name, most in ((STATE, config.max_state_dim), (ACTION, config.max_action_dim)):
            if dataset.shapes[name][0] > most:
                raise ValueError(f"the data set's {name} has {dataset.shapes[name][0]} dims; {self.base} takes {most}")
        self._loaded.fit({name: tuple(dataset.shapes[name]) for name in (*names, STATE)}, dataset.shapes[ACTION], dataset.stats)
        self._settle()

    def _settle(self) -> None:
        """What follows from the features that the policy has now."""
        config = self.vla.config
        self.shapes = {n: tuple(f.shape) for n, f in config.input_features.items() if not n.startswith(EMPTY)}
        self.action_dim = config.output_features[ACTION].shape[0]
        self._choose_what_learns()

    def _choose_what_learns(self) -> None:
        """Of the part that is to learn, the parameters that a gradient reaches: a dry evaluation's graph names them.

        Left out are heads and last layers that nothing reads; they stay in the checkpoint as they are.
        """
        network, frozen = self.vla.model, PRECISIONS[self.precision]
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(self.train == "full" or not name.startswith(self._family.prefix))
        self._note_prefix()
        blank = Context([""], {name: torch.zeros(1, 1, *shape) for name, shape in self.shapes.items()})
        with torch.enable_grad():
            seen = self.encode(blank)
            x, t = torch.zeros(1, *self.event_shape, device=self.device), torch.ones(1, device=self.device)
            reached = leaves(velocity(self.vla, self._family, seen.batch, self._prefix(seen), x, t))
        for parameter in network.parameters():
            parameter.requires_grad_(parameter in reached)
            parameter.data = parameter.data.to(torch.float32 if parameter in reached else frozen)
        self._note_prefix()

    def _note_prefix(self) -> None:
        learning = self.trainable().items()
        self._prefix_learns = [p for name, p in learning if name.startswith(self._family.prefix)]

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that learn, by their names in the policy's network, in its order."""
        return {name: p for name, p in self.vla.model.named_parameters() if p.requires_grad}

    def save(self, directory: Path) -> None:
        """A policy folder as LeRobot saves it, with its processors."""
        self._loaded.save(directory)

    # What is seen and asked

    def encode(self, context: Context) -> Seen:
        """The last frame and the instruction through the policy's own preprocessor; the prefix is not computed yet."""
        batch: dict[str, Any] = {"task": list(context.prompts)}
        for name, shape in self.shapes.items():
            frames = context.observation.get(name)
            image = len(shape) == 3  # of any size: the policy resizes it
            if frames is None or frames.ndim != 2 + len(shape) or (frames.shape[2:] != shape and not image):
                got = "is missing" if frames is None else f"comes as {list(frames.shape[1:])}"
                raise ValueError(f"observation {name} {got}; this policy needs {[1, *shape]} of every row")
            batch[name] = frames[:, -1]
        made = self._loaded.pre(batch)
        return Seen({name: value for name, value in made.items() if name.startswith("observation.")})

    def negative(self, condition: Seen) -> Seen:
        """Raises: these policies have no unconditional branch."""
        raise ValueError("policy lerobot_flow has no unconditional branch; set chain.guidance to 1")

    def _prefix(self, seen: Seen) -> Prefix:
        """The prefix, computed once unless it learns: then anew for a gradient, and after every change of weights."""
        if self._prefix_learns and torch.is_grad_enabled():
            return encode_prefix(self.vla, self._family, seen.batch, torch.empty(0))
        mark = torch.stack([p.detach().double().sum() for p in self._prefix_learns] or [torch.zeros(())])
        if seen.prefix is None or not torch.equal(seen.prefix.mark, mark):
            with torch.no_grad():
                seen.prefix = encode_prefix(self.vla, self._family, seen.batch, mark)
        return seen.prefix

    def features(self, condition: Seen) -> Tensor:
        """The mean of the prefix's last hidden states over its valid tokens, and the normalised state: [B,F]."""
        with torch.no_grad(), self._autocast():
            prefix = self._prefix(condition)
        weight = prefix.valid.float()[..., None]
        mean = (prefix.hidden.float() * weight).sum(1) / weight.sum(1)
        return torch.cat([mean, condition.batch[STATE].float()], -1)

    # The chain's view

    def grid(self, steps: int) -> Tensor:
        """K uniform steps from 1 to 0, LeRobot's own."""
        return self.schedule.grid(steps)

    def times(self, uniform: Tensor) -> Tensor:
        """scale Beta(a, b) + offset through its quantile function; by default .999 u^(2/3) + .001."""
        config = self.vla.config  # SmolVLA's are not in its configuration, and are pi's
        a, b = (getattr(config, f"time_sampling_beta_{name}", value) for name, value in (("alpha", 1.5), ("beta", 1.0)))
        quantile = torch.from_numpy(betaincinv(a, b, uniform.double().cpu().numpy())).to(uniform)
        return getattr(config, "time_sampling_scale", 0.999) * quantile + getattr(config, "time_sampling_offset", 0.001)

    @contextmanager
    def _autocast(self) -> Iterator[None]:
        dtype = PRECISIONS[self.precision]
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            yield

    def denoise(self, x: Tensor, t: Tensor, condition: Seen) -> Prediction:
        """One evaluation of the expert at x [B,T,max_action_dim], t [B], counted."""
        with self._autocast():
            time = t.to(x.device, torch.float32)
            output = velocity(self.vla, self._family, condition.batch, self._prefix(condition), x, time)
        self.evaluations += len(x) * (2 if output.requires_grad else 1)
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        prediction = Prediction.of(self.parametrisation, output, x, alpha, sigma)
        if self.padding == "network" or self.action_dim == x.shape[-1]:
            return prediction
        padded = x[..., self.action_dim :].float()  # x_0 is 0 there, so that all of x is noise
        return Prediction(
            torch.cat([self.scored(prediction.x0), torch.zeros_like(padded)], -1),
            torch.cat([self.scored(prediction.eps), padded / expand(sigma, padded)], -1),
        )

    def scored(self, value: Tensor) -> Tensor:
        """The robot's own dims, [B,T,action_dim]."""
        return value[..., : self.action_dim]

    # Actions

    def event(self, actions: Tensor) -> Tensor:
        """Actions [B,T,action_dim] normalised by the policy's own preprocessor, zeros in the padded dims."""
        step = next(s for s in self._loaded.pre.steps if isinstance(s, NormalizerProcessorStep))
        normalised = step(create_transition(action=actions.to(self.device)))[TransitionKey.ACTION]
        return functional.pad(normalised, (0, self.event_shape[-1] - self.action_dim))

    def event_mask(self, pad: Tensor) -> Tensor:
        """Which dims a supervised loss counts, bool [B,T,max_action_dim], given which actions lie outside the episode,
        ``pad`` bool [B,T]. As in LeRobot's own losses: never padded dims; SmolVLA leaves those actions out too, pi0
        and pi0.5 learn them.
        """
        robot = torch.arange(self.event_shape[-1], device=pad.device) < self.action_dim
        inside = torch.ones_like(pad) if self._family.pad_counts else ~pad
        return inside[..., None] & robot

    def decode(self, x0: Tensor) -> Tensor:
        """The executed actions in the environment's units, by the policy's own postprocessor: [B,executed,action_dim]."""
        return self._loaded.post(self.scored(x0)[:, : self.executed])


def leaves(output: Tensor) -> set[Tensor]:
    """The parameters that a gradient of ``output`` reaches."""
    found: set[Tensor] = set()
    visited: set[Any] = set()
    waiting = [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        found.update([node.variable] if hasattr(node, "variable") else [])
        waiting += [before for before, _ in node.next_functions]
    return found
