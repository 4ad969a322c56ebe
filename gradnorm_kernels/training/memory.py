"""Which storages are alive while ops run, on meta tensors too: the peak memory of a step, uncomputed."""

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PHASES = ("forward", "input gradient", "backward")
# What a step finds or leaves: parameters, buffers, images, and the parameters' gradients.
HELD = "held"


class Memory:
    """The storages that are alive: each once, whatever views it has, from when it is added to its release.

    Attributes:
        phase: in which what happens from now on happens.
        kinds: of each storage in turn, the phase that made it, or `HELD`.
        changes: in turn, (phase, storage, bytes) of each addition and, below 0, of each release.
    """

    def __init__(self) -> None:
        self.phase = PHASES[0]
        self.kinds: list[str] = []
        self.changes: list[tuple[str, int, int]] = []
        # By address, which another storage may have once this one is released.
        self._alive: dict[int, int] = {}

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Follows the storages of ``tensors``, and keeps none of them alive."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata in self._alive:
                continue
            self._alive[storage._cdata] = len(self.kinds)
            self.changes.append((self.phase, len(self.kinds), storage.nbytes()))
            self.kinds.append(self.phase)
            # PyTorch keeps a storage's Python object for as long as the storage, tensors in a graph included.
            weakref.finalize(storage, self._release, storage._cdata, storage.nbytes())

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Also says that they are of the kind `HELD`."""
        for tensor in tensors:
            self.add([tensor])
            self.kinds[self._alive[tensor.untyped_storage()._cdata]] = HELD

    def _release(self, address: int, size: int) -> None:
        self.changes.append((self.phase, self._alive.pop(address), -size))

    def after(self, phase: str) -> int:
        """Bytes alive at the end of ``phase``."""
        past = PHASES[: PHASES.index(phase) + 1]
        return sum(size for at, _, size in self.changes if at in past)

    def peak(self) -> Counter[str]:
        """Bytes alive when they are most, by kind."""
        alive: Counter[str] = Counter()
        most = alive.copy()
        for _, storage, size in self.changes:
            alive[self.kinds[storage]] += size
            if alive.total() > most.total():
                most = alive.copy()
        return most


class MemoryMode(TorchDispatchMode):
    """Adds to :class:`Memory` what the ops inside it return."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = Memory()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.memory.add(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        return result
