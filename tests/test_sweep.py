"""A sweep says exactly the cases it lists, and refuses what it cannot mean."""

from typing import ClassVar

import pytest

from bench import sweep as sweeps
from blockshock.linear import METHODS
from blockshock.phases.families import FAMILIES
from blockshock.phases.linear.case import LinearCase as Case

SMALL = "family: attention\ncpu: {batch: 1, heads: 1, D: 16"


class Chooser:
    """A method that has a choice of kernels and of sums."""

    masks = ("tile", "1100")
    kernels = ("auto", "library", "own")
    reduces = ("collective", "direct")
    policies: ClassVar = {"frozen": {}, "dense_master": {"master": "dense"}}
    asked: ClassVar = []

    @classmethod
    def unsupported(cls, N, K, *, dtype, device_type, ranks, mask=None, kernel=None, reduce=None):
        cls.asked.append((mask, kernel, reduce))
        return "own kernels need luck" if kernel == "own" else None


@pytest.fixture
def chooser(monkeypatch):
    monkeypatch.setitem(METHODS, "chooser", Chooser)
    monkeypatch.setattr(Chooser, "asked", [])
    return Chooser


def expand(text, phase="forward", device="cpu", settings=(), tmp=None):
    file = tmp / "own.yaml"
    file.write_text(text)
    ((family, sweep),) = sweeps.load(str(file), list(FAMILIES)).items()
    return sweeps.cases(sweep, phase, device, 2, sweeps.parse_set(list(settings), family))


def shipped(family, name):
    return sweeps.load(name, [family])[family]


def names(family):
    return sorted(file.stem for file in (sweeps.FOLDER / family).glob("*.yaml"))


@pytest.mark.parametrize("name", names("linear"))
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_shipped_sweeps_expand_to_distinct_cases(name, device):
    sweep = shipped("linear", name)
    assert sweep["about"]
    for phase in sweep.get("phases") or FAMILIES["linear"].phases:
        cases = sweeps.cases(sweep, phase, device, 2, {})
        listed = (sweep.get("common") or {}).get("method", METHODS)
        assert {case.method for case in cases} == set(listed)
        assert len({case.id for case in cases}) == len(cases)


@pytest.mark.parametrize("name", names("attention"))
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("phase", FAMILIES["attention"].phases)
def test_the_shipped_sweeps_of_attention_expand_to_distinct_cases(name, device, phase):
    sweep = shipped("attention", name)
    cases = sweeps.cases(sweep, phase, device, 1, {})
    assert sweep["about"]
    assert len({case.id for case in cases}) == len(cases)
    points = [case.point for case in cases]
    assert points == sorted(points, key=points.index)
    assert any(case.unsupported(device) is None for case in cases)


@pytest.mark.parametrize("phase", FAMILIES["attention"].phases)
def test_random_blocks_are_measured_over_sparsities_at_one_size_beside_dense(phase):
    cases = sweeps.cases(shipped("attention", "patterns"), phase, "cuda", 1, {})
    blocks = [c for c in cases if (c.pattern or "").startswith("random_blocks")]
    of_blocks = [c for c in blocks if c.method == "block_sparse"]
    shares = sorted(float(c.pattern[:-1].split(",")[1]) for c in of_blocks)
    assert shares == [0.02, 0.05, 0.1, 0.15, 0.25, 0.5]
    sizes = {(c.batch, c.heads, c.Tq, c.Tk, c.D, c.dtype) for c in blocks}
    assert sizes == {(1, 16, 16384, 16384, 128, "bf16")}
    dense = {(c.batch, c.heads, c.Tq, c.Tk, c.D, c.dtype) for c in cases if not c.pattern}
    assert sizes < dense


@pytest.mark.parametrize("phase", FAMILIES["attention"].phases)
def test_patterns_are_measured_at_the_length_that_allows_no_mask(phase):
    cases = sweeps.cases(shipped("attention", "patterns"), phase, "cuda", 1, {})
    found = {(c.pattern, c.method) for c in cases if c.Tq == 131072}
    assert found == {
        (pattern, method)
        for pattern in ("band(1024)", "causal_band(4096)")
        for method in ("flex", "block_sparse")
    }


def test_points_replace_axes_and_set_replaces_both(tmp_path):
    text = """
family: attention
common: {batch: [2], heads: [4], D: [16, 32], method: [reference, flex]}
cpu:
  points:
    - {Tq: 64, tier: small}
    - {Tq: [32, 64], D: 16, causal: true, method: reference, pattern: ["band(8)", "strided(4,2)"]}
"""
    cases = expand(text, tmp=tmp_path)
    assert len(cases) == 2 * 2 + 2 * 2
    assert {(c.D, c.causal, c.method) for c in cases if c.tier} == {
        (D, False, method) for D in (16, 32) for method in ("reference", "flex")
    }
    assert {(c.Tq, c.pattern) for c in cases if c.causal} == {
        (Tq, pattern) for Tq in (32, 64) for pattern in ("band(8)", "strided(4,2)")
    }
    words = ["pattern=strided(4,2),band(3)", "Tq=16", "causal=false", "D=16"]
    given = expand(text, settings=words, tmp=tmp_path)
    assert [(c.pattern, c.method) for c in given] == [
        (pattern, method)
        for pattern in ("strided(4,2)", "band(3)")
        for method in ("reference", "flex")
    ]
    assert {c.tier for c in given} == {None}  # other sizes than the label's
    assert {c.tier for c in expand(text, settings=["dtype=fp16"], tmp=tmp_path)} == {"small", None}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("family: convolution", "unknown family 'convolution'; known: linear, attention"),
        ("family: [linear]", r"unknown family \['linear'\]"),
        ("family: attention\ncpu: {N: [64]}", "unknown key 'N'; known: D, Tk, Tq, batch"),
        ("family: attention\nphases: [backward]", "unknown phase 'backward'; known: forward"),
        ("family: attention\ncpu: {heads: 1, Tq: 8, D: 16}", "says no batch for cpu"),
        (f"{SMALL}, Tq: 8, points: 3}}", "points must be a list of mappings .* 3"),
        (f"{SMALL}, Tq: 8, points: [{{T: 3}}]}}", "points: unknown key 'T'; known: D, Tk"),
        (f"{SMALL}, Tq: [8, 8]}}", "the sweep lists .*reference-B1-H1-T8-D16-bf16 twice"),
        (f"{SMALL}, points: [{{Tq: 8}}, {{Tq: 8}}]}}", "lists .* twice"),
        (f"{SMALL}, Tq: 8, points: []}}", r"points must be a list .* is \[\]"),
        (f"{SMALL}, Tq: []}}", "Tq is an empty list; name a value, or leave Tq out"),
        (f"{SMALL}, Tq: 8, D: 32}}", "line 2: 'D' is there 2 times; say it once"),
        (f"{SMALL}, points: [{{Tq: 8, Tq: 9}}]}}", "'Tq' is there 2 times"),
        (
            f"{SMALL}, Tq: 8}}\nphases: []",
            r"phases must be a list, such as \[forward\], and is \[\]",
        ),
        (f"{SMALL}, Tq: [[8]]}}", r"Tq: \[8\] is not one number"),
        (f"{SMALL}, Tq: 8, method: fast}}", "unknown method 'fast'"),
        (f"{SMALL}, Tq: 8, pattern: band}}", "pattern 'band' must be a builder and its numbers"),
        (f"{SMALL}, Tq: 8, causal: 1}}", "causal = 1 must be true or false"),
    ],
)
def test_a_sweep_of_attention_that_says_something_impossible_is_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        expand(text, tmp=tmp_path)


def test_points_of_linear_layers_replace_axes_too(tmp_path):
    text = """
common: {N: [64], B: [8, 16]}
cpu:
  points:
    - {mask: {block_shock: ["1100"]}}
    - {N: 128, B: 8, K: 64}
"""
    cases = expand(text, tmp=tmp_path)
    assert {(c.N, c.K, c.B) for c in cases} == {(64, 64, 8), (64, 64, 16), (128, 64, 8)}
    masks = {(c.N, c.mask) for c in cases if c.method == "block_shock"}
    assert masks == {(64, "1100"), (128, "tile")}
    same = expand(text, settings=["N=64", "B=8", "K=64", "method=dense_single"], tmp=tmp_path)
    assert [c.name for c in same] == ["dense_single-N64-B8-bf16"]


def test_a_file_in_a_familys_folder_is_of_that_family_and_another_says_it(tmp_path):
    path = sweeps.FOLDER / "attention/quick.yaml"
    assert set(sweeps.load(str(path), list(FAMILIES))) == {"attention"}
    (tmp_path / "own.yaml").write_text("cpu: {N: [64]}")
    assert set(sweeps.load(str(tmp_path / "own.yaml"), list(FAMILIES))) == {"linear"}
    assert sweeps.load(str(tmp_path / "own.yaml"), ["attention"]) == {}


def test_text_that_set_gives_stays_text_and_null_leaves_it_out():
    given = sweeps.parse_set(["mask=0110", "weight=null", "N=64", "input=mlp:a=["], "linear")
    assert given == {"mask": ["0110"], "weight": [None], "N": [64], "input": ["mlp:a=["]}


def test_points_are_no_axis_that_set_replaces():
    with pytest.raises(ValueError, match="unknown key 'points'; known: D, Tk"):
        sweeps.parse_set(["points=3"], "attention")


def test_cases_of_a_point_stand_side_by_side(tmp_path):
    cases = expand("cpu: {N: [64, 128], B: [8, 16]}", tmp=tmp_path)
    points = [case.point for case in cases]
    assert len(set(points)) == 4
    assert points == sorted(points, key=points.index)
    assert len(cases) == 4 * len(METHODS)


def test_later_parts_win_and_set_wins_over_all(tmp_path):
    text = """
common: {B: [8], training: {B: [4], optimizer: [adam]}}
cpu: {N: [64], training: {N: [128]}}
"""
    assert {c.N for c in expand(text, tmp=tmp_path)} == {64}
    trained = expand(text, phase="training", tmp=tmp_path)
    assert {(c.N, c.B, c.optimizer) for c in trained} == {(128, 4, "adam")}
    assert {c.N for c in expand(text, phase="training", settings=["N=192"], tmp=tmp_path)} == {192}


def test_masks_and_policies_go_to_the_methods_that_take_them(tmp_path):
    text = "cpu: {N: [64], B: [8], mask: [1100, tile]}".replace("1100", '"1100"')
    masks = {(c.method, c.mask) for c in expand(text, tmp=tmp_path)}
    assert ("block_shock", "1100") in masks
    assert ("block_shock", "tile") in masks
    assert ("block_shock_folded", "1100") in masks
    assert ("dense_single", None) in masks
    assert ("block_shock_folded", "tile") not in masks
    named = expand(text, settings=["mask=1001"], tmp=tmp_path)
    assert {c.mask for c in named if c.mask} == {"1001"}
    packed = expand(text, phase="training", settings=["policy=packed_master"], tmp=tmp_path)
    assert {c.policy for c in packed if c.method == "block_shock"} == {"packed_master"}
    assert all(c.policy for c in packed)


def test_the_usual_kernel_and_sum_are_meant_where_none_is_named(chooser):
    case = Case("training", "chooser", 128, 8, mask="1100", policy="dense_master")
    assert (case.kernel, case.reduce) == ("auto", "collective")
    assert case == Case(
        "training", "chooser", 128, 8, mask="1100", policy="dense_master", kernel="auto",
        reduce="collective",
    )  # fmt: skip
    assert case.label == "chooser-1100-dense_master"
    assert case.options() == {
        "master": "dense", "mask": "1100", "kernel": "auto", "reduce": "collective",
    }  # fmt: skip


def test_an_unusual_kernel_and_sum_are_in_the_name_and_asked_of_the_method(chooser):
    case = Case("forward", "chooser", 128, 8, kernel="own", reduce="direct")
    assert case.id == "forward/chooser-own-reduce=direct-N128-B8-bf16"
    assert case.unsupported("cpu") == "own kernels need luck"
    assert chooser.asked == [(None, "own", "direct")]


def test_a_method_without_kernels_is_not_asked_about_them(chooser):
    plain = Case("forward", "dense_single", 128, 8)
    assert (plain.kernel, plain.reduce, plain.options()) == (None, None, {})
    assert plain.unsupported("cpu") is None
    assert plain.point == Case("forward", "chooser", 128, 8, kernel="own", reduce="direct").point


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("chooser", {"kernel": "fast"}, "does not take kernel 'fast'; it takes auto, library, own"),
        ("chooser", {"reduce": "own"}, "does not take reduce 'own'; it takes collective, direct"),
        ("dense_single", {"kernel": "auto"}, "does not take kernel 'auto'; it takes none"),
    ],
)
def test_a_kernel_or_sum_of_no_such_name_is_refused(chooser, method, options, message):
    with pytest.raises(ValueError, match=message):
        Case("forward", method, 128, 8, **options)


@pytest.mark.parametrize(
    ("setting", "taken"),
    [
        ([], {("auto", "collective")}),
        (
            ["kernel=all"],
            {("auto", "collective"), ("library", "collective"), ("own", "collective")},
        ),
        (["kernel=own"], {("own", "collective")}),
        (["kernel=usual,own"], {("auto", "collective"), ("own", "collective")}),
        (["reduce=direct,collective", "kernel=own"], {("own", "direct"), ("own", "collective")}),
    ],
)
def test_kernels_and_sums_go_to_the_methods_that_take_them(chooser, tmp_path, setting, taken):
    cases = expand("cpu: {N: [64], B: [8]}", settings=setting, tmp=tmp_path)
    assert {(c.kernel, c.reduce) for c in cases if c.method == "chooser"} == taken
    assert {(c.kernel, c.reduce) for c in cases if c.method == "dense_single"} == {(None, None)}


def test_an_axis_can_be_meant_for_some_methods_only(chooser, tmp_path):
    text = 'cpu: {N: [64], B: [8], mask: {block_shock: [tile, "1100"]}, kernel: {chooser: all}}'
    cases = expand(text, tmp=tmp_path)
    masks = {(c.method, c.mask) for c in cases}
    assert {("block_shock", "1100"), ("block_shock", "tile"), ("masked_split", "tile")} <= masks
    assert ("masked_split", "1100") not in masks
    assert {c.kernel for c in cases if c.method == "chooser"} == {"auto", "library", "own"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cpu: {N: [64], Batch: [8]}", "unknown key 'Batch'; known: B, K"),
        ("gpu: {N: [64]}", "unknown key 'gpu'; known: about"),
        ("cpu: {N: [64], training: {n: [8]}}", "unknown key 'n'"),
        ("cpu: {N: [64]}", "says no B for cpu"),
        ("phases: [inference]", "unknown phase 'inference'"),
        ("- a list", "must be a mapping"),
        ("cpu: {N: [64", "is not YAML"),
        ("cpu: {N: [64], B: [8], forward: 3}", "own.yaml, cpu, forward must be a mapping .* 3"),
        ("cpu: [64]", "own.yaml, cpu must be a mapping"),
        ("phases: forward", r"phases must be a list, such as \[forward\]"),
        ("cpu: {N: [[64]], B: [8]}", r"N: \[64\] is not one number, name or text"),
        ("cpu: {N: {64: 1}, B: [8]}", "N: {64: 1} is not one number"),
        ("cpu: {N: [64], B: [8], method: [[a]]}", r"method: \['a'\] is not one"),
        ("cpu: {N: [yes], B: [8]}", "N = True must be a whole number"),
        ("cpu: {N: [null], B: [8]}", "N = None must be a whole number"),
        ("cpu: {N: [64], B: [8], seed: [-1]}", "seed = -1 must be a whole number, 0 or more"),
        ("cpu: {N: [64], B: [8], bias: [maybe]}", "bias = 'maybe' must be true or false"),
        ("cpu: {N: [64], B: [8], input: [3]}", "input = 3 must be text"),
        ("cpu: {N: [64], B: [8], weight: [3]}", "weight = 3 must be text"),
        ("cpu: {N: [64], B: [8], mask: [1100]}", "mask 1100 is no name; put it in quotes"),
        ("cpu: {N: [64], B: [-1]}", "B = -1 must be a whole number"),
        ("cpu: {N: [64], B: [1], method: [fast]}", "unknown method 'fast'"),
        ("cpu: {N: [64], B: [1], kernel: [fast]}", "unknown kernel 'fast'; known: all, "),
        ("cpu: {N: [64], B: [1], reduce: [fast]}", "unknown reduce 'fast'; known: all, "),
        ("cpu: {N: [64], B: [1], mask: {fast: [tile]}}", "mask: unknown method 'fast'"),
        ("cpu: {N: [64], B: [1], mask: {dense_single: [tile]}}", "unknown mask 'tile'; known: all"),
    ],
)
def test_a_sweep_that_says_something_impossible_is_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        expand(text, tmp=tmp_path)


def test_a_file_that_is_no_text_is_refused(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_bytes(b"\xff\xfe\x00")
    for path in (file, tmp_path / "folder.yaml"):
        (tmp_path / "folder.yaml").mkdir(exist_ok=True)
        with pytest.raises(ValueError, match="cannot be read"):
            sweeps.load(str(path), ["linear"])


@pytest.mark.parametrize(
    ("phase", "options", "refused"),
    [
        ("training", {"policy": "plain", "optimizer": "sgd"}, True),
        ("training", {"policy": "frozen", "optimizer": "sgd"}, False),
        ("correctness", {}, True),
        ("forward", {}, False),
        ("backward", {}, False),
        ("drift", {}, False),
    ],
)
def test_what_is_checked_against_a_whole_float32_layer_ends_at_its_size(phase, options, refused):
    large = Case(phase, "dense_single", 81920, 16, **options).unsupported("cuda")
    assert bool(large) == refused
    if refused:
        assert large.startswith(f"{phase} is checked against a whole float32 layer")
        assert "N = 81920" in large
    assert Case(phase, "dense_single", 32768, 16, **options).unsupported("cuda") is None


def test_names_show_what_is_not_the_default():
    assert (
        Case("forward", "block_shock", 4096, 64, mask="tile").name == "block_shock-N4096-B64-bf16"
    )
    other = Case("forward", "block_shock", 4096, 64, K=1024, mask="1100", bias=False, input="mlp")
    assert other.name == "block_shock-1100-N4096-K1024-B64-bf16-input=mlp-bias=False"
