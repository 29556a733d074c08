"""What weights promise: the same bits by any row blocks, seeded, given or read from a file."""

import io
import json
import math
import pickle
import resource
import struct
import sys
from itertools import pairwise

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from blockshock import sources, workloads

CPU = {"dtype": torch.float32, "device": "cpu"}
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def correlation(a, b):
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, 700), max_size=6), seed=st.integers(-(2**65), 2**65))
def test_row_blocks_do_not_change_a_seeded_weight(cuts, seed):
    weight = workloads.SeededWeight(700, 12, seed=seed, **CPU)
    edges = [0, *sorted(cuts), 700]
    blocks = [weight.rows(a, b) for a, b in pairwise(edges)]
    assert torch.equal(torch.cat(blocks), weight.rows(0, 700))


def test_a_seeded_weight_does_not_depend_on_its_height_and_rounds_once():
    weight = workloads.SeededWeight(600, 17, seed=3, **CPU)
    short = workloads.SeededWeight(301, 17, seed=3, **CPU)
    assert torch.equal(short.rows(0, 301), weight.rows(0, 301))
    for dtype in DTYPES:
        rounded = workloads.SeededWeight(600, 17, dtype=dtype, device="cpu", seed=3)
        assert rounded.rows(100, 400).dtype == dtype
        assert torch.equal(rounded.rows(100, 400), weight.rows(100, 400).to(dtype))


def test_a_seeded_weight_is_normal_of_the_scale_asked_for():
    weight = workloads.SeededWeight(2048, 256, seed=0, **CPU).rows(0, 2048)
    assert weight.std().item() == pytest.approx(1 / 16, rel=0.01)
    assert weight.mean().abs() < 1e-3
    wide = workloads.SeededWeight(2048, 256, seed=0, scale=2.0, **CPU).rows(0, 2048)
    torch.testing.assert_close(wide, weight * 32)


def test_chunks_seeds_and_purposes_share_no_values():
    weight = workloads.SeededWeight(768, 256, seed=0, **CPU).rows(0, 768)
    other = workloads.SeededWeight(768, 256, seed=1, **CPU).rows(0, 768)
    x = workloads.make_input("gaussian", 256, 256, seed=0, **CPU)
    target = workloads.make_target("normal", 256, 256, seed=0, **CPU)
    bias = workloads.seeded_bias(65536, seed=0, **CPU)
    parts = [weight[:256], weight[256:512], weight[512:], other[:256], x, target, bias]
    for index, a in enumerate(parts):
        for b in parts[index + 1 :]:
            assert abs(correlation(a, b)) < 0.02  # 5 standard deviations


def test_sources_can_be_handed_to_another_process():
    weight = workloads.SeededWeight(300, 8, seed=5, **CPU)
    again = pickle.loads(pickle.dumps(weight))
    assert torch.equal(again.rows(0, 300), weight.rows(0, 300))


def test_rows_are_the_callers_own():
    tensor = torch.randn(8, 4).T
    weight = workloads.as_source(tensor.requires_grad_())
    before = tensor.detach().clone()
    rows = weight.rows(1, 3)
    assert torch.equal(rows, before[1:3])
    assert rows.is_contiguous()
    assert not rows.requires_grad
    rows.zero_()
    assert torch.equal(tensor, before)


def test_as_source_takes_tensors_and_sources_alone():
    weight = workloads.SeededWeight(8, 8, seed=0, **CPU)
    assert workloads.as_source(weight) is weight
    source = workloads.as_source(torch.zeros(8, 4, dtype=torch.bfloat16))
    assert (source.shape, source.dtype, source.device.type) == ((8, 4), torch.bfloat16, "cpu")
    with pytest.raises(ValueError, match="a list is no weight"):
        workloads.as_source([[1.0]])
    with pytest.raises(ValueError, match=r"shape \(4,\)"):
        workloads.as_source(torch.zeros(4))


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 9)])
def test_rows_that_are_not_there_are_refused(start, stop):
    for weight in (
        workloads.SeededWeight(8, 4, seed=0, **CPU),
        workloads.TensorWeight(torch.zeros(8, 4)),
    ):
        with pytest.raises(ValueError, match=f"rows {start} to {stop}: the weight has rows 0 to 8"):
            weight.rows(start, stop)
        assert weight.rows(8, 8).shape == (0, 4)


def test_a_nan_in_a_weight_is_refused_with_its_place():
    tensor = torch.zeros(8, 4)
    tensor[6, 1] = math.nan
    with pytest.raises(ValueError, match="nan at row 6, column 1"):
        workloads.TensorWeight(tensor).rows(5, 8)


@given(N=st.integers(0, 5000), block=st.integers(1, 2000))
def test_row_blocks_cover_every_row_once(N, block):
    blocks = list(workloads.row_blocks(N, block))
    assert [row for start, stop in blocks for row in range(start, stop)] == list(range(N))
    assert all(stop - start == block for start, stop in blocks[:-1])


def test_empty_row_blocks_are_refused():
    with pytest.raises(ValueError, match="blocks of 0 rows"):
        list(workloads.row_blocks(8, 0))


def test_a_seeded_bias_is_standard_normal():
    bias = workloads.seeded_bias(10000, seed=0, **CPU)
    assert bias.shape == (10000,)
    assert bias.std().item() == pytest.approx(1, rel=0.05)
    half = workloads.seeded_bias(10000, dtype=torch.float16, device="cpu", seed=0)
    assert torch.equal(half, bias.half())


def test_generators_of_one_stream_never_meet():
    first = [
        torch.rand(1, generator=sources.generator("cpu", "weight", 0, part), dtype=torch.float64)
        for part in range(400)
    ]
    assert len({value.item() for value in first}) == 400


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "layer.0.weight": torch.randn(64, 12, generator=generator).bfloat16(),
        "layer.1.weight": torch.randn(32, 8, generator=generator, dtype=torch.float64),
        "bias": torch.randn(64, generator=generator),
        "ids": torch.arange(8).view(2, 4),
    }


@pytest.fixture
def model(tmp_path, tensors):
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    return path


@settings(max_examples=25, deadline=None)
@given(rows=st.tuples(st.integers(0, 64), st.integers(0, 64)).map(sorted))
def test_files_give_the_rows_asked_for(tmp_path_factory, rows):
    folder = tmp_path_factory.getbasetemp()
    values = torch.arange(64 * 12, dtype=torch.float32).view(64, 12)
    save_file({"w": values}, folder / "one.safetensors")
    numpy.save(folder / "one.npy", values.numpy())
    for path in (folder / "one.safetensors", folder / "one.npy"):
        weight = pickle.loads(pickle.dumps(workloads.FileWeight(path)))
        assert weight.shape == (64, 12)
        assert torch.equal(weight.rows(*rows), values[slice(*rows)])


def test_named_tensors_keep_their_dtype_unless_told_otherwise(model, tensors):
    for name in ("layer.0.weight", "layer.1.weight"):
        weight = workloads.FileWeight(model, name)
        assert weight.dtype == tensors[name].dtype
        assert torch.equal(weight.rows(3, 20), tensors[name][3:20])
        half = workloads.FileWeight(model, name, torch.float16)
        assert half.dtype == torch.float16
        assert torch.equal(half.rows(3, 20), tensors[name][3:20].half())


@pytest.mark.parametrize("kind", ["<f2", "<f4", "<f8", ">f4"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_files_of_any_float_and_order_are_read(tmp_path, kind, order):
    values = numpy.random.default_rng(0).normal(size=(16, 8)).astype(kind, order=order)
    numpy.save(tmp_path / "w.npy", values)
    rows = workloads.FileWeight(tmp_path / "w.npy").rows(2, 9)
    assert rows.is_contiguous()
    assert numpy.array_equal(rows.numpy(), values[2:9])
    rows.zero_()
    assert numpy.array_equal(numpy.load(tmp_path / "w.npy"), values)


def test_only_the_rows_asked_for_are_read(tmp_path):
    shape, size = (1 << 15, 1 << 13), 1 << 30  # 1 GiB, nearly all of it a hole in the file
    table = {"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}
    text = json.dumps(table).encode()
    heads = {
        "w.npy": npy_head(shape),
        "w.safetensors": struct.pack("<Q", len(text)) + text,
    }
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, head in heads.items():
        with (tmp_path / name).open("wb") as file:
            file.write(head)
            file.seek(len(head) + 4 * (shape[1] * 20_000 + 7))
            file.write(struct.pack("<f", 2.5))
            file.truncate(len(head) + size)
        rows = workloads.FileWeight(tmp_path / name).rows(19_999, 20_002)
        assert rows.nonzero().tolist() == [[1, 7]]
        assert rows[1, 7] == 2.5
    unit = 1 if sys.platform == "darwin" else 1024
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit < size / 4


def npy_head(shape):
    head = io.BytesIO()
    described = {"descr": "<f4", "fortran_order": False, "shape": shape}
    numpy.lib.format.write_array_header_1_0(head, described)
    return head.getvalue()


def test_a_wrong_or_missing_name_lists_the_tensors_nearest_first(model):
    listed = "bias, ids, layer.0.weight, layer.1.weight"
    with pytest.raises(ValueError, match=f"holds 4 tensors, and none was named; .* {listed}"):
        workloads.FileWeight(model)
    with pytest.raises(
        ValueError, match=r"no tensor 'layer.1.weigth'; choose one of layer.1.weight"
    ):
        workloads.FileWeight(model, "layer.1.weigth")


def test_a_long_list_of_tensors_is_cut(tmp_path):
    path = tmp_path / "long.safetensors"
    save_file({f"w{index}": torch.zeros(4, 4) for index in range(50)}, path)
    with pytest.raises(ValueError, match="and 10 more"):
        workloads.FileWeight(path)


def test_files_that_cannot_serve_are_refused_with_the_reason(tmp_path, model):
    refused = {
        "no such file": ("missing.npy", None),
        r"\.safetensors or \.npy": ("weight.pt", None),
        r"shape \(64,\): a weight is": (model.name, "bias"),
        r"is I64 of shape \(2, 4\)": (model.name, "ids"),
        "leave the name out": ("named.npy", "w"),
        r"is int64 of shape \(4, 4\)": ("integers.npy", None),
        r"of shape \(\)": ("scalar.npy", None),
        r"cannot be read as \.npy": ("broken.npy", None),
        r"cannot be read as \.safetensors": ("broken.safetensors", None),
    }
    numpy.save(tmp_path / "named.npy", numpy.zeros((4, 4)))
    numpy.save(tmp_path / "integers.npy", numpy.zeros((4, 4), dtype=numpy.int64))
    numpy.save(tmp_path / "scalar.npy", numpy.zeros(()))
    for name in ("broken.npy", "broken.safetensors"):
        (tmp_path / name).write_bytes(b"not a tensor")
    for reason, (file, name) in refused.items():
        with pytest.raises(ValueError, match=reason):
            workloads.FileWeight(tmp_path / file, name)


def test_values_that_overflow_the_dtype_are_refused_with_their_place(tmp_path):
    values = numpy.zeros((8, 4), dtype=numpy.float32)
    values[5, 2] = 1e5
    numpy.save(tmp_path / "w.npy", values)
    weight = workloads.FileWeight(tmp_path / "w.npy", dtype=torch.float16)
    assert weight.rows(0, 5).shape == (5, 4)
    with pytest.raises(ValueError, match=r"w\.npy is inf at row 5, column 2: .*bf16"):
        weight.rows(4, 8)


def test_safetensors_missing_is_said_with_the_remedy(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"pip install 'blockshock\[files\]'"):
        workloads.FileWeight(model, "bias")
