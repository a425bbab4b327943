import json
import math

import hypothesis.strategies as st
import numpy
import pytest
import torch
from esper_runtime.tolaria.plainjson import decode, encode
from hypothesis import given

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
KEYS = st.text() | st.integers() | st.sampled_from(["~bytes", "~map", "~tuple"])
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=20,
)


@given(VALUES)
def test_json_and_back_is_the_same(value):
    again = decode(json.loads(json.dumps(encode(value), allow_nan=False)))
    assert again == value
    assert repr(again) == repr(value)  # 1 and True, [] and (), 0.0 and -0.0 are equal but not the same


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8])
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3)])
def test_tensors_keep_type_shape_and_bits(dtype, shape):
    tensor = torch.arange(math.prod(shape)).reshape(shape).to(dtype)
    again = decode(json.loads(json.dumps(encode({"state": tensor}))))["state"]
    assert again.dtype == dtype
    assert torch.equal(again, tensor)
    assert again.shape == tensor.shape


def test_nan_arrays_and_transposed_tensors():
    assert math.isnan(decode(json.loads(json.dumps(encode(math.nan), allow_nan=False))))
    array = numpy.arange(6, dtype="<u2").reshape(2, 3).T
    again = decode(json.loads(json.dumps(encode(array))))
    assert again.dtype == array.dtype
    assert (again == array).all()
    tensor = torch.arange(6).reshape(2, 3).t()
    assert torch.equal(decode(encode(tensor)), tensor)


def test_other_types_are_named():
    with pytest.raises(TypeError, match="of type object"):
        encode({"cursor": object()})
