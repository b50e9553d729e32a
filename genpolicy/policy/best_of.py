"""The judge of a best-of-N sampler: a critic of decisions, saved beside the policy that it picks
for.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from genpolicy.config.errors import ConfigError
from genpolicy.learning.critic import Critic, Support, pessimistic

WEIGHTS, SETTINGS = "judge.safetensors", "judge.json"


@dataclass(frozen=True)
class QJudge:
    """mean - pessimism * std of what the critic's members say of a decision, as
    `genpolicy.policy.policy.Judge`.
    """

    critic: Critic
    pessimism: float

    @torch.no_grad()
    def __call__(self, features: Tensor, event: Tensor) -> Tensor:
        return pessimistic(self.critic(features, event), self.pessimism)

    def save(self, folder: Path) -> None:
        """Weights as safetensors; what rebuilds the critic, and how it is read, as json.

        inputs: features and event together, which the networks see as one vector.
        """
        first, support = self.critic.weights[0], self.critic.support
        members, inputs, hidden = first.shape
        settings = {
            "inputs": inputs,
            "members": members,
            "hidden": hidden,
            "layers": len(self.critic.weights) - 1,
            "support": None if support is None else asdict(support),
            "pessimism": self.pessimism,
        }
        (folder / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n")
        save_file(self.critic.state_dict(), folder / WEIGHTS)

    @classmethod
    def load(cls, folder: Path, device: torch.device | str = "cpu") -> "QJudge":
        """The judge that was saved in a folder, not to be trained any further."""
        for name in (SETTINGS, WEIGHTS):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"the policy's judge in {folder} is incomplete: it has no {name}"
                )
        try:
            settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
            pessimism, inputs = float(settings.pop("pessimism")), settings.pop("inputs")
            support = settings.pop("support")
            with torch.device("meta"):  # no weights are drawn that the file's would replace
                critic = Critic(
                    inputs, support=None if support is None else Support(**support), **settings
                )
            critic.load_state_dict(load_file(folder / WEIGHTS, device=str(device)), assign=True)
        except (
            Exception
        ) as error:  # json, safetensors and torch each complain in types of their own
            raise ConfigError(
                f"the policy's judge in {folder} is damaged ({' '.join(str(error).split())}): delete that folder to act"
                " without one"
            ) from None
        return cls(critic.requires_grad_(False), pessimism)
