"""What PyTorch cannot differentiate twice, and is right under the switch."""

import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from contract import assert_close
from test_corrected import check, curvatures, random, up_to_third_order
from torch.fx.experimental.proxy_tensor import make_fx

import gradnorm_kernels as gk


def integers(values, like):
    return torch.tensor(values, device=like.device)


def embedding_bag(weight, scales=None, *, offsets=(0, 2, 2, 5), dtype=torch.int64, **options):
    indices = integers([1, 4, 2, 1, 5, 4], weight).to(dtype)
    offsets = integers(offsets, weight).to(dtype)
    return F.embedding_bag(indices, weight, offsets, per_sample_weights=scales, **options)


def plain_bags(weight, scales=None, *, mode="mean", padding_idx=None, by_frequency=False):
    """Of a gradient that is divided by the frequency: the function that has it."""
    indices, bags = (1, 4, 2, 1, 5, 4), ((0, 1), (), (2, 3, 4), (5,))
    rows = []
    for bag in bags:
        places = [i for i in bag if indices[i] != padding_idx]
        if not places:
            rows.append(0 * weight[0])
            continue
        values = weight[[indices[i] for i in places]]
        if scales is not None:
            values = values * scales[places][:, None]
        if by_frequency:
            inverse = torch.tensor([1 / indices.count(indices[i]) for i in places], dtype=values.dtype)
            values = values * inverse[:, None] + (values * (1 - inverse[:, None])).detach()
        rows.append({"sum": values.sum, "mean": values.mean, "max": values.amax}[mode](0))
    return torch.stack(rows)


def plain_matrix_bags(weight):
    return weight[torch.tensor([[1, 2], [5, 1]])].mean(1)


def plain_multi_margin(x, *, p=1, margin=1.0, weight=None, reduction="mean"):
    labels = (2, 0, 1, 2) if x.dim() == 2 else (1,)
    losses = []
    for row, label in zip(x if x.dim() == 2 else x[None], labels, strict=True):
        others = [i for i in range(len(row)) if i != label]
        scale = 1 if weight is None else weight[label]
        losses.append((margin - row[label] + row[others]).clamp_min(0).pow(p).sum() * scale / len(row))
    return reduced(torch.stack(losses), reduction, x.dim() == 1)


def reduced(losses, reduction, is_one):
    if reduction == "none":
        return losses[0] if is_one else losses
    return losses.mean() if reduction == "mean" else losses.sum()


def multi_margin(x, **options):
    target = integers([2, 0, 1, 2] if x.dim() == 2 else 1, x)
    if options.get("weight") is not None:
        options["weight"] = options["weight"].to(x)
    return F.multi_margin_loss(x, target, **options)


LABELS = ((2, 0, -1, 1), (1, 1, 3, -1), (-1, 0, 1, 2))


def multilabel_margin(x, **options):
    labels = integers(LABELS if x.dim() == 2 else LABELS[0], x)
    return F.multilabel_margin_loss(x, labels, **options)


def plain_multilabel_margin(x, reduction="mean"):
    losses = []
    for row, labels in zip(x if x.dim() == 2 else x[None], LABELS, strict=False):
        labels = list(itertools.takewhile(lambda label: label >= 0, labels))
        others = [i for i in range(len(row)) if i not in labels]
        terms = 1 - row[labels][:, None] + row[others][None]
        losses.append(terms.clamp_min(0).sum() / len(row))
    return reduced(torch.stack(losses), reduction, x.dim() == 1)


def segments(x, reduce, *, by="lengths", axis=0, **options):
    lengths = integers([[2, 0, 3], [1, 3, 1]] if axis else [2, 0, 3], x)
    bounds = torch.cat([0 * lengths[..., :1], lengths.cumsum(-1)], -1)
    return torch.segment_reduce(
        x, reduce, axis=axis, **{by: lengths if by == "lengths" else bounds}, **options
    )


def plain_segments(x, reduce, *, axis=0, initial=None):
    if axis:
        parts = zip(x, ((2, 0, 3), (1, 3, 1)), strict=True)
        return torch.stack([plain_segments_of(row, lengths, reduce, initial) for row, lengths in parts])
    return plain_segments_of(x, (2, 0, 3), reduce, initial)


def plain_segments_of(x, lengths, reduce, initial):
    values = []
    for part in x.split(lengths):
        start = {"sum": 0.0, "mean": 0.0, "prod": 1.0, "max": -torch.inf, "min": torch.inf}[reduce]
        value = torch.full_like(x[0], start if initial is None else initial)
        for row in part:
            value = {
                "max": torch.maximum,
                "min": torch.minimum,
                "prod": torch.mul,
            }.get(reduce, torch.add)(value, row)
        values.append(value / len(part) if reduce == "mean" and len(part) else value)
    return torch.stack(values)


def with_zeros():
    x = random(5, 2).detach()
    x[0, 0] = x[2, 1] = x[3, 1] = x[4, 1] = x[3, 0] = 0
    return x.requires_grad_()


CTC_TARGETS = ((1, 2), (1, 1), (2, 0))


def ctc_loss(x, *, batched=True, lengths=list, concatenated=False, frames=(4, 2, 2), **options):
    sizes, targets = [2, 2, 1], [list(target) for target in CTC_TARGETS]
    if concatenated:
        targets = [1, 2, 1, 1, 2]
    if not batched:
        frames, sizes, targets = frames[0], sizes[0], targets[0]
    elif lengths is list:
        frames = list(frames)
    if lengths is not list or not batched:
        frames, sizes = integers(frames, x), integers(sizes, x)
    return F.ctc_loss(x.log_softmax(-1), integers(targets, x), frames, sizes, **options)


def plain_ctc_loss(x, *, frames=(4, 2, 2), blank=0, reduction="mean"):
    """The sum over all paths; 0 where there is none."""
    is_one = x.dim() == 2
    scores = (x[:, None] if is_one else x).log_softmax(-1)
    sizes, losses = (2, 2, 1), []
    for n in range(scores.shape[1]):
        target, total = CTC_TARGETS[n][: sizes[n]], 0 * scores[0, n].sum()
        for path in itertools.product(range(scores.shape[2]), repeat=frames[n]):
            merged = [label for label, _ in itertools.groupby(path) if label != blank]
            if merged == list(target):
                total = total + sum(scores[t, n, label] for t, label in enumerate(path)).exp()
        losses.append(-total.log() if total > 0 else 0 * total)
    losses = torch.stack(losses)
    if reduction == "mean":
        return (losses / torch.tensor(sizes[: len(losses)])).mean()
    return reduced(losses, reduction, is_one)


def case(function, plain, *inputs, **options):
    return partial(function, **options), plain, inputs


BAGS = random(6, 3), random(6)
# A function, the same in plain operations that are right to every order, and its inputs.
CASES = {
    "embedding_bag": case(embedding_bag, plain_bags, BAGS[0]),
    "embedding_bag of 32 bit": case(embedding_bag, plain_bags, BAGS[0], dtype=torch.int32),
    "embedding_bag of a matrix": case(
        lambda w: F.embedding_bag(integers([[1, 2], [5, 1]], w), w), plain_matrix_bags, BAGS[0]
    ),
    "embedding_bag, padding": case(embedding_bag, partial(plain_bags, padding_idx=1), BAGS[0], padding_idx=1),
    "embedding_bag, sum": case(embedding_bag, partial(plain_bags, mode="sum"), BAGS[0], mode="sum"),
    "embedding_bag, weights": case(
        embedding_bag, partial(plain_bags, mode="sum", padding_idx=4), *BAGS, mode="sum", padding_idx=4
    ),
    "embedding_bag, weights and last offset": case(
        embedding_bag,
        partial(plain_bags, mode="sum"),
        *BAGS,
        mode="sum",
        offsets=(0, 2, 2, 5, 6),
        include_last_offset=True,
    ),
    "embedding_bag, max": case(embedding_bag, partial(plain_bags, mode="max"), BAGS[0], mode="max"),
    "embedding_bag, max, padding": case(
        embedding_bag,
        partial(plain_bags, mode="max", padding_idx=4),
        BAGS[0],
        mode="max",
        padding_idx=4,
    ),
    "embedding_bag, sum, by frequency": case(
        embedding_bag,
        partial(plain_bags, mode="sum", by_frequency=True),
        BAGS[0],
        mode="sum",
        scale_grad_by_freq=True,
    ),
    "embedding_bag, mean, by frequency": case(
        embedding_bag, partial(plain_bags, by_frequency=True), BAGS[0], scale_grad_by_freq=True
    ),
    "multi_margin": case(multi_margin, plain_multi_margin, random(4, 3)),
    "multi_margin of one": case(
        multi_margin, partial(plain_multi_margin, p=2, reduction="none"), random(5), p=2, reduction="none"
    ),
    "multi_margin of squares": case(
        multi_margin,
        partial(plain_multi_margin, p=2, margin=0.7, weight=(0.5, 2.0, 3.0), reduction="none"),
        random(4, 3),
        p=2,
        margin=0.7,
        weight=torch.tensor([0.5, 2.0, 3.0]),
        reduction="none",
    ),
    "multi_margin of squares, sum": case(
        multi_margin, partial(plain_multi_margin, p=2, reduction="sum"), random(4, 3), p=2, reduction="sum"
    ),
    "multilabel_margin": case(multilabel_margin, plain_multilabel_margin, random(3, 4)),
    "multilabel_margin of each": case(
        multilabel_margin, partial(plain_multilabel_margin, reduction="none"), random(3, 4), reduction="none"
    ),
    "multilabel_margin of one": case(
        multilabel_margin, partial(plain_multilabel_margin, reduction="sum"), random(4), reduction="sum"
    ),
    "segment_reduce, zeros": case(
        segments, partial(plain_segments, reduce="prod"), with_zeros(), reduce="prod"
    ),
    "ctc_loss": case(ctc_loss, plain_ctc_loss, random(4, 3, 3), zero_infinity=True),
    "ctc_loss, lengths are tensors": case(
        ctc_loss, plain_ctc_loss, random(4, 3, 3), lengths=torch.tensor, zero_infinity=True
    ),
    "ctc_loss of concatenated targets": case(
        ctc_loss,
        partial(plain_ctc_loss, frames=(3, 4, 3), reduction="sum"),
        random(4, 3, 3),
        frames=(3, 4, 3),
        concatenated=True,
        reduction="sum",
    ),
    "ctc_loss of one": case(
        ctc_loss, partial(plain_ctc_loss, reduction="none"), random(4, 3), batched=False, reduction="none"
    ),
    "ctc_loss, another blank": case(
        ctc_loss,
        partial(plain_ctc_loss, frames=(4, 4, 4), blank=3, reduction="none"),
        random(4, 3, 4),
        frames=(4, 4, 4),
        blank=3,
        reduction="none",
    ),
}
for reduce, by, options in itertools.product(
    ("sum", "mean", "max", "min", "prod"), ("lengths", "offsets"), ({}, {"initial": 0.4}, {"axis": 1})
):
    # Of an empty segment the mean is NaN.
    if reduce != "mean" or "initial" in options:
        x = random(2, 5, 2) if "axis" in options else random(5, 2)
        name = ", ".join(["segment_reduce", reduce, by, *options])
        CASES[name] = case(
            segments, partial(plain_segments, reduce=reduce, **options), x, reduce=reduce, by=by, **options
        )
# Not of gradients that are not the function's, nor, as in PyTorch, of a mean over lengths in a list.
TRANSFORMED = [name for name in CASES if "by frequency" not in name and name != "ctc_loss"]


def finite_up_to_third_order(function, inputs):
    """Without the infinite values of empty segments."""
    return up_to_third_order(lambda *inputs: finite(function(*inputs)), inputs)


def finite_curvatures(function, inputs):
    return curvatures(lambda *inputs: finite(function(*inputs)), inputs)


def finite(values):
    return values.masked_fill(values.isinf(), 0)


@pytest.mark.parametrize("name", CASES)
def test_every_order_is_right(name):
    if "by frequency" in name and torch.__version__ < "2.14":
        pytest.skip("PyTorch's own first gradient is divided by how often another row occurs")
    check(finite_up_to_third_order, CASES[name])


@pytest.mark.parametrize("name", TRANSFORMED)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms_are_right(name):
    check(finite_curvatures, CASES[name])


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_forward_and_first_backward_are_pytorchs(name, create_graph):
    function, _, inputs = CASES[name]

    def both():
        output = function(*inputs)
        return [
            output,
            *torch.autograd.grad(output, inputs, output.detach().cos(), create_graph=create_graph),
        ]

    expected = both()
    with gk.set_fused_double_backward(True):
        for ours, stocks in zip(both(), expected, strict=True):
            assert torch.equal(ours, stocks)


@pytest.mark.parametrize("name", CASES)
def test_pytorch_raises(name):
    """A case that it can differentiate twice need not be here."""
    function, _, inputs = CASES[name]
    with pytest.raises(RuntimeError, match="not implemented"):
        up_to_third_order(function, inputs)


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_several_directions_at_once(name):
    function, _, inputs = CASES[name]
    with gk.set_fused_double_backward(True):
        output = finite(function(*inputs))
        firsts = torch.autograd.grad(output.sin().sum(), inputs, create_graph=True)
        directions = [torch.stack([first.detach().cos(), first.detach().sin()]) for first in firsts]

        def products(directions, **options):
            return torch.autograd.grad(
                firsts, inputs, directions, retain_graph=True, materialize_grads=True, **options
            )

        expected = [products([direction[i] for direction in directions]) for i in range(2)]
        ours = products(directions, is_grads_batched=True)
        assert_close(
            ours, [torch.stack(pair) for pair in zip(*expected, strict=True)], rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize(
    "name",
    [
        "embedding_bag, weights",
        "embedding_bag, max",
        "multi_margin",
        "multilabel_margin",
        "segment_reduce, max, lengths",
        # Of a mean PyTorch leaves the lengths out of the graph, and reads memory that nobody wrote.
        "ctc_loss, another blank",
    ],
)
def test_traced_graphs_are_right(name):
    function, _, inputs = CASES[name]

    def second(*inputs):
        firsts = torch.autograd.grad(finite(function(*inputs)).sin().sum(), inputs, create_graph=True)
        total = sum(first.sin().sum() for first in firsts)
        return torch.autograd.grad(total, inputs, materialize_grads=True)

    others = [2 * x.detach() for x in inputs]
    others = [x.requires_grad_() for x in others]
    with gk.set_fused_double_backward(True):
        graph = make_fx(second)(*inputs)
        expected = second(*others)
    assert_close(graph(*others), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("name", ["ctc_loss", "multi_margin of squares", "segment_reduce, zeros"])
def test_hooks_hear_of_each_gradient_once(name, create_graph):
    function, plain, (x,) = CASES[name]

    def heard(of):
        gradients = []
        inner = x * 1
        inner.register_hook(gradients.append)
        (first,) = torch.autograd.grad(of(inner).sin().sum(), x, create_graph=True)
        torch.autograd.grad(first.sin().sum(), x, create_graph=create_graph)
        return gradients

    expected = heard(plain)
    with gk.set_fused_double_backward(True):
        assert_close(heard(function), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("reduce", ["max", "min"])
@pytest.mark.parametrize("sign", [1, -1])
def test_equal_extremes_are_differentiated_as_pytorch_does(reduce, sign):
    """It shares a gradient among them if that is positive."""
    x = torch.tensor([2.0, 2.0, 1.0, 1.0, 2.0], dtype=torch.float64, requires_grad=True)
    g = torch.tensor([sign * 0.5], dtype=torch.float64, requires_grad=True)
    with gk.set_fused_double_backward(True):
        output = torch.segment_reduce(x, reduce, lengths=torch.tensor([5]))
        (first,) = torch.autograd.grad(output, x, g, create_graph=True)
        (slope,) = torch.autograd.grad((first * torch.arange(5)).sum(), g)
    is_extreme = (x == output).double()
    shares = is_extreme / is_extreme.sum() if sign > 0 else is_extreme
    assert torch.equal(first, g * shares)
    assert_close([slope], [(shares * torch.arange(5)).sum()[None]], rtol=1e-15, atol=0)


def test_first_of_equal_maxima_has_the_gradient_of_a_bag():
    weight = torch.ones(3, 2, dtype=torch.float64, requires_grad=True)
    with gk.set_fused_double_backward(True):
        output = F.embedding_bag(torch.tensor([[2, 0]]), weight, mode="max")
        g = torch.ones_like(output).requires_grad_()
        (first,) = torch.autograd.grad(output, weight, g, create_graph=True)
        (slope,) = torch.autograd.grad(first, g, torch.arange(6.0).double().view(3, 2))
    assert torch.equal(slope, torch.tensor([[4.0, 5.0]], dtype=torch.float64))


def test_loss_of_an_impossible_alignment_is_not_hidden():
    x = random(4, 3, 3)
    with gk.set_fused_double_backward(True):
        loss = ctc_loss(x, reduction="none")
        (first,) = torch.autograd.grad(loss.sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first[:, [0, 2]].square().sum(), x, retain_graph=True)
        (of_all,) = torch.autograd.grad(first.square().sum(), x)
    possible = loss.isfinite()
    assert possible.tolist() == [True, False, True]
    plain = plain_ctc_loss(x, reduction="none")
    (expected,) = torch.autograd.grad(plain[possible].sum(), x, create_graph=True)
    (expected,) = torch.autograd.grad(expected.square().sum(), x)
    assert first[:, 1].isnan().any() and of_all[:, 1].isnan().any()
    assert_close([of_all[:, possible]], [expected[:, possible]], rtol=1e-9, atol=1e-9)
    assert_close([second[:, possible]], [expected[:, possible]], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("embedding_bag", torch.float32),
        ("embedding_bag", torch.bfloat16),
        ("embedding_bag, weights", torch.bfloat16),
        ("embedding_bag, max", torch.bfloat16),
        ("ctc_loss", torch.float32),
        ("multi_margin of squares", torch.float32),
        ("segment_reduce, zeros", torch.bfloat16),
    ],
)
def test_other_dtypes(name, dtype):
    function, plain, inputs = CASES[name]
    narrow = [x.detach().to(dtype).requires_grad_() for x in inputs]
    wide = [x.detach().double().requires_grad_() for x in narrow]

    def second(of, inputs):
        first = torch.autograd.grad(of(*inputs).sin().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(f.sin().sum() for f in first), inputs)

    expected = second(plain, wide)
    with gk.set_fused_double_backward(True):
        ours = second(function, narrow)
    assert all(o.dtype == dtype for o in ours)
    tolerance = 20 * torch.finfo(dtype).eps
    assert_close([o.double() for o in ours], expected, rtol=tolerance, atol=tolerance)


def test_a_long_sequence_in_float32():
    targets, frames = torch.randint(1, 8, (2, 30), generator=torch.Generator().manual_seed(0)), [120, 100]

    def second(x):
        loss = F.ctc_loss(x.log_softmax(-1), targets, frames, [30, 25], reduction="sum")
        (first,) = torch.autograd.grad(loss, x, create_graph=True)
        return first.detach(), *torch.autograd.grad(first.square().sum(), x)

    x = random(120, 2, 8)
    with gk.set_fused_double_backward(True):
        first, exact = second(x)
        ours = second(x.detach().float().requires_grad_())
    # As exact as what it is the derivative of.
    error = (ours[0] - first).norm() / first.norm()
    assert (ours[1] - exact).norm() / exact.norm() < 2 * error


def test_sparse_gradients_raise():
    weight = BAGS[0]
    with gk.set_fused_double_backward(True):
        output = F.embedding_bag(torch.tensor([[0, 1]]), weight, sparse=True, mode="sum")
        (first,) = torch.autograd.grad(output.sin().sum(), weight, create_graph=True)
        with pytest.raises(RuntimeError, match="not implemented"):
            torch.autograd.grad(first.to_dense().square().sum(), weight)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_on_a_gpu(name):
    function, plain, inputs = CASES[name]
    expected = finite_up_to_third_order(plain, inputs)
    on_device = [x.detach().cuda().requires_grad_() for x in inputs]
    with gk.set_fused_double_backward(True):
        ours = finite_up_to_third_order(function, on_device)
    assert_close([o.cpu() for o in ours], expected, rtol=1e-9, atol=1e-9)
