"""Taking kept columns, joining them and dealing rows out are exact copies, however the ends lie.

The Triton kernels run on a GPU, or under Triton's interpreter (see conftest.py); outputs are
poisoned first, and widths are no multiples of a program's block.
"""

import pytest
import torch

from blockshock.kernels import columns

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PLACES = [(0, 1), (2, 3), (0, 2), (1, 3), (0, 3), (1, 2)]
# (B, K): one group, an odd number of groups, one row, more than one block of groups.
SHAPES = [(3, 4), (5, 36), (1, 1028), (2, 4 * 1031)]
HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def kernels():
    """The launchers, without the choice between them and plain PyTorch."""
    pytest.importorskip("triton", reason="needs Triton; it is in the extra `dev`")
    from blockshock.kernels import columns_triton

    return columns_triton


def distinct(B, K, dtype=torch.bfloat16):
    """Every bit pattern of 16 bits is a number of its own here: NaN, infinities, minus zero."""
    words = (torch.arange(B * K, device=DEVICE) * 40503 % 65536 - 32768).to(torch.int16)
    if dtype.itemsize == 2:
        return words.view(B, K).view(dtype)
    return torch.arange(B * K, device=DEVICE, dtype=dtype).view(B, K)


def strided(x, extra=8, before=4):
    """The same entries as a slice of columns of a wider tensor, poisoned around them."""
    wide = x.new_full((x.shape[0], before + x.shape[1] + extra), torch.nan)
    part = wide[:, before : before + x.shape[1]]
    part.copy_(x)
    return part


def poisoned(*shape, dtype=torch.bfloat16):
    return torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)


def same_bits(a, b):
    whole = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return a.shape == b.shape and torch.equal(
        a.contiguous().view(whole), b.contiguous().view(whole)
    )


@pytest.mark.parametrize("places", PLACES)
def test_the_references_follow_their_formulas(places):
    x = torch.arange(2 * 12, dtype=torch.float32).view(2, 12)
    taken = columns.take_reference(x, places)
    for b in range(2):
        for group in range(3):
            for s in range(2):
                assert taken[b, 2 * group + s] == x[b, 4 * group + places[s]]
    for r, plane in enumerate(columns.quads_reference(x)):
        assert torch.equal(plane, x[:, r::4])
    assert sorted((*places, *columns.others(places))) == [0, 1, 2, 3]
    assert columns.others(places)[0] < columns.others(places)[1]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("shape", SHAPES)
def test_take_matches_the_reference(kernels, shape, places, dtype):
    x = distinct(*shape, dtype)
    for given in (x, strided(x)):
        out = poisoned(shape[0], shape[1] // 2, dtype=dtype)
        kernels.take(given, places, out)
        assert same_bits(out, columns.take_reference(x, places))


@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("shape", SHAPES)
def test_join_undoes_take(kernels, shape, places):
    x = distinct(*shape)
    first, second = (columns.take_reference(x, p) for p in (places, columns.others(places)))
    out = poisoned(*shape)
    kernels.join(first, second, places, out)
    assert same_bits(out, x)


@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("join", ["kernel", "reference", "public"])
def test_join_writes_its_columns_of_a_wider_tensor_and_no_others(kernels, join, places):
    x = distinct(5, 36)
    first, second = (columns.take_reference(x, p) for p in (places, columns.others(places)))
    wide = poisoned(5, 4 + 36 + 8)
    out = wide[:, 4:40]
    chosen = {"kernel": kernels.join, "reference": columns.join_reference, "public": columns.join}
    chosen[join](first, second, places, out)
    assert same_bits(out, x)
    assert wide[:, :4].isnan().all()
    assert wide[:, 40:].isnan().all()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", SHAPES)
def test_quads_match_the_reference(kernels, shape, dtype):
    y = distinct(*shape, dtype)
    for given in (y, strided(y)):
        out = poisoned(4, shape[0], shape[1] // 4, dtype=dtype)
        kernels.quads(given, out)
        assert same_bits(out, columns.quads_reference(y))


# Whatever the kernels cannot take goes to plain PyTorch: wide types, a pitch or a start that is no
# whole group, rows that are not the last dimension's, nothing at all.
INPUTS = {
    "plain": lambda: distinct(5, 36),
    "one row": lambda: distinct(1, 36),
    "sliced": lambda: strided(distinct(5, 36)),
    "odd pitch": lambda: strided(distinct(5, 36), extra=7, before=0),
    "odd start": lambda: strided(distinct(5, 36), extra=9, before=3),
    "transposed": lambda: distinct(5, 36).t().contiguous().t(),
    "float32": lambda: distinct(5, 36, torch.float32),
    "no rows": lambda: distinct(0, 36),
    "no columns": lambda: distinct(5, 0),
}


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("places", [(0, 1), (1, 3)])
def test_the_public_functions_take_any_layout(name, places):
    x = INPUTS[name]()
    before = x.clone()
    kept, left = columns.take(x, places), columns.take(x, columns.others(places))
    assert same_bits(kept, columns.take_reference(before, places))
    planes = columns.quads(x)
    assert planes.is_contiguous()
    assert same_bits(planes, columns.quads_reference(before))
    out = torch.full_like(x, torch.nan)
    columns.join(kept, left, places, out)
    assert same_bits(out, before)
    assert same_bits(x, before)


def test_parts_with_strides_are_joined_too():
    x = distinct(5, 36)
    first, second = columns.take(x, (0, 2)), strided(columns.take(x, (1, 3)))
    out = poisoned(5, 36)
    columns.join(first, second, (0, 2), out)
    assert same_bits(out, x)


def test_only_16_bit_cuda_tensors_of_whole_groups_go_to_the_kernels():
    on_gpu = DEVICE == "cuda"
    fast = {name for name, make in INPUTS.items() if columns._fast(make())}
    assert fast == ({"plain", "one row", "sliced"} if on_gpu else set())
