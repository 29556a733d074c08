"""The vision transformer computes what its definition says, however it is run."""

import copy
import math

import pytest
import torch

from blockshock.block_sparse import Settings, apply_supermask, fold
from blockshock.transformer.vision import SHAPES, VisionConfig, VisionTransformer, compile_vision

SIZES = {"image": 8, "patch": 2, "classes": 7, "width": 24, "depth": 2, "heads": 3, "channels": 2}


def config(**changed):
    return VisionConfig(**{**SIZES, "attention": "reference", **changed})


def made(*, seed=0, **changed):
    model = VisionTransformer(config(**changed), generator=torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():  # the head and the biases are zero at first, and would hide errors
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def images(B=3, **changed):
    c = config(**changed)
    generator = torch.Generator().manual_seed(1)
    return torch.randn(B, c.channels, c.image, c.image, generator=generator)


def gradients(model, x):
    model.zero_grad(set_to_none=True)
    y = model(x)
    y.pow(2).sum().backward()
    return y.detach(), [p.grad for p in model.parameters()]


def by_definition(model, image):
    """Logits of one image in float64, position by position, in plain Python loops."""
    c, state = model.config, {name: value.double() for name, value in model.state_dict().items()}
    D, across = c.width // c.heads, c.image // c.patch

    def affine(name, x):
        return state[f"{name}.weight"] @ x + state[f"{name}.bias"]

    def norm(name, x):
        centred = x - x.mean()
        return (
            state[f"{name}.weight"] * centred / (centred.pow(2).mean() + c.eps).sqrt()
            + state[f"{name}.bias"]
        )

    stream = [state["class_token"].flatten()]
    kernel, bias = state["patches.weight"].flatten(1), state["patches.bias"]
    for i in range(across):
        for j in range(across):
            rows, columns = (slice(at * c.patch, (at + 1) * c.patch) for at in (i, j))
            stream.append(kernel @ image[:, rows, columns].reshape(-1) + bias)
    stream = [x + state["positions"][0, t] for t, x in enumerate(stream)]
    for n in range(c.depth):
        at = f"blocks.{n}"
        qkv = [
            affine(f"{at}.qkv", norm(f"{at}.attention_norm", x)).view(3, c.heads, D) for x in stream
        ]
        for t, x in enumerate(stream):
            mixed = []
            for h in range(c.heads):
                scores = torch.stack([qkv[t][0, h] @ other[1, h] for other in qkv])
                weights = (scores / math.sqrt(D)).softmax(0)
                mixed.append(weights @ torch.stack([other[2, h] for other in qkv]))
            stream[t] = x + affine(f"{at}.out", torch.cat(mixed))
        for t, x in enumerate(stream):
            inner = affine(f"{at}.mlp.up", norm(f"{at}.mlp_norm", x))
            inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
            stream[t] = x + affine(f"{at}.mlp.down", inner)
    return affine("head", norm("norm", stream[0]))


@pytest.mark.parametrize(
    "changed",
    [{}, {"attention": "flash_torch", "hidden": 40}, {"attention": None, "patch": 4}],
    ids=["usual", "flash_torch", "unnamed"],
)
def test_logits_are_those_of_the_definition(changed):
    model, x = made(**changed).double(), images(**changed).double()
    truth = torch.stack([by_definition(model, image) for image in x])
    torch.testing.assert_close(model(x), truth, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "parameters"), [("b_16", 86567656), ("l_16", 304326632), ("h_14", 632045800)]
)
def test_the_published_shapes_have_their_number_of_parameters(name, parameters):
    with torch.device("meta"):
        model = VisionTransformer(VisionConfig(image=224, classes=1000, **SHAPES[name]))
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_a_new_model_thinks_each_class_equally_probable():
    model = VisionTransformer(config())
    assert torch.equal(model(images()), torch.zeros(3, 7))


def test_the_weights_are_seeded_alike_whatever_the_default_generator_does():
    def new(seed):
        generator = torch.Generator().manual_seed(seed)
        return VisionTransformer(config(width=192), generator=generator).state_dict()

    state = torch.get_rng_state()
    first, again, other = new(3), new(3), new(4)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["positions"], other["positions"])
    # Cut at two standard deviations, a normal distribution keeps 0.88 of its own.
    for name, size in {"blocks.0.qkv": 4 * 192, "blocks.0.mlp.up": 5 * 192, "patches": 200}.items():
        assert abs(first[f"{name}.weight"].std() / (0.88 * (2 / size) ** 0.5) - 1) < 0.03


@pytest.mark.parametrize("attention", ["reference", "flash_torch"])
def test_a_compiled_model_has_no_graph_breaks_and_the_same_gradients(attention):
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    model = compile_vision(made(attention=attention), backend=backend)
    found, true = gradients(model, images()), gradients(made(attention=attention), images())
    assert len(graphs) == 1
    torch.testing.assert_close(found, true, rtol=1e-5, atol=1e-5)


def test_a_compiled_model_takes_supermasks_and_folds():
    torch._dynamo.reset()
    model = compile_vision(made(), backend="eager")
    plain = made()
    for each in (model, plain):
        apply_supermask(each, linear=Settings(block=8, sparsity=0.5), skip=("*.qkv", "last_layer"))
    torch.testing.assert_close(gradients(model, images()), gradients(plain, images()))
    fold(model)
    torch.testing.assert_close(model(images()), plain(images()))


def test_a_copy_of_a_compiled_model_computes_by_its_own_weights():
    torch._dynamo.reset()
    model = compile_vision(made(), backend="eager")
    before = model(images())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(twin(images()), before)


def test_inside_autocast_products_are_bf16_and_gradients_float32():
    model, plain = made(), made()
    with torch.autocast("cpu", torch.bfloat16):
        y, found = gradients(model, images())
    assert y.dtype == torch.bfloat16
    true = gradients(plain, images())[1]
    assert all(gradient.dtype == torch.float32 for gradient in found)
    norm = torch.cat([x.flatten() for x in true]).norm()
    apart = torch.cat([(a - b).flatten() for a, b in zip(found, true, strict=True)]).norm()
    assert apart < 0.05 * norm


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"patch": 3}, "image = 8 is no multiple of patch = 3"),
        ({"heads": 5}, "width = 24 is no multiple of heads = 5"),
        ({"depth": 0}, "depth = 0: an int of at least 1"),
        ({"hidden": 1.5}, "hidden = 1.5: an int"),
        ({"classes": True}, "classes = True: an int"),
        ({"eps": 0.0}, "eps = 0.0: it must be above 0"),
        ({"attention": "flashy"}, "unknown method 'flashy'; use one of reference"),
        ({"attention": "flash_triton", "heads": 6}, "D = 4"),
    ],
)
def test_a_config_that_cannot_be_is_refused_with_value_and_fix(changed, message):
    with pytest.raises(ValueError, match=message):
        config(**changed)


@pytest.mark.parametrize("shape", [(2, 8, 8), (3, 2, 8, 4), (3, 1, 8, 8)])
def test_images_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"\[B, 2, 8, 8\] is needed"):
        made()(torch.zeros(shape))
