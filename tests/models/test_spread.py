"""A model whose weights are spread over processes is refused in words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from sinklens.core.errors import ModelError
from sinklens.models.opening import open_model
from tests.families import build


def test_a_tensor_parallel_model_is_refused_with_what_to_do_instead() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    store: Any = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model: Any = build("llama")
        projection = model.model.layers[0].self_attn.q_proj
        mesh = init_device_mesh("cpu", (1,))
        projection.weight = torch.nn.Parameter(distribute_tensor(projection.weight.data, mesh, [Shard(0)]))
        with pytest.raises(ModelError, match="spread over 1 processes \\(tensor parallelism\\)") as refused:
            open_model(model)
        assert "q_proj.weight and 0 more" in str(refused.value)
        assert "device_map='auto'" in str(refused.value)
    finally:
        dist.destroy_process_group()
