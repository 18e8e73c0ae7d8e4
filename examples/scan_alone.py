"""The scan as a layer of another model: draw the cross through a bright pixel, which takes a view of the whole image.

python examples/scan_alone.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gspn_dit import gspn_scan


class ScanLayer(nn.Module):
    """Four directions, propagation weights shared by groups of channels (arXiv 2512.07884)."""

    def __init__(self, channels: int, groups: int = 4) -> None:
        super().__init__()
        self.groups = groups
        self.logits = nn.Linear(channels, 4 * 3 * groups)
        self.gates = nn.Linear(channels, 2 * 4 * channels)
        self.merge_weight = nn.Parameter(torch.full((4,), 0.25))

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens [B, H, W, C] to tokens [B, H, W, C]."""
        logits = self.logits(x).unflatten(-1, (4, 3, self.groups))  # [B, H, W, directions, neighbours, groups]
        input_gate, output_gate = self.gates(x).unflatten(-1, (2, 4, x.shape[-1])).unbind(-3)  # [B, H, W, 4, C] each
        return gspn_scan(x, logits, input_gate, output_gate, self.merge_weight)


def main(steps: int = 150) -> float:
    """Train to mark the row and the column of the pixel; return the last loss. Marking nothing has a loss of 0.16."""
    torch.manual_seed(0)
    size, channels = 12, 16
    model = nn.Sequential(nn.Linear(1, channels), ScanLayer(channels), nn.SiLU(), nn.Linear(channels, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    places = torch.stack(torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij"), -1)  # [H, W, 2]
    loss = torch.zeros(())
    for step in range(steps):
        pixel = torch.randint(size, (32, 2))
        same = places == pixel[:, None, None]  # [B, H, W, 2]
        image, cross = same.all(-1, keepdim=True).float(), same.any(-1, keepdim=True).float()
        loss = (model(image) - cross).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 25 == 0 or step == steps - 1:
            print(f"step {step}: mean square error {loss.item():.4f}")
    return loss.item()


if __name__ == "__main__":
    main()
