"""Muon: the momentum of matrices, made orthogonal, is what they move by; AdamW moves the rest.

K. Jordan, 2024, https://kellerjordan.github.io/posts/muon/; rates and decay as "Muon is Scalable for LLM Training"
(arXiv 2502.16982) scales them, so that those of AdamW carry over.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic a·σ + b·σ³ + c·σ⁵ by which an iteration maps singular values; steep at 0, within 0.68 … 1.14 soon."""
ITERATIONS = 5
RMS = 0.2
"""Root mean square of an update at rate 1, about that of AdamW's."""


def orthogonalised(matrices: Tensor) -> Tensor:
    """Return about U·Vᵀ of each matrix U·S·Vᵀ, by Newton-Schulz iterations; [n, A, B], in the matrices' dtype.

    They are bfloat16 on accelerators; on CPUs float32, whose sums are the same in every run.
    """
    found = matrices.to(torch.float32 if matrices.device.type == "cpu" else torch.bfloat16)
    tall = matrices.shape[1] > matrices.shape[2]
    found = found.mT if tall else found
    found = found / found.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = found @ found.mT
        found = a * found + (b * gram + c * gram @ gram) @ found
    return (found.mT if tall else found).to(matrices.dtype)


class Muon(torch.optim.AdamW):
    """Fused AdamW but for groups with "matrices" set, which Muon moves; a skipped step waits for no device, either.

    torch.optim.Muon computes the same. This one also skips where `found_inf` is 1, as fused AdamW does, takes matrices
    of one shape together, and is exact on CPUs.

    Args:
        groups: of parameters; "rate_scale" and "weight_decay" as in `parameter_groups`, "matrices" tells [A, B] ones.
        momentum: of the gradients of matrices; Nesterov's.
        options: of AdamW.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], momentum: float, **options: Any) -> None:
        super().__init__(groups, **options, fused=True)
        self.momentum = momentum
        self.found_inf: Tensor | None = None
        """1.0 where this step is skipped, else 0.0, 0-d; None for 0."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take up a loaded state; AdamW's own method asks every parameter's for a count of steps."""
        torch.optim.Optimizer.__setstate__(self, state)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move matrices and the rest by their gradients; `closure` must be None."""
        for group in self.param_groups:
            if not group["matrices"]:
                continue
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for parameters in by_shape.values():
                self._move(parameters, group["lr"], group["weight_decay"])
                for parameter in parameters:
                    parameter.grad = None  # which leaves nothing of it for AdamW
        super().step(closure)

    def _move(self, matrices: list[Tensor], rate: float, decay: float) -> None:
        """Take the step of matrices of one shape."""
        gradients = torch.stack([matrix.grad for matrix in matrices])  # type: ignore[misc]
        took = torch.ones((), device=gradients.device)
        if self.found_inf is not None:
            took = 1 - self.found_inf
            gradients = torch.where(took > 0, gradients, 0)
        momenta = [self._momentum_of(matrix) for matrix in matrices]
        averaged = torch.stack(momenta).lerp(gradients, (1 - self.momentum) * took)
        scale = rate * RMS * max(matrices[0].shape) ** 0.5
        updates = orthogonalised(gradients.lerp(averaged, self.momentum)) * (scale * took)
        torch._foreach_copy_(momenta, list(averaged.unbind()))
        torch._foreach_mul_(matrices, 1 - rate * decay * took)
        torch._foreach_sub_(matrices, list(updates.unbind()))

    def _momentum_of(self, matrix: Tensor) -> Tensor:
        state = self.state[matrix]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(matrix)
        return state["momentum_buffer"]
