"""What training sees of images: each as often as the next, mixed by the algebra, seeded alike."""

import copy
import random
from itertools import islice

import pytest
import torch
from torch import nn

from blockshock.runs.order import Order
from blockshock.runs.settings import Refused
from blockshock.vision import config as settings
from blockshock.vision.augment import mix
from blockshock.vision.average import Average
from blockshock.vision.config import CONFIGS
from blockshock.vision.data import open_source, sequences, split
from blockshock.vision.model import vision_config

ONE = ["device=cpu", "train.seed=3"]


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_each_config_that_is_shipped_can_be_read_and_built(name):
    vision_config(settings.load(name))


def test_the_imagenet_config_is_vit_b_16_on_1024_images_a_step_of_8_ranks():
    config = settings.load("imagenet")
    sizes = vision_config(config)
    assert (sizes.width, sizes.depth, sizes.patch, sizes.tokens) == (768, 12, 16, 197)
    assert config.train.batch * config.train.accumulate * 8 == 1024
    assert config.train.steps == 300 * (1281167 // 1024)
    other = settings.load("imagenet", ["model.shape=h_14", "model.depth=2"])
    assert (vision_config(other).width, vision_config(other).depth) == (1280, 2)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("sparse.linear=1.0", "sparse.linear = 1.0: it must be below 1"),
        ("sparse.end=-1", "sparse.end = -1.0: it must be at least 0"),
        ("sparse.begin=0.9", r"sparse.end = 0.25 is before sparse.begin = 0.9"),
        ("sparse.skip=[1]", r"sparse.skip = \[1\]: it takes a list of names"),
        ("sparse.skip=head", "sparse.skip = 'head': it takes list, not str"),
        ("sparse.gradient=none", "sparse.gradient = 'none': use one of masked, through"),
        ("train.warmup=1000", "train.warmup = 1000 leaves no step of train.steps = 1000"),
        ("train.min_lr=1", "train.min_lr = 1 exceeds train.lr"),
        ("use.storage=coo", "use.storage = 'coo': use one of dense, bsr, semi_structured"),
        ("trian.steps=3", "unknown key trian; did you mean train?"),
    ],
)
def test_a_wrong_setting_is_one_error_with_its_fix(setting, message):
    with pytest.raises(Refused, match=message):
        settings.load("digits", [setting])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.patch=3", "model: image = 8 is no multiple of patch = 3"),
        ("model.width=null", "model: width not given; set model.shape to one of b_16"),
        ("model.shape=s_16", "model.shape = 's_16': use one of b_16, l_16, h_14"),
    ],
)
def test_a_model_that_cannot_be_is_refused(setting, message):
    with pytest.raises(Refused, match=message):
        vision_config(settings.load("digits", [setting]))


def test_each_epoch_reads_each_piece_once_in_another_order():
    order = Order(7, 5)
    epochs = [[order[7 * epoch + i] for i in range(7)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert order[3] == epochs[0][3]
    assert Order(7, 5)[10] == epochs[1][3]
    with pytest.raises(IndexError, match="sequence -1"):
        order[-1]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_ranks_read_what_one_rank_reads(ranks):
    whole = list(islice(sequences(10, 6 * ranks), 4))
    parts = [list(islice(sequences(10, 6, rank, ranks), 4)) for rank in range(ranks)]
    assert whole == [[number for part in parts for number in part[i]] for i in range(4)]


@pytest.mark.parametrize(
    ("count", "batch", "ranks"), [(19, 4, 1), (19, 4, 2), (8, 4, 2), (5, 9, 3)]
)
def test_validation_has_each_image_once_in_as_many_batches_on_every_rank(count, batch, ranks):
    parts = [list(split(count, batch, rank, ranks)) for rank in range(ranks)]
    sizes = [[len(numbers) for numbers in part] for part in parts]
    assert all(own == sizes[0] for own in sizes)
    numbers = sorted(number for part in parts for own in part for number in own)
    assert numbers[:count] == list(range(count))
    assert len(numbers) - count < ranks


def images(B=6):
    return torch.randn(B, 2, 9, 7, generator=torch.Generator().manual_seed(0))


def test_without_mixing_the_images_are_as_they_are():
    labels = torch.tensor([0, 2, 1, 1, 0, 2])
    found, targets = mix(images(), labels, 3, mixup=0.0, cutmix=0.0, seed="1")
    assert torch.equal(found, images())
    assert torch.equal(targets, torch.eye(3)[labels])


def test_mixup_is_the_mean_of_neighbours_by_one_share():
    labels = torch.tensor([0, 2, 1, 1, 0, 2])
    found, targets = mix(images(), labels, 3, mixup=1.0, cutmix=0.0, seed="2")
    share = random.Random("2").betavariate(1.0, 1.0)
    assert 0 < share < 1
    before = images().roll(1, 0)
    torch.testing.assert_close(found, share * images() + (1 - share) * before)
    one_hot = torch.eye(3)[labels]
    torch.testing.assert_close(targets, share * one_hot + (1 - share) * one_hot.roll(1, 0))


@pytest.mark.parametrize("seed", range(20))
def test_cutmix_has_the_neighbour_in_a_box_and_its_share_in_the_target(seed):
    labels = torch.tensor([0, 1, 2, 0, 1, 2])  # no neighbours are alike
    found, targets = mix(images(), labels, 3, mixup=0.0, cutmix=1.0, seed=str(seed))
    own, other = found == images(), found == images().roll(1, 0)
    assert (own | other).all()
    inside = other[0, 0]
    assert torch.equal(other, inside.expand_as(other))
    rows, columns = inside.any(1), inside.any(0)
    assert torch.equal(inside, rows[:, None] & columns)
    share = 1 - inside.sum() / inside.numel()
    torch.testing.assert_close(targets[0], share * torch.eye(3)[0] + (1 - share) * torch.eye(3)[2])


def test_where_both_are_asked_for_each_has_its_part_and_a_seed_gives_the_same_bits():
    def one(seed):
        return mix(images(), torch.arange(6) % 3, 3, mixup=1.0, cutmix=1.0, seed=seed)

    boxes = [bool((one(str(seed))[0] == images()).any()) for seed in range(40)]
    assert 10 < sum(boxes) < 30
    first, again = one("7"), one("7")
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_the_average_is_that_of_its_equation_and_can_be_put_in_place():
    module = nn.Linear(3, 2)
    average = Average(module, 0.5)
    expected = [p.detach().clone() for p in module.parameters()]
    for step in (1, 2, 3, 20):
        with torch.no_grad():
            for p in module.parameters():
                p.add_(1.0)
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        now = [p.detach() for p in module.parameters()]
        expected = [decay * e + (1 - decay) * p for e, p in zip(expected, now, strict=True)]
    torch.testing.assert_close(average.values, expected)
    before = copy.deepcopy(module.state_dict())
    with average.in_place():
        torch.testing.assert_close(list(module.parameters()), list(map(nn.Parameter, expected)))
        module.load_state_dict({name: torch.zeros_like(v) for name, v in before.items()})
    assert all(torch.equal(v, before[name]) for name, v in module.state_dict().items())
    assert all((value == 0).all() for value in average.values)


@pytest.fixture
def digits():
    pytest.importorskip("sklearn", reason="the extra vision is not installed")
    return open_source(settings.load("digits", ONE))


def test_digits_are_split_into_training_and_validation_images(digits):
    assert (digits.train, digits.val, digits.classes) == (1437, 360, 10)
    seen = list(digits.training(islice(sequences(0, 479), 3)))
    images = torch.cat([images for images, _ in seen] + [next(digits.validation([range(360)]))[0]])
    assert images.shape == (1797, 1, 8, 8)
    assert (images.min(), images.max()) == (-1, 1)
    from sklearn.datasets import load_digits

    every = torch.tensor(load_digits().images).flatten(1)
    found = (images.double().flatten(1) + 1) * 8
    assert sorted(found.tolist()) == sorted(every.tolist())


def test_digits_go_on_from_any_number(digits):
    whole = list(digits.training(islice(sequences(0, 100), 20)))
    rest = list(open_source(settings.load("digits", ONE)).training(islice(sequences(1500, 100), 5)))
    for (one, labels), (other, same) in zip(whole[15:], rest, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(labels, same)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.classes=3", "model.classes = 3, and digits has 10"),
        ("model.channels=3", "model.channels = 3, and digits has 1"),
        ("model.image=16", "model.image = 16, and digits have 8"),
    ],
)
def test_digits_that_do_not_fit_the_model_are_refused(digits, setting, message):
    with pytest.raises(Refused, match=message):
        open_source(settings.load("digits", [setting]))


@pytest.mark.parametrize(
    ("module", "source", "name"),
    [
        ("sklearn.datasets", "digits", "scikit-learn"),
        ("torchvision.datasets", "nowhere", "torchvision"),
    ],
)
def test_a_library_that_is_missing_says_how(monkeypatch, module, source, name):
    import sys

    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(Refused, match=rf"{name} is missing.*pip install 'blockshock\[vision\]'"):
        open_source(settings.load("digits", [f"data.source={source}"]))


@pytest.fixture
def photographs(tmp_path):
    """A folder of two classes, and the settings of a model for it."""
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    image = pytest.importorskip("PIL.Image")
    for part, count in (("train", 3), ("val", 2)):
        for label, name in enumerate(("cat", "dog")):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                image.new("RGB", (40 + 9 * i, 30), (90 * i, 100 * label, 50)).save(
                    folder / f"{i}.png"
                )
    sizes = {"image": 32, "channels": 3, "classes": 2, "patch": 8}
    given = [f"model.{name}={value}" for name, value in sizes.items()]
    return [f"data.source={tmp_path}", "data.workers=0", *given]


def test_photographs_are_cropped_by_their_number_alone(photographs):
    source = open_source(settings.load("digits", photographs))
    assert (source.train, source.val, source.classes) == (6, 4, 2)
    state = torch.get_rng_state()
    (one, labels), (two, _) = islice(source.training(sequences(0, 6)), 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert one.shape == (6, 3, 32, 32)
    assert labels.sum() == 3
    again, _ = next(source.training(sequences(6, 6)))
    assert torch.equal(two, again)
    (val, labels), *_ = source.validation([[0, 1, 2, 3]])
    assert val.shape == (4, 3, 32, 32)
    assert labels.tolist() == [0, 0, 1, 1]
    green = torch.tensor([0.0, 100 / 255]) - 0.456
    torch.testing.assert_close(val[[0, 2], 1, 16, 16], green / 0.224)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "val/dog").rename(folder / "val/cow"), "other classes: cow, dog"),
        (lambda folder: (folder / "val").rename(folder / "test"), "has no folders of images"),
    ],
)
def test_folders_that_do_not_fit_are_refused(photographs, tmp_path, change, message):
    change(tmp_path)
    with pytest.raises(Refused, match=message):
        open_source(settings.load("digits", photographs))
