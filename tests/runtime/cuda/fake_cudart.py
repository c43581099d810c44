"""The part of `torch.cuda.cudart()` that page-locks memory, without a GPU; any call can fail."""

from __future__ import annotations

OUT_OF_MEMORY = 2
NOT_REGISTERED = 713


class FakeCudart:
    """Keeps a table of locked regions.

    Attributes:
        calls: names of calls so far.
        locked: bytes by address.
    """

    def __init__(self, *, fails: str | None = None) -> None:
        self.calls: list[str] = []
        self.locked: dict[int, int] = {}
        self._fails = fails

    def cudaHostRegister(self, address: int, size_bytes: int, flags: int) -> int:
        if self._called("cudaHostRegister"):
            return OUT_OF_MEMORY
        assert address % 4096 == 0
        assert flags == 0
        assert address not in self.locked
        self.locked[address] = size_bytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        failed = self._called("cudaHostUnregister")
        return NOT_REGISTERED if failed or self.locked.pop(address, None) is None else 0

    def cudaGetErrorString(self, error: int) -> str:
        return {OUT_OF_MEMORY: "out of memory", NOT_REGISTERED: "not registered"}[error]

    def synchronize(self) -> None:
        if self._called("synchronize"):
            raise RuntimeError("the device is lost")

    def _called(self, name: str) -> bool:
        self.calls.append(name)
        return name == self._fails
