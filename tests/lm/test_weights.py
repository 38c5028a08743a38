from __future__ import annotations

import pytest
import torch

from errata.lm.weights import weight_hash, weight_out_in
from tests.lm.families import tiny_lm


def test_the_view_shares_memory_even_where_square_and_transposed() -> None:
    lm = tiny_lm("gpt2-square")
    layer = lm.mlp_out(1)
    view = weight_out_in(layer)
    keys = torch.randn(3, 24)
    with torch.no_grad():
        torch.testing.assert_close(layer(keys) - layer.bias, keys @ view.T)
        view += 1
        torch.testing.assert_close(layer(keys) - layer.bias, keys @ view.T)
    assert not view.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_hashes_tell_bits_shapes_and_dtypes_apart(dtype: torch.dtype) -> None:
    weight = torch.randn(4, 6).to(dtype)
    assert weight_hash(weight) == weight_hash(weight.clone()) == weight_hash(weight.T.clone().T)
    changed = weight.clone()
    changed[3, 5] = torch.nextafter(changed[3, 5].float(), torch.tensor(9.0)) + 1
    others = [changed, weight.reshape(6, 4), weight.T, weight.double().to(torch.float8_e4m3fn)]
    assert len({weight_hash(weight), *map(weight_hash, others)}) == 5
