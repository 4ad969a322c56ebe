"""Double rematerialisation: the same gradients, random numbers and buffers as without it, and less kept."""

import copy
import functools
import pickle
import threading
import weakref

import pytest
import torch
from test_distributed import in_two_processes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils._python_dispatch import TorchDispatchMode

import gradnorm_kernels as gk
from gradnorm_kernels.training import AdversarialLoss, EdgeLoss, GradientNormLoss, NaturalLoss

WIDTH = 6


class Block(nn.Module):
    """Two linear layers with what comes between, and a random number of its own for each sample."""

    def __init__(self, between, last=nn.Identity):
        super().__init__()
        self.fc1, self.between, self.fc2, self.last = (
            nn.Linear(WIDTH, 8),
            between(),
            nn.Linear(8, WIDTH),
            last(),
        )

    def forward(self, x):
        return x + self.last(self.fc2(self.between(self.fc1(x))))


class DropPath(nn.Module):
    def forward(self, x):
        return x * x.new_empty(len(x), 1).bernoulli_(0.5) if self.training else x


class Attention(nn.Module):
    def forward(self, x):
        heads = x.unflatten(-1, (2, -1)).transpose(0, 1)
        return gk.functional.scaled_dot_product_attention(heads, heads, heads).transpose(0, 1).flatten(1)


def spectral():
    return nn.Sequential(nn.Tanh(), spectral_norm(nn.Linear(8, 8)), nn.SiLU())


BLOCKS = {
    "tanh": functools.partial(Block, nn.Tanh),
    "fused": functools.partial(Block, lambda: nn.Sequential(gk.FusedLayerNorm(8), gk.FusedGeLU())),
    "dropout": functools.partial(Block, lambda: nn.Sequential(nn.Tanh(), nn.Dropout(0.4)), DropPath),
    "batch_norm": functools.partial(Block, lambda: nn.Sequential(gk.FusedBatchNorm1d(8), nn.Tanh())),
    "stock_batch_norm": functools.partial(Block, lambda: nn.Sequential(nn.BatchNorm1d(8), nn.Tanh())),
    "spectral_norm": functools.partial(Block, spectral),
    "attention": lambda: Block(Attention),
}
WITHOUT_THIRD_ORDER = {"stock_batch_norm"}


def make_model(block="tanh"):
    torch.manual_seed(0)
    blocks = nn.Sequential(*(BLOCKS[block]() for _ in range(3)))
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), blocks, nn.Linear(WIDTH, 4)).double()


def step(model, order=2, call=None, dtype=torch.float64, **options):
    """The parameters' and the input's gradients, buffers, and the next random number."""
    torch.manual_seed(1)
    x = torch.randn(5, WIDTH, dtype=dtype, requires_grad=True)
    loss = (call or model)(x).double().logsumexp(1).sum()
    parameters = [p for p in model.parameters() if p.requires_grad]
    for _ in range(order - 1):
        gradients = torch.autograd.grad(loss, [x], create_graph=True)
        loss = loss + sum(g.double().square().sum() for g in gradients)
    loss.backward(**options)
    return [x.grad, *(p.grad for p in parameters), *(b.clone() for b in model.buffers()), torch.rand(2)]


def assert_same(ours, wanted, tolerance=1e-12):
    assert len(ours) == len(wanted)
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def ops(function):
    """The names of the ops that ``function`` runs."""
    names = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func._schema.name.removeprefix("aten::"))
            return func(*args, **kwargs or {})

    with Mode():
        function()
    return names


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("block", BLOCKS)
def test_equals_the_step_without(block, order):
    if order == 3 and block in WITHOUT_THIRD_ORDER:
        pytest.skip("PyTorch's own does not go that far")
    model = make_model(block)
    checkpointed = gk.checkpoint_modules(copy.deepcopy(model))
    assert_same(step(checkpointed, order), step(model, order))


@pytest.mark.parametrize("order", [1, 2])
def test_frozen_parameters_and_an_input_without_gradient(order):
    model = make_model()
    model[1][1].requires_grad_(False)
    model[1][2].fc1.requires_grad_(False)
    checkpointed = gk.checkpoint_modules(copy.deepcopy(model))
    assert_same(step(checkpointed, order), step(model, order))
    x = torch.randn(5, WIDTH, dtype=torch.float64)
    for m in (model, checkpointed):
        m.zero_grad()
        m(x).square().sum().backward()
    assert_same(gradients(checkpointed), gradients(model))


def gradients(model):
    return [p.grad for p in model.parameters() if p.requires_grad]


def test_nesting():
    model = make_model("dropout")
    inner = gk.checkpoint_modules(copy.deepcopy(model))
    outer = copy.deepcopy(inner)
    outer[1].forward = functools.partial(gk.checkpoint, outer[1].forward)
    assert_same(step(outer), step(model))
    assert_same(step(outer, 3), step(model, 3))


def test_intermediate_results_are_not_kept():
    model, seen = gk.checkpoint_modules(make_model()), []
    for block in model[1]:
        block.fc1.register_forward_hook(lambda module, args, output: seen.append(weakref.ref(output)))
    x = torch.randn(5, WIDTH, dtype=torch.float64, requires_grad=True)
    loss = model(x).square().sum()
    assert len(seen) == 3 and all(ref() is None for ref in seen)
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    assert len(seen) == 6 and all(ref() is None for ref in seen)
    gradient.square().sum().backward()
    assert len(seen) == 12 and all(ref() is None for ref in seen)


def test_the_first_backward_computes_no_gradient_of_weights():
    model = make_model()
    x = torch.randn(5, WIDTH, dtype=torch.float64, requires_grad=True)

    def count(model):
        loss = model(x).square().sum()
        return sum(
            name in ("mm", "addmm") for name in ops(lambda: torch.autograd.grad(loss, x, create_graph=True))
        )

    plain = count(model)
    # One for each linear layer, and those of the blocks again.
    assert plain == 8 and count(gk.checkpoint_modules(model)) <= plain + 6


def test_matrix_products_of_a_step():
    """Of both parts of the second backward, the first one computes no first gradient again."""
    model = make_model()
    x = torch.randn(5, WIDTH, dtype=torch.float64, requires_grad=True)

    def count(model):
        def run():
            (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
            gradient.square().sum().backward()

        return sum(name in ("mm", "addmm") for name in ops(run))

    # For each of the six layers in blocks: three forwards and one first gradient more. And the gradient of
    # the incoming gradient in both parts, but in the second one not of a block's own, which enters at its
    # last layer.
    assert count(gk.checkpoint_modules(copy.deepcopy(model))) == count(model) + 6 * 5 - 3


def under_autocast(model, x):
    with torch.autocast("cpu", torch.bfloat16):
        return model(x)


def step_under_autocast(model, order):
    return step(model, order, functools.partial(under_autocast, model), dtype=torch.float32)


def test_autocast():
    model = make_model("dropout").float()
    checkpointed = gk.checkpoint_modules(copy.deepcopy(model))
    for order in (1, 2):
        # Of the same bfloat16 products; without the cache of casts, sums are the same too.
        ours, wanted = (step_under_autocast(m, order) for m in (checkpointed, model))
        assert_same(ours, wanted, tolerance=1e-2)
        model.zero_grad(), checkpointed.zero_grad()
    x = torch.randn(5, WIDTH, requires_grad=True)
    seen = []
    checkpointed[1][0].fc1.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    under_autocast(checkpointed, x).sum().backward()
    assert seen == [torch.bfloat16] * 2


def several(x, *, scale, others, flag="a"):
    """Non-tensor and nested arguments; an output that is none, an integer one, one without a gradient."""
    y, z = others["y"]
    assert flag == "b"
    product = torch.tanh(x) * y * scale
    return {"product": product, "rest": (product.sum(0), z + 1, x.argmax(), x.detach() * 2, "text", x)}


def gradients_of_several(call, order):
    """Of what ``call`` makes of `several`'s arguments."""
    torch.manual_seed(0)
    x, y = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    z = torch.arange(4)
    out = call(torch.exp(x), scale=2.0, others={"y": [y * x, z]}, flag="b")
    total, plain, index, constant, text, same = out["rest"]
    assert text == "text" and not constant.requires_grad and index.dtype == torch.int64
    assert torch.equal(plain, z + 1)
    loss = (out["product"].square().sum() + total.exp().sum() + same.sin().sum()) * constant.sum()
    for _ in range(order - 1):
        found = torch.autograd.grad(loss, [x, y], create_graph=True)
        loss = sum(g.square().sum() for g in found)
    return torch.autograd.grad(loss, [x, y])


@pytest.mark.parametrize("order", [1, 2, 3])
def test_several_inputs_and_outputs(order):
    checkpointed = functools.partial(gk.checkpoint, several)
    assert_same(gradients_of_several(checkpointed, order), gradients_of_several(several, order))


def step_of_several_first_gradients(model):
    """Of one forward; with a second backward pass over the same graph."""
    torch.manual_seed(1)
    x = torch.randn(5, WIDTH, dtype=torch.float64, requires_grad=True)
    out = model(x)
    first = [torch.autograd.grad(out[:, i].exp().sum(), x, create_graph=True)[0] for i in range(2)]
    loss = (first[0] * first[1]).sum() + out.square().sum()
    loss.backward(retain_graph=True)
    loss.backward()
    return [x.grad, *gradients(model)]


def step_of_gradients_by_parameters(model):
    x = torch.linspace(-1, 1, 5 * WIDTH, dtype=torch.float64).view(5, WIDTH)
    first = torch.autograd.grad(model(x).exp().sum(), list(model.parameters()), create_graph=True)
    sum(g.square().sum() for g in first).backward()
    return gradients(model)


@pytest.mark.parametrize("run", [step_of_several_first_gradients, step_of_gradients_by_parameters])
def test_other_steps(run):
    model = make_model()
    assert_same(run(gk.checkpoint_modules(copy.deepcopy(model))), run(model))


def test_hooks():
    """A block's own run once, those of a leaf once the whole gradient is there."""

    def run(model):
        calls = []
        model[1][0].register_forward_hook(lambda *_: calls.append("forward"))
        model[1][0].register_full_backward_hook(lambda *_: calls.append("backward"))
        model[1][0].fc1.weight.register_hook(lambda g: calls.append("leaf") or 2 * g)
        return step(model), calls

    model = make_model()
    (ours, calls), (wanted, expected) = run(gk.checkpoint_modules(copy.deepcopy(model))), run(model)
    assert calls == expected
    assert_same(ours, wanted)


def test_nothing_is_recorded_without_gradients():
    model, x = gk.checkpoint_modules(make_model()), torch.randn(5, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        assert not model(x).requires_grad
    model.requires_grad_(False)
    assert not model(x).requires_grad


def test_the_training_mode_is_that_of_the_forward():
    def run(model):
        x = torch.linspace(-1, 1, 5 * WIDTH, dtype=torch.float64).view(5, WIDTH)
        loss = model(x).square().sum()
        model.eval()
        loss.backward()
        assert not any(module.training for module in model.modules())
        return gradients(model)

    model = make_model("batch_norm")
    assert_same(run(gk.checkpoint_modules(copy.deepcopy(model))), run(model))


def test_backward_in_another_thread():
    model, results = make_model("dropout"), []
    checkpointed = gk.checkpoint_modules(copy.deepcopy(model))
    thread = threading.Thread(target=lambda: results.append(step(checkpointed)))
    thread.start()
    thread.join()
    assert_same(results[0], step(model))


def test_transforms_are_right():
    """They call the function: torch.func's, forward mode, a compiler."""
    model = make_model()
    checkpointed = gk.checkpoint_modules(copy.deepcopy(model))
    x, v = torch.randn(2, 5, WIDTH, dtype=torch.float64)

    def penalty(model, x):
        return torch.func.grad(lambda x: model(x).exp().sum())(x).square().sum()

    for transform in (torch.func.grad, torch.func.jacfwd, torch.func.hessian):
        ours, wanted = (transform(functools.partial(penalty, m))(x) for m in (checkpointed, model))
        torch.testing.assert_close(ours, wanted)
    ours, wanted = (torch.func.vmap(m)(x) for m in (checkpointed, model))
    torch.testing.assert_close(ours, wanted)
    ours, wanted = (torch.func.jvp(m, (x,), (v,))[1] for m in (checkpointed, model))
    torch.testing.assert_close(ours, wanted)


@pytest.mark.skipif(
    not hasattr(torch._dynamo.config, "trace_autograd_ops"), reason="cannot trace autograd.grad"
)
def test_a_compiled_step(fresh_dynamo):
    model = make_model("dropout")
    checkpointed = gk.checkpoint_modules(copy.deepcopy(model)).eval()

    def penalty(x):
        (gradient,) = torch.autograd.grad(checkpointed(x).exp().sum(), x, create_graph=True)
        return gradient.square().sum()

    x = torch.randn(5, WIDTH, dtype=torch.float64, requires_grad=True)
    expected = penalty(x)
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        torch.testing.assert_close(torch.compile(penalty, backend="eager", fullgraph=True)(x), expected)


def test_bad_input():
    x = torch.randn(3, requires_grad=True)
    with pytest.raises(ValueError, match="use_reentrant"):
        gk.checkpoint(torch.sin, x, use_reentrant=True)
    with pytest.raises(TypeError, match="function"):
        gk.checkpoint(x, x)
    with pytest.raises(TypeError, match="model"):
        gk.checkpoint_modules(torch.sin)
    with pytest.raises(ValueError, match="select"):
        gk.checkpoint_modules(nn.Linear(2, 2))
    outside = x * 2
    with pytest.raises(RuntimeError, match="pass it as an argument"):
        gk.checkpoint(lambda x: x * outside, x)
    with pytest.raises(RuntimeError, match="in place"):
        gk.checkpoint(lambda x, y: x * y.add_(1), x, torch.ones(3))
    results = [x.detach(), None]
    with pytest.raises(RuntimeError, match="recomputation"):
        gk.checkpoint(lambda x: x.sin() if results.pop() is None else results, x).sum().backward()


def test_an_error_in_a_recomputation_leaves_everything_as_it_was():
    model = make_model("batch_norm")
    block, failing = model[1][0], []

    def forward(x):
        y = Block.forward(block, x)
        if failing:
            raise RuntimeError("out of luck")
        return y

    x = torch.randn(5, WIDTH, dtype=torch.float64, requires_grad=True)
    loss = gk.checkpoint(forward, x).square().sum()
    before = [b.clone() for b in model.buffers()], torch.get_rng_state(), list(model.buffers())
    failing.append(True)
    with pytest.raises(RuntimeError, match="out of luck"):
        torch.autograd.grad(loss, x)
    assert_same([*model.buffers()], before[0])
    assert all(a is b for a, b in zip(model.buffers(), before[2], strict=True))
    assert torch.equal(torch.get_rng_state(), before[1])
    failing.clear()
    loss = gk.checkpoint(forward, x).square().sum()
    torch.autograd.grad(loss, x)


OBJECTIVES = {
    "natural": NaturalLoss(),
    "double_backprop": GradientNormLoss(ramp_epochs=0),
    "forward_over_reverse": GradientNormLoss(ramp_epochs=0, engine="forward_over_reverse"),
    "finite_difference": GradientNormLoss(ramp_epochs=0, engine="finite_difference"),
    "hybrid": AdversarialLoss(objective=GradientNormLoss(ramp_epochs=0)),
    "edge": EdgeLoss(),
}


class Network(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.model = make_model(block)

    def forward(self, images):
        return self.model(images.flatten(1)[:, :WIDTH])


@pytest.mark.parametrize("block", ["fused", "dropout", "batch_norm"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives(name, block):
    model = Network(block)
    checkpointed = gk.checkpoint_modules(copy.deepcopy(model))
    images, targets = torch.rand(5, 2, 3, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0])
    for m in (model, checkpointed):
        torch.manual_seed(2)
        OBJECTIVES[name](m, images, targets, epoch=1).total.backward()
    tolerance = 1e-6 if name == "finite_difference" else 1e-12
    assert_same(gradients(checkpointed), gradients(model), tolerance)
    assert_same(list(checkpointed.buffers()), list(model.buffers()))


def penalised(model, batch):
    GradientNormLoss(ramp_epochs=0)(model, *batch, epoch=1).total.backward()


def whole_batch_gradients(batch):
    model = Network("fused")
    penalised(model, batch)
    return gradients(model)


def distributed_data_parallel(batch, part):
    model = gk.checkpoint_modules(Network("fused"))
    penalised(DistributedDataParallel(model, broadcast_buffers=False), part)
    assert_same(gradients(model), whole_batch_gradients(batch), 1e-10)


def fully_sharded(batch, part):
    model, mesh = gk.checkpoint_modules(Network("fused")), init_device_mesh("cpu", (2,))
    shards = [*model.model[1], model]
    for module in shards:
        fully_shard(module, mesh=mesh, reshard_after_forward=False)
    model.set_reshard_after_backward(False)
    for _ in range(2):
        model.zero_grad()
        penalised(model, part)
        for module in shards:
            module.reshard()
        assert_same([g.full_tensor() for g in gradients(model)], whole_batch_gradients(batch), 1e-10)


@pytest.mark.slow
def test_two_processes():
    in_two_processes(distributed_data_parallel, fully_sharded)


def wrapped(model):
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


def assert_changes_nothing_else(wrap, tolerance=1e-12):
    """``wrap`` lets the blocks of a model run otherwise, in place; returns a model that it was given."""
    model = make_model()
    keys, kinds = model.state_dict().keys(), [type(m) for m in model.modules()]
    assert wrap(wrap(model)) is model
    assert wrapped(model) == ["1.0", "1.1", "1.2"]
    assert model.state_dict().keys() == keys and [type(m) for m in model.modules()] == kinds
    expected = step(make_model())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        # It runs its own parameters, not those it was copied from.
        assert_same(step(other), expected, tolerance)
    assert all(p.grad is None for p in model.parameters())
    return model


def test_checkpoint_modules_changes_nothing_else():
    model = assert_changes_nothing_else(gk.checkpoint_modules)
    assert wrapped(gk.checkpoint_modules(model, undo=True)) == []
    assert wrapped(gk.checkpoint_modules(model, lambda name, m: isinstance(m, nn.Tanh))) == [
        f"1.{i}.between" for i in range(3)
    ]


def test_fuse_before_and_after():
    block = functools.partial(Block, lambda: nn.Sequential(nn.LayerNorm(8), nn.GELU()))
    torch.manual_seed(0)
    model = nn.Sequential(*(block() for _ in range(2))).double()
    expected = step(copy.deepcopy(model))
    before = gk.checkpoint_modules(gk.fuse(copy.deepcopy(model)))
    after = gk.fuse(gk.checkpoint_modules(copy.deepcopy(model)))
    assert isinstance(after[0].between[1], gk.FusedGeLU)
    for other in (before, after, gk.unfuse(copy.deepcopy(after))):
        assert_same(step(other), expected)


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("vit_tiny_patch16_224", ["blocks.0", "blocks.1", "blocks.2", "blocks.11"]),
        ("swin_tiny_patch4_window7_224", ["layers.0.blocks.0", "layers.3.blocks.1"]),
        ("convnext_atto", ["stages.0.blocks.0", "stages.3.blocks.1"]),
        ("resnet50", ["layer1.0", "layer4.2"]),
        ("regnety_002", ["s3.b1", "s4.b2"]),
        ("focalnet_tiny_srf", ["layers.0.blocks.0", "layers.3.blocks.1"]),
    ],
)
def test_blocks_of_timm(name, blocks):
    """Those that timm's set_grad_checkpointing covers, all of one depth."""
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model(name)
    found = wrapped(gk.checkpoint_modules(model))
    assert {*blocks} <= {*found}
    assert len({name.count(".") for name in found}) == 1


def test_trainer(tmp_path):
    """Ends in the weights of the run without, up to rounding."""
    pytest.importorskip("timm")
    from gradnorm_kernels.training.config import TrainConfig
    from gradnorm_kernels.training.data import load_data
    from gradnorm_kernels.training.options import TrainingError
    from gradnorm_kernels.training.trainer import Trainer

    states = []
    for fused in ("on", "off"):
        for checkpoint in (False, True):
            config = TrainConfig(
                epochs=2, warmup_epochs=0.0, ramp_epochs=0.0, checkpoint=checkpoint, fused=fused
            )
            trainer = Trainer(config, load_data(config))
            batches = trainer.data.training_batches(0, 0)
            for _ in range(3):
                images, labels = next(batches)
                trainer.step(*trainer.data.soften(images, labels))
                trainer.step_in_epoch += 1
            assert bool(wrapped(trainer.model)) == checkpoint
            assert not wrapped(trainer.ema.module)
            states.append(list(trainer.model.state_dict().values()))
        assert_same(states[-1], states[-2], 1e-5)
    with pytest.raises(TrainingError, match="checkpoint"):
        TrainConfig(checkpoint=True, compile=True)
