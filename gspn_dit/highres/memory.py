"""What a module's forward pass holds in memory, found on the meta device, where nothing is computed or allocated."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_Module = TypeVar("_Module", bound=nn.Module)


class LiveMemory(TorchDispatchMode):
    """Follows the storages of the tensors that operators return, for as long as they live.

    Weights, and what a kernel takes for itself alone, are not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = self.peak_bytes = 0
        self.largest = 0
        """Most elements of any one tensor."""
        self._users: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._follow(tensor)
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        return result

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        place, size = storage._cdata, storage.nbytes()
        self.largest = max(self.largest, tensor.numel())
        if place not in self._users:
            self.live_bytes += size
        self._users[place] = self._users.get(place, 0) + 1
        weakref.finalize(tensor, self._forget, place, size)

    def _forget(self, place: int, size: int) -> None:
        self._users[place] -= 1
        if not self._users[place]:
            del self._users[place]
            self.live_bytes -= size


def on_meta(module: _Module) -> _Module:
    """Return a copy of a module whose weights are on the meta device; the module's own are not copied."""
    tensors = [*module.parameters(), *module.buffers()]
    shadows = {id(tensor): torch.empty_like(tensor, device="meta") for tensor in tensors}
    parameters = {id(tensor) for tensor in module.parameters()}
    memo: dict[int, Any] = {
        key: nn.Parameter(shadow, requires_grad=False) if key in parameters else shadow
        for key, shadow in shadows.items()
    }
    return copy.deepcopy(module, memo)


@torch.no_grad()
def measure(run: Callable[[], object]) -> LiveMemory:
    """Run a function on the meta device and return what it held."""
    with torch.device("meta"), LiveMemory() as memory:
        run()
    return memory
