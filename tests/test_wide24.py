"""The wide 2:4 kernel: its operands follow the instruction's layout, its products match float64.

What needs no GPU runs everywhere: an emulator of `wgmma.sp` puts together again the matrix that the
registers of a group of warps describe. The kernel itself is CUDA code.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F

from blockshock import masks
from blockshock.distributed import exchange
from blockshock.kernels import nvrtc, tensor_maps, wide24
from blockshock.measure.clock import capture
from blockshock.measure.errors import relative_error
from blockshock.packed import Packed24
from tests.sparse24_cases import Matrix, poison

on_gpu = pytest.mark.gpus(1)

# (N, K, B): one block of everything; rows that fill no block, no cluster; odd and even numbers of
# blocks of columns, more and fewer than stages; more tiles than processors; ragged B.
SHAPES = [
    (64, 64, 1),
    (64, 128, 8),
    (192, 320, 5),
    (704, 960, 333),
    (1024, 4096, 256),
    (448, 2368, 1000),
    (4160, 1088, 4097),
    (8192, 64, 1025),
]


class Case(Matrix):
    """A matrix, its mask and its layout; `product` multiplies by it, in poisoned memory."""

    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        self.places = wide24.arrange_places(self.codes)

    def product(self, x, bias=None):
        poison()
        return wide24.product(x, self.values, self.places, bias)


def operand(registers, words, selector):
    """The matrix A, [64, 32], of one `wgmma.sp`, from what its 128 threads give it.

    registers [128, 4, 2] are values, words [128] are codes. PTX ISA, "register fragments for
    wgmma.mma_async.sp.m64k32", "sparse matrix storage" and "sparsity selector".
    """
    kept, full = torch.zeros(64, 16), torch.zeros(64, 32)
    for thread in range(128):
        warp, g, q = thread // 32, thread % 32 // 4, thread % 4
        for register in range(4):
            row, column = 16 * warp + g + 8 * (register % 2), 8 * (register // 2) + 2 * q
            kept[row, column : column + 2] = registers[thread, register]
    for warp in range(4):
        for g in range(8):
            for u in range(2):
                word = int(words[32 * warp + 4 * g + 2 * selector + u])
                for half in range(2):
                    row = 16 * warp + g + 8 * half
                    for j in range(4):
                        code, group = word >> (16 * half + 4 * j) & 15, 4 * u + j
                        for i, place in enumerate((code & 3, code >> 2)):
                            full[row, 4 * group + place] = kept[row, 2 * group + i]
    return full


def through_shared_memory(values, block):
    """The registers [2, 128, 4, 2] that `ldmatrix` loads of a tile of 64 rows × 32 values.

    The copy puts the 16 bytes at chunk c of row r (64 bytes) at chunk c ^ (r / 2 % 4).
    """
    tile = values[:, 32 * block : 32 * block + 32].view(64, 4, 8)
    shared = torch.empty(64, 4, 8)
    for row in range(64):
        for chunk in range(4):
            shared[row, chunk ^ (row >> 1 & 3)] = tile[row, chunk]
    found = torch.empty(2, 128, 4, 2)
    for step in range(2):
        for warp in range(4):
            for lane in range(32):  # gives the address of row lane % 8 of matrix lane / 8
                row, half = warp * 16 + wide24.ROWS_OF_W[lane % 16], lane // 16
                address = row * 64 + ((half ^ (row >> 1 & 3)) << 4) ^ 32 * step
                eight = shared.view(-1, 8)[address // 16].view(4, 2)
                receivers = slice(warp * 32 + lane % 8 * 4, warp * 32 + lane % 8 * 4 + 4)
                found[step, receivers, lane // 8] = eight
    return found


@pytest.mark.parametrize("pattern", ["random", "tile", "1010"])
def test_the_registers_describe_the_matrix(pattern):
    case = Case(128, 192, pattern, torch.float32, device="cpu")
    for tile in range(2):
        rows = slice(64 * tile, 64 * tile + 64)
        for block in range(3):
            given = through_shared_memory(case.values[rows], block)
            for step in range(2):
                start = 64 * block + 32 * step
                found = operand(given[step], case.places[tile, block], step)
                dense = case.dense[rows, start : start + 32].view(4, 16, 32)
                assert torch.equal(found.view(4, 16, 32), dense[:, wide24.ROWS_OF_W])


@pytest.mark.slow
def test_places_of_many_tiles_are_those_of_each():
    case = Case(192, 128, device="cpu")
    wide = case.codes.repeat(1, (1 << 20) // 32)  # so many groups a row that each tile is alone
    found = wide24.arrange_places(wide)
    assert found.dtype == torch.int32
    assert torch.equal(found[:, :2], case.places)
    assert torch.equal(found[:, -2:], case.places)


def test_stages_fit_the_shared_memory_of_a_block():
    assert all(tile.shared_bytes <= 227 * 1024 for tile in wide24.TILES)


# (N, B) and the columns of the tile that was faster on an H200, by more than 2 %.
FASTER = [
    *((8192, batch, 128) for batch in (64, 96, 128, 192, 256)),
    *((8192, batch, 256) for batch in (384, 512, 768, 1024, 1280, 2048, 4096, 16384)),
    *((4096, batch, 128) for batch in (128, 256, 512)),
    *((4096, batch, 256) for batch in (1024, 4096, 16384)),
    (16384, 128, 128),
    *((16384, batch, 256) for batch in (256, 512, 1024, 4096, 16384)),
]


@pytest.mark.parametrize(("N", "B", "columns"), FASTER)
def test_the_tile_that_was_measured_as_faster_is_taken(N, B, columns):
    assert wide24.best(N, B, dict.fromkeys(wide24.TILES, 66)).columns == columns


def test_what_the_kernel_does_not_take_is_named():
    assert "cpu" in wide24.unsupported(torch.bfloat16, "cpu")
    for dtype in (torch.float32, torch.float64):
        assert "bf16 or fp16" in wide24.unsupported(dtype, "cuda")
        assert str(dtype).removeprefix("torch.") in wide24.unsupported(dtype, "cuda")


def test_no_rows_give_none():
    case = Case(64, 64, device="cpu")
    assert wide24.product(case.input(0), case.values, case.places).shape == (0, 64)


def test_a_kernel_is_loaded_once_on_each_device(monkeypatch):
    loaded = []
    load = nvrtc.once_per_device(lambda name, **macros: loaded.append(name) or len(loaded))
    for device, number in ((0, 1), (0, 1), (1, 2), (0, 1)):
        monkeypatch.setattr(torch.cuda, "current_device", lambda device=device: device)
        assert load("product", HALF=1) == number
    assert load("product", HALF=0) == 3


def test_a_tensor_map_of_rows_off_sixteen_bytes_is_refused():
    x = torch.zeros(4, 72, dtype=torch.bfloat16)
    assert tensor_maps.aligned(x[:, :64])
    for bad in (x[:, 4:68], x.t(), x[:, ::2], x.view(8, 36)[:, :32], x[:1].expand(4, 72)):
        assert not tensor_maps.aligned(bad)
        with pytest.raises(ValueError, match="multiples of 16 bytes"):
            tensor_maps.tensor_map(bad, (4, 64), 128)


@on_gpu
@pytest.mark.parametrize(("N", "K", "B"), SHAPES)
def test_the_product_is_as_near_to_float64_as_the_dense_one(N, K, B):
    for dtype, pattern, term in ((torch.bfloat16, "random", 0), (torch.float16, "tile", 1)):
        case = Case(N, K, pattern, dtype, term=term)
        x = case.input(B)
        for bias in (None, case.bias()):
            exact = case.truth(x, bias)
            found = case.product(x, bias)
            assert found.shape == (B, N)
            own, dense = (relative_error(y, exact) for y in (found, F.linear(x, case.dense, bias)))
            assert own <= 1.1 * dense, (pattern, bias is not None)


@on_gpu
@pytest.mark.parametrize("dtype", wide24.DTYPES)
def test_unit_rows_give_the_columns_of_the_weight_to_the_bit(dtype):
    case = Case(320, 192, dtype=dtype)
    eye = torch.eye(192, dtype=dtype, device="cuda")
    assert torch.equal(case.product(eye), case.dense.t())


@on_gpu
def test_rows_do_not_depend_on_the_rows_beside_them():
    case = Case(192, 320)
    x = case.input(300)
    whole = case.product(x)
    for batch in (1, 64, 255, 257):
        other = x.clone()
        other[batch:] = torch.nan
        assert torch.equal(case.product(other)[:batch], whole[:batch])


@on_gpu
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_row_and_column(bad):
    case = Case(192, 320)
    x, plain = case.input(300), torch.ones(300, 192, dtype=torch.bool, device="cuda")
    whole = case.product(x)
    x[7], case.values[70, 33] = bad, bad
    plain[7], plain[:, 70] = False, False
    found = case.product(x)
    assert torch.equal(found.isfinite(), plain)
    assert torch.equal(found[plain], whole[plain])


@on_gpu
def test_inputs_with_strides_and_odd_starts_give_the_same_bits():
    case = Case(192, 320)
    x, bias = case.input(33), case.bias()
    y = case.product(x, bias)
    for before, pitch in ((0, 324), (4, 328), (1, 321), (8, 328), (2, 322), (0, 328)):
        wide = torch.full((33, pitch), torch.nan, device="cuda").to(x)
        wide[:, before : before + 320] = x
        assert torch.equal(case.product(wide[:, before : before + 320], bias), y), (before, pitch)
    assert torch.equal(case.product(x.t().contiguous().t(), bias), y)
    assert torch.equal(case.product(x, torch.stack((bias, -bias), 1)[:, 0]), y)


@pytest.mark.gpus(2)
def test_x_on_another_device_than_the_current_one_is_refused():
    for device in ("cuda:0", "cuda:1"):  # a kernel is loaded on each
        with torch.cuda.device(device):
            case = Case(64, 64, device=device)
            x = case.input(8)
            assert relative_error(case.product(x), case.truth(x)) < torch.finfo(x.dtype).eps
    with pytest.raises(ValueError, match="x is on cuda:1"):
        wide24.product(x, case.values, case.places)


@on_gpu
def test_one_wrong_place_is_found():
    case = Case(64, 64)
    x = case.input(8)
    exact = case.truth(x)
    assert relative_error(case.product(x), exact) < 0.35 * torch.finfo(x.dtype).eps
    case.codes[13, 7] = masks.complement(case.codes[13:14, 7:8])[0, 0]
    case.places = wide24.arrange_places(case.codes)
    assert relative_error(case.product(x), exact) > torch.finfo(x.dtype).eps


@on_gpu
def test_a_replayed_graph_follows_what_x_and_the_values_have_become():
    case = Case(1024, 4096)
    values = case.values
    x, result = case.input(600), {}
    graph = capture(lambda: result.update(y=wide24.product(x, values, case.places)))
    for seed in (1, 2):
        x.copy_(case.input(600, seed))
        values.mul_(-2)
        result["y"].fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(result["y"], wide24.product(x, values, case.places))


@on_gpu
def test_both_products_of_a_packed_matrix_follow_its_values_also_in_replays():
    case, result = Case(1024, 4096, "tile"), {}
    form = Packed24.pack(case.weight, masks.decode(case.codes)).with_transpose()
    x, dy = case.input(600), torch.randn(600, 1024, device="cuda").bfloat16()

    def step():
        form.mark_stale()
        result["y"] = form.product(x, None, "wide")
        result["dx"] = form.transposed.product(dy, None, "wide")

    step()
    graph = capture(step)
    for _ in range(2):
        form.values.data.mul_(-2)
        for found in result.values():
            found.fill_(torch.nan)
        poison()
        graph.replay()
        torch.cuda.synchronize()
        dense = form.unpack()
        for found, given, matrix in ((result["y"], x, dense), (result["dx"], dy, dense.t())):
            exact = given.double() @ matrix.double().t()
            own, plain = (relative_error(y, exact) for y in (found, F.linear(given, matrix)))
            assert own <= 1.1 * plain
    step()  # what was replayed is what an eager step makes
    assert torch.equal(result["y"], found_again(form, x))


def found_again(form, x):
    """A product by a copy of the matrix."""
    return Packed24.from_codes(form.values, form.codes).product(x, None, "wide")


@on_gpu
@pytest.mark.parametrize(("rows", "chunks"), [(4096, 4), (1000, 3), (130, 2)])
def test_chunks_of_the_rows_have_the_bits_of_the_whole(rows, chunks):
    case = Case(704, 960)
    x, bias, bounds = case.input(rows), case.bias(), exchange.cut(rows, chunks)
    parts = [case.product(x[a:b], bias) for a, b in itertools.pairwise(bounds)]
    assert all(part.is_contiguous() for part in parts)
    assert torch.equal(torch.cat(parts), case.product(x, bias))


@on_gpu
def test_products_on_two_streams_do_not_disturb_each_other():
    cases = [Case(1024, 4096), Case(1024, 4096, "tile")]
    inputs = [case.input(600, seed) for seed, case in enumerate(cases)]
    alone = [case.product(x) for case, x in zip(cases, inputs, strict=True)]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    found = []
    for _ in range(20):
        for case, x, stream in zip(cases, inputs, streams, strict=True):
            with torch.cuda.stream(stream):
                found.append(wide24.product(x, case.values, case.places))
    torch.cuda.synchronize()
    assert all(torch.equal(y, alone[i % 2]) for i, y in enumerate(found))
