"""What one of two processes does for tests/test_processes.py: `two_processes.py FOLDER`.

Everything in one program, because starting it takes longer than all that it trains. `trained` is
what one process alone does, too.
"""

import copy
import faulthandler
import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler
from training import adam, network, samples, sgd

import nncx
from nncx import _processes
from nncx.commands import _compress, _recipe
from nncx.train import Supervised, error_rate, fit

SECONDS = 240  # after which each says where it hangs, and ends: both together take 8 on two cores


def plain(classes=3):
    """Nothing in it looks at other samples, and nothing is random."""
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, classes))


def loader(count=46, **settings):
    """Batches of 8 + 7 samples, and a last one of 1, of which the second process has no part."""
    generator = torch.Generator().manual_seed(_processes.rank())  # it follows the first process
    return DataLoader(samples(count), 15, shuffle=True, generator=generator, **settings)


class Hint(nn.Module):
    """Trains the first layer of a network that is all in the optimizer."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, inputs, targets):
        return {"loss": self.model[0](inputs).square().mean(), "inputs": inputs.mean()}


def supervised():
    model = plain()
    return Supervised(model), [sgd(model.parameters())]


def hint():
    model = plain()
    return Hint(model), [sgd(model.parameters())]


def adversarial():
    teacher, student = plain(), plain()
    task = nncx.distill.anc(student, teacher, hidden=(8,), dropout=0)
    return task, [adam(task.student_parameters()), sgd(task.discriminator_parameters())]


TASKS = {"supervised": supervised, "hint": hint, "adversarial": adversarial}


def trained(make, data, epochs=3, **settings):
    torch.manual_seed(0)
    task, optimizers = make()
    if _processes.rank() > 0:  # the first process's parameters are what counts
        with torch.no_grad():
            for parameter in task.parameters():
                parameter.zero_()
    calls = []

    def validate():
        calls.append(_processes.rank())
        return float(len(calls))  # it rises

    history = fit(
        task,
        data,
        epochs=epochs,
        optimizer=optimizers,
        validate=validate,
        progress=False,
        **settings,
    )
    return {"task": task.state_dict(), "history": history, "calls": calls}


def random_and_resumed(folder):
    """Dropout, BatchNorm and bfloat16: three epochs at once; one, and two more in other objects."""

    def run(epochs, checkpoint=None, seed=0):
        torch.manual_seed(seed)
        model = network()
        history = fit(
            model,
            loader(45),
            epochs=epochs,
            optimizer=adam(model.parameters()),
            amp=torch.bfloat16,
            checkpoint=checkpoint,
            progress=False,
        )
        return [model.state_dict(), history, torch.get_rng_state()]

    whole = run(3)
    run(1, folder / "run")
    return [whole, run(3, folder / "run", seed=9)]


def binary():
    """A converted student: parameters, packed buffers, and BatchNorm."""
    torch.manual_seed(0)
    model = nncx.convert(nncx.models.ResNet(8, in_channels=1, width=4), nncx.XNOR())
    before = copy.deepcopy(model.state_dict())
    images = torch.randn(6, 1, 8, 8), torch.arange(6)
    fit(model, [images] * 2, epochs=1, optimizer=sgd(model.parameters()), progress=False)
    error_rate(model, [images])
    return [before, model.state_dict()]


def refused(data):
    try:
        trained(supervised, data)
    except ValueError as error:
        return str(error)


def compressed(network, device):
    """In steps, of which each process takes its own, on weights that all have."""
    _processes.wait_for_all()  # the first writes the network
    settings = {"methods": ("inq",), "method_options": {"fractions": [0.5, 1]}}
    compression = _compress.Compression(model=str(network), epochs=1, batch=1000, **settings)
    return _compress.run(compression, network.parents[1] / "compressed", _recipe.Setup(device))


def main(folder):
    with nncx.train.processes() as device:
        results = {name: trained(make, loader()) for name, make in TASKS.items()}
        results |= {
            "device": str(device),
            "listed": trained(supervised, list(DataLoader(samples(46), 15))),
            "workers": trained(supervised, loader(num_workers=1)),
            "logged": trained(supervised, loader(), log=folder / "log", patience=1),
            "resumed": random_and_resumed(folder),
            "binary": binary(),
            "sampler": refused(
                DataLoader(samples(), 16, sampler=DistributedSampler(samples(), shuffle=False))
            ),
            "order": refused(DataLoader(samples(), 16, shuffle=True)),
            "recipe": _recipe.run(
                _recipe.Recipe(options={"width": 4}, epochs=1, batch=1000),
                folder / "recipe",
                _recipe.Setup(device),
            ),
            "compressed": compressed(folder / "recipe" / "model.safetensors", device),
        }
        rank = _processes.rank()
    torch.save(results, folder / f"{rank}.pt")


if __name__ == "__main__":
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
