"""Several processes on one machine: their gradients are those of one process with the whole batch."""

import os
import socket
import subprocess
import sys
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

import gradnorm_kernels as gk
from gradnorm_kernels.training import AdversarialLoss, GradientNormLoss, NaturalLoss
from gradnorm_kernels.training.distributed import any_process

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no Gloo")

OBJECTIVES = {
    "natural": NaturalLoss(),
    "gradient_norm": GradientNormLoss(ramp_epochs=0),
    "finite_difference": GradientNormLoss(ramp_epochs=0, engine="finite_difference", difference_step=1e-7),
    "forward_over_reverse": GradientNormLoss(ramp_epochs=0, engine="forward_over_reverse"),
    "hybrid": AdversarialLoss(random_start=False, objective=GradientNormLoss(ramp_epochs=0)),
}


def make_model():
    torch.manual_seed(0)
    block = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.SiLU())
    return gk.fuse(nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.GELU(), block, nn.Linear(8, 4))).double()


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def in_two_processes(*functions):
    """Runs each with all random images and labels and the process's own half of them."""
    mp.spawn(_process, (functions, free_port()), nprocs=2)


def _process(rank, functions, port):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(minutes=2))
    try:
        for function in functions:
            torch.manual_seed(1)
            batch = torch.rand(8, 3, 2, 2, dtype=torch.float64), torch.randint(4, (8,))
            function(batch, tuple(part[4 * rank : 4 * rank + 4] for part in batch))
            dist.barrier()  # Gloo aborts a process whose peer is gone
    finally:
        dist.destroy_process_group()


def whole_batch_gradients(objective, batch):
    model = make_model()
    objective(model, *batch, epoch=1).total.backward()
    return [p.grad for p in model.parameters()]


def distributed_data_parallel(batch, part):
    for name, objective in OBJECTIVES.items():
        model = DistributedDataParallel(make_model(), broadcast_buffers=False)
        objective(model, *part, epoch=1).total.backward()
        tolerance = 1e-5 if name == "finite_difference" else 1e-10
        for p, wanted in zip(model.parameters(), whole_batch_gradients(objective, batch), strict=True):
            largest = wanted.abs().max().item()
            torch.testing.assert_close(p.grad, wanted, rtol=tolerance, atol=tolerance * largest)


def fully_sharded(batch, part):
    """Parameters stay gathered between the backward passes, because the second one needs them again."""
    model, mesh = make_model(), init_device_mesh("cpu", (2,))
    for module in (model[3], model):
        fully_shard(module, mesh=mesh, reshard_after_forward=False)
    model.set_reshard_after_backward(False)
    objective = OBJECTIVES["gradient_norm"]
    expected = whole_batch_gradients(objective, batch)
    for _ in range(2):
        model.zero_grad()
        objective(model, *part, epoch=1).total.backward()
        for module in (model[3], model):
            module.reshard()
        for p, wanted in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad.full_tensor(), wanted, rtol=1e-10, atol=1e-14)


def uneven_evaluation(batch, part):
    """Of five held-out images one process has three, in two batches, and the other two, in one."""
    from gradnorm_kernels.training.config import TrainConfig
    from gradnorm_kernels.training.data import Data
    from gradnorm_kernels.training.models import input_spec
    from gradnorm_kernels.training.trainer import Trainer

    config = TrainConfig(batch_size=4, epochs=1, warmup_epochs=0.0, ema_decay=0.0)
    train, evaluation = (TensorDataset(torch.rand(n, 1, 8, 8), torch.arange(n) % 4) for n in (8, 5))
    data = Data(config, train, evaluation, list("abcd"), input_spec(config.model, 1, 8))
    trainer = Trainer(config, data)
    trainer.run_epoch(lambda: any_process(False, trainer.device))
    images, labels = evaluation.tensors
    with torch.no_grad():
        correct = trainer.ema.module.eval()(images).argmax(1) == labels
    assert trainer.history[-1]["eval_accuracy"] == pytest.approx(correct.double().mean().item())


def test_gradients_of_two_processes():
    in_two_processes(distributed_data_parallel, fully_sharded)


@pytest.mark.slow
def test_evaluation_of_uneven_shares():
    pytest.importorskip("timm")
    in_two_processes(uneven_evaluation)


# BatchNorm's frozen statistics and dropout-free models: what is random within a step differs by process.
@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [["accumulate=2", "clip_norm=0.1"], ["epochs=2"], ["model=preact_resnet10"]]
)
def test_a_run_of_two_processes_equals_that_of_one(options, tmp_path):
    """Weights, averaged weights and metrics, after interleaved evaluation too."""
    pytest.importorskip("timm")
    from gradnorm_kernels.training.files import load_checkpoint

    settings = ["epochs=1", "batch_size=356", "ramp_epochs=0", "lr=1e-4", "warmup_epochs=0", "epsilon=0.1"]
    command = ["-m", "gradnorm_kernels", "train", "digits", "--set", *settings, *options, "--output"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    states = []
    for name, launcher in (("one", []), ("two", torchrun)):
        run = [sys.executable, *launcher, *command, str(tmp_path / name)]
        subprocess.run(run, env=environment, check=True, timeout=300)
        states.append(load_checkpoint(tmp_path / name))
    one, two = states
    for part in ("model", "ema"):
        for key, value in one[part].items():
            torch.testing.assert_close(two[part][key], value, rtol=1e-3, atol=1e-5, msg=key)
    for a, b in zip(one["history"], two["history"], strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - {"seconds", "images_per_second"}:
            assert b[key] == pytest.approx(a[key], rel=2e-3, abs=3e-3), key
    assert len((tmp_path / "two" / "metrics.jsonl").read_text().splitlines()) == len(one["history"])
