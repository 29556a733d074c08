"""The thin 2:4 kernel: its indices follow their layout, and its products match float64.

What needs no GPU runs everywhere; the kernel itself is CUDA code.
"""

import pytest
import torch
import torch.nn.functional as F

from blockshock import masks
from blockshock.kernels import sparse24, thin24
from blockshock.measure.clock import capture
from blockshock.measure.errors import relative_error
from tests.sparse24_cases import Matrix, poison

on_gpu = pytest.mark.gpus(1)


@pytest.fixture(params=["this GPU's", "mma.sp"])
def instructions(request, monkeypatch):
    """With the instructions of this GPU, and with those that every GPU since Ampere has."""
    if request.param == "mma.sp":
        monkeypatch.setattr(thin24, "_hopper", lambda: False)
    thin24._kernels.cache_clear()
    yield request.param
    thin24._kernels.cache_clear()


# (N, K, B): one tile of everything; rows that fill no block of threads; K that fills no stage; K in
# parts, also unequal and empty ones; more tiles of rows than processors; all rows of X but one.
SHAPES = [
    (64, 64, 8),
    (192, 320, 5),
    (704, 960, 33),
    (1024, 4096, 128),
    (448, 2368, 20),
    (1024, 4160, 7),
    (17920, 64, 3),
    (256, 512, 1),
    (256, 512, 127),
]


class Case(Matrix):
    """A matrix, its mask, its kept values and their layout; `product` multiplies by it."""

    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        self.layout = thin24.layout(self.codes, masks.period(self.codes))

    def product(self, x, bias=None, layout=None):
        poison()
        return thin24.product(x, self.values, layout or self.layout, bias)


@pytest.mark.parametrize(("N", "K"), [(16, 64), (48, 192), (64, 64)])
@pytest.mark.parametrize("pattern", ["random", "tile", "1010"])
def test_indices_are_arranged_as_the_docstring_says(N, K, pattern):
    codes = masks.encode(masks.make(pattern, torch.zeros(N, K), seed=3))
    found = thin24.arrange_indices(codes)
    assert found.shape == (N // 16, K // 64, 32)
    assert found.dtype == torch.int32
    for tile in range(N // 16):
        for block in range(K // 64):
            for g in range(8):
                for s in range(2):
                    for u in range(2):
                        word = 0
                        for half in range(2):
                            for q in range(4):
                                code = codes[
                                    16 * tile + g + 8 * half, 16 * block + 4 * q + 2 * s + u
                                ]
                                word |= int(code) << (16 * half + 4 * q)
                        assert found[tile, block, 4 * g + 2 * s + u].item() & 0xFFFFFFFF == word


@on_gpu
def test_arranging_tile_by_tile_changes_no_bit():
    # So many groups a row that the tiles are arranged in two pieces.
    codes = masks.encode(masks.make("random", torch.zeros(48, 64, device="cuda"), seed=3))
    wide = codes.repeat(1, (1 << 21) // 16)
    found = thin24.arrange_indices(wide)
    assert torch.equal(found[:, :1], thin24.arrange_indices(codes))
    assert bool((found == found[:, :1]).all())


def test_indices_lose_nothing():
    codes = masks.encode(masks.make("random", torch.zeros(64, 128), seed=5))
    words = thin24.arrange_indices(codes).view(4, 2, 8, 2, 2)  # tile, block, g, s, u
    back = torch.empty_like(codes).view(4, 2, 8, 2, 4, 2, 2)  # tile, half, g, block, q, s, u
    for half in range(2):
        for q in range(4):
            nibble = words >> (16 * half + 4 * q) & 15
            back[:, half, :, :, q] = nibble.permute(0, 2, 1, 3, 4).to(torch.uint8)
    assert torch.equal(back.view(64, 32), codes)


@pytest.mark.parametrize("term", [0, 1])
@pytest.mark.parametrize("pattern", ["1100", "1010", "1001", "tile"])
def test_a_periodic_mask_is_four_codes_and_no_indices(pattern, term):
    case = Case(192, 64, pattern, device="cpu", term=term)
    assert case.layout.indices is None
    for row in range(192):
        assert case.layout.codes >> 4 * (row % 4) & 15 == case.codes[row, 0]
    assert case.layout.nbytes == 0


def test_the_layout_of_any_other_mask_has_its_indices_and_counts_their_bytes():
    case = Case(192, 128, device="cpu")
    assert torch.equal(case.layout.indices, thin24.arrange_indices(case.codes))
    assert case.layout.nbytes == 192 * 128 // 16 * 2 == case.values.nbytes // 8


def test_every_gpu_has_room_for_the_last_pipeline():
    # 99 KB of shared memory a block is the least of the GPUs with sparse tensor cores.
    assert thin24._shared_bytes(thin24.MAX_BATCH // 8, *thin24.PIPELINES[-1]) <= 99 * 1024


@on_gpu
def test_a_gpu_with_less_shared_memory_gets_a_shorter_pipeline_and_the_same_sums(monkeypatch):
    case = Case(1024, 4160)
    x, bias = case.input(64), case.bias()
    usual = case.product(x, bias)
    monkeypatch.setattr(thin24, "_pipeline", lambda _: thin24.PIPELINES[-1])
    thin24._kernels.cache_clear()
    short = case.product(x, bias)
    thin24._kernels.cache_clear()
    exact = case.truth(x, bias)
    assert relative_error(short, exact) <= 1.1 * relative_error(usual, exact)


def test_the_reference_is_the_dense_product_of_the_kept_entries():
    case = Case(64, 128, dtype=torch.float64, device="cpu")
    x, bias = case.input(5), case.bias()
    torch.testing.assert_close(
        sparse24.product_reference(x, case.values, case.codes, bias), F.linear(x, case.dense, bias)
    )


def test_too_many_rows_are_refused_and_none_give_none():
    case = Case(64, 64, device="cpu")
    with pytest.raises(ValueError, match=r"129 rows: .* at most 128"):
        thin24.product(case.input(129), case.values, case.layout)
    assert thin24.product(case.input(0), case.values, case.layout).shape == (0, 64)


def test_what_the_kernel_does_not_take_is_named():
    assert "CUDA" in thin24.unsupported(torch.bfloat16, "cpu")
    assert "cpu" in thin24.unsupported(torch.bfloat16, "cpu")
    for dtype in (torch.float32, torch.float64):
        assert "bf16 or fp16" in thin24.unsupported(dtype, "cuda")
        assert str(dtype).removeprefix("torch.") in thin24.unsupported(dtype, "cuda")


@on_gpu
@pytest.mark.parametrize("dtype", thin24.DTYPES)
@pytest.mark.parametrize(("N", "K", "B"), SHAPES)
def test_the_product_is_as_near_to_float64_as_the_dense_one(N, K, B, dtype, instructions):
    for pattern, term in (("random", 0), ("tile", 1), ("1001", 0)):
        case = Case(N, K, pattern, dtype, term=term)
        x = case.input(B)
        for bias in (None, case.bias()):
            exact = case.truth(x, bias)
            found = case.product(x, bias)
            assert found.shape == (B, N)
            assert found.is_contiguous()
            own, dense = (relative_error(y, exact) for y in (found, F.linear(x, case.dense, bias)))
            assert own <= 1.1 * dense, (pattern, bias is not None)


@on_gpu
@pytest.mark.parametrize("dtype", thin24.DTYPES)
@pytest.mark.parametrize(
    ("pattern", "term"), [("random", 0), ("1010", 0), ("1010", 1), ("tile", 1)]
)
def test_unit_rows_give_the_columns_of_the_weight_to_the_bit(pattern, term, dtype):
    case = Case(320, 192, pattern, dtype, term=term)
    eye = torch.eye(192, dtype=dtype, device="cuda")
    found = torch.cat([case.product(eye[:127]), case.product(eye[127:])])
    assert torch.equal(found, case.dense.t())


@on_gpu
@pytest.mark.parametrize("batch", [1, 8, 9, 64])
def test_rows_do_not_depend_on_the_rows_beside_them(batch):
    case = Case(192, 320)
    x = case.input(128)
    whole = case.product(x)
    x[batch:] = torch.nan
    assert torch.equal(case.product(x)[:batch], whole[:batch])


@on_gpu
@pytest.mark.parametrize("B", [1, 5, 33])
def test_inputs_with_strides_and_odd_starts_give_the_same_bits(B):
    case = Case(192, 320)
    x, bias = case.input(B), case.bias()
    y = case.product(x, bias)
    for before, pitch in ((0, 324), (4, 328), (1, 321), (1, 328), (2, 322), (0, 323)):
        wide = torch.full((B, pitch), torch.nan, device="cuda").to(x)
        wide[:, before : before + 320] = x
        assert torch.equal(case.product(wide[:, before : before + 320], bias), y), (before, pitch)
    assert torch.equal(case.product(x.t().contiguous().t(), bias), y)
    assert torch.equal(case.product(x, torch.stack((bias, -bias), 1)[:, 0]), y)


@on_gpu
@pytest.mark.parametrize(("N", "K", "B"), [(192, 320, 5), (1024, 4096, 128), (1024, 4160, 7)])
@pytest.mark.parametrize("pattern", ["random", "tile"])
def test_the_same_bits_again_and_again(pattern, N, K, B):
    case = Case(N, K, pattern)
    x, bias = case.input(B), case.bias()
    first = case.product(x, bias)
    # Without a pause, so that products follow each other on the counters and the parts.
    runs = [thin24.product(x, case.values, case.layout, bias) for _ in range(50)]
    assert all(torch.equal(run, first) for run in runs)


@on_gpu
@pytest.mark.parametrize(("row", "group"), [(0, 0), (13, 7), (63, 15)])
def test_one_wrong_index_is_found(row, group):
    case = Case(64, 64)
    x = case.input(8)
    exact = case.truth(x)
    assert relative_error(case.product(x), exact) < 0.35 * torch.finfo(x.dtype).eps
    codes = case.codes.clone()
    codes[row, group] = masks.complement(codes[row : row + 1, group : group + 1])[0, 0]
    wrong = thin24.layout(codes, None)
    assert relative_error(case.product(x, layout=wrong), exact) > torch.finfo(x.dtype).eps


@on_gpu
@pytest.mark.parametrize("pattern", ["random", "1100"])
def test_values_written_in_place_are_seen(pattern):
    case = Case(192, 320, pattern)
    x = case.input(9)
    before = case.product(x)
    case.values.mul_(2)
    assert torch.equal(case.product(x), before * 2)


@on_gpu
@pytest.mark.parametrize(("N", "K", "B"), [(192, 320, 5), (1024, 4096, 64)])
def test_a_replayed_graph_follows_what_x_and_the_values_have_become(N, K, B):
    case = Case(N, K)
    x, result = case.input(B), {}
    graph = capture(lambda: result.update(y=thin24.product(x, case.values, case.layout)))
    for seed in (1, 2):
        x.copy_(case.input(B, seed))
        case.values.mul_(-2)
        result["y"].fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(result["y"], case.product(x))


@on_gpu
@pytest.mark.parametrize("shared", [False, True], ids=["two matrices", "one matrix"])
def test_products_on_two_streams_do_not_disturb_each_other(shared):
    cases = [Case(1024, 4096)] * 2 if shared else [Case(1024, 4096), Case(1024, 4096, "tile")]
    inputs = [case.input(64, seed) for seed, case in enumerate(cases)]
    alone = [case.product(x) for case, x in zip(cases, inputs, strict=True)]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    found = []
    for _ in range(20):
        for case, x, stream in zip(cases, inputs, streams, strict=True):
            with torch.cuda.stream(stream):
                found.append(thin24.product(x, case.values, case.layout))
    torch.cuda.synchronize()
    for i, y in enumerate(found):
        assert torch.equal(y, alone[i % 2])
