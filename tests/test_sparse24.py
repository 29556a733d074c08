"""cuSPARSELt does what the packed form relies on, and an algorithm is trusted only when right."""

import json

import pytest
import torch

from blockshock import masks
from blockshock.kernels import algorithms, cusparselt
from blockshock.measure.clock import capture
from blockshock.packed import Packed24

CUDA = torch.cuda.is_available()
on_gpu = pytest.mark.gpus(1)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the test's own."""
    monkeypatch.setenv("BLOCKSHOCK_CACHE", str(tmp_path))
    algorithms._table.cache_clear()
    yield tmp_path
    algorithms._table.cache_clear()


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory):
    """A cache that the tests of this file share, and nothing else does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BLOCKSHOCK_CACHE", str(tmp_path_factory.mktemp("algorithms")))
        algorithms._table.cache_clear()
        yield
        algorithms._table.cache_clear()


def random_form(N, K, dtype=torch.bfloat16, pattern="random"):
    weight = torch.randn(N, K, device="cuda", dtype=dtype)
    weight[weight == 0] = 1  # the library may give a zero another place than the mask does
    return weight, masks.make(pattern, weight), Packed24.pack(weight, masks.make(pattern, weight))


@on_gpu
@pytest.mark.parametrize("dtype", cusparselt.DTYPES)
@pytest.mark.parametrize(("N", "K"), [(64, 64), (192, 320), (1024, 4096)])
def test_the_compressed_buffer_is_values_then_metadata_of_the_mask(N, K, dtype):
    weight, mask, form = random_form(N, K, dtype)
    library = torch._cslt_compress(weight * mask).view(-1)
    ours = form.compressed.view(-1)
    assert torch.equal(library[: N * K // 2], weight[mask])
    assert torch.equal(ours.view(torch.int16), library.view(torch.int16))


@on_gpu
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("batch", "dtype"),
    # A search in fp16 takes ten seconds and more: one is enough for all batches up to 8.
    [*((batch, torch.bfloat16) for batch in (1, 7, 8, 100, 1024)), (7, torch.float16)],
)
def test_the_product_matches_dense(shared_cache, batch, dtype, bias):
    weight, mask, form = random_form(256, 512, dtype, "tile")
    x = torch.randn(batch, 512, device="cuda", dtype=dtype)
    b = torch.randn(256, device="cuda", dtype=dtype) if bias else None
    torch.full((4096, 4096), torch.nan, device="cuda")  # freed at once: new memory is poisoned
    truth = torch.nn.functional.linear(
        x.double(), (weight * mask).double(), None if b is None else b.double()
    )
    error = (form.product(x, b).double() - truth).norm() / truth.norm()
    assert error < 0.35 * torch.finfo(dtype).eps


@on_gpu
def test_a_wrong_algorithm_is_never_chosen(cache, monkeypatch):
    _, _, form = random_form(256, 256)
    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    right = cusparselt.run

    def wrong(x, compressed, bias, algorithm):
        y = right(x, compressed, bias, algorithm)
        if algorithm != 2:
            y[0, 0] += 1  # one element of one tile
        return y

    monkeypatch.setattr(cusparselt, "run", wrong)
    assert algorithms.choose(len(x), form.codes, x.dtype) == 2


@on_gpu
def test_no_right_algorithm_is_an_error(cache, monkeypatch):
    _, _, form = random_form(256, 256)
    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    monkeypatch.setattr(cusparselt, "run", lambda x, *_: torch.zeros(64, 256, device="cuda").to(x))
    with pytest.raises(algorithms.AlgorithmError, match="256x256 B64"):
        algorithms.choose(len(x), form.codes, x.dtype)


@on_gpu
def test_the_choice_is_kept_on_disk_and_a_damaged_file_is_replaced(cache):
    _, _, form = random_form(256, 256)
    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    algorithms.cache_file().write_text('{"256x256 B64 bf')  # truncated
    chosen = algorithms.choose(len(x), form.codes, x.dtype)
    kept = json.loads(algorithms.cache_file().read_text())["256x256 B64 bfloat16"]
    assert kept[0] == chosen
    assert 1 < len(set(kept)) == len(kept) <= algorithms.FEW
    assert list(cache.iterdir()) == [algorithms.cache_file()]


@on_gpu
def test_another_large_batch_tries_the_best_few_of_the_first_one(cache, monkeypatch):
    _, _, form = random_form(256, 256)
    first = algorithms.choose(1024, form.codes, torch.bfloat16)
    table = algorithms._table()
    tried = []
    agrees = algorithms._Trial.agrees
    monkeypatch.setattr(
        algorithms._Trial, "agrees", lambda self, n: tried.append(n) or agrees(self, n)
    )
    chosen = algorithms.choose(2048, form.codes, torch.bfloat16)
    assert tried == table["256x256 B1024 bfloat16"]
    assert chosen in tried
    assert first == tried[0]
    for other in (2056, 1016):  # more than twice as large; fewer rows than those of large batches
        tried.clear()
        algorithms.choose(other, form.codes, torch.bfloat16)
        assert len(tried) > algorithms.FEW


def test_the_best_few_are_those_of_the_same_batch_or_of_a_near_large_one(monkeypatch):
    found = {batch: [batch, 0] for batch in (64, 512, 1024, 3000)} | {2000: [7]}
    table = {f"64x64 B{batch} bfloat16": numbers for batch, numbers in found.items()}
    monkeypatch.setattr(algorithms, "_table", lambda: table)
    wanted = {64: 64, 72: None, 512: 512, 1016: None, 1032: 1024, 2000: 3000, 6000: 3000}
    for batch, other in wanted.items():
        few = algorithms._best_nearby(batch, 64, 16)
        assert few == (other and found[other]), batch
    assert algorithms._best_nearby(6008, 64, 16) is None
    assert algorithms._best_nearby(64, 128, 16) is None


class _Pretended:
    """Of numbers 0 to 9 higher ones are faster; in fp16 9 is wrong."""

    def __init__(self, batch, codes, dtype):
        self.dtype = dtype

    def numbers(self):
        return range(10)

    def agrees(self, number):
        return not (self.dtype == torch.float16 and number == 9)

    def milliseconds(self, number):
        return -number


def test_fp16_takes_the_second_best_of_bf16_where_the_best_is_wrong(cache, monkeypatch):
    monkeypatch.setattr(algorithms, "_Trial", _Pretended)
    monkeypatch.setattr(algorithms, "cache_file", lambda: cache / "choices.json")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert algorithms.choose(64, torch.empty(64, 16), torch.float16) == 8


@on_gpu
def test_fp16_takes_a_correct_one_of_the_few_that_are_fastest_in_bf16(cache):
    _, _, form = random_form(256, 512, torch.float16, "tile")
    chosen = algorithms.choose(64, form.codes, torch.float16)
    table = algorithms._table()
    assert table["256x512 B64 float16"] == [chosen]
    assert chosen in table["256x512 B64 bfloat16"]


@on_gpu
def test_a_shape_never_searched_is_refused_inside_a_capture(cache):
    _, _, form = random_form(256, 256)
    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x.clone()  # an empty graph would be warned of
        with pytest.raises(RuntimeError, match="once before"):
            form.product(x)


@on_gpu
def test_a_replayed_graph_follows_values_written_in_place(cache):
    _, _, form = random_form(256, 256, pattern="tile")
    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    result = {}
    graph = capture(lambda: result.update(y=form.product(x)))
    form.values.normal_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(result["y"], form.product(x))


@pytest.mark.parametrize("older", ["5", '"x"', "[]", "[1.5]"])
def test_an_entry_of_another_form_is_searched_again_and_replaced(cache, monkeypatch, older):
    monkeypatch.setattr(algorithms, "cache_file", lambda: cache / "algorithms.json")
    monkeypatch.setattr(algorithms, "_search", lambda *_: [3, 4])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    kept = '{"64x64 B8 bfloat16": %s, "64x64 B16 bfloat16": [7]}'
    algorithms.cache_file().write_text(kept % older)
    codes = torch.zeros(64, 16, dtype=torch.uint8)
    assert algorithms.choose(8, codes, torch.bfloat16) == 3
    assert algorithms.choose(16, codes, torch.bfloat16) == 7
    assert json.loads(algorithms.cache_file().read_text())["64x64 B8 bfloat16"] == [3, 4]


def test_a_number_that_the_library_refuses_does_not_end_the_search(cache, monkeypatch):
    trial = algorithms._Trial.__new__(algorithms._Trial)
    trial.x = trial.compressed = torch.zeros(8, 8)
    trial.truths, trial.last, trial.ended = [(None, torch.ones(8, 8))], 4, False

    def run(x, compressed, bias, number):
        if number >= 3:
            raise RuntimeError("cusparseLtMatmulAlgSetAttribute failed")
        return torch.ones(8, 8)

    monkeypatch.setattr(cusparselt, "run", run)
    assert not trial.agrees(9)  # one of another shape's best few
    assert [number for number in trial.numbers() if trial.agrees(number)] == [0, 1, 2]


def test_what_the_kernels_do_not_take_is_named():
    assert "bf16 or fp16" in cusparselt.unsupported(torch.float32, "cuda")
    assert cusparselt.unsupported(torch.float32, "cpu") is None
