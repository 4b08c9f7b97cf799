"""Tensors of these tests are made on `--device`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _on_the_device(device: str) -> Iterator[None]:
    with torch.device(device):
        yield
