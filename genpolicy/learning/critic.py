"""Critics: what a policy may expect from here."""

from torch import Tensor, nn


class StateValue(nn.Module):
    """V(features) by an MLP of two hidden layers with LayerNorm: Float[B,F] -> Float[B]."""

    def __init__(self, features: int, hidden: int = 256) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Linear(features, hidden),
            nn.LayerNorm(hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.LayerNorm(hidden),
            nn.SiLU(),
            nn.Linear(hidden, 1),
        )

    def forward(self, features: Tensor) -> Tensor:
        return self.network(features).squeeze(-1)
