"""The training loop: what it computes, and that a resumed run equals an uninterrupted one."""

import copy
import math
import os
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nncx import _files, train
from nncx.train import Supervised, error_rate, fit


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The tensors are tiny: on a busy machine, threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def samples(count=50):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(count, 6, generator=generator)
    return TensorDataset(inputs, (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0).long())


def batches(seed=0, shuffle=True):
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(samples(), 16, shuffle=shuffle, generator=generator)


def network():
    """BatchNorm has buffers, dropout needs the random state."""
    return nn.Sequential(
        nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.3), nn.Linear(12, 3)
    )


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-3, nesterov=True)


def adam(parameters):
    return torch.optim.Adam(parameters, lr=1e-2, amsgrad=True)


def numpy_sgd(parameters):
    """Settings as they come out of a sweep over NumPy arrays."""
    return torch.optim.SGD(
        parameters, lr=np.float32(0.1), momentum=np.float64(0.9), nesterov=np.bool_(True)
    )


def same(first, second):
    """Equal to the bit, through any nest of containers."""
    assert type(first) is type(second)
    if isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype and torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            same(first[key], second[key])
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            same(one, other)
    else:
        assert first == second


class Interrupting(nn.Module):
    """Raises in its n-th training step, as Ctrl-C would."""

    def __init__(self, model, step):
        super().__init__()
        self.model, self.step = model, step

    def forward(self, x):
        if self.training:
            self.step -= 1
            if self.step == 0:
                raise KeyboardInterrupt
        return self.model(x)


class TestFit:
    def test_equals_the_loop_written_out(self):
        torch.manual_seed(0)
        model = network()
        reference = copy.deepcopy(model)
        torch.manual_seed(1)
        history = fit(model, batches(), epochs=3, optimizer=sgd(model.parameters()), progress=False)

        torch.manual_seed(1)
        optimizer, data = sgd(reference.parameters()), batches()
        for epoch in range(3):
            total = 0.0
            reference.train()
            for inputs, targets in data:
                loss = nn.functional.cross_entropy(reference(inputs), targets)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.item() * len(inputs)
            assert history[epoch] == {"epoch": epoch + 1, "loss": pytest.approx(total / 50)}
        same(model.state_dict(), reference.state_dict())

    def test_learns(self):
        torch.manual_seed(0)
        model, data = network(), batches()
        before = error_rate(model, data)
        history = fit(model, data, epochs=40, optimizer=adam(model.parameters()), progress=False)
        assert error_rate(model, data) < before / 3
        assert history[-1]["loss"] < history[0]["loss"] / 2

    def test_task_logs_every_scalar_and_validation(self):
        class Task(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(torch.ones(()))

            def forward(self, inputs, targets=None):
                return {
                    "loss": self.weight * inputs.mean(),
                    "count": torch.tensor(float(len(inputs))),
                    "logits": inputs,
                }

        task = Task()
        data = [(torch.ones(3, 1), torch.zeros(3)), (torch.zeros(1, 1), torch.zeros(1))]
        optimizer = torch.optim.SGD(task.parameters(), lr=0.0)
        history = fit(task, data, epochs=2, optimizer=optimizer, validate=lambda: 7, progress=False)
        expected = {"loss": 0.75, "count": 2.5, "validation": 7.0}  # means over samples
        assert history == [{"epoch": epoch, **expected} for epoch in (1, 2)]

    def test_several_optimizers_and_schedulers_all_step(self):
        model = network()
        before = copy.deepcopy(model.state_dict())
        optimizers = sgd(model[0].parameters()), adam(model[4].parameters())
        schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in optimizers]
        fit(model, batches(), epochs=2, optimizer=optimizers, scheduler=schedulers, progress=False)
        assert [o.param_groups[0]["lr"] for o in optimizers] == [0.1 / 4, 1e-2 / 4]
        after = model.state_dict()
        changed = {name for name in after if not torch.equal(before[name], after[name])}
        assert {"0.weight", "4.weight"} <= changed and "1.weight" not in changed

    def test_trains_in_train_mode_after_a_validation_in_eval_mode(self):
        model, data, modes = network(), batches(), []
        model.register_forward_pre_hook(lambda module, _: modes.append(module.training))

        def validate():
            model.eval()
            return 0.0

        fit(
            model,
            data,
            epochs=2,
            optimizer=sgd(model.parameters()),
            validate=validate,
            progress=False,
        )
        assert modes and all(modes)

    def test_no_epochs(self):
        model = network()
        assert fit(model, batches(), epochs=0, optimizer=sgd(model.parameters())) == []

    def test_any_iterable(self):
        model, data = network(), [(torch.randn(4, 6), torch.tensor([0, 1, 2, 0]))]
        history = fit(model, data, epochs=2, optimizer=sgd(model.parameters()), progress=False)
        assert len(history) == 2

    def test_compiled_task_is_a_task(self):
        task = torch.compile(Supervised(network()), backend="eager")
        history = fit(task, batches(), epochs=1, optimizer=sgd(task.parameters()), progress=False)
        assert history[0]["loss"] > 0

    def test_supervised_takes_a_criterion(self):
        model = nn.Linear(6, 1)
        task = Supervised(model, nn.MSELoss())
        inputs, targets = torch.randn(4, 6), torch.randn(4, 1)
        assert torch.equal(task(inputs, targets)["loss"], nn.MSELoss()(model(inputs), targets))

    def test_bad_arguments(self, tmp_path):
        model = network()
        optimizer = sgd(model.parameters())
        with pytest.raises(ValueError, match="epochs must be an integer of at least 0, got -1"):
            fit(model, batches(), epochs=-1, optimizer=optimizer)
        with pytest.raises(ValueError, match="at least one batch, got none"):
            fit(model, [], epochs=1, optimizer=optimizer)
        with pytest.raises(ValueError, match="can data be iterated again"):
            fit(model, iter(batches()), epochs=2, optimizer=optimizer, progress=False)
        with pytest.raises(FileNotFoundError, match="existing folder, got .*absent"):
            fit(model, [], epochs=1, optimizer=optimizer, checkpoint=tmp_path / "absent" / "run")

    def test_optimizers_that_do_not_train_the_task(self):
        model, other = network(), network()

        def refused(optimizer, message, task=model):
            before = copy.deepcopy(task.state_dict())
            with pytest.raises(ValueError, match=message):
                fit(task, batches(), epochs=1, optimizer=optimizer)
            same(task.state_dict(), before)

        for nothing in (None, []):
            refused(nothing, "at least one optimizer, got none")
        refused(sgd(other.parameters()), "but 6 of the 6 of SGD are not of Supervised")
        stale = [*model[0].parameters(), *other[4].parameters()]
        refused([sgd(model.parameters()), adam(stale)], "but 2 of the 4 of Adam are not of")
        refused(sgd(other.parameters()), "6 of the 6 of SGD are not", task=nn.Flatten())
        refused(torch.optim.LBFGS(model.parameters()), "without a closure, which LBFGS needs")
        other.requires_grad_(False)
        refused(sgd(other.parameters()), "requires a gradient, SGD has none", task=other)

    def test_frozen_parameters_may_be_in_an_optimizer(self):
        model = network()
        model[0].requires_grad_(False)
        before = model[0].weight.clone()
        fit(model, batches(), epochs=1, optimizer=sgd(model.parameters()), progress=False)
        assert torch.equal(model[0].weight, before)

    def test_schedulers_that_cannot_be_stepped(self):
        model = network()
        optimizer = sgd(model.parameters())
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        with pytest.raises(ValueError, match="without arguments, which ReduceLROnPlateau needs"):
            fit(model, batches(), epochs=1, optimizer=optimizer, scheduler=plateau)
        other = torch.optim.lr_scheduler.ExponentialLR(sgd(model.parameters()), 0.9)
        with pytest.raises(ValueError, match="an optimizer that is given, ExponentialLR is not"):
            fit(model, batches(), epochs=1, optimizer=optimizer, scheduler=other)

    @pytest.mark.parametrize("result", [torch.tensor(1.0), {}, {"loss": 1.0}, {"loss": [1, 2]}])
    def test_task_without_a_loss(self, result):
        class Task(nn.Linear):
            def forward(self, inputs, targets):
                return result

        task = Task(1, 1)
        with pytest.raises(ValueError, match="scalar tensor 'loss', Task did not"):
            fit(task, batches(), epochs=1, optimizer=sgd(task.parameters()))

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_loss_that_is_not_finite(self, tmp_path, value):
        model, path = network(), tmp_path / "run.safetensors"
        options = {"optimizer": sgd(model.parameters()), "checkpoint": path, "progress": False}
        fit(model, batches(), epochs=2, **options)
        whole = path.read_bytes()

        class Diverged(nn.Module):
            def forward(self, logits, targets):
                return logits.sum() * 0 + value

        with pytest.raises(FloatingPointError, match=f"epoch 3, .*loss {value}"):
            fit(Supervised(model, Diverged()), batches(), epochs=5, **options)
        assert path.read_bytes() == whole


SCHEDULERS = {
    "none": lambda optimizer: None,
    "multistep": lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 3, 5], 0.5),
    "cosine": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8),
    "warmup": lambda optimizer: torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2),
            torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
        ],
        milestones=[2],
    ),
}


class TestClumsyCalls:
    @pytest.mark.parametrize("epochs", [2.0, "2", None, True])
    def test_epochs(self, epochs):
        model = network()
        with pytest.raises(ValueError, match="epochs must be an integer of at least 0, got "):
            fit(model, batches(), epochs=epochs, optimizer=sgd(model.parameters()))

    def test_the_class_instead_of_a_model(self):
        with pytest.raises(TypeError, match="fit: task must be an nn.Module, got Supervised"):
            fit(Supervised, batches(), epochs=1, optimizer=sgd(network().parameters()))

    @pytest.mark.parametrize(
        "batch",
        [{"x": 1, "y": 2}, torch.ones(2, 6), (torch.ones(2, 6),), (torch.ones(2, 6), [0, 1]), "ab"],
        ids=["dict", "tensor", "one", "labels", "text"],
    )
    def test_data_without_pairs(self, batch):
        model = network()
        with pytest.raises(
            ValueError, match=r"data must give pairs \(inputs, targets\) of tensors"
        ):
            fit(model, [batch], epochs=1, optimizer=sgd(model.parameters()))

    def test_a_folder_as_checkpoint(self, tmp_path):
        model = network()
        for resume in (True, False):
            with pytest.raises(IsADirectoryError, match="must be a file, got the folder"):
                optimizer = sgd(model.parameters())
                where = {"checkpoint": tmp_path, "resume": resume}
                fit(model, batches(), epochs=1, optimizer=optimizer, **where)


class TestResume:
    def run(self, make_optimizer, make_scheduler, epochs, checkpoint=None, seed=0, wrap=None):
        """All that a new process would make, its random state included, then fit."""
        torch.manual_seed(seed)
        model, data = network(), batches(seed)
        task = Supervised(wrap(model) if wrap else model)
        optimizer = make_optimizer(task.parameters())
        scheduler = make_scheduler(optimizer)
        history = fit(
            task,
            data,
            epochs=epochs,
            optimizer=optimizer,
            scheduler=scheduler,
            validate=lambda: error_rate(model, batches(shuffle=False)),
            checkpoint=checkpoint,
            progress=False,
        )
        return {
            "history": history,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict() if scheduler else None,
            "random": [torch.get_rng_state(), data.generator.get_state()],
        }

    @pytest.mark.parametrize("schedule", SCHEDULERS)
    @pytest.mark.parametrize("make_optimizer", [sgd, adam, numpy_sgd])
    def test_resumed_equals_uninterrupted(self, tmp_path, make_optimizer, schedule):
        path = tmp_path / "run.safetensors"
        parts = make_optimizer, SCHEDULERS[schedule]
        whole = self.run(*parts, epochs=6)
        self.run(*parts, epochs=2, checkpoint=path)
        self.run(*parts, epochs=3, checkpoint=str(path), seed=8)
        resumed = self.run(*parts, epochs=6, checkpoint=path, seed=9)
        same(resumed, whole)
        assert [record["epoch"] for record in whole["history"]] == [1, 2, 3, 4, 5, 6]

    def test_interrupted_in_an_epoch(self, tmp_path):
        path = tmp_path / "run.safetensors"
        parts = adam, SCHEDULERS["multistep"]
        whole = self.run(*parts, epochs=5, wrap=lambda model: Interrupting(model, -1))
        with pytest.raises(KeyboardInterrupt, match=f"{path} holds 2 of 5 epochs; run again"):
            # 4 batches an epoch: in the third batch of the third epoch
            self.run(*parts, epochs=5, checkpoint=path, wrap=lambda model: Interrupting(model, 11))
        assert os.listdir(tmp_path) == [path.name]
        resumed = self.run(
            *parts, epochs=5, checkpoint=path, seed=9, wrap=lambda model: Interrupting(model, -1)
        )
        same(resumed, whole)

    def test_interrupted_before_the_first_epoch_was_complete(self, tmp_path):
        with pytest.raises(KeyboardInterrupt, match="nothing to resume"):
            self.run(
                sgd,
                SCHEDULERS["none"],
                epochs=5,
                checkpoint=tmp_path / "run",
                wrap=lambda model: Interrupting(model, 2),
            )
        assert os.listdir(tmp_path) == []

    def test_complete_run_only_gives_its_result(self, tmp_path):
        parts = sgd, SCHEDULERS["none"], 3, tmp_path / "run"
        first = self.run(*parts)
        before = (tmp_path / "run").read_bytes()
        same(self.run(*parts, seed=9), first)
        assert (tmp_path / "run").read_bytes() == before

    def test_global_random_state_orders_a_loader_without_generator(self, tmp_path):
        def run(epochs, checkpoint=None, seed=0):
            torch.manual_seed(seed)
            model = network()
            fit(
                model,
                DataLoader(samples(), 16, shuffle=True),
                epochs=epochs,
                optimizer=sgd(model.parameters()),
                checkpoint=checkpoint,
                progress=False,
            )
            return model.state_dict()

        run(2, tmp_path / "run")
        same(run(4, tmp_path / "run", seed=9), run(4))

    def test_resume_false_starts_anew(self, tmp_path):
        path = tmp_path / "run"
        for _ in range(2):
            torch.manual_seed(0)
            model = network()
            history = fit(
                model,
                batches(),
                epochs=2,
                optimizer=sgd(model.parameters()),
                checkpoint=path,
                resume=False,
                progress=False,
            )
            assert len(history) == 2
        assert len(_files.read(path)[1]["state"]["history"]["list"]) == 2

    def test_same_objects_continue(self, tmp_path):
        """A notebook's second cell: the schedulers stand where the checkpoint is."""
        torch.manual_seed(0)
        model, data = network(), batches()
        optimizer = adam(model.parameters())
        options = {
            "optimizer": optimizer,
            "scheduler": SCHEDULERS["warmup"](optimizer),
            "checkpoint": tmp_path / "run",
            "progress": False,
        }
        for epochs in (1, 3, 6):
            assert len(fit(model, data, epochs=epochs, **options)) == epochs

    def test_what_no_checkpoint_can_hold_is_refused_before_training(self, tmp_path):
        model = network()
        optimizer = sgd([{"params": model.parameters(), "name": same}])
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match="cannot hold a function .*optimizers/0"):
            fit(model, batches(), epochs=1, optimizer=optimizer, checkpoint=tmp_path / "run")
        same(model.state_dict(), before)
        assert os.listdir(tmp_path) == []

    def test_fewer_epochs_than_are_done(self, tmp_path):
        path, parts = tmp_path / "run", (sgd, SCHEDULERS["none"])
        self.run(*parts, epochs=3, checkpoint=path)
        with pytest.raises(
            ValueError, match=f"{path} has 3 epochs done, more than epochs=1: ask for at least 3"
        ):
            self.run(*parts, epochs=1, checkpoint=path)

    def test_after_divergence_a_lower_rate_is_refused_until_started_anew(self, tmp_path):
        class Diverging(nn.Module):
            def forward(self, logits, targets):
                return nn.functional.cross_entropy(logits, targets) * criterion_factor

        def run(lr, **options):
            model = network()
            task = Supervised(model, Diverging())
            optimizer = torch.optim.SGD(model.parameters(), lr=lr)
            options |= {"optimizer": optimizer, "progress": False}
            return fit(task, batches(), checkpoint=tmp_path / "run", **options)

        criterion_factor = 1.0
        run(0.2, epochs=1)
        criterion_factor = float("nan")
        with pytest.raises(
            FloatingPointError,
            match="lower the learning rate and name another checkpoint, or .* resume=False",
        ):
            run(0.2, epochs=2)
        criterion_factor = 1.0
        with pytest.raises(ValueError, match="SGD's lr is 1e-05 here, 0.2 in the file"):
            run(1e-5, epochs=2)
        assert len(run(1e-5, epochs=2, resume=False)) == 2


class TestKeepBest:
    def run(self, epochs, validations, checkpoint=None, keep_best=True):
        """Epoch i validates to `validations[i - 1]`, also when epochs before it were resumed."""
        torch.manual_seed(0)
        model, data = network(), batches()
        history = fit(
            model,
            data,
            epochs=epochs,
            optimizer=adam(model.parameters()),
            validate=lambda: next(validations),
            keep_best=keep_best,
            checkpoint=checkpoint,
            progress=False,
        )
        return model.state_dict(), history

    @pytest.mark.parametrize("validations", [[5, 3, 3, math.nan, 4], [math.nan, 3, 7, 8, 9]])
    def test_gives_the_first_of_the_lowest(self, validations):
        best, history = self.run(5, iter(validations))
        second, _ = self.run(2, iter(validations), keep_best=False)
        same(best, second)
        assert [record["epoch"] for record in history] == [1, 2, 3, 4, 5]

    def test_without_a_number_it_is_the_last_epoch(self):
        last, _ = self.run(2, iter([math.nan] * 2))
        same(last, self.run(2, iter([1, 0]))[0])

    @pytest.mark.parametrize("interrupted_after", [1, 2, 4])
    def test_resumed_equals_uninterrupted(self, tmp_path, interrupted_after):
        validations, path = [5, 2, 3, 4, 6], tmp_path / "run"
        whole = self.run(5, iter(validations))
        self.run(interrupted_after, iter(validations), path)
        same(self.run(5, iter(validations[interrupted_after:]), path), whole)
        same(self.run(5, iter([]), path), whole)  # complete: only gives its result

    def test_a_run_that_did_not_keep_it_cannot_be_resumed(self, tmp_path):
        path = tmp_path / "run"
        self.run(1, iter([5]), path, keep_best=False)
        with pytest.raises(ValueError, match=f"{path} is .*another run .it was begun without keep"):
            self.run(2, iter([4]), path)
        self.run(2, iter([4]), path, keep_best=False)

    @pytest.mark.parametrize(
        "change",
        [
            lambda best: best.pop("task"),
            lambda best: best.update(validation="none"),
            lambda best: best["task"].popitem(),
            lambda best: best["task"].update({"model.0.weight": torch.ones(2)}),
        ],
    )
    def test_a_forged_one_is_refused_before_the_training(self, tmp_path, monkeypatch, change):
        path = tmp_path / "run"
        state = train._Run._state

        def forged(run):
            changed = copy.deepcopy(state(run))
            if run.history:
                change(changed["best"])
            return changed

        with monkeypatch.context() as patch:
            patch.setattr(train._Run, "_state", forged)
            self.run(1, iter([5]), path)
        with pytest.raises(ValueError, match=f"{path} is not a sound checkpoint"):
            self.run(2, iter([]), path)

    def test_needs_a_validation(self):
        model = network()
        with pytest.raises(ValueError, match="keep_best chooses by what validate returns"):
            fit(model, [], epochs=1, optimizer=sgd(model.parameters()), keep_best=True)


class TestCheckpointOfOtherSettings:
    """`settings` of a second call that differ from the first are never silently dropped."""

    def fit(self, path, make_optimizer, make_scheduler=None, epochs=2):
        model = network()
        optimizer = make_optimizer(model)
        fit(
            model,
            batches(),
            epochs=epochs,
            optimizer=optimizer,
            scheduler=make_scheduler and make_scheduler(optimizer),
            checkpoint=path,
            progress=False,
        )

    def refused(self, path, first, second, message):
        self.fit(path, *first)
        whole = path.read_bytes()
        with pytest.raises(ValueError, match=f"{path} is the checkpoint of another .*{message}"):
            self.fit(path, *second, epochs=4)
        assert path.read_bytes() == whole
        self.fit(path, *first, epochs=4)

    @pytest.mark.parametrize(
        "settings, message",
        [
            ({"lr": 1e-5}, "SGD's lr is 1e-05 here, 0.1 in the file"),
            ({"momentum": 0.5}, "SGD's momentum is 0.5 here, 0.9 in the file"),
            ({"nesterov": True}, "SGD's nesterov is True here, False in the file"),
            ({"lr": torch.tensor(0.5)}, "SGD's lr is 0.5 here, 0.1 in the file"),
        ],
    )
    @pytest.mark.parametrize("schedule", SCHEDULERS)
    def test_of_an_optimizer(self, tmp_path, settings, message, schedule):
        def make(**changed):
            settings = {"lr": 0.1, "momentum": 0.9} | changed
            return lambda model: torch.optim.SGD(model.parameters(), **settings)

        scheduler = SCHEDULERS[schedule]
        self.refused(tmp_path / "run", (make(), scheduler), (make(**settings), scheduler), message)

    def test_of_adam_with_a_tensor_as_rate(self, tmp_path):
        def make(beta):
            return lambda model: torch.optim.Adam(
                model.parameters(), lr=torch.tensor(0.5), betas=(beta, 0.99)
            )

        message = r"Adam's betas is \[0.8, 0.99\] here, \[0.9, 0.99\] in the file"
        scheduler = SCHEDULERS["cosine"]
        self.refused(tmp_path / "run", (make(0.9), scheduler), (make(0.8), scheduler), message)

    def test_of_a_second_parameter_group(self, tmp_path):
        def make(lr):
            return lambda model: torch.optim.SGD(
                [{"params": model[0].parameters()}, {"params": model[4].parameters(), "lr": lr}],
                lr=0.1,
            )

        message = "SGD's param_groups/1/lr is 0.3 here, 0.2 in the file"
        self.refused(tmp_path / "run", (make(0.2),), (make(0.3),), message)

    @pytest.mark.parametrize(
        "first, second, message",
        [
            (
                lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2),
                lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6),
                "CosineAnnealingLR's T_max is 6 here, 2 in the file",
            ),
            (
                SCHEDULERS["multistep"],
                lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4], 0.5),
                "MultiStepLR's milestones is .*4: 1.* here, .*3: 1.* in the file",
            ),
            (
                SCHEDULERS["warmup"],
                lambda optimizer: torch.optim.lr_scheduler.SequentialLR(
                    optimizer,
                    [
                        torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2),
                        torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8),
                    ],
                    milestones=[2],
                ),
                "SequentialLR's _schedulers/1/gamma is 0.8 here, 0.9 in the file",
            ),
        ],
    )
    def test_of_a_scheduler(self, tmp_path, first, second, message):
        def make(model):
            return sgd(model.parameters())

        self.refused(tmp_path / "run", (make, first), (make, second), message)

    def test_that_the_file_does_not_hold(self, tmp_path):
        path = tmp_path / "run"
        self.fit(path, lambda model: sgd(model.parameters()))
        tensors, metadata = _files.read(path)
        del metadata["state"]["settings"]
        _files.write(path, tensors, metadata)
        with pytest.raises(ValueError, match="does not hold the settings of its optimizers"):
            self.fit(path, lambda model: sgd(model.parameters()))


class TestCheckpointOfSomethingElse:
    @pytest.fixture
    def path(self, tmp_path):
        path, model = tmp_path / "run.safetensors", network()
        options = {"optimizer": sgd(model.parameters()), "checkpoint": path, "progress": False}
        fit(model, batches(), epochs=1, **options)
        return path

    def resume(self, path, model, make_optimizer=sgd, data=None, scheduler=None):
        before = copy.deepcopy(model.state_dict())
        optimizer = make_optimizer(model.parameters())
        random = torch.get_rng_state()
        try:
            fit(
                model,
                data or batches(),
                epochs=2,
                optimizer=optimizer,
                scheduler=scheduler and scheduler(optimizer),
                checkpoint=path,
                progress=False,
            )
        finally:
            same(model.state_dict(), before)  # refused before anything was changed
            assert torch.equal(torch.get_rng_state(), random)

    @pytest.mark.parametrize(
        "model, message",
        [
            (nn.Sequential(*network(), nn.Linear(3, 3)), r"only this task has 'model.5.bias'"),
            (nn.Sequential(*network()[:4]), r"only the file has 'model.4.bias'"),
            (
                nn.Sequential(*network()[:4], nn.Linear(12, 4)),
                r"'model.4.weight' is float32\[4, 12\] here, float32\[3, 12\] in the file",
            ),
            (network().double(), r"'model.0.weight' is float64\[12, 6\] here, float32"),
        ],
    )
    def test_another_model(self, path, model, message):
        with pytest.raises(
            ValueError, match=f"{path} is the checkpoint of another run .*{message}"
        ):
            self.resume(path, model)

    def test_another_optimizer_or_scheduler(self, path):
        with pytest.raises(ValueError, match=r"with \['Adam'\] here, \['SGD'\] in the file"):
            self.resume(path, network(), adam)
        with pytest.raises(ValueError, match=r"\['SGD', 'MultiStepLR'\] here"):
            self.resume(path, network(), scheduler=SCHEDULERS["multistep"])
        with pytest.raises(ValueError, match="SGD has other parameter groups"):
            self.resume(path, network(), lambda parameters: sgd(list(parameters)[:2]))

    def test_data_that_had_no_generator(self, tmp_path):
        model, path = network(), tmp_path / "run"
        data = DataLoader(samples(), 16)
        fit(
            model,
            data,
            epochs=1,
            optimizer=sgd(model.parameters()),
            checkpoint=path,
            progress=False,
        )
        with pytest.raises(ValueError, match="data has a generator here"):
            self.resume(path, network())

    def test_other_files(self, path, tmp_path):
        whole = path.read_bytes()
        path.write_bytes(whole[:-1])
        with pytest.raises(ValueError, match=f"{path} is not a whole nncx file"):
            self.resume(path, network())
        _files.write(path, {}, {"kind": "model"})
        with pytest.raises(ValueError, match=f"{path} is not a checkpoint"):
            self.resume(path, network())

    @pytest.mark.parametrize(
        "forge",
        [
            lambda tensors, state: state.clear(),
            lambda tensors, state: state.pop("optimizers"),
            lambda tensors, state: state.update(history=7),
            lambda tensors, state: state.update(task={"dict": [[[], 0]]}),
            lambda tensors, state: state.update(types={"tensor": "absent"}),
            lambda tensors, state: state.update(types={"numpy": ["O", 1]}),
            lambda tensors, state: state["optimizers"]["list"].append(3),
            lambda tensors, state: tensors.update({"random/cpu": torch.zeros(3).byte()}),
            lambda tensors, state: tensors.update({"random/data": torch.zeros(3).byte()}),
        ],
        ids="empty optimizers history keys tensor numpy more cpu data".split(),
    )
    def test_forged_files(self, path, forge):
        """With a valid hash. The last two fail when everything else was taken already."""
        tensors, metadata = _files.read(path)
        forge(tensors, metadata["state"])
        _files.write(path, tensors, metadata)
        with pytest.raises(ValueError, match=f"{path} is not a sound checkpoint .*: name another"):
            self.resume(path, network())


class TestState:
    def test_round_trip_of_every_kind(self):
        state = {
            0: {"step": torch.tensor(3.0), "buffer": None, "empty": {}},
            "groups": [{"betas": (0.9, 0.999), "nesterov": True, "lr": 0.1 + 0.2}, []],
            "best": float("inf"),
            "milestones": Counter({3: 2}),
            "numpy": [np.float32(0.1), np.int64(3), np.bool_(True), np.float16("inf")],
        }
        tensors = {}
        restored = train._from_json(train._to_json(state, "state", tensors), tensors)
        same(restored, state)
        assert list(tensors) == ["state/0/step"]

    def test_what_no_state_may_hold(self):
        with pytest.raises(ValueError, match=r"cannot hold a function \(at 'state/0'\)"):
            train._to_json([same], "state", {})
        with pytest.raises(ValueError, match="two tensors at 'x/a/b'"):
            train._to_json({"a/b": torch.ones(1), "a": {"b": torch.ones(1)}}, "x", {})


class TestProgress:
    def run(self, progress):
        model = network()
        fit(
            model,
            batches(),
            epochs=2,
            optimizer=sgd(model.parameters()),
            validate=lambda: 12.5,
            progress=progress,
        )

    def test_a_line_an_epoch_without_a_terminal(self, capsys):
        self.run(progress=True)
        output = capsys.readouterr()
        first, second = output.err.splitlines()
        assert first.startswith("epoch 1/2  loss ") and second.startswith("epoch 2/2  loss ")
        assert "validation 12.5" in first and first.endswith(" s")
        assert output.out == ""

    def test_a_line_when_resumed(self, tmp_path, capsys):
        path = tmp_path / "run"
        for _ in range(2):
            model = network()
            optimizer = sgd(model.parameters())
            fit(model, batches(), epochs=2, optimizer=optimizer, checkpoint=path)
        assert capsys.readouterr().err.splitlines()[2:] == [f"resumed {path}: 2 of 2 epochs done"]

    def test_silent(self, capsys):
        self.run(progress=False)
        assert capsys.readouterr() == ("", "")

    def test_a_bar_on_a_terminal(self, capsys, monkeypatch):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        self.run(progress=True)
        output = capsys.readouterr()
        assert "epoch 2/2  loss " in output.err and output.out == ""


class TestErrorRate:
    def test_is_the_share_of_wrong_samples(self):
        logits = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
        targets = torch.tensor([0, 1, 1, 1, 0])
        data = DataLoader(TensorDataset(logits, targets), 2)
        assert error_rate(nn.Identity(), data) == 40.0

    def test_runs_in_eval_mode_and_gives_every_mode_back(self):
        model = network().train()
        model[1].eval()
        seen = []
        model[3].register_forward_hook(lambda module, *_: seen.append(module.training))
        before = copy.deepcopy(model.state_dict())
        assert error_rate(model, batches()) == error_rate(model, batches())
        same(model.state_dict(), before)
        assert not any(seen)
        assert [m.training for m in model] == [True, False, True, True, True]
        assert model.training

    def test_needs_samples(self):
        with pytest.raises(ValueError, match="at least one sample"):
            error_rate(network(), [])
