"""Random generators by purpose, so that adding a draw in one place changes no other place's numbers."""

import hashlib
from collections.abc import Iterable

import torch


def generator(seed: int, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a new generator on `device`; the same seed and purpose give the same draws."""
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def generators(
    seed: int, owner: str, purposes: Iterable[str], device: torch.device | str = "cpu"
) -> dict[str, torch.Generator]:
    """Return a `generator` for every purpose of `owner`, by purpose."""
    return {purpose: generator(seed, f"{owner}/{purpose}", device) for purpose in purposes}
