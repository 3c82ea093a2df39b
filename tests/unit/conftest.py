"""The bridge, and small models to cross it with."""

import pytest
import torch


@pytest.fixture
def bridge(pack):
    return pack.nodes.bridge


@pytest.fixture
def identity(pack):
    return pack.nodes.identity


@pytest.fixture
def build(small_models):
    """Builders of small models, called as the executor calls a loader: under inference mode."""

    class Build:
        def __getattr__(self, name):
            def call(*args, **kwargs):
                with torch.inference_mode():
                    return getattr(small_models.builders, name)(*args, **kwargs)

            return call

    return Build()
