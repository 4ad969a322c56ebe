"""Masks equal to AutoAttack's own, evaluations that resume to the bit, models left as they were."""

import contextlib
import json
import warnings
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from conftest import usual
from torch import nn

pytest.importorskip("pyautoattack", reason="evaluation needs: pip install 'gradnorm_kernels[train]'")

from pyautoattack import AutoAttack
from sklearn.datasets import load_digits

import gradnorm_kernels as gk
from gradnorm_kernels.training import evaluation
from gradnorm_kernels.training.evaluation import ATTACKS, Robustness, evaluate, robustness_curve

EPS = 0.1


class QuickAutoAttack(AutoAttack):
    """AutoAttack with a hundredth of the iterations, and the later attacks the stronger."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.apgd.n_iter = 1
        self.apgd_targeted.n_iter, self.apgd_targeted.n_iter_2 = 2, 1
        self.fab.n_iter = 4
        self.square.n_queries = 40


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(evaluation, "AutoAttack", QuickAutoAttack)


def linear_model(classes=10, size=64):
    return nn.Sequential(nn.Flatten(), nn.Linear(size, classes)).eval()


def convolutional_model():
    first = nn.Conv2d(1, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.GELU()
    return nn.Sequential(*first, nn.Conv2d(8, 12, 3, 2, 1), nn.GELU(), nn.Flatten(), nn.Linear(48, 10))


def train(images, labels):
    """A model of all but the first 400 digits."""
    images, labels = images[400:], labels[400:]
    model = convolutional_model()
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model.train()(images), labels).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    images = torch.from_numpy(data.images).float().unsqueeze(1) / 16
    return images, torch.from_numpy(data.target).long()


@pytest.fixture(scope="module")
def trained(digits):
    return train(*digits)


@pytest.fixture
def held_out(digits):
    images, labels = digits
    return images[:60], labels[:60]


def reference_mask(adversary, images, labels, batch_size=250):
    """What AutoAttack's own loop leaves standing."""
    _, predicted = adversary.run_standard_evaluation(images, labels, batch_size=batch_size)
    # Where it fooled the model, that is another class; elsewhere the clean prediction.
    return predicted == labels


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, forward):
        super().__init__()
        self.forward = forward


class Counted(nn.Module):
    """Counts calls, and may fail at one."""

    def __init__(self, model, fail_at=None):
        super().__init__()
        self.model, self.calls, self.fail_at = model, 0, fail_at

    def forward(self, images):
        self.calls += 1
        if self.calls == self.fail_at:
            raise InterruptedError
        return self.model(images)


def assert_same(actual, expected):
    """All but the time."""
    dicts = [result.to_dict() | {"seconds": 0} for result in (actual, expected)]
    assert dicts[0] == dicts[1]


class TestAgainstAutoAttack:
    @pytest.mark.parametrize(("norm", "eps"), [("Linf", EPS), ("L2", 0.5)])
    @pytest.mark.parametrize("batch_size", [17, 250])
    def test_quick_mask_and_accuracies(self, quick, trained, held_out, norm, eps, batch_size, caplog):
        result = evaluate(trained, *held_out, eps=eps, norm=norm, batch_size=batch_size, seed=3)
        adversary = QuickAutoAttack(trained, eps=eps, norm=norm, seed=3)
        with caplog.at_level("DEBUG", logger="auto-attack"):
            mask = reference_mask(adversary, *held_out, batch_size)
        assert torch.equal(result.robust, mask)
        assert 0 < mask.sum() < result.clean_correct.sum() < 60
        logged = [m for m in caplog.messages if m.startswith("robust accuracy after")]
        for (name, accuracy), message in zip(result.accuracies.items(), logged, strict=True):
            assert message.startswith(f"robust accuracy after {name.upper()}: {accuracy:.2%} ")
        assert list(result.accuracies) == ["apgd-ce", "apgd-t", "fab-t", "square"]

    # Square's 5,000 queries take nearly all of the time.
    @pytest.mark.parametrize(("count", "queries"), [(200, 5000), (24, 50)])
    @pytest.mark.slow
    def test_standard_mask(self, trained, digits, count, queries, monkeypatch):
        class FewerQueries(AutoAttack):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                assert self.square.n_queries == 5000
                self.square.n_queries = queries

        monkeypatch.setattr(evaluation, "AutoAttack", FewerQueries)
        images, labels = (part[:count] for part in digits)
        result = evaluate(trained, images, labels, eps=EPS, batch_size=35, seed=1)
        mask = reference_mask(FewerQueries(trained, eps=EPS, seed=1), images, labels, 35)
        assert torch.equal(result.robust, mask) and 0 < mask.sum() < count

    def test_the_settings_are_the_standard_ones(self, monkeypatch, trained, held_out):
        """Of all that a quick test alters."""
        seen = {}

        def note(name, attack):
            def perturb(images, labels):
                seen[name] = {k: v for k, v in vars(attack).items() if isinstance(v, (int, float, str))}
                seen[name].pop("device", None)
                return images

            return perturb

        class Noted(AutoAttack):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                for name in ("apgd", "apgd_targeted", "fab", "square"):
                    attack = getattr(self, name)
                    attack.perturb = note(name, attack)

        monkeypatch.setattr(evaluation, "AutoAttack", Noted)
        evaluate(trained, *held_out, eps=EPS, seed=5)
        ours = dict(seen)
        seen.clear()
        reference_mask(Noted(trained, eps=EPS, seed=5), *held_out)
        assert ours == seen and len(seen) == 4
        assert ours["square"]["n_queries"] == 5000 and ours["apgd"]["n_iter"] == 100

    def test_apgd_alone_is_the_ensemble_s_first(self, trained, held_out):
        alone = evaluate(trained, *held_out, attack="apgd-ce", eps=EPS, batch_size=25, seed=2)
        adversary = AutoAttack(trained, eps=EPS, seed=2)
        adversary.attacks_to_run = ["apgd-ce"]
        assert torch.equal(alone.robust, reference_mask(adversary, *held_out, 25))
        assert alone.steps == 100

    def test_fewer_classes_than_targets(self, quick):
        images = torch.rand(20, 1, 8, 8)
        model = linear_model(5)
        labels = model(images).argmax(1)
        result = evaluate(model, images, labels, eps=0.02)
        adversary = QuickAutoAttack(model, eps=0.02, seed=0)
        adversary.apgd_targeted.n_target_classes = adversary.fab.n_target_classes = 4
        assert torch.equal(result.robust, reference_mask(adversary, images, labels))
        assert 0 < result.robust.sum() < 20

    @pytest.mark.parametrize("classes", [2, 3])
    def test_too_few_classes_for_the_targeted_loss(self, classes):
        images, labels = torch.rand(20, 1, 8, 8), torch.zeros(20, dtype=torch.int64)
        model = linear_model(classes)
        with pytest.raises(ValueError, match=f"^attack: .* at least 4 classes, got {classes}"):
            evaluate(model, images, labels)
        assert evaluate(model, images, labels, eps=0).images == 20
        assert evaluate(model, images, labels, attack="apgd-ce", steps=3).images == 20

    def test_nothing_left_to_attack(self, quick):
        images = torch.rand(20, 1, 8, 8)
        model = linear_model()
        result = evaluate(model, images, model(images).argmin(1))
        assert not result.clean_correct.any() and not result.robust.any()
        assert list(result.accuracies.values()) == [0, 0, 0, 0]


class TestOwnAttacks:
    @pytest.mark.parametrize(("norm", "eps"), [("Linf", EPS), ("L2", 0.6)])
    def test_order_of_strength(self, trained, held_out, norm, eps):
        options = {"eps": eps, "norm": norm, "batch_size": 25}
        accuracy = {
            attack: evaluate(trained, *held_out, attack=attack, **options).robust_accuracy
            for attack in ("fgsm", "pgd", "apgd-ce")
        }
        assert accuracy["fgsm"] >= accuracy["pgd"] >= accuracy["apgd-ce"] - 0.04
        assert 0 < accuracy["pgd"] < 0.9
        few = evaluate(trained, *held_out, attack="pgd", steps=1, **options)
        assert few.steps == 1 and few.robust_accuracy >= accuracy["pgd"]

    def test_fgsm_by_hand(self, trained, held_out):
        images, labels = held_out
        pixels = images.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(trained(pixels), labels, reduction="sum"), pixels)
        fooled = trained((images + EPS * gradient.sign()).clamp(0, 1)).argmax(1) != labels
        result = evaluate(trained, images, labels, attack="fgsm", eps=EPS)
        assert torch.equal(result.robust, result.clean_correct & ~fooled)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_models_of_other_dtypes(self, quick, digits, held_out, dtype):
        model = train(*digits).to(dtype)
        for attack in ATTACKS:
            result = evaluate(model, held_out[0].to(dtype), held_out[1], attack=attack, eps=EPS)
            assert 0 < result.robust_accuracy < result.clean_accuracy


class TestResuming:
    # Each attack but Square fools the model on some images, so that batches change from attack to attack.
    OPTIONS: ClassVar = {"norm": "L2", "eps": 0.5, "batch_size": 15}

    @pytest.mark.parametrize("fail_at", usual([2, 12, 20, 40, 90, 200, 300, 340], "2", "90", "340"))
    def test_same_as_uninterrupted(self, quick, trained, held_out, fail_at, tmp_path):
        whole = evaluate(trained, *held_out, **self.OPTIONS)
        path = tmp_path / "new" / "state.json"
        with pytest.raises(InterruptedError):
            evaluate(Counted(trained, fail_at), *held_out, **self.OPTIONS, state_path=path)
        resuming = Counted(trained)
        assert_same(evaluate(resuming, *held_out, **self.OPTIONS, state_path=path), whole)
        assert len(set(whole.accuracies.values()) | {whole.clean_accuracy}) == 4

        finished = Counted(trained)
        assert_same(evaluate(finished, *held_out, **self.OPTIONS, state_path=path), whole)
        assert finished.calls == 0
        assert [file.name for file in path.parent.iterdir()] == ["state.json"]

    def test_interrupted_at_every_batch(self, quick, trained, held_out, tmp_path, monkeypatch):
        """Each run does one more batch, and none twice."""
        whole = evaluate(trained, *held_out, **self.OPTIONS)
        path = tmp_path / "state.json"
        write = evaluation._StateFile.write

        def write_and_stop(file, state):
            write(file, state)
            raise InterruptedError

        monkeypatch.setattr(evaluation._StateFile, "write", write_and_stop)
        runs, states = 0, set()
        while True:
            runs += 1
            try:
                result = evaluate(trained, *held_out, **self.OPTIONS, state_path=path)
                break
            except InterruptedError:
                states.add(path.read_text())
        assert_same(result, whole)
        assert len(states) == runs - 1 >= 12

    @pytest.mark.parametrize(
        ("name", "change"),
        [
            ("attack", {"attack": "fgsm"}),
            ("norm", {"norm": "L2"}),
            ("eps", {"eps": 0.2}),
            ("seed", {"seed": 1}),
            ("steps", {"steps": 3}),
            ("batch_size", {"batch_size": 20}),
        ],
    )
    def test_state_of_other_settings(self, trained, held_out, name, change, tmp_path):
        options = {"attack": "pgd", "eps": EPS, "steps": 2, "state_path": tmp_path / "state.json"}
        evaluate(trained, *held_out, **options)
        if name == "attack":
            del options["steps"]
        with pytest.raises(ValueError, match=f"^state_path: .*state.json .*{name} is"):
            evaluate(trained, *held_out, **options | change)

    def test_state_of_other_data_or_weights(self, trained, held_out, tmp_path):
        images, labels = held_out
        options = {"attack": "fgsm", "eps": EPS, "state_path": tmp_path / "state.json"}
        evaluate(trained, images, labels, **options)
        for other in ((images.flip(0), labels), (images, labels.flip(0)), (images.double(), labels)):
            with pytest.raises(ValueError, match=r"^state_path: .*another evaluation: data_sha256 is \w+ th"):
                evaluate(trained, *other, **options)
        with pytest.raises(ValueError, match="another evaluation: images is 60 there and 59 here"):
            evaluate(trained, images[:59], labels[:59], **options)
        with pytest.raises(ValueError, match=r"another evaluation: model_sha256 is \w+ there"):
            evaluate(convolutional_model(), images, labels, **options)

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"evaluation": {}}', '{"evaluation": 3}', "\0"])
    def test_file_of_another_kind(self, trained, held_out, text, tmp_path):
        path = tmp_path / "state.json"
        path.write_text(text)
        with pytest.raises(ValueError, match=r"^state_path: .*is not the state"):
            evaluate(trained, *held_out, attack="fgsm", state_path=path)
        assert path.read_text() == text


class TestModelIsLeftAlone:
    @pytest.mark.parametrize("attack", ATTACKS)
    @pytest.mark.parametrize("fails", [False, True])
    def test_modes_gradients_and_random_numbers(self, quick, held_out, attack, fails):
        model = convolutional_model().train()
        model[1].eval()
        model[0].weight.requires_grad_(False)
        model[3].weight.grad = torch.ones_like(model[3].weight)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        random_state = torch.get_rng_state()

        seen = set()
        model.register_forward_hook(lambda module, *_: seen.update(m.training for m in module.modules()))
        model.register_forward_hook(
            lambda module, *_: seen.update(p.requires_grad for p in module.parameters())
        )
        counted = Counted(model, fail_at=5 if fails else None)
        with pytest.raises(InterruptedError) if fails else contextlib.nullcontext():
            evaluate(counted, *held_out, attack=attack, eps=EPS, batch_size=25)

        assert seen == {False}
        assert model.training and not model[1].training and model[2].training and counted.training
        assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["0.weight"]
        assert [name for name, p in model.named_parameters() if p.grad is not None] == ["3.weight"]
        assert (model[3].weight.grad == 1).all()
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert torch.equal(torch.get_rng_state(), random_state)

    @pytest.mark.parametrize("attack", ATTACKS)
    def test_under_other_gradient_modes(self, quick, trained, held_out, attack):
        expected = evaluate(trained, *held_out, attack=attack, eps=EPS)
        with torch.no_grad():
            assert_same(evaluate(trained, *held_out, attack=attack, eps=EPS), expected)
        with torch.inference_mode():
            images, labels = (part.clone() for part in held_out)
            assert_same(evaluate(trained, images, labels, attack=attack, eps=EPS), expected)

    def test_images_stored_channels_last(self, quick):
        images = torch.rand(20, 3, 8, 8)
        model = linear_model(10, 192)
        labels = model(images).argmax(1)
        expected = evaluate(model, images, labels, norm="L2", eps=0.1)
        assert 0 < expected.robust.sum() < 20
        images = images.to(memory_format=torch.channels_last)
        assert_same(evaluate(model, images, labels, norm="L2", eps=0.1), expected)

    @pytest.mark.parametrize("attack", ATTACKS)
    def test_fused_modules(self, quick, digits, held_out, attack):
        model = train(*digits)
        stock = evaluate(model, *held_out, attack=attack, eps=EPS)
        fused = evaluate(gk.fuse(model), *held_out, attack=attack, eps=EPS)
        assert isinstance(model[2], gk.FusedGeLU)
        assert torch.equal(fused.clean_correct, stock.clean_correct)
        # An image at the edge may fall to either side for rounding alone.
        assert (fused.robust != stock.robust).sum() <= 1


class TestCurve:
    def test_falls_from_the_clean_accuracy(self, trained, held_out, tmp_path):
        options = {"attack": "pgd", "steps": 5, "seed": 4, "state_dir": tmp_path / "curve"}
        curve = robustness_curve(trained, *held_out, [0, 0.05, 0.1, 0.3], **options)
        assert [point.eps for point in curve] == [0, 0.05, 0.1, 0.3]
        assert curve[0].accuracies == {} and torch.equal(curve[0].robust, curve[0].clean_correct)
        accuracies = [point.robust_accuracy for point in curve]
        assert accuracies == sorted(accuracies, reverse=True) and accuracies[0] > accuracies[-1] + 0.5
        assert all(torch.equal(point.clean_correct, curve[0].clean_correct) for point in curve)
        assert_same(curve[1], evaluate(trained, *held_out, attack="pgd", steps=5, seed=4, eps=0.05))

        assert len(list((tmp_path / "curve").iterdir())) == 4
        again = robustness_curve(trained, *held_out, [0, 0.05, 0.1, 0.3], **options)
        # The seconds as well: nothing is computed again.
        assert [point.to_dict() for point in again] == [point.to_dict() for point in curve]

    def test_a_bad_eps_is_named_before_any_attack(self, trained, held_out):
        counted = Counted(trained)
        with pytest.raises(ValueError, match=r"^eps:"):
            robustness_curve(counted, *held_out, [0.1, -0.1])
        assert counted.calls == 0


class TestReports:
    def test_dict_survives_json(self, quick, trained, held_out):
        result = evaluate(trained, *held_out, eps=EPS, seed=6)
        content = result.to_dict()
        assert json.loads(json.dumps(content, allow_nan=False)) == content
        assert content["images"] == 60 and content["seed"] == 6 and content["steps"] is None
        assert content["robust_accuracy"] == sum(content["robust"]) / 60 == result.accuracies["square"]
        assert content["clean_accuracy"] == sum(content["clean_correct"]) / 60
        assert isinstance(result, Robustness) and result.seconds > 0 and "tensor" not in repr(result)
        with pytest.raises(AttributeError):
            result.eps = 1

    def test_progress(self, quick, trained, held_out, capfd):
        evaluate(trained, *held_out, eps=EPS, batch_size=25)
        assert capfd.readouterr() == ("", "")
        result = evaluate(trained, *held_out, eps=EPS, batch_size=25, progress=True)
        out, err = capfd.readouterr()
        assert not out
        for name in result.accuracies:
            assert f"{name}: 100%" in err
        assert f"robust accuracy {result.robust_accuracy:.2%}" in err

    def test_an_ordinary_model_warns_of_nothing(self, quick, trained, held_out):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            evaluate(trained, *held_out, eps=EPS)

    def test_random_model(self, quick, held_out):
        noisy = Function(lambda images: images.flatten(1)[:, :10] + torch.randn(len(images), 10))
        with pytest.warns(UserWarning, match="^AutoAttack: .*randomized"):
            evaluate(noisy, *held_out)

    def test_probabilities(self, quick, trained, held_out):
        with pytest.warns(UserWarning, match="^AutoAttack: .*probability distribution"):
            evaluate(nn.Sequential(trained, nn.Softmax(1)), *held_out)

    def test_gradients_in_the_forward(self, quick, trained, held_out):
        def dynamic(images):
            with torch.enable_grad():
                pixels = images.detach().requires_grad_()
                torch.autograd.grad(trained(pixels).sum(), pixels)
            return trained(images)

        with pytest.warns(UserWarning, match="^AutoAttack: .*dynamic defense"):
            evaluate(Function(dynamic), *held_out, eps=EPS)
        # pyautoattack's own check would say so of each model from now on.
        self.test_an_ordinary_model_warns_of_nothing(None, trained, held_out)

    def test_masked_gradients(self, quick, trained, held_out):
        quantized = Function(lambda images: trained(images.detach().round() + 0 * images))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            evaluate(quantized, *held_out, eps=0.4, batch_size=25)
        messages = [str(warning.message) for warning in caught]
        assert sum("zero gradient" in message for message in messages) == 1
        assert sum("Square Attack has decreased" in message for message in messages) == 1
        assert sum("exactly zero for 100.0%" in message for message in messages) == 1

    @pytest.mark.parametrize("attack", ["apgd-ce", "pgd", "fgsm"])
    def test_saturated_logits(self, trained, held_out, attack):
        """Of which the softmax is 0 and 1 exactly; some images of them, or all."""
        images, labels = held_out
        some = torch.arange(len(images)) % 4 == 0
        counted = evaluate(trained, images, labels, attack=attack, eps=EPS)
        assert not counted.zero_gradient.any() and counted.gradient_masking == 0 and not counted.is_doubtful
        for which in (some, ~some | some):
            marked = images.clone()
            marked[which, 0, 0, 0] = 1.0
            sharp = Function(lambda x: trained(x) * torch.where(x[:, :1, 0, 0] > 0.9, 1e6, 1.0))
            with pytest.warns(UserWarning, match=rf"gradient is exactly zero for .*{attack} at eps .*Square"):
                result = evaluate(sharp, marked, labels, attack=attack, eps=1e-3)
            assert torch.equal(result.zero_gradient, which & result.clean_correct)
            share = (which & result.clean_correct).sum() / result.clean_correct.sum()
            assert result.gradient_masking == pytest.approx(share.item()) and result.is_doubtful
            assert result.to_dict()["gradient_masking"] == result.gradient_masking

    @pytest.mark.parametrize("attack", ["pgd", "fgsm"])
    def test_perturbations_that_the_model_rounds_away(self, trained, held_out, attack):
        images = held_out[0].round()
        half = Function(lambda x: trained(x.float()))
        half.scale = nn.Parameter(torch.ones((), dtype=torch.bfloat16))
        with pytest.warns(UserWarning, match=f"{attack} changed no image that the model sees"):
            result = evaluate(half, images * 0.5 + 0.5, held_out[1], attack=attack, eps=1e-6)
        assert result.unmoved == [attack] and result.is_doubtful and result.to_dict()["is_doubtful"]


class TestErrors:
    @pytest.mark.parametrize(
        ("error", "name", "change"),
        [
            (TypeError, "model", {"model": lambda images: images}),
            (ValueError, "model", {"model": nn.Identity()}),
            (ValueError, "model", {"model": nn.Flatten(0)}),
            (TypeError, "model", {"model": Function(lambda images: (images.flatten(1),))}),
            (TypeError, "model", {"model": Function(lambda images: {"logits": images.flatten(1)})}),
            (TypeError, "images", {"images": [0.5]}),
            (TypeError, "images", {"images": torch.zeros(60, 1, 8, 8, dtype=torch.uint8)}),
            (ValueError, "images", {"images": torch.zeros(60, 8, 8)}),
            (ValueError, "images", {"images": torch.zeros(0, 1, 8, 8)}),
            (ValueError, "images", {"images": torch.full((60, 1, 8, 8), 1.01)}),
            (ValueError, "images", {"images": torch.full((60, 1, 8, 8), -0.01)}),
            (ValueError, "images", {"images": torch.full((60, 1, 8, 8), float("nan"))}),
            (TypeError, "labels", {"labels": [0]}),
            (TypeError, "labels", {"labels": torch.zeros(60, dtype=torch.int32)}),
            (ValueError, "labels", {"labels": torch.zeros(59, dtype=torch.int64)}),
            (ValueError, "labels", {"labels": torch.zeros(60, 10, dtype=torch.int64)}),
            (ValueError, "labels", {"labels": torch.full((60,), 10)}),
            (ValueError, "labels", {"labels": torch.full((60,), -1)}),
            (ValueError, "attack", {"attack": "apgd-dlr"}),
            (ValueError, "norm", {"norm": "L1"}),
            (ValueError, "eps", {"eps": -0.1}),
            (ValueError, "eps", {"eps": float("nan")}),
            (ValueError, "batch_size", {"batch_size": 0}),
            (ValueError, "seed", {"seed": None}),
            (ValueError, "steps", {"steps": 10}),
            (ValueError, "steps", {"steps": 10, "attack": "fgsm"}),
            (ValueError, "steps", {"steps": 0, "attack": "pgd"}),
            (ValueError, "device", {"device": "no_such_device"}),
        ],
    )
    def test_bad_arguments_are_named(self, held_out, error, name, change):
        images, labels = held_out
        arguments = {"model": linear_model(), "images": images, "labels": labels} | change
        with pytest.raises(error, match=f"^{name}:"):
            evaluate(**arguments)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("attack", ["apgd-ce", "pgd", "fgsm"])
    def test_logits_that_are_not_finite_are_no_success_of_either(self, trained, held_out, attack, value):
        def undefined(images):
            """Off the grid of the digits' 17 levels."""
            off = (images * 16).frac().flatten(1).amax(1) > 0
            return trained(images).masked_fill(off.unsqueeze(1), value)

        with pytest.raises(ValueError, match=f"^model: logits of the images that {attack} made are NaN"):
            evaluate(Function(undefined), *held_out, attack=attack, eps=0.01)
        with pytest.raises(ValueError, match=r"^model: logits of the images are NaN"):
            evaluate(Function(undefined), held_out[0] * 0.99, held_out[1], attack=attack)
